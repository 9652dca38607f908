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
    target = rows.top_p * sum(p)
    kept = 0
    reached = 0.0
    while kept < len(p) and reached < target:
        reached += p[kept]
        kept += 1
    least = rows.min_p * p[0]
    p = [x for x in p[:kept] if x >= least]
    threshold = u * sum(p)
    drawn = -1
    cumulative = 0.0
    while cumulative <= threshold and drawn + 1 < len(p):
        drawn += 1
        cumulative += p[drawn]
    return drawn


def _penalise(z: Tensor, history: list[int], penalty: float) -> Tensor:
    """A copy of z (V,) with the repetition penalty on every id of the history."""
    z = z.clone()
    for i in set(history) - {-1}:
        if z[i] > 0:
            z[i] *= penalty**-1
        else:
            z[i] *= penalty
    return z


def _falling(z: Tensor) -> list[int]:
    """The ids of z (V,) in falling order; of equal numbers the lower id first."""
    pairs = sorted((-x, i) for i, x in enumerate(z.tolist()))
    return [i for _, i in pairs]


def sample_reference(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
    """Tokens (B,) int64 and their log-probabilities (B,), from logits (B, V)."""
    plain = logits.double()
    uniforms = uniform(rows.positions, rows.samples, rows.row_keys, rows.seed).tolist()
    chosen = []
    for b, u in enumerate(uniforms):
        z = plain[b]  # (V,)
        if rows.repetition_penalty != 1:
            z = _penalise(z, rows.history[b].tolist(), rows.repetition_penalty)
        order = _falling(z)
        if rows.temperature == 0:
            chosen.append(order[0])
            continue
        if rows.top_k:
            order = order[: rows.top_k]
        exponents = (z[order] - z[order[0]]) / rows.temperature
        p = torch.exp(exponents)  # the probabilities, times a constant
        index = _draw(p.tolist(), u, rows)
        chosen.append(order[index])
    tokens = torch.tensor(chosen, dtype=torch.int64, device=logits.device)
    logprobs = torch.log_softmax(plain, dim=-1)  # (B, V)
    logprobs = logprobs.gather(1, tokens[:, None])[:, 0]  # (B,)
    return tokens, logprobs.to(accumulate_dtype(logits.dtype))
