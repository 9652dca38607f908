"""Attention over a paged cache in C (kernels/cpu/native/attention.c), for fp32 on a CPU."""

# T = new tokens, B = sequences, P = pages of the longest sequence, size = tokens of a page
# H = query heads, G = key/value heads, d = head size

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cached import Cached
from kernels.cached_attention.torch_form import head_counts
from kernels.cpu.native import at, library


def kv_write_native_(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> None:
    """As `kv_write_`, in C."""
    H, G, d = head_counts(qkv, k, v, cached)
    T = qkv.shape[0]
    pages = at(cached.write_page, torch.int64)
    offsets = at(cached.write_offset, torch.int64)
    library().kv_write(at(qkv), at(k), at(v), pages, offsets, T, H, G, d, cached.page_size)


def cached_attention_native(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """As `cached_attention`, in C: every query is computed as if it came alone, prompts too.

    d has to be a multiple of the vector width (16 numbers with AVX-512, 8 with AVX2).
    """
    H, G, d = head_counts(qkv, k, v, cached)
    lanes = library().panel_columns() // 2
    assert d % lanes == 0, f"heads of {d} are not a multiple of the vector width {lanes}"
    B, P = cached.block_table.shape
    o = torch.empty(qkv.shape[0], H * d)
    table = at(cached.block_table, torch.int64)
    cu_queries = at(cached.cu_queries, torch.int32)
    contexts = at(cached.contexts, torch.int32)
    library().cached_attention(
        at(qkv), at(k), at(v), o.data_ptr(), table, cu_queries, contexts,
        B, P, H, G, d, cached.page_size,
    )  # fmt: skip
    return o
