"""From logits to the next token

    z = logits / temperature; keep the top_k largest; keep the smallest set of largest whose
    probability reaches top_p; u = philox(seed, row, sample, position) in (0, 1);
    the token is the first, in order of falling probability (ties: lower id first), at which the
    cumulative probability of what was kept exceeds u.        temperature 0: the largest logit.

The order temperature, top-k, top-p is Hugging Face's. The log-probability returned is that of the
chosen token under the plain softmax of the logits (temperature 1, nothing cut).
A row's token depends on its logits, its keys and the settings alone.

shapes     logits (B, V)    tokens (B,) int64    logprobs (B,) accumulation dtype
precision  softmax in max(fp32, dtype); the cumulative sum in fp64, a fixed order per row
"""

# B = rows, V = vocabulary

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.philox import uniform
from kernels.spec import Spec, accumulate_dtype


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


# ---- reference: the definition


def sample_reference(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
    """Row by row, token by token."""
    tokens = []
    plain = torch.log_softmax(logits.double(), dim=-1)
    draws = uniform(rows.positions, rows.samples, rows.row_keys, rows.seed).tolist()
    for z, u in zip(logits.double(), draws, strict=True):
        order = [i for _, i in sorted((-x, i) for i, x in enumerate(z.tolist()))]
        if rows.temperature == 0:
            tokens.append(order[0])
            continue
        order = order[: rows.top_k or None]
        p = torch.softmax(z[order] / rows.temperature, dim=-1).tolist()
        kept, reached = 0, 0.0
        while kept < len(p) and reached < rows.top_p:
            reached += p[kept]
            kept += 1
        threshold, cumulative, i = u * reached, 0.0, -1
        while cumulative <= threshold and i + 1 < kept:
            i += 1
            cumulative += p[i]
        tokens.append(order[i])
    chosen = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    logprobs = plain.gather(1, chosen[:, None])[:, 0]
    return chosen, logprobs.to(accumulate_dtype(logits.dtype))


# ---- torch


def sample(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
    """The next token (B,) of every row and its log-probability (B,)."""
    z = logits.to(accumulate_dtype(logits.dtype))
    if rows.temperature == 0:
        tokens = z.argmax(-1)
    else:
        if rows.top_k and rows.top_k < z.shape[1]:
            top, ids = z.topk(rows.top_k, dim=-1)  # sorted, but in no stated order within a tie
            ids, by_id = ids.sort(dim=-1)
            top, order = top.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
            ids = ids.gather(1, order)
        else:
            top, ids = z.sort(dim=-1, descending=True, stable=True)
        p = torch.softmax(top.double() / rows.temperature, dim=-1)
        cumulative = p.cumsum(-1)
        kept = cumulative - p < rows.top_p  # the one that reaches top_p is in; never none
        reached = torch.where(kept, cumulative, 0).amax(-1, keepdim=True)
        u = uniform(rows.positions, rows.samples, rows.row_keys, rows.seed)[:, None]
        last = kept.sum(-1, keepdim=True) - 1
        index = torch.minimum((cumulative <= u * reached).sum(-1, keepdim=True), last)
        tokens = ids.gather(1, index)[:, 0]
    # log_softmax treats each row alone; logsumexp splits its sum over threads for a single row
    return tokens, torch.log_softmax(z, dim=-1).gather(1, tokens[:, None])[:, 0]


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    b, v, *settings = shape
    rows = SampleRows(
        torch.arange(b),
        torch.randint(4, (b,), generator=g),
        torch.randint(2**62, (b,), generator=g),
        7,
        *settings,
    )
    logits = (4 * torch.randn(b, v, generator=g, dtype=torch.float64)).round(decimals=1)  # ties
    return {"logits": logits, "rows": rows}


def _run(ops, i: dict) -> dict[str, Tensor]:
    tokens, logprobs = ops.sample(i["logits"], i["rows"])
    return {"tokens": tokens, "logprobs": logprobs}


SPEC = Spec(
    "sample",
    _make_inputs,
    _run,
    test_shapes=(
        (5, 300),
        (64, 300, 1.0),
        (64, 300, 0.95, 50, 0.7),
        (64, 300, 0.7, 0, 0.9),
        (8, 40, 1.5, 64),
        (16, 300, 1.0, 1),
    ),
    bench_shapes=((32, 49152, 0.95, 50, 0.7), (256, 32000, 0.95, 50, 0.7)),
    floor=1e-5,
)
