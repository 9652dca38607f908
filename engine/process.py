"""What a process is set to before it computes, how it is asked to stop, how much memory it took."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not get memory: a GPU's own error, or a CPU's, which has no class."""
    words = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


class Termination:
    """Inside `with`, SIGTERM only sets `asked`: what is at work may come to an end.

    Elsewhere than in the main thread signals cannot be caught; `asked` then stays False.
    """

    def __init__(self) -> None:
        self.asked, self.previous = False, None

    def _note(self, *_: Any) -> None:
        self.asked = True

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)


class Interruption:
    """Inside `with`, the first Ctrl-C calls `stop` and says what that means, the second ends all.

    Elsewhere than in the main thread signals cannot be caught and nothing changes.
    """

    def __init__(self, stop: Callable[[], None], meaning: str) -> None:
        self.stop, self.meaning, self.previous = stop, meaning, None

    def _note(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"\ninterrupted: {self.meaning}; Ctrl-C again stops at once", file=sys.stderr)
        self.stop()

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
