"""The definition of attention over a paged cache."""


# T = new tokens, B = rows, H = query heads, G = key/value heads, d = head size, n = H / G
# P = pages of the longest row, S = parts of the longest decode row, W = queries of the widest

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.reference import attention_reference
from kernels.cached import Cached
from kernels.packed import Packed

# ---- reference: the definition


def kv_write_reference(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> None:
    """Token by token."""
    G, size, d = k.shape[1:]
    for t, (page, offset) in enumerate(
        zip(cached.write_page.tolist(), cached.write_offset.tolist(), strict=True)
    ):
        k[page, :, offset] = qkv[t, -2 * G * d : -G * d].view(G, d)
        v[page, :, offset] = qkv[t, -G * d :].view(G, d)


def cached_attention_reference(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """o (T, H d): each row's keys and values gathered, then plain attention of the whole row."""
    G, d = k.shape[1], k.shape[3]
    H = qkv.shape[1] // d - 2 * G
    outs, start = [], 0
    for new, context, table in zip(
        cached.query_lens, cached.context_lens, cached.tables, strict=True
    ):
        total = context + new
        pages = torch.tensor(table, device=k.device)
        row = [c[pages].transpose(1, 2).flatten(0, 1)[:total].flatten(1) for c in (k, v)]
        q = qkv.new_zeros(total, H * d)
        q[context:] = qkv[start : start + new, : H * d]
        whole = torch.cat((q, *row), dim=1)
        outs.append(attention_reference(whole, Packed.from_lengths([total]), H, G)[0][context:])
        start += new
    return torch.cat(outs) if outs else qkv[:, : H * d]
