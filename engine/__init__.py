"""How it is run: data, sampler, distillation, selection, training, evaluation."""

from pathlib import Path

import kernels
from engine.runtime.cores import let_waiting_threads_sleep

let_waiting_threads_sleep()  # here, so that it is done before any module of ours imports torch

_ours = Path(__file__).resolve().parent.parent
_found = Path(kernels.__file__ or "").resolve().parent.parent
if _found != _ours:
    raise ImportError(
        f"'kernels' resolves to {_found}, not to this clone ({_ours}). Hugging Face's 'kernels' "
        "package shadows ours; run from the clone root, or: pip uninstall kernels"
    )
