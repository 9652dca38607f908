"""The definition of attention over a paged cache. In fp64 it is the truth for the other forms."""

# T = new tokens, P = pages of a sequence, size = tokens of a page
# H = query heads, G = key/value heads, d = head size

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.reference import attention_reference
from kernels.cached import Cached
from kernels.packed import Packed


def kv_write_reference(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> None:
    """Token by token, from qkv (T, (H + 2G) d) into k and v (pages, G, size, d)."""
    G, d = k.shape[1], k.shape[3]
    pages = cached.write_page.tolist()
    offsets = cached.write_offset.tolist()
    for token, (page, offset) in enumerate(zip(pages, offsets, strict=True)):
        heads = qkv[token].view(-1, d)  # (H + 2G, d)
        k[page, :, offset] = heads[-2 * G : -G]
        v[page, :, offset] = heads[-G:]


def _gather(cache: Tensor, pages: tuple[int, ...], tokens: int) -> Tensor:
    """The first `tokens` keys (or values) of a sequence from its pages: (tokens, G d)."""
    own = cache[torch.tensor(pages, device=cache.device)]  # (P, G, size, d)
    by_token = own.transpose(1, 2).flatten(0, 1)  # (P size, G, d)
    return by_token[:tokens].flatten(1)


def cached_attention_reference(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """o (T, H d): each sequence's keys and values gathered, then plain attention of all of it."""
    G, d = k.shape[1], k.shape[3]
    H = qkv.shape[1] // d - 2 * G
    new_q = qkv[:, : H * d]  # (T, H d)
    outputs = []
    start = 0
    sequences = zip(cached.query_lens, cached.context_lens, cached.tables, strict=True)
    for new, context, pages in sequences:
        total = context + new
        q = qkv.new_zeros(total, H * d)  # 0 for cached tokens: their outputs are dropped
        q[context:] = new_q[start : start + new]
        keys = _gather(k, pages, total)
        values = _gather(v, pages, total)
        whole = torch.cat((q, keys, values), dim=1)  # (total, (H + 2G) d)
        o, _ = attention_reference(whole, Packed.from_lengths([total]), H, G)
        outputs.append(o[context:])
        start += new
    if not outputs:
        return new_q
    return torch.cat(outputs)
