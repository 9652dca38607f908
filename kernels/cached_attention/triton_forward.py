"""The Triton kernels of attention over a paged cache."""


# T = new tokens, B = rows, H = query heads, G = key/value heads, d = head size, n = H / G
# P = pages of the longest row, S = parts of the longest decode row, W = queries of the widest

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cached import Cached
from kernels.cached_attention.native_form import head_counts
from kernels.launch.tile_config import tile
from kernels.launch.triton_launch import cdiv, jit, launch, power_of_two, tl

DECODED = 16  # queries (heads of a group x new tokens) of a decoding tile: the least of a product


# ---- triton


@jit
def kv_write_kernel(
    qkv_ptr, k_ptr, v_ptr, page_ptr, offset_ptr, stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BW + tl.arange(0, BW)  # of the token's G heads end to end
    inside = cols < G * D
    first = tl.load(page_ptr + token) * G * PAGE + tl.load(offset_ptr + token)
    to = (first + cols // D * PAGE) * D + cols % D
    source = qkv_ptr + token * stride + H * D + cols
    tl.store(k_ptr + to, tl.load(source, mask=inside, other=0.0), mask=inside)
    tl.store(v_ptr + to, tl.load(source + G * D, mask=inside, other=0.0), mask=inside)


@jit
def _queries(
    qkv_ptr, start, new, stride, flat, g,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Queries `flat` of key/value head g: (BM, BD)."""
    cols = tl.arange(0, BD)
    at = (start + flat // N).to(tl.int64) * stride + (g * N + flat % N) * D
    live = (flat < new * N)[:, None] & (cols < D)[None, :]
    return tl.load(qkv_ptr + at[:, None] + cols[None, :], mask=live, other=0.0)


@jit
def _step(
    q, top, total, acc, k_ptr, v_ptr, table_ptr, begin, end, positions, g, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys begin .. begin + BN - 1 of a row of `end` tokens, base 2."""
    keys, cols = begin + tl.arange(0, BN), tl.arange(0, BD)
    page = tl.load(table_ptr + keys // PAGE, mask=keys < end, other=0)  # (BN,) int64
    at = ((page * G + g) * PAGE + keys % PAGE)[:, None] * D + cols[None, :]
    live = (keys < end)[:, None] & (cols < D)[None, :]
    k = tl.load(k_ptr + at, mask=live, other=0.0)  # (BN, BD)
    scores = tl.dot(q, k.T, input_precision="ieee") * scale  # (BM, BN)
    scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    e = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    v = tl.load(v_ptr + at, mask=live, other=0.0)
    acc = tl.dot(e.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return new_top, total * fade + tl.sum(e, axis=1), acc


@jit(varying=("P", "S", "W"))
def cached_decode_kernel(
    qkv_ptr, k_ptr, v_ptr, table_ptr, cu_ptr, contexts_ptr, top_ptr, total_ptr, acc_ptr,
    stride, P, S, W, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, g, part = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    start, context = tl.load(cu_ptr + row), tl.load(contexts_ptr + row)
    new = tl.load(cu_ptr + row + 1) - start
    end = context + new
    if part * SPLIT >= end:
        return
    flat = tl.arange(0, BM)
    q = _queries(qkv_ptr, start, new, stride, flat, g, N, D, BD)
    positions = context + flat // N
    top = tl.full((BM,), -1e30, tl.float32)  # finite: a query may see no key of its last part
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    table_ptr += row.to(tl.int64) * P
    for begin in range(part * SPLIT, tl.minimum(part * SPLIT + SPLIT, end), BN):
        top, total, acc = _step(
            q, top, total, acc, k_ptr, v_ptr, table_ptr, begin, end, positions, g, scale,
            G, D, BD, PAGE, BN,
        )  # fmt: skip
    at = (tl.program_id(0).to(tl.int64) * W + flat) * S + part
    cols = tl.arange(0, BD)
    live = flat < new * N
    tl.store(top_ptr + at, top, mask=live)
    tl.store(total_ptr + at, total, mask=live)
    acc_at = at[:, None] * D + cols[None, :]
    tl.store(acc_ptr + acc_at, acc, mask=live[:, None] & (cols < D)[None, :])


@jit(varying=("S", "W"))
def cached_join_kernel(
    top_ptr, total_ptr, acc_ptr, cu_ptr, contexts_ptr, o_ptr, S, W,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SPLIT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    row, g, flat = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    start, context = tl.load(cu_ptr + row), tl.load(contexts_ptr + row)
    new = tl.load(cu_ptr + row + 1) - start
    if flat >= new * N:
        return
    first = (tl.program_id(0).to(tl.int64) * W + flat) * S
    parts, cols = (context + new + SPLIT - 1) // SPLIT, tl.arange(0, BD)
    top, total, out = -1e30, 0.0, tl.zeros((BD,), tl.float32)
    for begin in range(0, parts, BS):
        part = begin + tl.arange(0, BS)
        part_top = tl.load(top_ptr + first + part, mask=part < parts, other=-1e30)  # (BS,)
        part_total = tl.load(total_ptr + first + part, mask=part < parts, other=0.0)
        live = (part < parts)[:, None] & (cols < D)[None, :]
        at = (first + part)[:, None] * D + cols[None, :]
        acc = tl.load(acc_ptr + at, mask=live, other=0.0)  # (BS, BD)
        new_top = tl.maximum(top, tl.max(part_top, axis=0))
        fade, weight = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        total = total * fade + tl.sum(part_total * weight, axis=0)
        out = out * fade + tl.sum(acc * weight[:, None], axis=0)
        top = new_top
    at = ((start + flat // N).to(tl.int64) * G * N + g * N + flat % N) * D + cols
    tl.store(o_ptr + at, (out / total).to(o_ptr.dtype.element_ty), mask=cols < D)


@jit(varying=("P",))
def cached_extend_kernel(
    qkv_ptr, k_ptr, v_ptr, table_ptr, cu_ptr, contexts_ptr, o_ptr, stride, P, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, g = tl.program_id(0) // G, tl.program_id(0) % G
    start, context = tl.load(cu_ptr + row), tl.load(contexts_ptr + row)
    new = tl.load(cu_ptr + row + 1) - start
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM  # the longest walks begin first
    if first >= new * N:
        return
    flat = first + tl.arange(0, BM)
    q = _queries(qkv_ptr, start, new, stride, flat, g, N, D, BD)
    positions = context + flat // N
    top = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    table_ptr += row.to(tl.int64) * P
    end = context + new
    for begin in range(0, tl.minimum(context + (first + BM - 1) // N + 1, end), BN):
        top, total, acc = _step(
            q, top, total, acc, k_ptr, v_ptr, table_ptr, begin, end, positions, g, scale,
            G, D, BD, PAGE, BN,
        )  # fmt: skip
    cols = tl.arange(0, BD)
    at = (start + flat // N).to(tl.int64) * (G * N * D) + (g * N + flat % N) * D
    live = (flat < new * N)[:, None] & (cols < D)[None, :]
    out = (acc / total[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + at[:, None] + cols[None, :], out, mask=live)


def kv_write_triton_(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> None:
    """As `kv_write_`, in one launch."""
    H, G, d = head_counts(qkv, k, v, cached)
    row = tile("kv_write_kernel", qkv.device)
    args = (qkv, k, v, cached.write_page, cached.write_offset, qkv.stride(0))
    grid = (qkv.shape[0], cdiv(G * d, row["BW"]))
    launch(kv_write_kernel, grid, *args, H=H, G=G, D=d, PAGE=cached.page_size, **row)


def cached_attention_triton(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """As `cached_attention`: decode and join for tokens that are alone, extend for prompts."""
    H, G, d = head_counts(qkv, k, v, cached)
    n, BD = H // G, power_of_two(d)
    if cached.alone:
        cached = cached.pieces(max(1, DECODED // n))
    B, W = len(cached.query_lens), n * max(cached.query_lens, default=0)
    o = qkv.new_empty(qkv.shape[0], H * d)
    shapes = (f"D{BD}x{qkv.element_size()}", f"x{qkv.element_size()}")
    sizes = {"N": n, "G": G, "D": d, "BD": BD}
    cache = (qkv, k, v, cached.block_table, cached.cu_queries, cached.contexts)
    stride, P, scale = qkv.stride(0), cached.block_table.shape[1], d**-0.5 * 1.4426950408889634
    if cached.alone:
        row = tile("cached_decode_kernel", qkv.device, *shapes)
        SPLIT = row["SPLIT"]
        assert SPLIT % row["BN"] == 0, f"parts of {SPLIT} tokens in steps of {row['BN']}"
        rows = zip(cached.query_lens, cached.context_lens, strict=True)
        S = cdiv(max((new + context for new, context in rows), default=0), SPLIT)
        top, total = (qkv.new_empty(B, G, W, S, dtype=torch.float32) for _ in range(2))
        acc = qkv.new_empty(B, G, W, S, d, dtype=torch.float32)
        launch(
            cached_decode_kernel, (B * G, S), *cache, top, total, acc, stride, P, S, W, scale,
            BM=power_of_two(n), PAGE=cached.page_size, **sizes, **row,
        )  # fmt: skip
        launch(
            cached_join_kernel, (B * G, W), top, total, acc, *cache[4:], o, S, W,
            SPLIT=SPLIT, **sizes, **tile("cached_join_kernel", qkv.device),
        )  # fmt: skip
    else:
        row = tile("cached_extend_kernel", qkv.device, *shapes)
        grid = (B * G, cdiv(W, row["BM"]))
        launch(
            cached_extend_kernel, grid, *cache, o, stride, P, scale,
            PAGE=cached.page_size, **sizes, **row,
        )  # fmt: skip
    return o
