"""The results of checks that are kept, a file for each in the cache folder

$XDG_CACHE_HOME (~/.cache)/sdft-engine/check-<operation>-<key>.json. The key is made of the card (on
a CPU: the compiled library), the versions of torch and triton, the functions, the shapes and dtypes
that they are checked at, and the sources that they depend on (sources.py): a change of another
operation, or of a page, leaves it as it is. A file that is not understood is replaced. Without a
home directory, or where other users could have written the file (kernels/disk_cache.py), each run
checks again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kernels import disk_cache
from kernels.cpu import native
from kernels.launch import tile_config
from kernels.registry import REFERENCE, functions
from kernels.self_check.sources import Sources
from kernels.spec import Spec, Widths

NEEDED = ("kernels.self_check.cases",)  # what decides beside the functions themselves


def identity(
    spec: Spec,
    ops: Any,
    device: torch.device,
    dtype: torch.dtype,
    widths: Widths | None,
    sources: Sources,
) -> dict[str, str]:
    """All that the result of this check is valid for.

    Of the model's widths the shapes that the operation is checked at because of them: one that has
    no widths, or another model's, is not checked again.
    """
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else native.name()
    checked = functions(ops, spec)
    definition = functions(REFERENCE, spec)
    modules = (spec.make_inputs.__module__, *NEEDED)
    device_class = tile_config.device_class(device)
    return {
        "operation": spec.name,
        "functions": ", ".join(f"{f.__module__}.{f.__qualname__}" for f in checked),
        "dtype": str(dtype),
        "shapes": str(() if widths is None else spec.model_shapes(widths)),
        "card": card,
        "torch": torch.__version__,
        "triton": triton,
        "sources": sources.hash_for((*checked, *definition), modules, device_class),
    }


def file_of(valid_for: dict[str, str]) -> Path | None:
    """The file with the result of this identity; None without a home directory."""
    folder = disk_cache.folder()
    if folder is None:
        return None
    text = json.dumps(valid_for, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return folder / f"check-{valid_for['operation']}-{key}.json"


def read(path: Path | None) -> str | None:
    """Why the operation fails, "" where it passed; None where there is no file of ours."""
    try:
        if path is None or disk_cache.why_distrusted(path) is not None:
            return None
        reason = json.loads(path.read_text(encoding="utf-8"))["fails"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reason if isinstance(reason, str) else None


def write(path: Path | None, valid_for: dict[str, str], reason: str) -> str:
    """Keep a result; returns the words that say where it is kept, or why it is not."""
    if path is None:
        return "not remembered, there is no home directory: set XDG_CACHE_HOME"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        distrusted = disk_cache.why_distrusted(path)
        if distrusted is not None:
            return f"not remembered, {distrusted}: set XDG_CACHE_HOME to a folder of your own"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        document = json.dumps({"valid_for": valid_for, "fails": reason}, indent=1)
        beside.write_text(document + "\n", encoding="utf-8")
        beside.chmod(0o600)  # other users must not write it, whatever the umask allows
        os.replace(beside, path)
    except OSError as error:
        return f"not remembered, {path} cannot be written ({error}); the next run checks again"
    return f"remembered in {path.parent}"


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Inside, no other process of this user checks: it waits, and then finds the results.

    Where the cache cannot be used nothing is locked: each process checks for itself.
    """
    folder = disk_cache.folder()
    with contextlib.ExitStack() as held:
        try:
            if folder is not None and disk_cache.why_distrusted(folder / "checks.lock") is None:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                lock = held.enter_context(open(folder / "checks.lock", "w"))
                os.chmod(folder / "checks.lock", 0o600)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a full or read-only disk, or one without locks
            pass
        yield
