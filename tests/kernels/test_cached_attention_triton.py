"""Paged attention in Triton is batch-invariant, wherever a sequence's pages lie."""

import random

import pytest
import torch

from kernels.cached import Cached
from kernels.integers import cdiv
from kernels.launch.triton_launch import INTERPRETED, why_unavailable
from kernels.registry import REFERENCE, TRITON
from tests.helpers import interpreter

H, G, D = 3, 1, 16  # query heads, key/value heads, head size
SIZE = 8  # tokens of a page
# (cached, new tokens) of each sequence; parts of 32 tokens and pages of 8 end at, before and after
# the last token; a tile decodes 5 tokens, and one sequence has a query that sees nothing of a part
SEQUENCES = [(0, 1), (63, 1), (64, 1), (30, 4), (0, 9), (24, 13)]


ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture(autouse=True)
def strict():
    reason = why_unavailable(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    if INTERPRETED:
        interpreter.install()


def random_tables(counts, seed):
    """A block table for each sequence, of so many pages of a cache with 5 pages more; its pages."""
    pages = sum(counts) + 5
    free = list(range(pages))
    random.Random(seed).shuffle(free)
    tables = []
    for count in counts:
        tables.append([free.pop() for _ in range(count)])
    return tables, pages


def attend(batch, seed, dtype, decode, cuts=None):
    """o of the sequences in `batch` (numbers into SEQUENCES); `seed` decides which pages they get.

    `cuts`: new tokens of one sequence by forward, instead of all at once. Memory that is not theirs
    is NaN: free pages and, in the last page, the places after the last token.
    """
    contexts = [SEQUENCES[i][0] for i in batch]
    counts = [SEQUENCES[i][1] for i in batch]
    tables, pages = random_tables([cdiv(sum(SEQUENCES[i]), SIZE) for i in batch], seed)
    k = torch.full((pages, G, SIZE, D), torch.nan, dtype=dtype, device=DEVICE)
    v = torch.full((pages, G, SIZE, D), torch.nan, dtype=dtype, device=DEVICE)
    new = []  # the qkv of each sequence's new tokens
    for i, context, count, table in zip(batch, contexts, counts, tables, strict=True):
        own = torch.Generator().manual_seed(i)  # the same numbers in every batch
        for cache in (k, v):
            cached_tokens = torch.randn(context, G, D, generator=own)
            for t, token in enumerate(cached_tokens):
                cache[table[t // SIZE], :, t % SIZE] = token.to(DEVICE, dtype)
        qkv = torch.randn(count, (H + 2 * G) * D, generator=own)
        new.append(qkv.to(DEVICE, dtype))

    forwards = [(torch.cat(new), counts, contexts)]  # qkv, new tokens, cached tokens
    if cuts is not None:
        forwards = []
        context = contexts[0]
        for part in new[0].split(cuts):
            forwards.append((part, [len(part)], [context]))
            context += len(part)
    outs = []
    for qkv, query_lens, context_lens in forwards:
        cached = Cached.build(query_lens, context_lens, tables, SIZE, DEVICE, decode)
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
    numbers = list(range(len(SEQUENCES)))
    together = attend(numbers, 1, dtype, decode)
    reversed_order = attend(numbers[::-1], 2, dtype, decode)
    for i in numbers:
        alone = attend([i], 3 + i, dtype, decode)[i]
        assert torch.equal(together[i], alone), f"sequence {i} among others"
        assert torch.equal(reversed_order[i], alone), f"sequence {i} in other order, other pages"


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_token_does_not_depend_on_how_the_forward_was_cut(dtype, decode):
    """Drafts as one token after the other, a prompt in other pieces: the same bits."""
    cases = [  # number into SEQUENCES, new tokens by forward
        (5, [1] * 13),
        (5, [1, 7, 5]),
        (4, [1] * 9),
        (4, [8, 1]),
        (3, [3, 1]),
    ]
    for i, cuts in cases:
        together = attend([i], i, dtype, decode)[i]
        cut = attend([i], i, dtype, decode, cuts)[i]
        assert torch.equal(together, cut), f"sequence {i} cut into {cuts}"


def test_a_masked_key_does_not_count_where_scores_are_far_below_zero():
    """Every score is near -230 (base 2): a masked key must not count as a score of 0."""
    k = torch.ones(11, G, SIZE, D, device=DEVICE)
    v = torch.randn(11, G, SIZE, D, device=DEVICE)
    qkv = torch.randn(7, (H + 2 * G) * D, device=DEVICE)
    qkv[:, : H * D] = -40  # queries
    qkv[:, H * D : (H + G) * D] = 1  # keys
    tables = [list(range(9)), [9, 10]]
    for decode in (True, False):
        cached = Cached.build([1, 6], [64, 10], tables, SIZE, DEVICE, decode)
        TRITON.kv_write_(qkv, k, v, cached)
        got = TRITON.cached_attention(qkv, k, v, cached)
        want = REFERENCE.cached_attention(qkv.double(), k.double(), v.double(), cached)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
