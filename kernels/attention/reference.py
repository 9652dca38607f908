"""The definition of attention. In fp64 it is the truth that every other form is compared with."""

# T = tokens, L = tokens of a row, H = query heads, G = key/value heads, d = head size, n = H / G

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dtypes import accumulate_dtype
from kernels.packed import Packed
from kernels.spec import autograd


def attention_reference(qkv: Tensor, packed: Packed, H: int, G: int) -> tuple[Tensor, Tensor]:
    """o (T, H d) and lse (T, H) of qkv (T, (H + 2G) d); differentiable.

    Row by row; a row's queries see the shared prefix (`context` tokens) and the row itself.
    """
    n = H // G
    acc = accumulate_dtype(qkv.dtype)
    heads = qkv.unflatten(1, (H + 2 * G, -1))  # (T, H + 2G, d)
    d = heads.shape[2]
    outputs, log_sums = [], []
    for (start, end), context in zip(packed.rows, packed.contexts, strict=True):
        row = torch.cat((heads[:context], heads[start:end]))  # (context + L, H + 2G, d)
        row = row.to(acc).transpose(0, 1)  # (H + 2G, context + L, d)
        q, k, v = row.split((H, G, G))
        q = q[:, context:]  # (H, L, d)
        k = k.repeat_interleave(n, dim=0)  # (H, context + L, d)
        v = v.repeat_interleave(n, dim=0)  # (H, context + L, d)
        scores = q @ k.transpose(1, 2) * d**-0.5  # (H, L, context + L)
        ones = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
        future = ones.triu(1 + context)  # (L, context + L)
        scores = scores.masked_fill(future, -torch.inf)
        o = torch.softmax(scores, dim=-1) @ v  # (H, L, d)
        lse = torch.logsumexp(scores, dim=-1)  # (H, L)
        outputs.append(o.transpose(0, 1).flatten(1))  # (L, H d)
        log_sums.append(lse.T)  # (L, H)
    if not outputs:
        return qkv[:, : H * d], qkv.new_zeros(0, H)
    return torch.cat(outputs).to(qkv.dtype), torch.cat(log_sums)


def attention_reference_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, packed: Packed, H: int, G: int
) -> Tensor:
    """dqkv (T, (H + 2G) d), by autograd."""
    if not packed.rows:
        return torch.zeros_like(qkv)

    def output(qkv: Tensor) -> Tensor:
        o, _ = attention_reference(qkv, packed, H, G)
        return o

    (dqkv,) = autograd(output, (qkv,), do)
    return dqkv
