"""The definition of attention. In fp64 it is the truth that every other form is compared with."""

# T = tokens, L = tokens of a row, H = query heads, G = key/value heads, d = head size

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
    heads = qkv.unflatten(1, (H + 2 * G, -1))  # (T, H + 2G, d)
    outputs, log_sums = [], []
    for (start, end), context in zip(packed.rows, packed.contexts, strict=True):
        row = torch.cat((heads[:context], heads[start:end]))  # (context + L, H + 2G, d)
        row = row.to(accumulate_dtype(qkv.dtype))
        q, k, v = row.transpose(0, 1).split((H, G, G))  # (H or G, context + L, d)
        q = q[:, context:]  # (H, L, d)
        k = k.repeat_interleave(H // G, dim=0)  # (H, context + L, d)
        v = v.repeat_interleave(H // G, dim=0)
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5  # (H, L, context + L)
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(future.triu(1 + context), -torch.inf)
        outputs.append((torch.softmax(scores, dim=-1) @ v).transpose(0, 1).flatten(1))
        log_sums.append(torch.logsumexp(scores, dim=-1).T)
    if not outputs:
        return qkv[:, : H * heads.shape[2]], qkv.new_zeros(0, H)
    return torch.cat(outputs).to(qkv.dtype), torch.cat(log_sums)


def attention_reference_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, packed: Packed, H: int, G: int
) -> Tensor:
    """dqkv (T, (H + 2G) d), by autograd."""
    if not packed.rows:
        return torch.zeros_like(qkv)
    return autograd(lambda qkv: attention_reference(qkv, packed, H, G)[0], (qkv,), do)[0]
