"""Memory of a process: glibc's allocator, memory queries, errors where memory is short."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_processes_on_gpu = 1  # processes of the job on this one's GPU, itself included

# options of mallopt, from glibc's malloc.h
M_TRIM_THRESHOLD = -1  # bytes free at the end of the heap before they are returned to the system
M_TOP_PAD = -2  # bytes by which the heap grows beyond a request
M_MMAP_THRESHOLD = -3  # bytes from which on an allocation is a mapping of its own
M_MMAP_MAX = -4  # number of such mappings


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next tensor; returns whether glibc accepted.

    By default every large tensor is mapped anew and unmapped when freed, and the kernel zeroes each
    of its pages at the first access: a fifth of a training step on a CPU. Without mappings and
    trimming, the next micro-batch uses the memory of the last one.
    """
    return _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 << 20})


def return_freed_memory() -> bool:
    """Have glibc return every freed tensor to the system at once; returns whether glibc accepted.

    For sharded weights, which are gathered and freed for every layer: nothing else would fit into
    the gaps they leave.
    """
    return _mallopt({M_MMAP_THRESHOLD: 1 << 20})  # fixed at 1 MiB; glibc raises it up to 32 MB


def give_back_freed_memory(device: str | torch.device) -> None:
    """Return the memory that is free now to the system: glibc's and, on a GPU, torch's.

    Called between two kinds of work: the free gaps of the first (packed weights, pages of keys and
    values) do not fit the second, and would stay resident beside it.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    malloc_trim = _libc_function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))


def _mallopt(settings: dict[int, int]) -> bool:
    """Set options of glibc's malloc; returns whether it has them and accepted them all."""
    mallopt = _libc_function("mallopt")
    if mallopt is None:
        return False
    accepted = [mallopt(option, value) == 1 for option, value in settings.items()]
    return all(accepted)


def _libc_function(name: str) -> Any:
    """A function of the C library; None where it lacks that name (musl), and not on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)


def _kilobytes_line(file: Path, name: str) -> int | None:
    """Bytes of the line "NAME: 1234 kB" of a file in /proc; None where there is none."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{name}:"):
            _, kilobytes, *_ = line.split()
            return 1024 * int(kilobytes)
    return None


def _status(name: str) -> int:
    """Bytes of the line `name` of /proc/self/status; 0 where it does not exist (not Linux)."""
    file = Path("/proc/self/status")
    if not file.exists():
        return 0
    return _kilobytes_line(file, name) or 0


def peak_memory(device: str | torch.device) -> int:
    """Bytes: the largest resident set of this process so far, or torch's peak on a GPU.

    VmHWM, and not ru_maxrss, whose first value is the resident set of the parent when it forked.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def held_memory(device: str | torch.device) -> int:
    """Bytes held now: the resident set of this process, or torch's allocations on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def share_gpu(processes: int) -> None:
    """Say how many processes of the job are on this one's GPU: each plans for an equal share."""
    global _processes_on_gpu
    _processes_on_gpu = processes


def total_memory(device: str | torch.device) -> int:
    """Bytes of a GPU's memory, whatever holds them, or of the machine's.

    Of a GPU that several processes of the job are on, the share of one (`share_gpu`).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // _processes_on_gpu
    total = _kilobytes_line(Path("/proc/meminfo"), "MemTotal")
    assert total is not None, "/proc/meminfo has no line MemTotal"
    return total


def free_memory(device: str | torch.device) -> int:
    """Bytes that this process can still allocate, as the system or the GPU's driver reports them.

    On a GPU, the memory that torch has cached and does not use is added: the driver counts it as
    in use. Of a GPU that processes of the job share, no more than is left of this one's share.
    """
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_allocated(device)
        cached = torch.cuda.memory_reserved(device) - held
        if _processes_on_gpu == 1:
            return free + cached
        left_of_share = max(0, total_memory(device) - held)
        return min(free + cached, left_of_share)
    available = _kilobytes_line(Path("/proc/meminfo"), "MemAvailable")
    assert available is not None, "/proc/meminfo has no line MemAvailable"
    return available


# the advice in the messages about sampling and training, which have taken on less before
SAMPLE_LESS = "one sequence at a time does not fit; allow fewer new tokens, or give shorter prompts"
TRAIN_LESS = "lower --micro-tokens, then --max-length, or take --recompute full"
# Messages of torch, oneDNN, CUDA's libraries, the loader and the system where memory is short
_NO_MEMORY = re.compile(
    "DefaultCPUAllocator|can.?t allocate memory|cannot allocate memory|not enough memory|"
    "out of memory|bad_alloc|could not create a primitive|ALLOC_FAILED|failed to map segment",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short.

    On a GPU the error has a class of its own; on a CPU it is a RuntimeError like others, and only
    its message tells.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, (RuntimeError, ImportError)):
        return False
    return _NO_MEMORY.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class name if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def memory_for(doing: str, lower: str) -> Iterator[None]:
    """Turn out-of-memory errors into ValueError, inside `with` or in a function decorated by it.

    doing    the work, for the message: "training"
    lower    advice: the flags that need less memory
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = f"out of memory while {doing} ({first_line(error)}): {lower}"
    else:
        return
    # outside of `except`, so that the error and the tensors in its traceback are freed
    raise ValueError(message)
