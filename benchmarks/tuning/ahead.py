"""Kernels compiled ahead of their launch, by worker processes, into triton's cache on disk.

A launch looks its kernel up by a hash of source, signature, constants, attributes, options, target
and compiler. A worker derives all of these from a recorded launch (benchmarks.tuning.compile), for
a given target, so it needs no GPU and makes no context there; the process that measures then only
loads the compiled kernel. A worker that dies or takes too long loses its own task only.
"""

from __future__ import annotations

import contextlib
import heapq
import io
import itertools
import os
import re
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from benchmarks._common import Launch, record, tables
from benchmarks.tuning import compile as aot
from kernels.launch import tile_config, triton_launch
from kernels.launch.compile_ahead import make_launcher
from kernels.registry import SPECS

PATIENCE = 60.0  # seconds for a task; ptxas takes minutes over a kernel that spills thousands
VETOES = ("spills", "shared memory", "serialised wgmma")  # it would run; no configuration may
Items = tuple[tuple[str, Any], ...]  # the items of a tile configuration


@dataclass(frozen=True)
class Target:
    """The card that is compiled for."""

    device_class: str  # of the tile configurations
    gpu: tuple[str, int | str, int]  # triton's: backend, architecture, threads of a warp
    shared: int  # bytes of shared memory that a program may have

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """This card; for processes that launch on it."""
        gpu = triton_launch.triton.runtime.driver.active.get_current_target()
        device_class = tile_config.device_class(device)
        properties = torch.cuda.get_device_properties(device)
        limit = aot.SHARED[device_class]
        shared = getattr(properties, "shared_memory_per_block_optin", limit)
        return cls(device_class, (gpu.backend, gpu.arch, gpu.warp_size), shared)


@dataclass(frozen=True, order=True)
class Task:
    """Launches of an operation at a shape. With `names` only those kernels'; of `parts` the n-th.

    `configs` are (kernel, shape class, configuration) instead of those in the files; class "": for
    every one. With `names` the launches of that kernel for another class are left out too.
    """

    operation: str
    table: str
    shape: tuple[int, ...]
    dtype: str
    configs: tuple[tuple[str, str, Items], ...] = ()
    names: tuple[str, ...] = ()
    masters: bool = True  # inputs as benchmarks._common.typed has them, not all in one dtype
    part: int = 0
    parts: int = 1


def in_parts(parts: int, *about: Any, **how: Any) -> list[Task]:
    """All launches of an operation at a shape, shared out over so many tasks."""
    return [Task(*about, **how, part=n, parts=parts) for n in range(parts)]


# ---- in a worker


def launches(task: Task, target: Target) -> list[Launch]:
    """The launches that the task has to compile."""
    spec = SPECS[task.operation]
    ops = next(o for o in tables(spec) if o.name == task.table)
    dtype = getattr(torch, task.dtype)
    overrides = {(kernel, at): dict(items) for kernel, at, items in task.configs}
    with tile_config.overriding(overrides):
        made = record(spec, ops, task.shape, dtype, target.device_class, task.masters)
    made = [x for x in made if 0 not in x.grid]
    if task.names:
        classes = {kernel: at for kernel, at, _ in task.configs if at}

        def is_named(launch: Launch) -> bool:
            name = launch.kernel.__name__
            shape_class = classes.get(name, launch.shape_class)
            return name in task.names and shape_class == launch.shape_class

        made = [x for x in made if is_named(x)]
    distinct = {f"{x.kernel.__name__} {x.args} {x.options}": x for x in made}
    return list(distinct.values())[task.part :: task.parts]


def compiled(launch: Launch, target: Target) -> tuple[Any, str]:
    """The kernel as a launch would find it, and the compiler's log if it was not there yet."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    signature, constexprs, attrs, options = aot.specialised(launch, target.gpu)
    log = io.StringIO()
    with contextlib.redirect_stdout(log), aot.stderr_kept():
        source = ASTSource(launch.kernel, signature, constexprs, attrs)
        gpu = GPUTarget(*target.gpu)
        return compile_kernel(source, target=gpu, options=options.__dict__), log.getvalue()


def why_refused(task: Task, target: Target) -> str | None:
    """Compile all of a task; returns why its configuration must not be taken, None if it may be."""
    reasons = []
    try:
        for launch in launches(task, target):
            kernel, log = compiled(launch, target)
            if kernel.metadata.shared > target.shared:
                reasons.append("shared memory")
            elif aot.SERIAL in log:
                reasons.append("serialised wgmma")
            elif "cubin" in kernel.asm:
                usage = aot.resources(kernel.asm["cubin"])
                if int(re.search(r"STACK:(\d+)", usage)[1]):
                    reasons.append("spills")
                make_launcher(kernel)
    except Exception as error:  # whatever the compiler raises
        return type(error).__name__
    return reasons[0] if reasons else None


def work(connection: Connection, target: Target) -> None:
    """The loop of a worker: receives tasks, sends outcomes, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(10)  # the process that measures goes first
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"  # is not part of the cache's key
    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(why_refused(task, target))


# ---- in the process that measures


def prepare() -> None:
    """Begin to import the workers' modules in the process that they are forked from: not this one.

    A process that has a GPU must not be copied.
    """
    forkserver.set_forkserver_preload(["benchmarks.tuning.ahead"])
    forkserver.ensure_running()


class Workers:
    """Processes that compile tasks, the most urgent first."""

    def __init__(self, number: int, target: Target) -> None:
        prepare()
        self.context, self.number, self.target = get_context("forkserver"), number, target
        self.outcomes: dict[Task, str | None] = {}  # None: compiled; else why it is refused
        self.asked: set[Task] = set()
        self.queue: list[tuple[Any, int, Task]] = []
        self.count = itertools.count()
        self.busy: dict[Connection, tuple[Any, Task, float]] = {}  # process, its task, since when
        self.idle: list[tuple[Connection, Any]] = []  # started with the first task

    def started(self) -> tuple[Connection, Any]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=work, args=(theirs, self.target), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def want(self, tasks: Iterable[Task], urgency: Any) -> None:
        """Have the tasks compiled, each once; small `urgency` first."""
        for task in tasks:
            if task not in self.asked:
                self.asked.add(task)
                heapq.heappush(self.queue, (urgency, next(self.count), task))

    def poll(self, seconds: float = 0.0) -> None:
        """Collect outcomes, waiting at most `seconds` for one, and keep every worker at work."""
        self._give()
        for connection in wait(list(self.busy), seconds):
            process, task, _ = self.busy.pop(connection)
            try:
                self.outcomes[task] = connection.recv()
                self.idle.append((connection, process))
            except (EOFError, OSError):
                self._replace(connection, process, task, "compiler died")
        late = time.monotonic() - PATIENCE
        for connection, (process, task, since) in list(self.busy.items()):
            if since < late:
                del self.busy[connection]
                self._replace(connection, process, task, "compiler too slow")
        self._give()

    def _give(self) -> None:
        if not self.idle and not self.busy:
            self.idle = [self.started() for _ in range(self.number)]
        while self.idle and self.queue:
            connection, process = self.idle.pop()
            task = heapq.heappop(self.queue)[-1]
            try:
                connection.send(task)
            except OSError:
                self._replace(connection, process, task, "compiler died")
            else:
                self.busy[connection] = (process, task, time.monotonic())

    def _replace(self, connection: Connection, process: Any, task: Task, why: str) -> None:
        process.kill()
        process.join()
        connection.close()
        self.outcomes[task] = why
        self.idle.append(self.started())

    def missing(self, tasks: Iterable[Task]) -> bool:
        """Whether any of them has no outcome yet."""
        return any(task not in self.outcomes for task in tasks)

    def why_refused(self, tasks: Iterable[Task], vetoes: bool = True) -> str | None:
        """Why the configuration that the tasks are for is refused; None if it is not.

        Without `vetoes` only what cannot run is refused.
        """
        for task in tasks:
            reason = self.outcomes[task]
            if reason is not None and (vetoes or reason not in VETOES):
                return reason
        return None

    def close(self) -> None:
        """End them all now."""
        held = [(c, p) for c, (p, _, _) in self.busy.items()] + self.idle
        for connection, process in held:
            process.kill()
            connection.close()
        for _, process in held:
            process.join()
        self.busy, self.idle, self.queue = {}, [], []
