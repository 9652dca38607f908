"""Sampling on torch operations."""


# B = rows, V = vocabulary, L = length of the longest history

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.rowwise import rowwise
from kernels.dtypes import accumulate_dtype
from kernels.philox import uniform
from kernels.sampling.sample_rows import SampleRows

# ---- torch


def penalised(z: Tensor, rows: SampleRows) -> Tensor:
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
    z = penalised(plain, rows)
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
