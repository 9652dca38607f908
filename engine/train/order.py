"""The order of the examples: which of them each optimizer step takes, fixed by the seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from engine.train.config import TrainConfig
from kernels.integers import cdiv
from kernels.philox import mix


class Batch(NamedTuple):
    """The examples of one optimizer step."""

    epoch: int  # counts from 0
    indices: list[int]  # into the examples of the run


def batches(count: int, config: TrainConfig, done: int = 0) -> Iterator[Batch]:
    """The batches of the optimizer steps over `count` examples that follow the first `done`.

    Each epoch has its own order, which takes 8 bytes an example (16 while the next one is drawn).
    """
    steps_per_epoch = cdiv(count, config.batch_rows)
    order = torch.empty(0, dtype=torch.int64)
    epoch = -1  # whose order it is
    for step in range(done, config.steps(count)):
        if step // steps_per_epoch != epoch:
            epoch = step // steps_per_epoch
            order = _order_of_epoch(count, config.seed, epoch)
        start = step % steps_per_epoch * config.batch_rows
        yield Batch(epoch, order[start : start + config.batch_rows].tolist())


def _order_of_epoch(count: int, seed: int, epoch: int) -> Tensor:
    """(count,) int64: the examples in the order in which an epoch takes them."""
    epoch_seed = mix("order", seed, epoch) >> 1  # 63 bits: manual_seed takes no more
    generator = torch.Generator().manual_seed(epoch_seed)
    return torch.randperm(count, generator=generator)
