"""The Triton kernels of sampling

A logit and its id make an integer key (`order_keys`), larger where sampling's order (falling logit,
then rising id) is earlier. No two keys of a row are equal, so its first tokens are those of its
largest keys, ties included, and torch.topk finds these.

first tokens   A row's first FIRST tokens (or top_k) are almost always all that is needed:
               top_p, min_p and the draw take one small program (`sample_sorted_kernel`).
the whole row  Where it may lie behind them (a flat distribution; top_k above FIRST) nothing is
               sorted. "The k largest", "the set that reaches top_p" and "the token at u" are one
               question: the largest key such that the keys from it on are enough, by count or by
               mass. `search_keys` answers it in a few passes over the row.

Which of the two a row takes depends on its own logits and the settings alone.

launches   1. penalise_kernel        the repetition penalty, into a copy of the logits
           2. sample_largest_kernel  the largest key and the log-sum-exp; greedy ends here
           3. sample_keys_kernel     all keys; then torch.topk
           4. sample_sorted_kernel   top-p, min-p, the draw among the first tokens; it ends here if
                                     top_k leaves no others
           5. sample_weights_kernel  before 4: exp((z - largest) / temperature) in fp64
           6. sample_draw_kernel     the rows that 4 left: top-k, top-p, min-p, the draw
           One program per row of logits in 2, 4 and 6: in 2 and 6 pipeline stages hide the latency
           of loads. The settings are constants of the kernels: a new setting compiles anew.
tiles      one shape class
"""

# B = rows of logits, V = vocabulary, L = length of the longest history
# IB = bits of an id, BV = logits of a step, BM = marks of a pass of the search

from __future__ import annotations

import torch
from torch import Tensor

from kernels.integers import cdiv, power_of_two
from kernels.launch.tile_config import tile_config
from kernels.launch.triton_launch import jit, launch, tl
from kernels.philox import mix, signed64, uniform_triton
from kernels.sampling.sample_rows import SampleRows

FIRST = 256  # first tokens of a row that are looked at before all others

# ---- integer keys, and the search over them


@jit
def order_keys(z, ids, IB: tl.constexpr):
    """int64 keys that fall where z falls and, in a tie, where the id rises.

    The upper bits are the 32 of z, mapped so that integers compare as the floats do: the bits of a
    negative float rise as it falls, so all but the sign are flipped. Then 0x80000000 makes them
    positive. The lower IB bits hold the largest id less this one.
    """
    z = tl.where(z == 0, 0.0, z)  # -0 is 0
    bits = z.to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    upper = (rising.to(tl.int64) + 0x80000000) << IB
    lower = (1 << IB) - 1 - ids
    return upper + lower


@jit
def id_of_key(key, V: tl.constexpr, IB: tl.constexpr):
    """The id in a key. The minimum: NaN can leave a number that is no key of the row."""
    LARGEST: tl.constexpr = (1 << IB) - 1
    lower = key & LARGEST
    return tl.minimum(LARGEST - lower, V - 1)


@jit
def search_keys(
    z_ptr,  # (V,) a row of logits
    weights_ptr,  # (V,) fp64, their weights; unread if COUNT
    low, end,  # keys
    fraction, target,  # masses, fp64
    COUNT: tl.constexpr, STRICT: tl.constexpr, MIN_P: tl.constexpr,
    V: tl.constexpr, IB: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The largest key in [low, end) such that the mass of all keys from it on reaches `target`.

    COUNT: every key weighs 1; MIN_P: smaller weights count as 0. A negative target becomes
    `fraction` of the mass from `low` on. STRICT: the mass must exceed the target.
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
            inside = ids < V
            z = tl.load(z_ptr + ids, mask=inside, other=0.0)  # (BV,)
            keys = order_keys(z.to(tl.float32), ids, IB)
            keys = tl.where(inside, keys, -1)
            if COUNT:
                weight = tl.full((BV,), 1, tl.int32)
            else:
                weight = tl.load(weights_ptr + ids, mask=inside, other=0.0)
                weight = tl.where(weight >= MIN_P, weight, 0.0)
            counts = keys[:, None] >= marks[None, :]  # (BV, BM)
            mass += tl.where(counts, weight[:, None], 0)
            between = (keys >= low) & (keys < end)
            first = tl.minimum(first, tl.where(between, keys, end))
            last = tl.maximum(last, tl.where(between, keys, low))
        total = tl.sum(mass, axis=0).to(tl.float64)  # (BM,), falling
        target = tl.where(target < 0, fraction * tl.max(total, axis=0), target)
        reaches = total > target if STRICT else total >= target
        n = tl.sum(reaches.to(tl.int64), axis=0)  # marks that reach it
        n = tl.maximum(n, 1)
        # The answer is a key of the row, so the interval also shrinks to the keys inside it.
        end = tl.minimum(end, low + n * step)
        end = tl.minimum(end, tl.max(last, axis=0) + 1)
        low = tl.maximum(low + (n - 1) * step, tl.min(first, axis=0))
    return low


# ---- kernels


@jit(varying=("L",))
def penalise_kernel(
    logits_ptr,  # (B, V)
    history_ptr,  # (B, L) int64, padded with -1
    z_ptr,  # (B, V) fp32: a copy of the logits, overwritten at the ids of the history
    L,
    PENALTY: tl.constexpr, V: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """The penalty on BL ids of one row's history.

    grid: (B, blocks of BL ids)
    """
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BL + tl.arange(0, BL)
    ids = tl.load(history_ptr + row * L + places, mask=places < L, other=-1)  # (BL,)
    known = (ids >= 0) & (ids < V)
    z = tl.load(logits_ptr + row * V + ids, mask=known, other=0.0).to(tl.float64)
    z = tl.where(z > 0, z / PENALTY, z * PENALTY)
    z_ptrs = z_ptr + row * V + ids
    tl.store(z_ptrs, z.to(tl.float32), mask=known)  # a repeated id writes the same twice


@jit
def sample_largest_kernel(
    logits_ptr,  # (B, V)
    z_ptr,  # (B, V): with the penalty
    largest_ptr, lse_ptr,  # (B,) int64 and fp32, written if not GREEDY
    tokens_ptr, logprobs_ptr,  # (B,) int64 and fp32, written if GREEDY
    GREEDY: tl.constexpr, V: tl.constexpr, IB: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One row's largest key of z and log-sum-exp of the plain logits; GREEDY: its token.

    grid: (B,)
    """
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BV,), tl.int64)
    m_i = tl.full((BV,), -3.0e38, tl.float32)  # finite: -inf - -inf would be NaN
    l_i = tl.zeros((BV,), tl.float32)  # maximum and sum per lane: one reduction at the end
    for start in tl.range(0, V, BV, num_stages=3):
        ids = start + tl.arange(0, BV)
        inside = ids < V
        x = tl.load(logits_ptr + row * V + ids, mask=inside, other=-float("inf")).to(tl.float32)
        z = tl.load(z_ptr + row * V + ids, mask=inside, other=-float("inf")).to(tl.float32)
        keys = tl.where(inside, order_keys(z, ids, IB), 0)
        largest = tl.maximum(largest, keys)
        m_new = tl.maximum(m_i, x)
        l_i = l_i * tl.exp(m_i - m_new) + tl.exp(x - m_new)
        m_i = m_new
    key = tl.max(largest, axis=0)
    m = tl.max(m_i, axis=0)
    total = tl.sum(l_i * tl.exp(m_i - m), axis=0)  # of exp(x - m)
    lse = m + tl.log(total)
    if GREEDY:
        token = id_of_key(key, V, IB)
        tl.store(tokens_ptr + row, token)
        x = tl.load(logits_ptr + row * V + token).to(tl.float32)
        tl.store(logprobs_ptr + row, x - lse)
    else:
        tl.store(largest_ptr + row, key)
        tl.store(lse_ptr + row, lse)


@jit
def sample_keys_kernel(
    z_ptr,  # (B, V): with the penalty
    keys_ptr,  # (B, V) int64, written
    V: tl.constexpr, IB: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BV of one row's keys.

    grid: (B, blocks of BV ids)
    """
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BV + tl.arange(0, BV)
    inside = ids < V
    z = tl.load(z_ptr + row * V + ids, mask=inside, other=0.0).to(tl.float32)
    keys = order_keys(z, ids, IB)
    keys_ptrs = keys_ptr + row * V + ids
    tl.store(keys_ptrs, keys, mask=inside)


@jit(varying=("seed_key", "blocks"))
def sample_sorted_kernel(
    logits_ptr,  # (B, V)
    z_ptr,  # (B, V): with the penalty
    keys_ptr,  # (B, K) int64: each row's largest keys, falling
    sums_ptr,  # (B, blocks) fp64: weights of all V, added up by blocks; unread if COMPLETE
    lse_ptr,  # (B,) fp32
    positions_ptr, samples_ptr, row_keys_ptr,  # (B,) int64
    tokens_ptr, logprobs_ptr,  # (B,) int64 and fp32, written
    found_ptr,  # (B,) int32, written if not COMPLETE: 1 where the token is among these K
    seed_key, blocks,
    K: tl.constexpr, COMPLETE: tl.constexpr,
    TEMPERATURE: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    V: tl.constexpr, IB: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One row's token among its first K, and its log-probability.

    COMPLETE: there are no other candidates. TOP_P 1 keeps all.

    grid: (B,)
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    places = tl.arange(0, BK)  # in the order of sampling
    inside = places < K
    keys_ptrs = keys_ptr + row * K + places
    keys = tl.load(keys_ptrs, mask=inside, other=0)  # (BK,)
    ids = id_of_key(keys, V, IB)
    likeliest = id_of_key(tl.load(keys_ptr + row * K), V, IB)
    z_max = tl.load(z_ptr + likeliest).to(tl.float64)
    z = tl.load(z_ptr + ids, mask=inside, other=0.0).to(tl.float64)
    weights = tl.where(inside, tl.exp((z - z_max) / TEMPERATURE), 0.0)  # falling, the first is 1
    cumulative = tl.cumsum(weights, axis=0)
    is_last = places == K - 1
    mass = tl.sum(tl.where(is_last, cumulative, 0.0), axis=0)  # of the K tokens
    total = mass  # of all candidates
    if not COMPLETE:
        sums = tl.zeros((BS,), tl.float64)
        for start in range(0, blocks, BS):
            block = start + tl.arange(0, BS)
            sums_ptrs = sums_ptr + row * blocks + block
            sums += tl.load(sums_ptrs, mask=block < blocks, other=0.0)
        total = tl.sum(sums, axis=0)

    # the tokens that are kept are the first n; `all_known` if none of them is behind the K
    kept = inside
    all_known = tl.full((), 1 if COMPLETE else 0, tl.int32)
    if TOP_P < 1:
        target = TOP_P * total
        short = inside & (cumulative < target)  # up to and with this token it is not reached
        kept = kept & (places <= tl.sum(short.to(tl.int32), axis=0))
        all_known |= (mass >= target).to(tl.int32)
    if MIN_P > 0:
        kept = kept & (weights >= MIN_P)
        least = tl.sum(tl.where(is_last, weights, 0.0), axis=0)
        all_known |= (least < MIN_P).to(tl.int32)
    n = tl.maximum(tl.sum(kept.to(tl.int32), axis=0), 1)  # NaN may keep none
    kept_mass = tl.sum(tl.where(places == n - 1, cumulative, 0.0), axis=0)

    position = tl.load(positions_ptr + row)
    sample = tl.load(samples_ptr + row)
    row_key = tl.load(row_keys_ptr + row)
    u = uniform_triton(seed_key, position, sample, row_key)
    if not COMPLETE:
        found = all_known
        if TOP_P >= 1 and MIN_P <= 0:  # all are kept
            kept_mass = total
            found = (mass > u * total).to(tl.int32)
        tl.store(found_ptr + row, found)
    passed = tl.sum((inside & (cumulative <= u * kept_mass)).to(tl.int32), axis=0)
    index = tl.minimum(passed, n - 1)
    token = tl.sum(tl.where(places == index, ids, 0), axis=0)
    x = tl.load(logits_ptr + row * V + token).to(tl.float32)
    tl.store(tokens_ptr + row, token)
    lse = tl.load(lse_ptr + row)
    tl.store(logprobs_ptr + row, x - lse)


@jit
def sample_weights_kernel(
    z_ptr,  # (B, V): with the penalty
    largest_ptr,  # (B,) int64
    weights_ptr,  # (B, V) fp64, written
    sums_ptr,  # (B, blocks) fp64, written: the sum of each block
    TEMPERATURE: tl.constexpr, V: tl.constexpr, IB: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BV of one row's weights: the largest logit's is 1.

    grid: (B, blocks of BV ids)
    """
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BV + tl.arange(0, BV)
    z = tl.load(z_ptr + row * V + ids, mask=ids < V, other=0.0).to(tl.float64)
    likeliest = id_of_key(tl.load(largest_ptr + row), V, IB)
    z_max = tl.load(z_ptr + row * V + likeliest).to(tl.float64)
    weights_ptrs = weights_ptr + row * V + ids
    weights = tl.exp((z - z_max) / TEMPERATURE)
    tl.store(weights_ptrs, weights, mask=ids < V)
    total = tl.sum(tl.where(ids < V, weights, 0.0), axis=0)
    tl.store(sums_ptr + row * tl.num_programs(1) + tl.program_id(1), total)


@jit(varying=("seed_key",))
def sample_draw_kernel(
    logits_ptr,  # (B, V)
    z_ptr,  # (B, V): with the penalty
    weights_ptr,  # (B, V) fp64
    largest_ptr, lse_ptr,  # (B,) int64 and fp32
    positions_ptr, samples_ptr, row_keys_ptr,  # (B,) int64
    tokens_ptr, logprobs_ptr,  # (B,) int64 and fp32, written
    found_ptr,  # (B,) int32: 1 where the token is known already; None if nowhere
    seed_key,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    V: tl.constexpr, IB: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One row's token and its log-probability.

    Keys in [low, end) are candidates: all at first, then top_k and top_p raise `low`. TOP_K 0 and
    TOP_P 1 keep all.

    grid: (B,)
    """
    row = tl.program_id(0).to(tl.int64)
    if found_ptr is not None:
        if tl.load(found_ptr + row) != 0:
            return
    z_ptr += row * V
    weights_ptr += row * V
    end = tl.load(largest_ptr + row) + 1
    low = tl.zeros((), tl.int64)
    whole = tl.full((), -1.0, tl.float64)  # a target that means: a fraction of the whole mass
    one = tl.full((), 1.0, tl.float64)
    if TOP_K > 0:
        low = search_keys(
            z_ptr, weights_ptr, low, end, one, one * TOP_K,
            COUNT=True, STRICT=False, MIN_P=0.0, V=V, IB=IB, BM=BM, BV=BV,
        )  # fmt: skip
    if TOP_P < 1:
        low = search_keys(
            z_ptr, weights_ptr, low, end, one * TOP_P, whole,
            COUNT=False, STRICT=False, MIN_P=0.0, V=V, IB=IB, BM=BM, BV=BV,
        )  # fmt: skip
    position = tl.load(positions_ptr + row)
    sample = tl.load(samples_ptr + row)
    row_key = tl.load(row_keys_ptr + row)
    u = uniform_triton(seed_key, position, sample, row_key)
    key = search_keys(
        z_ptr, weights_ptr, low, end, u, whole,
        COUNT=False, STRICT=True, MIN_P=MIN_P, V=V, IB=IB, BM=BM, BV=BV,
    )  # fmt: skip
    token = id_of_key(key, V, IB)
    x = tl.load(logits_ptr + row * V + token).to(tl.float32)
    tl.store(tokens_ptr + row, token)
    lse = tl.load(lse_ptr + row)
    tl.store(logprobs_ptr + row, x - lse)


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
    grid = (B, cdiv(L, config["BL"]))
    launch(
        penalise_kernel, grid, logits, history, z, L,
        PENALTY=rows.repetition_penalty, V=V, **config,
    )  # fmt: skip
    return z


def _first_keys(z: Tensor, count: int, sizes: dict[str, int]) -> Tensor:
    """The `count` largest keys of every row of z (B, V), falling: (B, count) int64."""
    B, V = z.shape
    keys = z.new_empty(B, V, dtype=torch.int64)
    config = tile_config("sample_keys_kernel", z.device)
    grid = (B, cdiv(V, config["BV"]))
    launch(sample_keys_kernel, grid, z, keys, **sizes, **config)
    return keys.topk(count, dim=-1).values.contiguous()


def _weights(
    z: Tensor, largest: Tensor, temperature: float, sizes: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """The weights (B, V) fp64 of z (B, V), and their sums (B, blocks) fp64 by blocks of ids."""
    B, V = z.shape
    config = tile_config("sample_weights_kernel", z.device)
    blocks = cdiv(V, config["BV"])
    weights = z.new_empty(B, V, dtype=torch.float64)
    sums = z.new_empty(B, blocks, dtype=torch.float64)
    launch(
        sample_weights_kernel, (B, blocks), z, largest, weights, sums,
        TEMPERATURE=temperature, **sizes, **config,
    )  # fmt: skip
    return weights, sums


def sample_triton(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
    """As `sample`. Two launches if greedy, five with a small top_k, else seven; one less without a
    penalty."""
    B, V = logits.shape
    columns = (rows.positions, rows.samples, rows.row_keys)
    shapes = [tuple(column.shape) for column in columns]
    assert shapes == [(B,)] * 3, f"logits {tuple(logits.shape)}, keys {shapes}"
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

    candidates = min(rows.top_k or V, V)
    columns = [column.contiguous() for column in columns]
    seed_key = signed64(mix("sample", rows.seed))
    found = weights = sums = None
    blocks = 0
    complete = candidates <= FIRST
    if not complete:
        weights, sums = _weights(z, largest, rows.temperature, sizes)
        blocks = sums.shape[1]
    if complete or candidates == V:  # else the mass of all candidates is not known yet
        count = min(candidates, FIRST)
        keys = _first_keys(z, count, sizes)
        if not complete:
            found = logits.new_empty(B, dtype=torch.int32)
        launch(
            sample_sorted_kernel, (B,),
            logits, z, keys, sums, lse, *columns, tokens, logprobs, found, seed_key, blocks,
            K=count, COMPLETE=complete, BK=power_of_two(count, least=16),
            TEMPERATURE=rows.temperature, TOP_P=rows.top_p, MIN_P=rows.min_p,
            **sizes, **tile_config("sample_sorted_kernel", device),
        )  # fmt: skip
    if not complete:
        top_k = candidates if candidates < V else 0
        launch(
            sample_draw_kernel, (B,),
            logits, z, weights, largest, lse, *columns, tokens, logprobs, found, seed_key,
            TOP_K=top_k, TOP_P=rows.top_p, MIN_P=rows.min_p,
            **sizes, **tile_config("sample_draw_kernel", device),
        )  # fmt: skip
    return tokens, logprobs
