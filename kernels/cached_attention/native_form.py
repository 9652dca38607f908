"""Attention over a paged cache in C (cpu/native/attention.c)."""


# T = new tokens, B = rows, H = query heads, G = key/value heads, d = head size, n = H / G
# P = pages of the longest row, S = parts of the longest decode row, W = queries of the widest

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cached import Cached
from kernels.cpu.native import at, library

# ---- what the native and the Triton forms ask of shapes


def head_counts(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> tuple[int, int, int]:
    """H, G and d, after a look at the shapes."""
    G, size, d = k.shape[1:]
    H = qkv.shape[1] // d - 2 * G
    assert qkv.shape == (len(cached.write_page), (H + 2 * G) * d) and H % G == 0, (
        f"qkv {tuple(qkv.shape)}, {len(cached.write_page)} tokens, {G} key/value heads of {d}"
    )
    assert v.shape == k.shape and size == cached.page_size, (
        f"k {tuple(k.shape)}, v {tuple(v.shape)}, pages of {cached.page_size} tokens"
    )
    assert k.is_contiguous() and v.is_contiguous() and qkv.stride(1) == 1, "rows with gaps"
    return H, G, d


# ---- native: fp32 on a CPU


def kv_write_native_(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> None:
    """As `kv_write_`, in C (native/attention.c)."""
    H, G, d = head_counts(qkv, k, v, cached)
    places = (at(cached.write_page, torch.int64), at(cached.write_offset, torch.int64))
    library().kv_write(at(qkv), at(k), at(v), *places, qkv.shape[0], H, G, d, cached.page_size)


def cached_attention_native(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """As `cached_attention`, in C: every query is computed as if alone, prompts too.

    d has to be whole vectors (16 numbers with AVX-512, 8 with AVX2).
    """
    H, G, d = head_counts(qkv, k, v, cached)
    assert d % (library().panel_columns() // 2) == 0, f"heads of {d} are no whole vectors"
    o = torch.empty(qkv.shape[0], H * d)
    rows = (at(cached.block_table, torch.int64), at(cached.cu_queries, torch.int32))
    pointers = (at(qkv), at(k), at(v), o.data_ptr(), *rows, at(cached.contexts, torch.int32))
    B, P = cached.block_table.shape
    library().cached_attention(*pointers, B, P, H, G, d, cached.page_size)
    return o
