"""How it is run: data, sampler, distillation, selection, training, evaluation."""

from pathlib import Path

import kernels
from engine.runtime.cores import let_waiting_threads_sleep

let_waiting_threads_sleep()  # before any module of this engine imports torch

_clone = Path(__file__).resolve().parent.parent
_parent_of_kernels = Path(kernels.__file__ or "").resolve().parent.parent
if _parent_of_kernels != _clone:
    raise ImportError(
        f"'kernels' resolves to {_parent_of_kernels}, not to this clone ({_clone}): Hugging "
        "Face's package 'kernels' hides ours; run from the root of the clone, or: pip uninstall "
        "kernels"
    )
