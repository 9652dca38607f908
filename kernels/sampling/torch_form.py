"""Sampling on torch operations."""

# B = rows of logits, V = vocabulary, k = candidates of a row: top_k, or all V
# L = length of the longest history

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.rowwise import rowwise
from kernels.dtypes import accumulate_dtype
from kernels.philox import uniform
from kernels.sampling.sample_rows import SampleRows


def penalised(z: Tensor, rows: SampleRows) -> Tensor:
    """z (B, V) with the repetition penalty on every id of the history."""
    if rows.repetition_penalty == 1:
        return z
    B, V = z.shape
    penalty = rows.repetition_penalty
    ids = rows.history.masked_fill(rows.history < 0, V)  # (B, L), padding goes to column V
    seen = torch.zeros(B, V + 1, dtype=torch.bool, device=z.device)
    seen.scatter_(1, ids, True)
    wide = z.double()  # rounded once: the same on every device
    wide = torch.where(wide > 0, wide / penalty, wide * penalty)
    return torch.where(seen[:, :V], wide.to(z.dtype), z)


def _top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of z (B, V), falling, and their ids (B, k); ties: lower id first.

    torch does not say which of several equal numbers topk takes for the last places. Numbers above
    the k-th are certain; the places left go to the lowest ids that equal it.
    """
    V = z.shape[1]
    top, ids = z.topk(k, dim=-1)  # (B, k)
    kth = top[:, -1:]  # (B, 1)
    every_id = torch.arange(V, device=z.device)
    # the ids that equal the k-th number, rising; V stands for "no more"
    tied = torch.where(z == kth, every_id, V)  # (B, V)
    tied = tied.topk(k, dim=-1, largest=False).values  # (B, k)
    above = top > kth
    place = every_id[:k] - above.sum(-1, keepdim=True)  # among the ties; negative above them
    tied = tied.gather(1, place.clamp(min=0))
    ids = torch.where(above, ids, tied)
    # by id first, so that the stable sort by value leaves lower ids first in a tie
    ids, by_id = ids.sort(dim=-1)
    top = top.gather(1, by_id)
    top, by_value = top.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, by_value)
    return top, ids


def _draw(z: Tensor, rows: SampleRows) -> Tensor:
    """The tokens (B,) drawn from z (B, V) at a temperature above 0."""
    if rows.top_k and rows.top_k < z.shape[1]:
        top, ids = _top_k(z, rows.top_k)  # (B, k)
    else:
        top, ids = z.sort(dim=-1, descending=True, stable=True)
    p = (top.double() - top[:, :1]) / rows.temperature
    p = rowwise(torch.exp, p)  # (B, k) the probabilities, times a constant: the first is 1
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1:]  # (B, 1)
    # top_p keeps a token if those before it have not reached top_p yet: always the first
    in_top_p = cumulative - p < rows.top_p * total
    kept = in_top_p & (p >= rows.min_p)
    kept_mass = torch.where(kept, cumulative, 0).amax(-1, keepdim=True)  # (B, 1)
    u = uniform(rows.positions, rows.samples, rows.row_keys, rows.seed)[:, None]  # (B, 1)
    passed = (cumulative <= u * kept_mass).sum(-1, keepdim=True)  # tokens before the drawn one
    last = kept.sum(-1, keepdim=True) - 1
    index = torch.minimum(passed, last)
    return ids.gather(1, index)[:, 0]


def sample(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
    """The next token (B,) of every row and its log-probability (B,), from logits (B, V)."""
    plain = logits.to(accumulate_dtype(logits.dtype))
    z = penalised(plain, rows)
    if rows.temperature == 0:
        tokens = z.max(-1).indices  # of equals the first; twice as fast as argmax on a CPU
    else:
        tokens = _draw(z, rows)
    # log_softmax treats each row alone; logsumexp splits its sum over threads for a single row
    logprobs = torch.log_softmax(plain, dim=-1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]
