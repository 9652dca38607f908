"""The definition of attention over a paged cache. In fp64 it is the truth for the other forms."""

# T = new tokens, H = query heads, G = key/value heads, d = head size

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.reference import attention_reference
from kernels.cached import Cached
from kernels.packed import Packed


def kv_write_reference(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> None:
    """Token by token, from qkv (T, (H + 2G) d) into k and v (pages, G, page size, d)."""
    G, d = k.shape[1], k.shape[3]
    pages = cached.write_page.tolist()
    offsets = cached.write_offset.tolist()
    for token, (page, offset) in enumerate(zip(pages, offsets, strict=True)):
        k[page, :, offset] = qkv[token, -2 * G * d : -G * d].view(G, d)
        v[page, :, offset] = qkv[token, -G * d :].view(G, d)


def _gather(cache: Tensor, pages: list[int], tokens: int) -> Tensor:
    """The first `tokens` keys (or values) of a sequence from its pages: (tokens, G d)."""
    own = cache[torch.tensor(pages, device=cache.device)]  # (P, G, page size, d)
    return own.transpose(1, 2).flatten(0, 1)[:tokens].flatten(1)


def cached_attention_reference(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """o (T, H d): each sequence's keys and values gathered, then plain attention of all of it."""
    G, d = k.shape[1], k.shape[3]
    H = qkv.shape[1] // d - 2 * G
    outputs, start = [], 0
    for new, context, pages in zip(
        cached.query_lens, cached.context_lens, cached.tables, strict=True
    ):
        total = context + new
        q = qkv.new_zeros(total, H * d)  # cached tokens ask nothing: their outputs are dropped
        q[context:] = qkv[start : start + new, : H * d]
        whole = torch.cat((q, _gather(k, pages, total), _gather(v, pages, total)), dim=1)
        o, _ = attention_reference(whole, Packed.from_lengths([total]), H, G)
        outputs.append(o[context:])
        start += new
    return torch.cat(outputs) if outputs else qkv[:, : H * d]
