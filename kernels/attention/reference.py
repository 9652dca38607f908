"""The definition of attention, in fp64 the truth that every form is held to."""


# T = tokens, L = tokens of a row, H = query heads, G = key/value heads, d = head size, n = H / G

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dtypes import accumulate_dtype
from kernels.packed import Packed
from kernels.spec import autograd

# ---- reference: the definition


def attention_reference(qkv: Tensor, packed: Packed, H: int, G: int) -> tuple[Tensor, Tensor]:
    """o (T, H d) and lse (T, H); differentiable."""
    heads = qkv.unflatten(1, (H + 2 * G, -1))
    outs, sums = [], []
    for (start, end), context in zip(packed.rows, packed.contexts, strict=True):
        row = torch.cat((heads[:context], heads[start:end])).to(accumulate_dtype(qkv.dtype))
        q, k, v = row.transpose(0, 1).split((H, G, G))  # (H or G, context + L, d)
        q = q[:, context:]
        k, v = (t.repeat_interleave(H // G, dim=0) for t in (k, v))
        future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        future = future.triu(1 + context)
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
        outs.append((torch.softmax(scores, dim=-1) @ v).transpose(0, 1).flatten(1))
        sums.append(torch.logsumexp(scores, dim=-1).T)
    if not outs:
        return qkv[:, : H * heads.shape[2]], qkv.new_zeros(0, H)
    return torch.cat(outs).to(qkv.dtype), torch.cat(sums)


def attention_reference_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, packed: Packed, H: int, G: int
) -> Tensor:
    """By autograd."""
    if not packed.rows:
        return torch.zeros_like(qkv)
    return autograd(lambda qkv: attention_reference(qkv, packed, H, G)[0], (qkv,), do)[0]
