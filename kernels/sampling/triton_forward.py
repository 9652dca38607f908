"""The Triton kernels of sampling."""


# B = rows, V = vocabulary, L = length of the longest history

from __future__ import annotations

import torch
from torch import Tensor

from kernels.launch.tile_config import tile
from kernels.launch.triton_launch import cdiv, jit, launch, tl
from kernels.philox import mix, uniform_triton
from kernels.sampling.sample_rows import SampleRows

# ---- triton


@jit
def _keys(z, ids, IB: tl.constexpr):
    """The order by falling z, then rising id, as falling integers: 32 bits of z, IB of the id."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)  # -0 is 0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((rising.to(tl.int64) + 0x80000000) << IB) + ((1 << IB) - 1 - ids)


@jit
def _key_id(key, V: tl.constexpr, IB: tl.constexpr):
    """The id of a key; NaN can leave a number that is nobody's key, hence the minimum."""
    return tl.minimum((1 << IB) - 1 - (key & ((1 << IB) - 1)), V - 1)


@jit
def _search(
    z_ptr, weights_ptr, low, end, fraction, target,
    COUNT: tl.constexpr, STRICT: tl.constexpr, MIN_P: tl.constexpr,
    V: tl.constexpr, IB: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The largest key in [low, end) such that the mass of all keys from it on reaches `target`.

    A negative target becomes `fraction` of the mass from `low` on. COUNT: every key weighs 1.
    Sums run in one order whatever the mark, so that the mass falls with the mark after rounding.
    """
    while end - low > 1:
        step = (end - low + BM - 1) // BM
        marks = low + step * tl.arange(0, BM)
        mass = tl.zeros((BV, BM), tl.int32 if COUNT else tl.float64)
        first = tl.zeros((BV,), tl.int64) + end
        last = tl.zeros((BV,), tl.int64) + low
        for start in tl.range(0, V, BV, num_stages=3):
            ids = start + tl.arange(0, BV)
            z = tl.load(z_ptr + ids, mask=ids < V, other=0.0).to(tl.float32)
            key = tl.where(ids < V, _keys(z, ids, IB), -1)
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
        n = tl.maximum(tl.sum(reaches.to(tl.int64), axis=0), 1)
        # the answer is some row's key, so the interval shrinks to the keys that are in it
        end = tl.minimum(tl.minimum(end, low + n * step), tl.max(last, axis=0) + 1)
        low = tl.maximum(low + (n - 1) * step, tl.min(first, axis=0))
    return low


@jit(varying=("L",))
def penalise_kernel(
    logits_ptr, history_ptr, z_ptr, L,
    PENALTY: tl.constexpr, V: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BL + tl.arange(0, BL)
    ids = tl.load(history_ptr + row * L + at, mask=at < L, other=-1)
    known = (ids >= 0) & (ids < V)
    z = tl.load(logits_ptr + row * V + ids, mask=known, other=0.0).to(tl.float64)
    z = tl.where(z > 0, z / PENALTY, z * PENALTY)
    tl.store(z_ptr + row * V + ids, z.to(tl.float32), mask=known)  # twice the same for a repeat


@jit
def sample_largest_kernel(
    logits_ptr, z_ptr, largest_ptr, lse_ptr, tokens_ptr, logprobs_ptr,
    GREEDY: tl.constexpr, V: tl.constexpr, IB: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BV,), tl.int64)
    m = tl.full((BV,), -3.0e38, tl.float32)  # finite: -inf - -inf would be NaN
    total = tl.zeros((BV,), tl.float32)
    for start in tl.range(0, V, BV, num_stages=3):
        ids = start + tl.arange(0, BV)
        x = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=-float("inf")).to(tl.float32)
        z = tl.load(z_ptr + row * V + ids, mask=ids < V, other=-float("inf")).to(tl.float32)
        largest = tl.maximum(largest, tl.where(ids < V, _keys(z, ids, IB), 0))
        above = tl.maximum(m, x)
        total = total * tl.exp(m - above) + tl.exp(x - above)
        m = above
    key, top = tl.max(largest, axis=0), tl.max(m, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp(m - top), axis=0))
    if GREEDY:
        token = _key_id(key, V, IB)
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
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BV + tl.arange(0, BV)
    z = tl.load(z_ptr + row * V + ids, mask=ids < V, other=0.0).to(tl.float64)
    most = tl.load(z_ptr + row * V + _key_id(tl.load(largest_ptr + row), V, IB)).to(tl.float64)
    tl.store(weights_ptr + row * V + ids, tl.exp((z - most) / TEMPERATURE), mask=ids < V)


@jit(varying=("seed_key",))
def sample_draw_kernel(
    logits_ptr, z_ptr, weights_ptr, largest_ptr, lse_ptr, positions_ptr, samples_ptr,
    row_keys_ptr, tokens_ptr, logprobs_ptr, seed_key,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    V: tl.constexpr, IB: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    weights_ptr += row * V
    end = tl.load(largest_ptr + row) + 1
    low = tl.zeros((), tl.int64)
    whole = tl.full((), -1.0, tl.float64)
    one = tl.full((), 1.0, tl.float64)
    if TOP_K > 0:
        low = _search(
            z_ptr, weights_ptr, low, end, one, one * TOP_K, True, False, 0.0, V, IB, BM, BV
        )
    if TOP_P < 1:
        low = _search(
            z_ptr, weights_ptr, low, end, one * TOP_P, whole, False, False, 0.0, V, IB, BM, BV
        )
    u = uniform_triton(
        seed_key,
        tl.load(positions_ptr + row),
        tl.load(samples_ptr + row),
        tl.load(row_keys_ptr + row),
    )
    key = _search(z_ptr, weights_ptr, low, end, u, whole, False, True, MIN_P, V, IB, BM, BV)
    token = _key_id(key, V, IB)
    x = tl.load(logits_ptr + row * V + token).to(tl.float32)
    tl.store(tokens_ptr + row, token)
    tl.store(logprobs_ptr + row, x - tl.load(lse_ptr + row))


def sample_triton(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
    """As `sample`."""
    B, V = logits.shape
    columns = (rows.positions, rows.samples, rows.row_keys)
    assert all(c.shape == (B,) for c in columns), (
        f"logits {tuple(logits.shape)}, keys {[tuple(c.shape) for c in columns]}"
    )
    logits = z = logits.contiguous()
    tiles = {
        name: tile(f"{name}_kernel", logits.device)
        for name in ("penalise", "sample_largest", "sample_weights", "sample_draw")
    }
    if rows.repetition_penalty != 1:
        history = rows.history.contiguous()
        assert history.shape[:1] == (B,), f"{B} rows, history {tuple(history.shape)}"
        z = logits.to(torch.float32, copy=True)
        grid = (B, cdiv(history.shape[1], tiles["penalise"]["BL"]))
        args = (logits, history, z, history.shape[1])
        constants = {"PENALTY": rows.repetition_penalty, "V": V, **tiles["penalise"]}
        launch(penalise_kernel, grid, *args, **constants)
    sizes = {"V": V, "IB": (V - 1).bit_length()}
    tokens, largest = (logits.new_empty(B, dtype=torch.int64) for _ in range(2))
    logprobs, lse = (logits.new_empty(B, dtype=torch.float32) for _ in range(2))
    args = (logits, z, largest, lse, tokens, logprobs)
    greedy = rows.temperature == 0
    launch(sample_largest_kernel, (B,), *args, GREEDY=greedy, **sizes, **tiles["sample_largest"])
    if greedy:
        return tokens, logprobs
    weights = logits.new_empty(B, V, dtype=torch.float64)
    grid = (B, cdiv(V, tiles["sample_weights"]["BV"]))
    constants = {"TEMPERATURE": rows.temperature, **sizes, **tiles["sample_weights"]}
    launch(sample_weights_kernel, grid, z, largest, weights, **constants)
    key = mix("sample", rows.seed)
    args = (logits, z, weights, largest, lse, *(c.contiguous() for c in columns))
    args += (tokens, logprobs, key - 2**64 if key >= 2**63 else key)
    top_k = rows.top_k if rows.top_k < V else 0
    constants = {"TOP_K": top_k, "TOP_P": rows.top_p, "MIN_P": rows.min_p, **sizes}
    launch(sample_draw_kernel, (B,), *args, **constants, **tiles["sample_draw"])
    return tokens, logprobs
