"""Several processes as one job, under torchrun; in a single process every function does nothing

    torchrun --nproc-per-node 2 scripts/train.py ...              each process holds all weights
    torchrun --nproc-per-node 2 scripts/train.py --shard ...      each a shard (model/sharded.py)

The processes are numbered from 0: their rank. On GPUs a process takes the one of its local rank; if
there are fewer GPUs than processes, several share one (LOCAL_RANK modulo the number of GPUs). gloo
carries tensors on CPUs, NCCL tensors on GPUs. NCCL cannot join two processes on one GPU: as soon as
two share one, gloo carries the GPUs' tensors too, copied through host memory. That is slow; it
serves to run a job of several processes on one GPU. Booleans and counts (`any_rank`,
`max_over_ranks`) are always CPU tensors, on gloo.

How long a process waits for the others:
    in a sum      Timeouts.collective. All ranks are at the same step, so a missing one is lost
    at a barrier  as long as they live: one rank may distil for hours after another has finished.
                  Meanwhile they exchange heartbeats; a rank that misses one for
                  Timeouts.heartbeat is lost
When a rank is lost, every other one ends with a ValueError that says how to resume.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engine.runtime.process_memory import first_line, share_gpu

GLOO = "gloo"  # for tensors on CPUs, and on GPUs through host memory
GLOO_AND_NCCL = "cpu:gloo,cuda:nccl"


@dataclass(frozen=True)
class Timeouts:
    """How long a rank waits for the others; a test takes shorter ones."""

    collective: timedelta = timedelta(minutes=30)  # longer than a checkpoint or a validation takes
    heartbeat: timedelta = timedelta(minutes=10)  # a busy machine delays one by seconds only
    pause: float = 2.0  # seconds between two heartbeats


DEFAULT_TIMEOUTS = Timeouts()


class Heartbeat(threading.Thread):
    """Tells the other ranks that this process lives, and how many barriers it has reached.

    The threads of all ranks exchange these numbers on gloo every `timeouts.pause` seconds, while
    their programs work. If a process is stopped, the exchange fails after `timeouts.heartbeat`; if
    one has died, its connections are closed and the exchange fails at once.
    """

    def __init__(self, size: int, timeouts: Timeouts) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.group = dist.new_group(backend="gloo", timeout=timeouts.heartbeat)
        self.timeouts = timeouts
        self.barriers = 0  # number of barriers that this rank has reached
        self.barriers_of = [0] * size  # the same of each rank, at the last heartbeat
        self.at_barrier = False  # True: heartbeats follow each other without a pause
        self.wake = threading.Event()  # ends the pause between two heartbeats
        self.leaving = False  # this rank is about to end
        self.why_ended: str | None = None  # why the heartbeats have ended; None while they go on
        self.broken = False  # they have ended because a process is stopped or dead

    def run(self) -> None:
        """Exchange heartbeats until a rank leaves, or is lost."""
        while self.why_ended is None:
            own = torch.tensor([-1 if self.leaving else self.barriers])  # -1: this rank leaves
            gathered = [torch.empty_like(own) for _ in self.barriers_of]
            try:
                dist.all_gather(gathered, own, group=self.group)
            except RuntimeError as error:
                self.why_ended = first_line(error)
                self.broken = True
                return
            counts = [int(count) for count in gathered]
            self.barriers_of = [max(pair) for pair in zip(self.barriers_of, counts, strict=True)]
            if -1 in counts:
                self.why_ended = f"rank {counts.index(-1)} has ended"
            elif not self.at_barrier:
                self.wake.wait(self.timeouts.pause)
                self.wake.clear()

    def barrier(self) -> None:
        """Wait until every rank has reached as many barriers; RuntimeError if one is lost."""
        self.barriers += 1
        self.at_barrier = True
        self.wake.set()
        pause = 0.002  # seconds
        while min(self.barriers_of) < self.barriers:
            self.check()
            time.sleep(pause)
            pause = min(1.2 * pause, 0.1)
        self.at_barrier = False

    def check(self) -> None:
        """RuntimeError if a rank is lost."""
        if self.why_ended is not None:
            raise RuntimeError(self.why_ended)

    def leave(self) -> None:
        """End the heartbeats; the other ranks learn it from the next one."""
        self.leaving = True
        self.wake.set()
        pause = self.timeouts.pause
        self.join(timeout=self.timeouts.heartbeat.total_seconds() + pause)
        if self.is_alive():  # a rank that is stopped did not answer
            self.broken = True
        time.sleep(pause / 10)  # the others read the last heartbeat before its connections close
        self.group = None


class Device(NamedTuple):
    """The device of a rank."""

    host: str
    uuid: str  # of a GPU, whatever number CUDA_VISIBLE_DEVICES gives it; "cpu"
    index: int  # of a GPU in its own process

    def __str__(self) -> str:
        return f"{self.host} cuda:{self.index} ({self.uuid})"


@dataclass(frozen=True)
class Placement:
    """The device of every rank, and the backend that carries tensors between them."""

    devices: tuple[Device, ...]  # by rank
    backend: str  # GLOO or GLOO_AND_NCCL

    def ranks_on_device(self, rank: int) -> int:
        """How many ranks share the GPU of this rank, itself included."""
        own = self.devices[rank]
        return sum(_is_same_gpu(own, other) for other in self.devices)

    def describe(self) -> str:
        """The line that a job prints at its start."""
        size = len(self.devices)
        if self.devices[0].uuid == "cpu":
            return f"processes: {size} on CPUs, tensors on {self.backend}"
        tensors = "NCCL"
        if self.backend == GLOO:
            tensors = "gloo through host memory (slow: NCCL cannot join two processes on one GPU)"
        of_ranks = [f"rank {rank} on {device}" for rank, device in enumerate(self.devices)]
        return f"processes: {size}, tensors on {tensors}; {', '.join(of_ranks)}"


@dataclass(frozen=True)
class World:
    """The rank of this process and the size of the job."""

    rank: int = 0
    size: int = 1
    heartbeat: Heartbeat | None = field(default=None, compare=False, repr=False)
    placement: Placement | None = field(default=None, compare=False, repr=False)

    @property
    def is_rank0(self) -> bool:
        """Whether this process prints and writes files for all."""
        return self.rank == 0

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place, bitwise the same in each; returns `tensor`.

        ValueError if a rank is lost. On a GPU this does not synchronise: call
        `wait_for_device` before the host reads the sum.
        """
        if self.size > 1:
            try:
                if tensor.is_cuda and self.placement.backend == GLOO:
                    sum_through_host_(tensor)
                else:
                    dist.all_reduce(tensor)
            except RuntimeError as error:
                raise ValueError(_lost_rank(self, error)) from None
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        count = self.all_reduce_sum_(torch.tensor(float(flag)))
        return bool(count)

    def max_over_ranks(self, count: int) -> int:
        """The largest count of any rank."""
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = count
        return int(self.all_reduce_sum_(counts).max())

    @contextlib.contextmanager
    def report_lost_rank(self) -> Iterator[None]:
        """Inside `with`, ValueError where gathering sharded weights finds a rank lost."""
        try:
            yield
        except RuntimeError as error:
            words = ("Connection", "gloo", "NCCL", "Timed out")  # of messages about a lost rank
            is_lost = any(word in str(error) for word in words)
            if self.size == 1 or not is_lost:
                raise
            raise ValueError(_lost_rank(self, error)) from None

    def barrier(self) -> None:
        """Wait until every rank is here, however long it works; ValueError if one is lost."""
        if self.size > 1:
            try:
                self.heartbeat.barrier()
            except RuntimeError as error:
                raise ValueError(_lost_rank(self, error)) from None

    def wait_for_device(self, device: torch.device) -> None:
        """Wait until a GPU has finished its work; ValueError if a rank is lost.

        Without the lost rank a sum on NCCL never ends, and reading its result would never return.
        """
        if self.size == 1 or device.type != "cuda":
            return
        done = torch.cuda.Event()
        done.record()
        try:
            while not done.query():
                self.heartbeat.check()
                time.sleep(0.001)
        except RuntimeError as error:
            raise ValueError(_lost_rank(self, error)) from None


def _lost_rank(world: World, error: RuntimeError) -> str:
    """The message of a job whose other process is gone."""
    return (
        f"rank {world.rank} of {world.size}: another process of the job is gone "
        f"({first_line(error)[:160]}); start the same command again with --resume to continue "
        "from the last checkpoint"
    )


def sum_through_host_(tensor: Tensor) -> None:
    """The sum of a GPU's tensor over all ranks, in place, added up in host memory by gloo."""
    on_host = tensor.to("cpu", copy=True)
    dist.all_reduce(on_host)
    tensor.copy_(on_host)


def start(device: str = "cpu", timeouts: Timeouts = DEFAULT_TIMEOUTS) -> World:
    """Join the job that torchrun describes in the environment; World() if there is none.

    From then on only rank 0 prints to stdout. It prints the device of every rank. On GPUs the
    process takes the one of its local rank, modulo their number.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    placement, heartbeat = _join(torch.device(device).type, timeouts)
    return World(dist.get_rank(), size, heartbeat, placement)


@functools.cache
def _join(kind: str, timeouts: Timeouts) -> tuple[Placement, Heartbeat]:
    """Join the process group, once, until this process ends."""
    if kind == "cuda":
        placement = _join_on_gpus(timeouts)
        share_gpu(placement.ranks_on_device(dist.get_rank()))
    else:
        if not dist.is_initialized():
            dist.init_process_group(GLOO, timeout=timeouts.collective)
        cpu = Device("", "cpu", 0)
        placement = Placement((cpu,) * dist.get_world_size(), GLOO)
    heartbeat = Heartbeat(dist.get_world_size(), timeouts)
    heartbeat.start()
    atexit.register(_leave, heartbeat, placement.backend)
    if dist.get_rank() != 0:
        atexit.register(discard_stdout().close)
    print(placement.describe())
    return placement, heartbeat


def _join_on_gpus(timeouts: Timeouts) -> Placement:
    """Take this rank's GPU, tell it to the other ranks, and join with the backend that fits all."""
    index = local_gpu(os.environ, torch.cuda.device_count())
    torch.cuda.set_device(index)
    properties = torch.cuda.get_device_properties(index)
    uuid = getattr(properties, "uuid", f"{properties.name} {index}")
    own = Device(socket.gethostname(), str(uuid), index)

    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeouts.collective)))
    store.set_timeout(timeouts.collective)
    store.set(f"device of rank {rank}", json.dumps(own))
    texts = [store.get(f"device of rank {other}") for other in range(size)]
    devices = tuple(Device(*json.loads(text)) for text in texts)
    placement = Placement(devices, backend_for(devices))
    dist.init_process_group(
        placement.backend,
        store=dist.PrefixStore("job", store),
        rank=rank,
        world_size=size,
        timeout=timeouts.collective,
    )
    return placement


def local_gpu(environment: Mapping[str, str], count: int) -> int:
    """The index of a process's GPU, of the `count` that it sees, in torchrun's environment."""
    return int(environment["LOCAL_RANK"]) % count


def backend_for(devices: Sequence[Device]) -> str:
    """The backend of a job on these GPUs, one a rank: NCCL unless two ranks have the same GPU."""
    for rank, device in enumerate(devices):
        if any(_is_same_gpu(device, other) for other in devices[:rank]):
            return GLOO
    return GLOO_AND_NCCL


def _is_same_gpu(one: Device, other: Device) -> bool:
    return (one.host, one.uuid) == (other.host, other.uuid)


def discard_stdout() -> contextlib.ExitStack:
    """Discard all that this process prints to sys.stdout, until the returned stack is closed.

    Rank 0 prints for all ranks; sys.stderr, and so errors, stay with every rank.
    """
    discarding = contextlib.ExitStack()
    nowhere = discarding.enter_context(open(os.devnull, "w", encoding="utf-8"))
    discarding.enter_context(contextlib.redirect_stdout(nowhere))
    return discarding


def _leave(heartbeat: Heartbeat, backend: str) -> None:
    """Leave the process group. NCCL's is not destroyed if a rank is lost: that would never end."""
    heartbeat.leave()
    if backend == GLOO or not heartbeat.broken:
        dist.destroy_process_group()


def shares(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices into `lengths` for each of `size` ranks, so that all get about as many tokens.

    The rows are dealt out from the longest to the shortest, each to the rank with the fewest tokens
    so far. The same input gives the same shares; a rank may get none.
    """
    indices: list[list[int]] = [[] for _ in range(size)]
    tokens = [0] * size
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for index in longest_first:
        rank = tokens.index(min(tokens))
        indices[rank].append(index)
        tokens[rank] += lengths[index]
    return [sorted(own) for own in indices]
