"""How many sequences a GPU decodes together, planned from its total memory

    pages = (GPU_SHARE of the card - weights) / bytes of a page      what keys and values may take
    rows  = pages / mean pages of a sequence of its expected length  at most MOST_ROWS

The expected length counts, not the longest possible one: a sequence is admitted by it too, and one
that becomes longer preempts the youngest where pages run short (scheduler.py). Not the memory that
is free now, but all that the card has, so that the same job has the same number on the same card.
"""

from __future__ import annotations

import torch

from engine.sampling.page_pool import GPU_SHARE
from kernels.integers import cdiv
from model.config import LlamaConfig
from model.kv_cache import KVCache
from model.layout import parameter_count

MOST_ROWS = 256  # more raise the tokens per second by little, and the delay of each by much
UNIT = 32  # rows are a multiple of it from there on: a bucket of a CUDA graph


def planned_pages(
    config: LlamaConfig, dtype: torch.dtype, page_size: int, total_bytes: int, kv_memory: float
) -> int:
    """Pages for keys and values beside the weights on a card of `total_bytes`.

    kv_memory: GB that the user allows for them; 0: not limited. 0 where the weights leave no room.
    """
    weights = parameter_count(config) * dtype.itemsize
    room = GPU_SHARE * total_bytes - weights
    if kv_memory:
        room = min(room, kv_memory * 1e9)
    return max(0, int(room // KVCache.page_bytes(config, page_size, dtype)))


def planned_rows(pages: int, expected_pages: list[int]) -> int:
    """Sequences that hold `pages` together, at least 1.

    expected_pages: of each waiting request, at the length that it will likely have.
    """
    mean = cdiv(sum(expected_pages), len(expected_pages))
    rows = min(MOST_ROWS, pages // max(1, mean))
    if rows >= UNIT:
        rows -= rows % UNIT
    return max(1, rows)
