"""The definition of sampling."""


# B = rows, V = vocabulary, L = length of the longest history

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dtypes import accumulate_dtype
from kernels.philox import uniform
from kernels.sampling.sample_rows import SampleRows

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
