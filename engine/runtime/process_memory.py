"""What a process is set to before it computes, how much memory it took, whether that was short."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next tensor; whether it agreed.

    By default every large tensor is mapped afresh and unmapped when freed, and each of its pages
    is zeroed by the kernel at the first touch: a fifth of a training step on a CPU. With the
    mappings off and trimming off, the next micro-batch writes where the last one did.
    """
    return _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 << 20})


def return_freed_memory() -> bool:
    """Have glibc give every freed tensor back at once; whether it agreed.

    For weights that are gathered and given up all the time, in sizes whose gaps nothing else fits.
    """
    return _mallopt({M_MMAP_THRESHOLD: 1 << 20})  # by default it moves up to 32 MB


def give_back_freed_memory(device: str | torch.device) -> None:
    """Have glibc and, on a GPU, torch give back what is free now, once, between two kinds of work.

    What the one left in small gaps (packed weights, pages of keys and values) does not fit the
    other, and would stay resident beside it.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _mallopt(settings: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all([mallopt(*setting) == 1 for setting in settings.items()])


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status, 0 where there is none (not Linux)."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith(name + ":")), 0)


def peak_memory(device: str | torch.device) -> int:
    """Bytes: the largest resident set of this process, or what torch held at most of a GPU.

    VmHWM and not ru_maxrss, which starts at what the parent held when it forked.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def held_memory(device: str | torch.device) -> int:
    """Bytes held now: the resident set, or what torch has allocated on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def free_memory(device: str | torch.device) -> int:
    """Bytes that this process can still take: what the system, or a GPU's driver, calls free.

    On a GPU also what torch has taken and keeps for later tensors: the driver calls that used.
    """
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))


SAMPLE_LESS = "lower --rows or --kv-memory"
TRAIN_LESS = "lower --micro-tokens, then --max-length, or take --recompute full"
# How torch, oneDNN, CUDA's libraries, the loader and the system say that memory is short.
_NO_MEMORY = re.compile(
    "DefaultCPUAllocator|can.?t allocate memory|cannot allocate memory|not enough memory|"
    "out of memory|bad_alloc|could not create a primitive|ALLOC_FAILED|failed to map segment",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: a GPU's own error, a CPU's, which has no class, or the system's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    foreign = isinstance(error, (RuntimeError, ImportError))
    return foreign and _NO_MEMORY.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """What a library said, without what follows it."""
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__


@contextlib.contextmanager
def memory_for(doing: str, lower: str) -> Iterator[None]:
    """Inside `with`, or in a function decorated by it: memory that is short is a ValueError that
    says what was being done, and what takes less of it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = f"out of memory while {doing} ({first_line(error)}): {lower}"
    else:
        return
    raise ValueError(message)  # here, where the error and what its traceback holds are gone
