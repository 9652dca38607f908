"""The Triton kernels of sampling

Nothing is sorted. A logit and its id make an integer key (`order_keys`), larger where sampling's
order (falling logit, then rising id) is earlier. So "the k largest", "the set that reaches top_p"
and "the token at u" are one question: the largest key such that the keys from it on are enough, by
count or by mass. `search_keys` answers it in a few passes over the row.

launches   1. penalise_kernel        the repetition penalty, into a copy of the logits
           2. sample_largest_kernel  the largest key and the log-sum-exp; greedy ends here
           3. sample_weights_kernel  exp((z - largest) / temperature) in fp64
           4. sample_draw_kernel     top-k, top-p, the draw
           One program per row of logits in 2 and 4: their pipeline stages hide the latency of
           loads. The settings are constants of the kernels: a new setting compiles anew.
tiles      one shape class
"""

# B = rows of logits, V = vocabulary, L = length of the longest history
# IB = bits of an id, BV = logits of a step, BM = marks of a pass of the search

from __future__ import annotations

import torch
from torch import Tensor

from kernels.integers import cdiv
from kernels.launch.tile_config import tile_config
from kernels.launch.triton_launch import jit, launch, tl
from kernels.philox import mix, signed64, uniform_triton
from kernels.sampling.sample_rows import SampleRows

# ---- integer keys, and the search over them


@jit
def order_keys(z, ids, IB: tl.constexpr):
    """int64 keys that fall where z falls and, in a tie, where the id rises.

    The upper bits are the 32 of z, mapped so that integers compare as the floats do: the bits of a
    negative float rise as it falls, so all but the sign are flipped. Then 0x80000000 makes them
    positive. The lower IB bits hold the largest id less this one.
    """
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)  # -0 is 0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((rising.to(tl.int64) + 0x80000000) << IB) + ((1 << IB) - 1 - ids)


@jit
def id_of_key(key, V: tl.constexpr, IB: tl.constexpr):
    """The id in a key. The minimum: NaN can leave a number that is no key of the row."""
    return tl.minimum((1 << IB) - 1 - (key & ((1 << IB) - 1)), V - 1)


@jit
def search_keys(
    z_ptr, weights_ptr, low, end, fraction, target,
    COUNT: tl.constexpr, STRICT: tl.constexpr, MIN_P: tl.constexpr,
    V: tl.constexpr, IB: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The largest key in [low, end) such that the mass of all keys from it on reaches `target`.

    z_ptr, weights_ptr: a row of logits (V,) and of their weights. COUNT: every key weighs 1;
    MIN_P: smaller weights count as 0. A negative target becomes `fraction` of the mass from `low`
    on. STRICT: the mass must exceed the target.
    Each pass cuts the interval by BM evenly spaced marks, and weighs the keys from every mark on.
    Sums run in one order whatever the mark, so that the mass falls with the mark after rounding.
    """
    while end - low > 1:
        step = (end - low + BM - 1) // BM
        marks = low + step * tl.arange(0, BM)
        mass = tl.zeros((BV, BM), tl.int32 if COUNT else tl.float64)
        first = tl.zeros((BV,), tl.int64) + end  # smallest key of the row in the interval, per lane
        last = tl.zeros((BV,), tl.int64) + low  # largest key
        for start in tl.range(0, V, BV, num_stages=3):
            ids = start + tl.arange(0, BV)
            z = tl.load(z_ptr + ids, mask=ids < V, other=0.0).to(tl.float32)
            key = tl.where(ids < V, order_keys(z, ids, IB), -1)
            if COUNT:
                weight = tl.full((BV,), 1, tl.int32)
            else:
                weight = tl.load(weights_ptr + ids, mask=ids < V, other=0.0)
                weight = tl.where(weight >= MIN_P, weight, 0.0)
            mass += tl.where(key[:, None] >= marks[None, :], weight[:, None], 0)
            between = (key >= low) & (key < end)
            first = tl.minimum(first, tl.where(between, key, end))
            last = tl.maximum(last, tl.where(between, key, low))
        total = tl.sum(mass, axis=0).to(tl.float64)  # (BM,), falling
        target = tl.where(target < 0, fraction * tl.max(total, axis=0), target)
        reaches = total > target if STRICT else total >= target
        n = tl.maximum(tl.sum(reaches.to(tl.int64), axis=0), 1)  # marks that reach it
        # The answer is a key of the row, so the interval also shrinks to the keys inside it.
        end = tl.minimum(tl.minimum(end, low + n * step), tl.max(last, axis=0) + 1)
        low = tl.maximum(low + (n - 1) * step, tl.min(first, axis=0))
    return low


# ---- kernels


@jit(varying=("L",))
def penalise_kernel(
    logits_ptr, history_ptr, z_ptr, L,
    PENALTY: tl.constexpr, V: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """The penalty on BL ids of one row's history, from logits into z, a copy of them."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BL + tl.arange(0, BL)
    ids = tl.load(history_ptr + row * L + at, mask=at < L, other=-1)
    known = (ids >= 0) & (ids < V)
    z = tl.load(logits_ptr + row * V + ids, mask=known, other=0.0).to(tl.float64)
    z = tl.where(z > 0, z / PENALTY, z * PENALTY)
    tl.store(z_ptr + row * V + ids, z.to(tl.float32), mask=known)  # a repeat writes the same twice


@jit
def sample_largest_kernel(
    logits_ptr, z_ptr, largest_ptr, lse_ptr, tokens_ptr, logprobs_ptr,
    GREEDY: tl.constexpr, V: tl.constexpr, IB: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One row's largest key of z and log-sum-exp of the plain logits; GREEDY: its token."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BV,), tl.int64)
    m_i = tl.full((BV,), -3.0e38, tl.float32)  # finite: -inf - -inf would be NaN
    l_i = tl.zeros((BV,), tl.float32)  # maximum and sum per lane: one reduction at the end
    for start in tl.range(0, V, BV, num_stages=3):
        ids = start + tl.arange(0, BV)
        x = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=-float("inf")).to(tl.float32)
        z = tl.load(z_ptr + row * V + ids, mask=ids < V, other=-float("inf")).to(tl.float32)
        largest = tl.maximum(largest, tl.where(ids < V, order_keys(z, ids, IB), 0))
        m_new = tl.maximum(m_i, x)
        l_i = l_i * tl.exp(m_i - m_new) + tl.exp(x - m_new)
        m_i = m_new
    key = tl.max(largest, axis=0)
    m = tl.max(m_i, axis=0)
    lse = m + tl.log(tl.sum(l_i * tl.exp(m_i - m), axis=0))
    if GREEDY:
        token = id_of_key(key, V, IB)
        tl.store(tokens_ptr + row, token)
        tl.store(logprobs_ptr + row, tl.load(logits_ptr + row * V + token).to(tl.float32) - lse)
    else:
        tl.store(largest_ptr + row, key)
        tl.store(lse_ptr + row, lse)


@jit
def sample_weights_kernel(
    z_ptr, largest_ptr, weights_ptr,
    TEMPERATURE: tl.constexpr, V: tl.constexpr, IB: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BV of one row's weights (V,) fp64: the largest logit's is 1."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BV + tl.arange(0, BV)
    z = tl.load(z_ptr + row * V + ids, mask=ids < V, other=0.0).to(tl.float64)
    likeliest = id_of_key(tl.load(largest_ptr + row), V, IB)
    z_max = tl.load(z_ptr + row * V + likeliest).to(tl.float64)
    tl.store(weights_ptr + row * V + ids, tl.exp((z - z_max) / TEMPERATURE), mask=ids < V)


@jit(varying=("seed_key",))
def sample_draw_kernel(
    logits_ptr, z_ptr, weights_ptr, largest_ptr, lse_ptr, positions_ptr, samples_ptr,
    row_keys_ptr, tokens_ptr, logprobs_ptr, seed_key,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    V: tl.constexpr, IB: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One row's token and its log-probability.

    Keys in [low, end) are candidates: all at first, then top_k and top_p raise `low`. TOP_K 0 and
    TOP_P 1 keep all.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    weights_ptr += row * V
    end = tl.load(largest_ptr + row) + 1
    low = tl.zeros((), tl.int64)
    whole = tl.full((), -1.0, tl.float64)  # a target that means: a fraction of the whole mass
    one = tl.full((), 1.0, tl.float64)
    if TOP_K > 0:
        low = search_keys(
            z_ptr, weights_ptr, low, end, one, one * TOP_K, True, False, 0.0, V, IB, BM, BV
        )
    if TOP_P < 1:
        low = search_keys(
            z_ptr, weights_ptr, low, end, one * TOP_P, whole, False, False, 0.0, V, IB, BM, BV
        )
    u = uniform_triton(
        seed_key,
        tl.load(positions_ptr + row),
        tl.load(samples_ptr + row),
        tl.load(row_keys_ptr + row),
    )
    key = search_keys(z_ptr, weights_ptr, low, end, u, whole, False, True, MIN_P, V, IB, BM, BV)
    token = id_of_key(key, V, IB)
    x = tl.load(logits_ptr + row * V + token).to(tl.float32)
    tl.store(tokens_ptr + row, token)
    tl.store(logprobs_ptr + row, x - tl.load(lse_ptr + row))


# ---- launches


def _penalised(logits: Tensor, rows: SampleRows) -> Tensor:
    """z (B, V) fp32 with the penalty; without one the logits themselves."""
    if rows.repetition_penalty == 1:
        return logits
    B, V = logits.shape
    history = rows.history.contiguous()  # (B, L)
    assert history.shape[:1] == (B,), f"{B} rows, history {tuple(history.shape)}"
    L = history.shape[1]
    z = logits.to(torch.float32, copy=True)
    config = tile_config("penalise_kernel", logits.device)
    launch(
        penalise_kernel, (B, cdiv(L, config["BL"])), logits, history, z, L,
        PENALTY=rows.repetition_penalty, V=V, **config,
    )  # fmt: skip
    return z


def sample_triton(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
    """As `sample`: two launches if greedy, else four; one less without a penalty."""
    B, V = logits.shape
    columns = (rows.positions, rows.samples, rows.row_keys)
    assert all(c.shape == (B,) for c in columns), (
        f"logits {tuple(logits.shape)}, keys {[tuple(c.shape) for c in columns]}"
    )
    device = logits.device
    logits = logits.contiguous()
    z = _penalised(logits, rows)
    sizes = {"V": V, "IB": (V - 1).bit_length()}
    tokens = logits.new_empty(B, dtype=torch.int64)
    largest = logits.new_empty(B, dtype=torch.int64)
    logprobs = logits.new_empty(B, dtype=torch.float32)
    lse = logits.new_empty(B, dtype=torch.float32)
    greedy = rows.temperature == 0
    launch(
        sample_largest_kernel, (B,), logits, z, largest, lse, tokens, logprobs,
        GREEDY=greedy, **sizes, **tile_config("sample_largest_kernel", device),
    )  # fmt: skip
    if greedy:
        return tokens, logprobs

    weights = logits.new_empty(B, V, dtype=torch.float64)
    config = tile_config("sample_weights_kernel", device)
    launch(
        sample_weights_kernel, (B, cdiv(V, config["BV"])), z, largest, weights,
        TEMPERATURE=rows.temperature, **sizes, **config,
    )  # fmt: skip
    positions, samples, row_keys = (c.contiguous() for c in columns)
    launch(
        sample_draw_kernel, (B,),
        logits, z, weights, largest, lse, positions, samples, row_keys, tokens, logprobs,
        signed64(mix("sample", rows.seed)),
        TOP_K=rows.top_k if rows.top_k < V else 0, TOP_P=rows.top_p, MIN_P=rows.min_p,
        **sizes, **tile_config("sample_draw_kernel", device),
    )  # fmt: skip
    return tokens, logprobs
