"""The one place that imports triton, and the one way a kernel is launched.

Kernels are `@jit` functions whose name ends in `_kernel`; other `@jit` functions are helpers that
are compiled into them. Without triton (not Linux) the files still import: `jit` returns the plain
function, and `usable` says why nothing can be launched. It is not imported either, for it takes
70 MB, where torch was built for CPUs and it is not to interpret: whoever compiles ahead of time
imports triton before anything of kernels.

On a CPU kernels run only in triton's interpreter, which is decided when triton is first imported:
TRITON_INTERPRET=1 has to be in the environment by then. It is for tests; it is very slow.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # said aloud: the default is to change

OLDEST = (3, 6)  # compiled with 3.6 and 3.9; before, tensor descriptors are not there or differ
HOW = "on Linux torch 2.10 and newer bring it: pip install -U 'torch>=2.10'"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

try:
    if not (INTERPRETED or torch.version.cuda or torch.version.hip or "triton" in sys.modules):
        raise ImportError("nothing can be launched")
    import triton
    import triton.language as tl
except ImportError:  # or there is no wheel for this system
    triton = tl = None
OPTIONS = {"num_warps", "num_stages"}

# benchmarks/tuning/compile.py sets this to collect what would be launched, and nothing is launched.
recorder: Callable[[Any, tuple[int, ...], tuple, dict], None] | None = None


def jit(fn: Callable | None = None, *, varying: tuple[str, ...] = ()) -> Any:
    """`triton.jit`. Integers named in `varying` change from step to step: no recompilation."""
    if fn is None:
        return lambda fn: jit(fn, varying=varying)
    return fn if triton is None else triton.jit(fn, do_not_specialize=list(varying))


def constant(value: float) -> Any:
    """`value` as a global that kernels can read; without triton the plain value."""
    return value if triton is None else tl.constexpr(value)


def usable(device: str | torch.device) -> str:
    """Empty when kernels can be launched for tensors of this device, else the reason."""
    kind = torch.device(device).type
    if kind == ("cpu" if INTERPRETED else "cuda"):
        if triton is None:
            if not (torch.version.cuda or torch.version.hip):
                return "this torch was built for CPUs and knows no GPU"
            return f"triton is not installed; {HOW}"
        if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
            return f"triton is {triton.__version__}, and the kernels need 3.6 or newer; {HOW}"
        return ""
    where = "unset it" if kind == "cuda" else "kernels run on a GPU, or on a CPU with it (slow)"
    return (
        f"TRITON_INTERPRET is {'' if INTERPRETED else 'not '}set and the device is {kind}; {where}"
    )


def _scratch(size: int, align: int, stream: int | None) -> Tensor:
    # torch aligns to 512 bytes; while a step is captured, from the graph's own pool, which gives it
    # out again to what comes later on the stream
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` over `grid`; no program for an empty grid.

    `options` are the kernel's constexpr arguments and num_warps, num_stages: a row of the table of
    tiles. The interpreter would drop a misspelt one without a word, so they are looked at here.
    """
    unknown = options.keys() - set(kernel.arg_names) - OPTIONS
    assert not unknown, f"{kernel.__name__} has no argument {', '.join(sorted(unknown))}"
    if recorder is not None:
        recorder(kernel, grid, args, options)
        return
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type != "cuda":
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(device):
        triton.set_allocator(_scratch)  # tensor descriptors made on the device live there
        kernel[grid](*args, **options)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least `n` and `least`: the edge of a tile."""
    return max(least, 1 << (n - 1).bit_length())


def described(*tensors: Tensor) -> bool:
    """Whether tensor descriptors (TMA on sm_90) can read all of these: rows begin on 16 bytes."""
    return all(
        t.stride(-1) == 1
        and t.stride(0) * t.element_size() % 16 == 0
        and t.storage_offset() * t.element_size() % 16 == 0
        and (recorder is not None or t.data_ptr() % 16 == 0)  # recorded tensors have no memory
        for t in tensors
    )
