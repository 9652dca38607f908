"""The definition of sampling, row by row and token by token."""

# B = rows of logits, V = vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dtypes import accumulate_dtype
from kernels.philox import uniform
from kernels.sampling.sample_rows import SampleRows


def _draw(p: list[float], u: float, rows: SampleRows) -> int:
    """Which of the weights p, sorted and falling, is drawn at u in (0, 1).

    p need not add up to 1: only its ratios matter.
    """
    kept, reached, total = 0, 0.0, sum(p)
    while kept < len(p) and reached < rows.top_p * total:
        reached += p[kept]
        kept += 1
    p = [x for x in p[:kept] if x >= rows.min_p * p[0]]
    threshold, cumulative, i = u * sum(p), 0.0, -1
    while cumulative <= threshold and i + 1 < len(p):
        i += 1
        cumulative += p[i]
    return i


def sample_reference(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
    """Tokens (B,) int64 and their log-probabilities (B,) of logits (B, V)."""
    tokens = []
    uniforms = uniform(rows.positions, rows.samples, rows.row_keys, rows.seed).tolist()
    for b, (z, u) in enumerate(zip(logits.double(), uniforms, strict=True)):  # z (V,)
        if rows.repetition_penalty != 1:
            z = z.clone()
            for i in set(rows.history[b].tolist()) - {-1}:
                if z[i] > 0:
                    z[i] *= rows.repetition_penalty**-1
                else:
                    z[i] *= rows.repetition_penalty
        order = [i for _, i in sorted((-x, i) for i, x in enumerate(z.tolist()))]
        if rows.temperature == 0:
            tokens.append(order[0])
            continue
        if rows.top_k:
            order = order[: rows.top_k]
        p = torch.exp((z[order] - z[order[0]]) / rows.temperature)  # times a constant
        tokens.append(order[_draw(p.tolist(), u, rows)])
    chosen = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    logprobs = torch.log_softmax(logits.double(), dim=-1).gather(1, chosen[:, None])[:, 0]
    return chosen, logprobs.to(accumulate_dtype(logits.dtype))
