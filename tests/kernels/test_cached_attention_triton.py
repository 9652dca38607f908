"""Paged attention in Triton: a row's result is its own, whatever lies beside it and wherever."""

import random

import pytest
import torch

from kernels.cached import Cached
from kernels.launch.triton_launch import INTERPRETED, usable
from kernels.registry import REFERENCE, TRITON
from tests.helpers import interpreter

H, G, D, SIZE = 3, 1, 16, 8
# (cached, new tokens); parts of 32 tokens and pages of 8 end at, before and behind the last token;
# a tile decodes 5 tokens, and one row has a query that misses a part
ROWS = [(0, 1), (63, 1), (64, 1), (30, 4), (0, 9), (24, 13)]


ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture(autouse=True)
def strict():
    if reason := usable(DEVICE):
        pytest.skip(reason)
    if INTERPRETED:
        interpreter.install()


def attend(batch, seed, dtype, alone, cuts=None):
    """o of the rows in `batch` (numbers into ROWS); `seed` decides which pages they get.

    `cuts`: new tokens of one row by forward, instead of all at once. Whatever is not theirs is
    NaN: free pages and, in the last page, what is behind the last token.
    """
    rng = random.Random(seed)
    need = [-(-sum(ROWS[i]) // SIZE) for i in batch]
    free = list(range(sum(need) + 5))
    rng.shuffle(free)
    k, v = (
        torch.full((len(free), G, SIZE, D), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)
    )
    tables, new = [], []
    for i, count in zip(batch, need, strict=True):
        tables.append([free.pop() for _ in range(count)])
        own = torch.Generator().manual_seed(i)  # a row's numbers are the same in every batch
        for cache in (k, v):
            for t, token in enumerate(torch.randn(ROWS[i][0], G, D, generator=own)):
                cache[tables[-1][t // SIZE], :, t % SIZE] = token.to(DEVICE, dtype)
        new.append(torch.randn(ROWS[i][1], (H + 2 * G) * D, generator=own).to(DEVICE, dtype))
    counts, contexts = [len(q) for q in new], [ROWS[i][0] for i in batch]
    if cuts is None:
        forwards = [(torch.cat(new), counts, contexts)]
    else:
        starts = [sum(cuts[:n]) for n in range(len(cuts))]
        parts = zip(new[0].split(cuts), cuts, starts, strict=True)
        forwards = [(part, [m], [contexts[0] + start]) for part, m, start in parts]
    outs = []
    for qkv, lengths, before in forwards:
        cached = Cached.build(lengths, before, tables, SIZE, DEVICE, alone)
        with interpreter.poisoned():
            TRITON.kv_write_(qkv, k, v, cached)
            outs.append(TRITON.cached_attention(qkv, k, v, cached))
    o = torch.cat(outs)
    assert o.isfinite().all()
    return dict(zip(batch, o.split(counts), strict=True))


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "prompts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_its_own(dtype, alone):
    """Bitwise equal by itself, among others, in another order and in other pages."""
    everyone = list(range(len(ROWS)))
    among = attend(everyone, 1, dtype, alone)
    turned = attend(everyone[::-1], 2, dtype, alone)
    for i in everyone:
        single = attend([i], 3 + i, dtype, alone)[i]
        assert torch.equal(among[i], single), f"row {i} among others"
        assert torch.equal(turned[i], single), f"row {i} in another order and other pages"


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "prompts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_token_is_its_own(dtype, alone):
    """Drafts as one token after the other, a prompt in other pieces: the same bits."""
    for row, cuts in ((5, [1] * 13), (5, [1, 7, 5]), (4, [1] * 9), (4, [8, 1]), (3, [3, 1])):
        together, cut = (attend([row], row, dtype, alone, c)[row] for c in (None, cuts))
        assert torch.equal(together, cut), f"row {row} cut into {cuts}"


def test_scores_far_below_zero():
    """Every score near -230 (base 2): what is masked must not count as a score of 0."""
    k, v = torch.ones(11, G, SIZE, D, device=DEVICE), torch.randn(11, G, SIZE, D, device=DEVICE)
    qkv = torch.randn(7, (H + 2 * G) * D, device=DEVICE)
    qkv[:, : H * D], qkv[:, H * D : (H + G) * D] = -40, 1
    for alone in (True, False):
        tables = [list(range(9)), [9, 10]]
        cached = Cached.build([1, 6], [64, 10], tables, SIZE, DEVICE, alone)
        TRITON.kv_write_(qkv, k, v, cached)
        got = TRITON.cached_attention(qkv, k, v, cached)
        want = REFERENCE.cached_attention(qkv.double(), k.double(), v.double(), cached)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
