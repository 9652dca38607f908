"""Kernels compiled by several processes at once, before their first launch

1. `record`: an operation runs on tensors without memory, and its launches are noted.
2. `distinct`: of launches that triton would compile to the same kernel, one is kept.
3. `Compilers`: forked processes compile them into triton's cache on disk.

A launch then finds its kernel there. Triton itself derives, in a process without a GPU, what it
would compile for a launch. A compiler that fails, or dies, changes nothing but the time: its kernel
is compiled at its launch, where an error is noticed.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from kernels.launch import tile_config, triton_launch
from kernels.spec import Spec, cast

INDEX = struct.Struct("i")  # of a launch, on the pipes; reads and writes of it are whole


class Target(NamedTuple):
    """The card that is compiled for."""

    device_class: str  # of the tile configurations
    processors: int  # that a persistent kernel is launched with; 0: it has a program per tile
    backend: str  # triton's name
    architecture: int | str
    warp: int  # threads

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """This GPU."""
        gpu = triton_launch.triton.runtime.driver.active.get_current_target()
        device_class = tile_config.device_class(device)
        processors = tile_config.device_processors(device)
        return cls(device_class, processors, gpu.backend, gpu.arch, gpu.warp_size)


@dataclass(frozen=True)
class Pointer:
    """Stands for a recorded tensor, which has no memory, before triton's launcher."""

    dtype: torch.dtype
    offset: int  # bytes into its storage, which itself begins on 16 bytes
    bytes: int  # of its storage

    @classmethod
    def of(cls, tensor: Tensor) -> Pointer:
        offset = tensor.storage_offset() * tensor.element_size()
        return cls(tensor.dtype, offset, tensor.untyped_storage().nbytes())

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return self.bytes


@dataclass(frozen=True)
class Launch:
    """A recorded launch, its tensors as `Pointer`s."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]
    shape_class: str = ""  # the first by which the kernel's tile configuration was looked up


# ---- 1. recording


@contextlib.contextmanager
def recording(
    device_class: str | None = None, processors: int | None = None
) -> Iterator[list[Launch]]:
    """Launches inside are collected and none is made; tile configurations are for the class."""
    launches: list[Launch] = []
    looked_up: dict[str, str] = {}  # kernel -> shape class: a launch follows its look-up

    def note_lookup(lookup: tile_config.Lookup) -> None:
        looked_up[lookup.kernel] = lookup.shape_class

    def note_launch(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict) -> None:
        pointers = tuple(Pointer.of(a) if isinstance(a, Tensor) else a for a in args)
        shape_class = looked_up.get(kernel.__name__, "")
        launches.append(Launch(kernel, grid, pointers, dict(options), shape_class))

    with (
        tile_config.pretending(device_class, processors),
        tile_config.watching(note_lookup),
        triton_launch.recording_launches(note_launch),
    ):
        yield launches


class _RealOrder(TorchFunctionMode):
    """randperm gives real values even among fake tensors: inputs are laid out on the host by it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.randperm:
            return func(*args, **(kwargs or {}))
        with unset_fake_temporarily():
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Inside, new tensors have shapes and dtypes, but no memory and no values."""
    with _fakes, _RealOrder():
        yield


_fakes = FakeTensorMode()


def record(
    spec: Spec, ops: Any, shape: tuple[int, ...], dtype: torch.dtype, target: Target
) -> list[Launch]:
    """The launches of an operation at a shape, as the check in kernels/spec.py makes them."""
    with recording(target.device_class, target.processors) as launches, without_memory():
        inputs = spec.make_inputs(shape, torch.Generator().manual_seed(0))
        spec.run(ops, cast(inputs, dtype))
    return [launch for launch in launches if 0 not in launch.grid]


# ---- 2. what triton would compile


class _TargetOnly:
    """Triton's driver in a process that compiles for a GPU and has none."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(target.backend, target.architecture, target.warp)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Inside, triton compiles for this target, and nothing can be launched."""
    driver = triton_launch.triton.runtime.driver
    driver.set_active(_TargetOnly(target))
    try:
        yield
    finally:
        driver.set_active(None)  # the next use finds the GPU's own


def distinct(launches: Sequence[Launch], target: Target) -> list[Launch]:
    """The launches without those whose kernel an earlier one compiles already."""
    knobs = triton_launch.triton.knobs.runtime
    seen: set[tuple[str, str]] = set()
    kept: list[Launch] = []

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        identity = (fn.name, key)
        if identity not in seen:
            seen.add(identity)
            kept.append(launch)
        return True  # do not compile

    hook, knobs.jit_cache_hook = knobs.jit_cache_hook, note
    try:
        with compiling_for(target):
            for launch in launches:
                launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    finally:
        knobs.jit_cache_hook = hook
    return kept


# ---- 3. compiling


def compile_launch(launch: Launch) -> None:
    """Compile the kernel of a launch, inside `compiling_for`, into triton's cache on disk."""
    kernel = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    make_launcher(kernel)


def make_launcher(kernel: Any) -> None:
    """triton 3.6 has the C compiler make a function for each signature; later ones need none.

    Where that fails, the launch itself will say so.
    """
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        with contextlib.suppress(Exception):
            driver.CudaLauncher(kernel.src, kernel.metadata)


class Compilers:
    """Forked processes that compile launches. To be made before this process uses a GPU."""

    def __init__(self, launches: Sequence[Launch], target: Target, processes: int) -> None:
        self.launches, self.target = launches, target
        self.compiled: set[int] = set()  # indices of launches
        processes = min(processes, len(launches))
        self.workers = Workers(self._compile, len(launches), processes, self._prepare)

    def _prepare(self) -> None:
        """In a forked process: what the compiler prints would be said again at the launch."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        torch.set_num_threads(1)
        triton_launch.triton.runtime.driver.set_active(_TargetOnly(self.target))

    def _compile(self, index: int) -> None:
        compile_launch(self.launches[index])

    def wait_for(self, wanted: set[int], say: Callable[[int], None]) -> None:
        """Until the launches with these indices are compiled, or no compiler is left.

        `say` is called with the number of those that are compiled so far, of all.
        """
        while not wanted <= self.compiled:
            index = self.workers.next_done()
            if index is None:
                return
            self.compiled.add(index)
            say(len(self.compiled))

    def close(self) -> None:
        """End the processes."""
        self.workers.close()


class Workers:
    """work(0), ..., work(count - 1) shared out over forked processes, each taking the next one.

    A process that dies loses the call that it was in; the others go on. An exception ends a call.
    """

    def __init__(
        self,
        work: Callable[[int], None],
        count: int,
        processes: int,
        prepare: Callable[[], None] = lambda: None,  # called first in each process
    ) -> None:
        todo, give = os.pipe()
        self.done, tell = os.pipe()
        os.set_blocking(give, False)  # a pipe holds 16,000 indices
        for index in range(count):
            os.write(give, INDEX.pack(index))
        os.close(give)
        self.pids: list[int] = []
        for _ in range(processes):
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(self.done)
                    prepare()
                    _work_until_empty(work, todo, tell)
                finally:
                    os._exit(0)  # nothing of the parent's is to be cleaned up here
            self.pids.append(pid)
        os.close(todo)
        os.close(tell)

    def next_done(self) -> int | None:
        """Wait for the next call that has ended; None when no process is left."""
        select.select([self.done], [], [])
        text = os.read(self.done, INDEX.size)
        return INDEX.unpack(text)[0] if text else None

    def close(self) -> None:
        """End the processes."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
            os.waitpid(pid, 0)
        self.pids = []
        os.close(self.done)


def _work_until_empty(work: Callable[[int], None], todo: int, tell: int) -> None:
    while text := os.read(todo, INDEX.size):
        index = INDEX.unpack(text)[0]
        with contextlib.suppress(Exception):
            work(index)
        os.write(tell, text)
