"""Paged attention in Triton is batch-invariant, wherever a sequence's pages lie."""

import random

import pytest
import torch

from kernels.cached import Cached
from kernels.integers import cdiv
from kernels.launch.triton_launch import INTERPRETED, why_unavailable
from kernels.registry import REFERENCE, TRITON
from tests.helpers import interpreter

H, G, D, SIZE = 3, 1, 16, 8
# (cached, new tokens) of each sequence; parts of 32 tokens and pages of 8 end at, before and after
# the last token; a tile decodes 5 tokens, and one sequence has a query that sees nothing of a part
SEQUENCES = [(0, 1), (63, 1), (64, 1), (30, 4), (0, 9), (24, 13)]


ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture(autouse=True)
def strict():
    if reason := why_unavailable(DEVICE):
        pytest.skip(reason)
    if INTERPRETED:
        interpreter.install()


def attend(batch, seed, dtype, decode, cuts=None):
    """o of the sequences in `batch` (numbers into SEQUENCES); `seed` decides which pages they get.

    `cuts`: new tokens of one sequence by forward, instead of all at once. Memory that is not theirs
    is NaN: free pages and, in the last page, the places after the last token.
    """
    rng = random.Random(seed)
    need = [cdiv(sum(SEQUENCES[i]), SIZE) for i in batch]
    free = list(range(sum(need) + 5))
    rng.shuffle(free)
    k, v = (
        torch.full((len(free), G, SIZE, D), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)
    )
    tables, new = [], []
    for i, count in zip(batch, need, strict=True):
        tables.append([free.pop() for _ in range(count)])
        own = torch.Generator().manual_seed(i)  # the same numbers in every batch
        for cache in (k, v):
            for t, token in enumerate(torch.randn(SEQUENCES[i][0], G, D, generator=own)):
                cache[tables[-1][t // SIZE], :, t % SIZE] = token.to(DEVICE, dtype)
        new.append(torch.randn(SEQUENCES[i][1], (H + 2 * G) * D, generator=own).to(DEVICE, dtype))
    counts, contexts = [len(q) for q in new], [SEQUENCES[i][0] for i in batch]
    if cuts is None:
        forwards = [(torch.cat(new), counts, contexts)]
    else:
        starts = [sum(cuts[:n]) for n in range(len(cuts))]
        parts = zip(new[0].split(cuts), cuts, starts, strict=True)
        forwards = [(part, [m], [contexts[0] + start]) for part, m, start in parts]
    outs = []
    for qkv, lengths, before in forwards:
        cached = Cached.build(lengths, before, tables, SIZE, DEVICE, decode)
        with interpreter.poisoned():
            TRITON.kv_write_(qkv, k, v, cached)
            outs.append(TRITON.cached_attention(qkv, k, v, cached))
    o = torch.cat(outs)
    assert o.isfinite().all()
    return dict(zip(batch, o.split(counts), strict=True))


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_does_not_depend_on_the_batch(dtype, decode):
    """Bitwise equal by itself, among others, in another order and in other pages."""
    everyone = list(range(len(SEQUENCES)))
    among = attend(everyone, 1, dtype, decode)
    turned = attend(everyone[::-1], 2, dtype, decode)
    for i in everyone:
        single = attend([i], 3 + i, dtype, decode)[i]
        assert torch.equal(among[i], single), f"sequence {i} among others"
        assert torch.equal(turned[i], single), f"sequence {i} in another order and other pages"


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_token_does_not_depend_on_how_the_forward_was_cut(dtype, decode):
    """Drafts as one token after the other, a prompt in other pieces: the same bits."""
    for i, cuts in ((5, [1] * 13), (5, [1, 7, 5]), (4, [1] * 9), (4, [8, 1]), (3, [3, 1])):
        together = attend([i], i, dtype, decode)[i]
        cut = attend([i], i, dtype, decode, cuts)[i]
        assert torch.equal(together, cut), f"sequence {i} cut into {cuts}"


def test_scores_far_below_zero():
    """Every score near -230 (base 2): a masked key must not count as a score of 0."""
    k, v = torch.ones(11, G, SIZE, D, device=DEVICE), torch.randn(11, G, SIZE, D, device=DEVICE)
    qkv = torch.randn(7, (H + 2 * G) * D, device=DEVICE)
    qkv[:, : H * D], qkv[:, H * D : (H + G) * D] = -40, 1
    for decode in (True, False):
        tables = [list(range(9)), [9, 10]]
        cached = Cached.build([1, 6], [64, 10], tables, SIZE, DEVICE, decode)
        TRITON.kv_write_(qkv, k, v, cached)
        got = TRITON.cached_attention(qkv, k, v, cached)
        want = REFERENCE.cached_attention(qkv.double(), k.double(), v.double(), cached)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
