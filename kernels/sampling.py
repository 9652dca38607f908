"""From logits to the next token

    l = logits; l[i] = l[i] / r if l[i] > 0 else l[i] r, once for each i in the history (r is the
    repetition penalty); z = l / temperature; keep the top_k largest; keep the smallest set of
    largest whose probability reaches top_p; drop what is less probable than min_p times the most
    probable; u = philox(seed, row, sample, position) in (0, 1); the token is the first, in order of
    falling probability (ties: lower id first), at which the cumulative probability of what was kept
    exceeds u.        temperature 0: the largest l.

The order is Hugging Face's, whose top-k differs in ties: it keeps all that equal the k-th.
The log-probability returned is that of the chosen token under the plain softmax of the logits.
A row's token depends on its logits, its history, its keys and the settings alone.
-inf is never drawn. A row with NaN or +inf gives some token of the vocabulary.

shapes     logits (B, V)    tokens (B,) int64    logprobs (B,) accumulation dtype
precision  softmax in max(fp32, dtype); l rounded to that; probabilities and their sums in fp64
triton     nothing is sorted. A logit and its id make an integer key, larger where the order above
           is earlier, so that "the k largest", "the set that reaches top_p" and "the token at u"
           each ask for the largest key k for which the count or mass of the keys >= k is enough.
           `_search` finds it: a pass over the row weighs BM keys spread over the interval left.
           A program is alone with its row: stages are what hides the latency of its loads.
           Launches: penalise; largest key and log-sum-exp (greedy ends here); weights; draw.
           The settings are constants of the kernels: a new setting compiles anew.
tiles      one shape class
"""

# B = rows, V = vocabulary, L = length of the longest history

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._triton import cdiv, jit, launch, tl
from kernels.native import at, library
from kernels.philox import mix, uniform, uniform_triton
from kernels.rowwise import rowwise
from kernels.spec import MODELS, Spec, accumulate_dtype
from kernels.tiles import tile


@dataclass(frozen=True)
class SampleRows:
    """What names the random number of each row, and the settings all rows share."""

    positions: Tensor  # (B,) int64: position of the token to be drawn
    samples: Tensor  # (B,) int64: which of several samples of the row
    row_keys: Tensor  # (B,) int64: 64-bit hash of the row id
    seed: int
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # 1 is none
    min_p: float = 0.0
    history: Tensor | None = None  # (B, L) int64: ids seen, padded with -1; for the penalty

    def __post_init__(self) -> None:
        assert self.repetition_penalty > 0 and 0 < self.top_p and 0 <= self.min_p <= 1, (
            f"repetition_penalty {self.repetition_penalty}, top_p {self.top_p}, min_p {self.min_p}"
        )
        assert self.repetition_penalty == 1 or self.history is not None, (
            f"repetition_penalty {self.repetition_penalty} needs the history"
        )


# ---- reference: the definition


def sample_reference(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
    """Row by row, token by token."""
    tokens = []
    plain = torch.log_softmax(logits.double(), dim=-1)
    draws = uniform(rows.positions, rows.samples, rows.row_keys, rows.seed).tolist()
    for b, (z, u) in enumerate(zip(logits.double(), draws, strict=True)):
        if rows.repetition_penalty != 1:
            z = z.clone()
            for i in set(rows.history[b].tolist()) - {-1}:
                z[i] *= rows.repetition_penalty ** (-1 if z[i] > 0 else 1)
        order = [i for _, i in sorted((-x, i) for i, x in enumerate(z.tolist()))]
        if rows.temperature == 0:
            tokens.append(order[0])
            continue
        order = order[: rows.top_k or None]
        p = torch.exp((z[order] - z[order[0]]) / rows.temperature).tolist()  # times a constant
        kept, reached, whole = 0, 0.0, sum(p)
        while kept < len(p) and reached < rows.top_p * whole:
            reached += p[kept]
            kept += 1
        p = [x for x in p[:kept] if x >= rows.min_p * p[0]]
        threshold, cumulative, i = u * sum(p), 0.0, -1
        while cumulative <= threshold and i + 1 < len(p):
            i += 1
            cumulative += p[i]
        tokens.append(order[i])
    chosen = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    logprobs = plain.gather(1, chosen[:, None])[:, 0]
    return chosen, logprobs.to(accumulate_dtype(logits.dtype))


# ---- torch


def _penalised(z: Tensor, rows: SampleRows) -> Tensor:
    """z (B, V) with the repetition penalty on every id of the history."""
    if rows.repetition_penalty == 1:
        return z
    B, V = z.shape
    seen = torch.zeros(B, V + 1, dtype=torch.bool, device=z.device)  # padding goes to column V
    seen.scatter_(1, rows.history.masked_fill(rows.history < 0, V), True)
    wide = z.double()  # rounded once: the same on every device
    wide = torch.where(wide > 0, wide / rows.repetition_penalty, wide * rows.repetition_penalty)
    return torch.where(seen[:, :V], wide.to(z.dtype), z)


def _top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of z (B, V) and their ids (B, k), lower ids first in a tie."""
    top, ids = z.topk(k, dim=-1)
    # which of its equals topk takes for the last places is not stated: take the lowest
    every = torch.arange(z.shape[1], device=z.device)
    equal = torch.where(z == top[:, -1:], every, z.shape[1]).topk(k, dim=-1, largest=False).values
    above = top > top[:, -1:]
    place = every[:k] - above.sum(-1, keepdim=True)
    ids = torch.where(above, ids, equal.gather(1, place.clamp(min=0)))
    ids, by_id = ids.sort(dim=-1)
    top, order = top.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return top, ids.gather(1, order)


def sample(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
    """The next token (B,) of every row and its log-probability (B,)."""
    plain = logits.to(accumulate_dtype(logits.dtype))
    z = _penalised(plain, rows)
    if rows.temperature == 0:
        tokens = z.max(-1).indices  # the first of equals; twice as fast as argmax on a CPU
    else:
        if rows.top_k and rows.top_k < z.shape[1]:
            top, ids = _top_k(z, rows.top_k)
        else:
            top, ids = z.sort(dim=-1, descending=True, stable=True)
        p = rowwise(torch.exp, (top.double() - top[:, :1]) / rows.temperature)
        cumulative = p.cumsum(-1)
        # the one that reaches top_p is in; never none
        kept = (cumulative - p < rows.top_p * cumulative[:, -1:]) & (p >= rows.min_p)
        reached = torch.where(kept, cumulative, 0).amax(-1, keepdim=True)
        u = uniform(rows.positions, rows.samples, rows.row_keys, rows.seed)[:, None]
        last = kept.sum(-1, keepdim=True) - 1
        index = torch.minimum((cumulative <= u * reached).sum(-1, keepdim=True), last)
        tokens = ids.gather(1, index)[:, 0]
    # log_softmax treats each row alone; logsumexp splits its sum over threads for a single row
    return tokens, torch.log_softmax(plain, dim=-1).gather(1, tokens[:, None])[:, 0]


# ---- native: fp32 on a CPU


def sample_native(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
    """As `sample`, in C (native/sample.c): no whole sort where top_k leaves few tokens."""
    B, V = logits.shape
    z = _penalised(logits, rows)
    tokens, logprobs = torch.empty(B, dtype=torch.int64), torch.empty(B)
    places = (rows.positions, rows.samples, rows.row_keys, rows.seed)
    u = uniform(*places) if rows.temperature else torch.zeros(B, dtype=torch.float64)
    outputs = (tokens.data_ptr(), logprobs.data_ptr())
    settings = (rows.temperature, rows.top_k, rows.top_p, rows.min_p)
    library().sample(at(logits), at(z), at(u, torch.float64), *outputs, B, V, *settings)
    return tokens, logprobs


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


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    b, v, *settings = shape
    rows = SampleRows(
        torch.arange(b),
        torch.randint(4, (b,), generator=g),
        torch.randint(-(2**62), 2**62, (b,), generator=g),
        7,
        *settings,
        history=torch.randint(-1, v, (b, v // 3 + 1), generator=g),  # repeats and padding
    )
    logits = (4 * torch.randn(b, v, generator=g, dtype=torch.float64)).round(decimals=1)  # ties
    return {"logits": logits, "rows": rows}


def _run(ops, i: dict) -> dict[str, Tensor]:
    tokens, logprobs = ops.sample(i["logits"], i["rows"])
    return {"tokens": tokens, "logprobs": logprobs}


# greedy, the usual, the whole vocabulary, everything
_SETTINGS = ((), (0.95, 50, 0.7), (1.0, 0, 0.95), (0.95, 50, 0.7, 1.1, 0.05))

SPEC = Spec(
    "sample",
    _make_inputs,
    _run,
    # rows, vocabulary, temperature, top_k, top_p, repetition penalty, min_p
    test_shapes=(
        (5, 300),
        (64, 300, 1.0),
        (64, 300, 0.95, 50, 0.7),
        (64, 300, 0.7, 0, 0.9),
        (8, 40, 1.5, 64),
        (16, 300, 1.0, 1),
        (16, 300, 0.0, 0, 1.0, 1.3),
        (64, 300, 1.2, 0, 1.0, 1.3),
        (64, 300, 1.5, 0, 1.0, 1.0, 0.1),
        (64, 300, 1.1, 40, 0.9, 1.2, 0.05),
        (0, 40, 1.0),
    ),
    bench_shapes=tuple(
        (b, m.V, *settings) for m in MODELS.values() for b in (1, 16, 64) for settings in _SETTINGS
    ),
    floor=1e-5,
    model_shapes=lambda m: ((2, m.V), (2, m.V, 0.95, 50, 0.7)),
    interpreter_shapes=(
        (5, 300),
        (5, 100, 1.0),
        (5, 100, 0.95, 50),
        (5, 100, 0.7, 0, 0.9),
        (5, 100, 0.95, 50, 0.7),
        (3, 40, 1.5, 64),
        (3, 37, 1.0, 1),
        (5, 100, 0.0, 0, 1.0, 1.3),
        (5, 100, 1.2, 0, 1.0, 1.3),
        (5, 100, 1.5, 0, 1.0, 1.0, 0.1),
        (5, 100, 1.1, 40, 0.9, 1.2, 0.05),
        (0, 40, 1.0),
    ),
)
