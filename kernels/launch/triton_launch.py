"""The one place that imports triton, and the one way a kernel is launched.

Kernels are `@jit` functions whose name ends in `_kernel`; other `@jit` functions are helpers that
are compiled into them. Without triton (not Linux) the files still import: `jit` returns the plain
function, and `why_unavailable` says why nothing can be launched. Where torch was built for CPUs and
kernels are not interpreted, triton is not imported either, for it takes 70 MB: a program that
compiles ahead of time imports triton before anything of kernels.

On a CPU kernels run only in triton's interpreter, which is decided when triton is first imported:
TRITON_INTERPRET=1 has to be in the environment by then. It is for tests; it is very slow.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # explicit: triton plans another default

OLDEST = (3, 6)  # compiled with 3.6 and 3.9; older ones lack tensor descriptors or have others
WHERE_KERNELS_RUN = "kernels run on a GPU, or on a CPU with it (slow)"
HOW_TO_INSTALL = "on Linux torch 2.10 and newer bring it: pip install -U 'torch>=2.10'"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

try:
    if not (INTERPRETED or torch.version.cuda or torch.version.hip or "triton" in sys.modules):
        raise ImportError("nothing can be launched")
    import triton
    import triton.language as tl
except ImportError:  # or there is no wheel for this system
    triton = tl = None
OPTIONS = {"num_warps", "num_stages"}  # of a launch, beside the kernel's own arguments
TMA_ALIGNMENT = 16  # bytes

# (kernel, grid, args, options) of a launch
Recorder = Callable[[Any, tuple[int, ...], tuple, dict[str, Any]], None]
_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def jit(fn: Callable | None = None, *, varying: tuple[str, ...] = ()) -> Any:
    """`triton.jit`. Integers named in `varying` change from step to step: no recompilation."""
    if fn is None:  # written as @jit(varying=...)
        return functools.partial(jit, varying=varying)
    if triton is None:
        return fn
    return triton.jit(fn, do_not_specialize=list(varying))


def constant(value: float) -> Any:
    """`value` as a global that kernels can read; without triton the plain value."""
    return value if triton is None else tl.constexpr(value)


def why_unavailable(device: str | torch.device) -> str | None:
    """Why kernels cannot be launched for tensors of this device; None when they can."""
    kind = torch.device(device).type
    if INTERPRETED and kind != "cpu":
        advice = "unset it" if kind == "cuda" else WHERE_KERNELS_RUN
        return f"TRITON_INTERPRET is set and the device is {kind}; {advice}"
    if not INTERPRETED and kind != "cuda":
        return f"TRITON_INTERPRET is not set and the device is {kind}; {WHERE_KERNELS_RUN}"
    if triton is None:
        if not (torch.version.cuda or torch.version.hip):
            return "this torch was built for CPUs and knows no GPU"
        return f"triton is not installed; {HOW_TO_INSTALL}"
    major, minor = triton.__version__.split(".")[:2]
    if (int(major), int(minor)) < OLDEST:
        return (
            f"triton is {triton.__version__}, and the kernels need 3.6 or newer; {HOW_TO_INSTALL}"
        )
    return None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` over `grid`; no program for an empty grid.

    `options` are the kernel's constexpr arguments, num_warps and num_stages (a tile configuration).
    Inside `recording_launches` the recorder is called instead.
    """
    # The interpreter would ignore a misspelt option.
    unknown = options.keys() - set(kernel.arg_names) - OPTIONS
    assert not unknown, f"{kernel.__name__} has no argument {', '.join(sorted(unknown))}"
    recorder = _recorder.get()
    if recorder is not None:
        recorder(kernel, grid, args, options)
    else:
        launch_now(kernel, grid, *args, **options)


def launch_now(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """As `launch`, recorder or not: a recorder calls it to run what it has noted."""
    if 0 in grid:
        return
    device = _device_of(args)
    if device.type != "cuda":
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(device):
        triton.set_allocator(_scratch)  # tensor descriptors made on the device are stored there
        kernel[grid](*args, **options)


def _device_of(args: tuple) -> torch.device:
    """The device of a kernel's tensors, which are all on the same one."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device
    raise AssertionError("a kernel without tensors writes nothing")


def _scratch(size: int, align: int, stream: int | None) -> Tensor:
    # torch aligns to 512 bytes. While a step is captured the memory is from the graph's own pool,
    # which reuses it for later work on the same stream.
    return torch.empty(size, dtype=torch.int8, device="cuda")


@contextlib.contextmanager
def recording_launches(recorder: Recorder) -> Iterator[None]:
    """Inside, launches are passed to `recorder` and not made.

    For ahead-of-time compilation and tuning (benchmarks/tuning), which learn this way which kernels
    an operation launches and how. The tensors may be fake ones, without memory.
    """
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def tma_readable(*tensors: Tensor) -> bool:
    """Whether tensor descriptors (TMA on sm_90) can read all of these: rows begin on 16 bytes."""
    recorded = _recorder.get() is not None
    for tensor in tensors:
        if tensor.stride(-1) != 1:
            return False
        bytes_per_row = tensor.stride(0) * tensor.element_size()
        offset = tensor.storage_offset() * tensor.element_size()
        if bytes_per_row % TMA_ALIGNMENT != 0 or offset % TMA_ALIGNMENT != 0:
            return False
        # recorded tensors may have no memory
        if not recorded and tensor.data_ptr() % TMA_ALIGNMENT != 0:
            return False
    return True
