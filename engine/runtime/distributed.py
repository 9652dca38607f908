"""Several processes as one job, under torchrun; alone, every function here does nothing.

    torchrun --nproc-per-node 2 scripts/train.py ...              each holds all weights
    torchrun --nproc-per-node 2 scripts/train.py --shard ...      each a share (model/sharded.py)

A process has a rank below the size of the world. gloo carries tensors of the CPU, flags too, NCCL
those of GPUs.

How long a process waits for the others
    in a sum      COLLECTIVE: all are at the same step, so one that is missing is gone
    at a barrier  as long as they live: one may distil for hours behind another. Meanwhile their
                  heartbeats meet; one that misses them for SILENCE is gone
One that is gone ends the job with a ValueError that says how to go on.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from engine.runtime.process_memory import first_line

COLLECTIVE = timedelta(minutes=30)  # checkpoints, validation and compilation take less
SILENCE = timedelta(minutes=10)  # of a busy machine; a heartbeat is late by seconds at most
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
BEAT = 2.0  # seconds between heartbeats


class Heartbeat(threading.Thread):
    """Tells the other processes that this one lives, and how many barriers it has reached.

    The threads of all processes meet on gloo every BEAT seconds, whatever their programs do
    meanwhile. Where one is stopped, the meeting fails after SILENCE; where one has died, its
    connections are closed and it fails at once.
    """

    def __init__(self, size: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.group = dist.new_group(backend="gloo", timeout=SILENCE)
        self.reached = [0] * size  # barriers, by rank, as far as is known
        self.mine = 0
        self.waiting = False  # at a barrier: then the next meeting is at once
        self.hurry = threading.Event()
        self.leaving = False
        self.gone = ""  # why no meeting takes place any more
        self.broken = False  # because a process is stopped or dead, not because one has ended

    def run(self) -> None:
        """Meet until a process leaves, or is gone."""
        while not self.gone:
            own = torch.tensor([-1 if self.leaving else self.mine])
            all_ = [torch.empty_like(own) for _ in self.reached]
            try:
                dist.all_gather(all_, own, group=self.group)
            except RuntimeError as error:
                self.gone, self.broken = first_line(error), True
                return
            found = [int(n) for n in all_]
            self.reached = [max(pair) for pair in zip(self.reached, found, strict=True)]
            if min(found) < 0:
                self.gone = f"rank {found.index(-1)} has ended"
            elif not self.waiting:
                self.hurry.wait(BEAT)
                self.hurry.clear()

    def meet(self) -> None:
        """Wait until every process has come as often as this one; RuntimeError where one cannot."""
        self.mine += 1
        self.waiting = True
        self.hurry.set()
        pause = 0.002
        while min(self.reached) < self.mine:
            self.look()
            time.sleep(pause)
            pause = min(1.2 * pause, 0.1)
        self.waiting = False

    def look(self) -> None:
        """RuntimeError where a process is gone."""
        if self.gone:
            raise RuntimeError(self.gone)

    def leave(self) -> None:
        """Say that this process ends; the others are told at their next meeting."""
        self.leaving = True
        self.hurry.set()
        self.join(timeout=SILENCE.total_seconds() + BEAT)  # a process that is stopped misses this
        self.broken |= self.is_alive()
        time.sleep(BEAT / 10)  # the others read the last meeting before its connections close
        self.group = None


@dataclass(frozen=True)
class World:
    """Where this process stands in the job."""

    rank: int = 0
    size: int = 1
    heartbeat: Heartbeat | None = field(default=None, compare=False, repr=False)

    @property
    def is_rank0(self) -> bool:
        """Whether this process prints and writes files for all."""
        return self.rank == 0

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place and the same bits in each; returns `tensor`.

        ValueError when a process of the job is gone. On a GPU this does not synchronise: call
        `wait_for_device` before the host reads the sum.
        """
        if self.size > 1:
            try:
                dist.all_reduce(tensor)
            except RuntimeError as error:
                raise ValueError(_gone(self, error)) from None
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.all_reduce_sum_(torch.tensor(float(flag))))

    def max_over_ranks(self, count: int) -> int:
        """The largest count of any rank."""
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = count
        return int(self.all_reduce_sum_(counts).max())

    @contextlib.contextmanager
    def report_lost_rank(self) -> Iterator[None]:
        """Inside `with`, ValueError where gathering sharded weights finds a process gone."""
        try:
            yield
        except RuntimeError as error:
            lost = any(word in str(error) for word in ("Connection", "gloo", "NCCL", "Timed out"))
            if self.size == 1 or not lost:
                raise
            raise ValueError(_gone(self, error)) from None

    def barrier(self) -> None:
        """Wait until every process is here, however long it works; ValueError where one is gone."""
        if self.size > 1:
            try:
                self.heartbeat.meet()
            except RuntimeError as error:
                raise ValueError(_gone(self, error)) from None

    def wait_for_device(self, device: torch.device) -> None:
        """Wait until a GPU has done what it was given; ValueError where a process is gone.

        Without that process a sum on NCCL never ends, nor does whoever asks for its numbers.
        """
        if self.size == 1 or device.type != "cuda":
            return
        done = torch.cuda.Event()
        done.record()
        try:
            while not done.query():
                self.heartbeat.look()
                time.sleep(0.001)
        except RuntimeError as error:
            raise ValueError(_gone(self, error)) from None


def _gone(world: World, error: RuntimeError) -> str:
    return (
        f"rank {world.rank} of {world.size}: another process of the job is gone "
        f"({first_line(error)[:160]}); start the same command again with --resume to go on from "
        "the last checkpoint"
    )


def start(device: str = "cpu") -> World:
    """Join the job that torchrun describes in the environment, once; alone without one.

    From then on only rank 0 prints. On GPUs the process takes the one of its local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    heartbeat = _join(torch.device(device).type)
    return World(dist.get_rank(), size, heartbeat)


@functools.cache
def _join(kind: str) -> Heartbeat:
    """Be one of the job from now on, to the end of this process."""
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group(BACKENDS[kind], timeout=COLLECTIVE)
    heartbeat = Heartbeat(dist.get_world_size())
    heartbeat.start()
    atexit.register(_leave, heartbeat, kind)
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return heartbeat


def _leave(heartbeat: Heartbeat, kind: str) -> None:
    """The orderly end; NCCL's would wait for a process that is gone."""
    heartbeat.leave()
    if kind == "cpu" or not heartbeat.broken:
        dist.destroy_process_group()


def shares(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices for each of `size` processes, balanced by tokens: longest first to the lightest.

    The same input gives the same shares; a process may get none.
    """
    places: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        lightest = min(range(size), key=loads.__getitem__)
        places[lightest].append(index)
        loads[lightest] += lengths[index]
    return [sorted(place) for place in places]
