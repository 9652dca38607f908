"""Several processes as one job, under torchrun; alone, every function here does nothing.

    torchrun --nproc-per-node 2 scripts/train.py ...              each holds all weights
    torchrun --nproc-per-node 2 scripts/train.py --shard ...      each a share (model/sharded.py)

A process has a rank below the size of the world. gloo joins CPUs, nccl GPUs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

WAIT = timedelta(days=7)  # the slowest process may distil for hours; torchrun ends what is dead


@dataclass(frozen=True)
class World:
    """Where this process stands in the job."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place and the same bits in each.

        ValueError when a process of the job is gone.
        """
        if self.size > 1:
            try:
                dist.all_reduce(tensor)
            except RuntimeError as error:
                raise ValueError(_gone(self, error)) from None
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.size == 1:
            return flag
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return bool(self.sum_(torch.tensor(float(flag), device=device)).item())

    def most(self, count: int) -> int:
        """The largest count of any process."""
        device = "cuda" if self.size > 1 and dist.get_backend() == "nccl" else "cpu"
        counts = torch.zeros(self.size, dtype=torch.int64, device=device)
        counts[self.rank] = count
        return int(self.sum_(counts).max())

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Inside `with`, ValueError when gathering sharded weights finds a process gone."""
        try:
            yield
        except RuntimeError as error:
            lost = any(word in str(error) for word in ("Connection", "gloo", "NCCL"))
            if self.size == 1 or not lost:
                raise
            raise ValueError(_gone(self, error)) from None

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.any(False)


def _gone(world: World, error: RuntimeError) -> str:
    words = (str(error).strip().splitlines() or ["no word"])[0]
    return (
        f"rank {world.rank} of {world.size}: another process of the job is gone ({words[:160]}); "
        "start the same command again with --resume to go on from the last checkpoint"
    )


def start(device: str = "cpu") -> World:
    """Join the job that torchrun describes in the environment, once; alone without one.

    From then on only rank 0 prints. On GPUs the process takes the one of its local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        gpu = torch.device(device).type == "cuda"
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if gpu else "gloo", timeout=WAIT)
        atexit.register(dist.destroy_process_group)
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return World(dist.get_rank(), size)


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
