"""Paged attention in Triton: a row's result is its own, whatever lies beside it and wherever."""

import random

import pytest
import torch

from kernels._triton import usable
from kernels.context import Cached
from kernels.registry import REFERENCE, TRITON
from tests import interpreter

H, G, D, SIZE = 3, 1, 16, 8
# (cached, new tokens): decode rows first, extend rows behind them; parts of 32 tokens and pages of
# 8 end at, before and behind the last token, and one decode row has a query that misses a part
ROWS = [(0, 1), (63, 1), (64, 1), (30, 4), (0, 9), (24, 8)]


@pytest.fixture(autouse=True)
def strict():
    if reason := usable("cpu"):
        pytest.skip(reason)
    interpreter.install()


def attend(batch, seed, dtype):
    """o of the rows in `batch` (numbers into ROWS); `seed` decides which pages they get.

    Whatever is not theirs is NaN: free pages and, in the last page, what is behind the last token.
    """
    rng = random.Random(seed)
    need = [-(-sum(ROWS[i]) // SIZE) for i in batch]
    free = list(range(sum(need) + 5))
    rng.shuffle(free)
    k, v = (torch.full((len(free), G, SIZE, D), torch.nan, dtype=dtype) for _ in range(2))
    tables, new = [], []
    for i, count in zip(batch, need, strict=True):
        tables.append([free.pop() for _ in range(count)])
        own = torch.Generator().manual_seed(i)  # a row's numbers are the same in every batch
        for cache in (k, v):
            for t, token in enumerate(torch.randn(ROWS[i][0], G, D, generator=own)):
                cache[tables[-1][t // SIZE], :, t % SIZE] = token.to(dtype)
        new.append(torch.randn(ROWS[i][1], (H + 2 * G) * D, generator=own).to(dtype))
    cached = Cached.build([ROWS[i][1] for i in batch], [ROWS[i][0] for i in batch], tables, SIZE)
    qkv = torch.cat(new)
    with interpreter.poisoned():
        TRITON.kv_write_(qkv, k, v, cached)
        o = TRITON.cached_attention(qkv, k, v, cached)
    assert o.isfinite().all()
    return dict(zip(batch, o.split([ROWS[i][1] for i in batch]), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_its_own(dtype):
    """Bitwise equal alone, among others, in another order and in other pages."""
    everyone = list(range(len(ROWS)))
    among = attend(everyone, 1, dtype)
    turned = attend(everyone[::-1], 2, dtype)
    for i in everyone:
        alone = attend([i], 3 + i, dtype)[i]
        assert torch.equal(among[i], alone), f"row {i} among others"
        assert torch.equal(turned[i], alone), f"row {i} in another order and other pages"


def test_scores_far_below_zero():
    """Every score near -230 (base 2): what is masked must not count as a score of 0."""
    cached = Cached.build([1, 6], [64, 10], [list(range(9)), [9, 10]], SIZE)
    k, v = torch.ones(11, G, SIZE, D), torch.randn(11, G, SIZE, D)
    qkv = torch.randn(7, (H + 2 * G) * D)
    qkv[:, : H * D], qkv[:, H * D : (H + G) * D] = -40, 1
    TRITON.kv_write_(qkv, k, v, cached)
    got = TRITON.cached_attention(qkv, k, v, cached)
    want = REFERENCE.cached_attention(qkv.double(), k.double(), v.double(), cached)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
