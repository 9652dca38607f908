"""The Triton kernels of attention over a paged cache

queries    The N heads of a group and a sequence's m new tokens are one list of m N queries, where
           query f is head f % N of token f / N. So a tile of BM queries reads the group's keys once
           for all of them.
decode     sampled and draft tokens. A tile takes the queries of up to DECODE_QUERIES / N tokens of
           a sequence. The context is cut every SPLIT tokens, one program per part (as
           flash-decoding does), and `cached_join_kernel` adds the parts in order.
extend     prompts: one program per BM queries, which walks along their whole context
softmax    online, in base 2: m_i is the largest score of a query so far, l_i the sum of its
           weights, and alpha rescales the sum and the output when m_i grows
invariance Parts and steps begin at fixed tokens of the sequence, and a step in which a query sees
           no key changes no bit of it (its weights are exact zeros and alpha is exactly 1). So a
           query's result does not depend on the tokens that share its tile. Every step is the same
           code: a step without the mask would be faster, but the compiler might contract it to
           other roundings.
pages      The page of a key is looked up for every key, so any page size is right.
tiles      shape classes: padded head size x bytes of an element, as "D128x2"; else the bytes, as
           "x2". SPLIT is in the configuration of cached_decode_kernel. kv_write_kernel and
           cached_join_kernel have one configuration for all shapes.
"""

# T = new tokens, B = sequences, H = query heads, G = key/value heads
# N = H / G query heads of a group, D = head size, BD = D padded to a power of two
# P = pages of the longest sequence, S = parts of the longest context
# W = queries of a group of the sequence that has most
# BM = queries of a tile, BN = keys of a step, PAGE = tokens of a page
# of one sequence: start = its first new token among all, new = how many it has, context = tokens in
# the cache before them, end = context + new
# stride = elements from one token of qkv to the next

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.triton_forward import LOG2_E
from kernels.cached import Cached
from kernels.cached_attention.torch_form import head_counts
from kernels.integers import cdiv, power_of_two
from kernels.launch.tile_config import tile_config
from kernels.launch.triton_launch import jit, launch, tl

DECODE_QUERIES = 16  # of a decoding tile: a product on tensor cores needs at least so many rows

# ---- writing the cache


@jit
def kv_write_kernel(
    qkv_ptr,  # (T, H + 2G heads of D)
    k_ptr, v_ptr,  # (pages, G, PAGE, D), written
    page_ptr, offset_ptr,  # (T,) int64: where each token is written
    stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """BW of the G * D keys, and of the values, of one token; the heads lie end to end in qkv.

    grid: (T, blocks of BW columns)
    """
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BW + tl.arange(0, BW)
    inside = cols < G * D
    page_line = tl.load(page_ptr + token) * G * PAGE  # a line is D numbers: a token of a head
    line = page_line + tl.load(offset_ptr + token)  # of head 0
    head_line = line + cols // D * PAGE  # of each column's head
    offsets = head_line * D + cols % D
    k_source = qkv_ptr + token * stride + H * D + cols
    k = tl.load(k_source, mask=inside, other=0.0)
    tl.store(k_ptr + offsets, k, mask=inside)
    v = tl.load(k_source + G * D, mask=inside, other=0.0)
    tl.store(v_ptr + offsets, v, mask=inside)


# ---- helpers compiled into the attention kernels


@jit
def load_queries(
    qkv_ptr, start, new, stride, queries, g,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """q (BM, BD) of the numbered `queries` (BM,) of key/value head g; zero where there is none."""
    cols = tl.arange(0, BD)
    tokens = (start + queries // N).to(tl.int64)
    offsets = tokens * stride + (g * N + queries % N) * D
    is_query = queries < new * N
    inside = is_query[:, None] & (cols < D)[None, :]
    q_ptrs = qkv_ptr + offsets[:, None] + cols[None, :]
    return tl.load(q_ptrs, mask=inside, other=0.0)


@jit
def add_cached_keys(
    q, m_i, l_i, acc,
    k_ptr, v_ptr, block_table_ptr, begin, end, positions, g, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    PAGE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys begin .. begin + BN - 1 of a sequence of `end` tokens.

    positions (BM,): a query sees the keys up to its own position. m_i, l_i (BM,) and acc (BM, BD)
    are the largest score, the sum of weights and the output so far; returned after the step.
    """
    keys = begin + tl.arange(0, BN)
    cols = tl.arange(0, BD)
    page = tl.load(block_table_ptr + keys // PAGE, mask=keys < end, other=0)  # (BN,) int64
    lines = (page * G + g) * PAGE + keys % PAGE  # a line is D numbers
    offsets = lines[:, None] * D + cols[None, :]
    is_key = keys < end
    inside = is_key[:, None] & (cols < D)[None, :]
    k = tl.load(k_ptr + offsets, mask=inside, other=0.0)  # (BN, BD)
    scores = tl.dot(q, k.T, input_precision="ieee") * scale  # (BM, BN)
    seen = keys[None, :] <= positions[:, None]
    scores = tl.where(seen, scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, axis=1))
    p = tl.exp2(scores - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    v = tl.load(v_ptr + offsets, mask=inside, other=0.0)  # (BN, BD)
    weights = p.to(v.dtype)
    acc = tl.dot(weights, v, acc * alpha[:, None], input_precision="ieee")
    l_i = l_i * alpha + tl.sum(p, axis=1)
    return m_new, l_i, acc


# ---- decode: the parts of every context, then their join


@jit(varying=("P", "S", "W"))
def cached_decode_kernel(
    qkv_ptr,  # (T, H + 2G heads of D)
    k_ptr, v_ptr,  # (pages, G, PAGE, D)
    block_table_ptr,  # (B, P) int64
    cu_ptr,  # (B + 1,) int32: first new token of each sequence
    contexts_ptr,  # (B,) int32
    m_ptr, l_ptr,  # (B, G, W, S) fp32, written: m_i and l_i of each part
    acc_ptr,  # (B, G, W, S, D) fp32, written: its output before the division by l_i
    stride, P, S, W,
    scale,  # exp(x / sqrt(D)) = exp2(x scale)
    N: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
    PAGE: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One part of the context of one sequence, for all queries of one key/value head.

    grid: (B * G, S)
    """
    sequence = tl.program_id(0) // G
    g = tl.program_id(0) % G
    part = tl.program_id(1)
    start = tl.load(cu_ptr + sequence)
    context = tl.load(contexts_ptr + sequence)
    new = tl.load(cu_ptr + sequence + 1) - start
    end = context + new
    if part * SPLIT >= end:
        return

    queries = tl.arange(0, BM)
    q = load_queries(qkv_ptr, start, new, stride, queries, g, N, D, BD)
    positions = context + queries // N
    m_i = tl.full((BM,), -1e30, tl.float32)  # finite: a query may see no key of its last part
    l_i = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    block_table_ptr += sequence.to(tl.int64) * P
    first = part * SPLIT
    for begin in range(first, tl.minimum(first + SPLIT, end), BN):
        m_i, l_i, acc = add_cached_keys(
            q, m_i, l_i, acc, k_ptr, v_ptr, block_table_ptr, begin, end, positions, g, scale,
            G, D, BD, PAGE, BN,
        )  # fmt: skip

    rows = tl.program_id(0).to(tl.int64) * W + queries  # (sequence, head, query)
    offsets = rows * S + part
    cols = tl.arange(0, BD)
    is_query = queries < new * N
    tl.store(m_ptr + offsets, m_i, mask=is_query)
    tl.store(l_ptr + offsets, l_i, mask=is_query)
    acc_offsets = offsets[:, None] * D + cols[None, :]
    inside = is_query[:, None] & (cols < D)[None, :]
    tl.store(acc_ptr + acc_offsets, acc, mask=inside)


@jit(varying=("S", "W"))
def cached_join_kernel(
    m_ptr, l_ptr,  # (B, G, W, S) fp32: m_i and l_i of each part
    acc_ptr,  # (B, G, W, S, D) fp32
    cu_ptr,  # (B + 1,) int32
    contexts_ptr,  # (B,) int32
    o_ptr,  # (T, H * D), written
    S, W,
    N: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
    SPLIT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """o of one query: its parts, BS at a time, rescaled to a common maximum and added in order.

    grid: (B * G, W)
    """
    sequence = tl.program_id(0) // G
    g = tl.program_id(0) % G
    query = tl.program_id(1)
    start = tl.load(cu_ptr + sequence)
    context = tl.load(contexts_ptr + sequence)
    new = tl.load(cu_ptr + sequence + 1) - start
    if query >= new * N:
        return

    row = tl.program_id(0).to(tl.int64) * W + query  # (sequence, head, query)
    first = row * S  # the query's part 0
    parts = (context + new + SPLIT - 1) // SPLIT
    cols = tl.arange(0, BD)
    m_i = -1e30
    l_i = 0.0
    out = tl.zeros((BD,), tl.float32)
    for begin in range(0, parts, BS):
        part = begin + tl.arange(0, BS)
        is_part = part < parts
        part_m = tl.load(m_ptr + first + part, mask=is_part, other=-1e30)  # (BS,)
        part_l = tl.load(l_ptr + first + part, mask=is_part, other=0.0)  # (BS,)
        inside = is_part[:, None] & (cols < D)[None, :]
        acc_offsets = (first + part)[:, None] * D + cols[None, :]
        acc = tl.load(acc_ptr + acc_offsets, mask=inside, other=0.0)  # (BS, BD)
        m_new = tl.maximum(m_i, tl.max(part_m, axis=0))
        alpha = tl.exp2(m_i - m_new)
        part_alpha = tl.exp2(part_m - m_new)
        l_i = l_i * alpha + tl.sum(part_l * part_alpha, axis=0)
        out = out * alpha + tl.sum(acc * part_alpha[:, None], axis=0)
        m_i = m_new

    token = (start + query // N).to(tl.int64)
    head_line = token * G * N + g * N + query % N  # a line is D numbers
    offsets = head_line * D + cols
    o = (out / l_i).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + offsets, o, mask=cols < D)


# ---- extend


@jit(varying=("P",))
def cached_extend_kernel(
    qkv_ptr,  # (T, H + 2G heads of D)
    k_ptr, v_ptr,  # (pages, G, PAGE, D)
    block_table_ptr,  # (B, P) int64
    cu_ptr,  # (B + 1,) int32: first new token of each sequence
    contexts_ptr,  # (B,) int32
    o_ptr,  # (T, H * D), written
    stride, P,
    scale,  # exp(x / sqrt(D)) = exp2(x scale)
    N: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
    PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """o of BM queries of one key/value head of one sequence.

    grid: (B * G, tiles of W queries)
    """
    sequence = tl.program_id(0) // G
    g = tl.program_id(0) % G
    start = tl.load(cu_ptr + sequence)
    context = tl.load(contexts_ptr + sequence)
    new = tl.load(cu_ptr + sequence + 1) - start
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest walks begin first
    first = tile * BM
    if first >= new * N:
        return

    queries = first + tl.arange(0, BM)
    q = load_queries(qkv_ptr, start, new, stride, queries, g, N, D, BD)
    positions = context + queries // N
    m_i = tl.full((BM,), -1e30, tl.float32)
    l_i = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    block_table_ptr += sequence.to(tl.int64) * P
    end = context + new
    seen = context + (first + BM - 1) // N + 1  # keys that the tile's last query sees
    for begin in range(0, tl.minimum(seen, end), BN):
        m_i, l_i, acc = add_cached_keys(
            q, m_i, l_i, acc, k_ptr, v_ptr, block_table_ptr, begin, end, positions, g, scale,
            G, D, BD, PAGE, BN,
        )  # fmt: skip

    cols = tl.arange(0, BD)
    tokens = (start + queries // N).to(tl.int64)
    offsets = tokens * (G * N * D) + (g * N + queries % N) * D
    is_query = queries < new * N
    inside = is_query[:, None] & (cols < D)[None, :]
    o = acc / l_i[:, None]
    o = o.to(o_ptr.dtype.element_ty)
    o_ptrs = o_ptr + offsets[:, None] + cols[None, :]
    tl.store(o_ptrs, o, mask=inside)


# ---- launches


def kv_write_triton_(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> None:
    """As `kv_write_`, in one launch."""
    H, G, d = head_counts(qkv, k, v, cached)
    config = tile_config("kv_write_kernel", qkv.device)
    grid = (qkv.shape[0], cdiv(G * d, config["BW"]))
    launch(
        kv_write_kernel, grid,
        qkv, k, v, cached.write_page, cached.write_offset, qkv.stride(0),
        H=H, G=G, D=d, PAGE=cached.page_size, **config,
    )  # fmt: skip


def cached_attention_triton(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """As `cached_attention`: decode and join for sampled and draft tokens, extend for prompts."""
    if cached.decode:
        return _decode(qkv, k, v, cached)
    return _extend(qkv, k, v, cached)


def _shape_classes(qkv: Tensor, d: int) -> tuple[str, str]:
    """The shape classes of tile configurations, the narrower one first."""
    bytes_each = qkv.element_size()
    return f"D{power_of_two(d)}x{bytes_each}", f"x{bytes_each}"


def _most_queries(cached: Cached, n: int) -> int:
    """W: queries of a group of the sequence that has most."""
    return n * max(cached.query_lens, default=0)


def _extend(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """o (T, H d), in one launch."""
    H, G, d = head_counts(qkv, k, v, cached)
    n = H // G
    B = len(cached.query_lens)
    P = cached.block_table.shape[1]
    o = qkv.new_empty(qkv.shape[0], H * d)
    scale = d**-0.5 * LOG2_E
    config = tile_config("cached_extend_kernel", qkv.device, *_shape_classes(qkv, d))
    tiles = cdiv(_most_queries(cached, n), config["BM"])
    launch(
        cached_extend_kernel, (B * G, tiles),
        qkv, k, v, cached.block_table, cached.cu_queries, cached.contexts, o,
        qkv.stride(0), P, scale,
        PAGE=cached.page_size, N=n, G=G, D=d, BD=power_of_two(d), **config,
    )  # fmt: skip
    return o


def _decode(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """o (T, H d), in two launches: the parts of every context, then their join."""
    H, G, d = head_counts(qkv, k, v, cached)
    n = H // G
    # A sequence with more new tokens than a tile holds becomes several with the same pages.
    cached = cached.pieces(max(1, DECODE_QUERIES // n))
    B = len(cached.query_lens)
    P = cached.block_table.shape[1]
    W = _most_queries(cached, n)
    config = tile_config("cached_decode_kernel", qkv.device, *_shape_classes(qkv, d))
    SPLIT = config["SPLIT"]
    assert SPLIT % config["BN"] == 0, f"parts of {SPLIT} tokens in steps of {config['BN']}"
    lengths = zip(cached.query_lens, cached.context_lens, strict=True)
    longest = max((new + context for new, context in lengths), default=0)
    S = cdiv(longest, SPLIT)
    o = qkv.new_empty(qkv.shape[0], H * d)
    m_i = qkv.new_empty(B, G, W, S, dtype=torch.float32)
    l_i = qkv.new_empty(B, G, W, S, dtype=torch.float32)
    acc = qkv.new_empty(B, G, W, S, d, dtype=torch.float32)
    scale = d**-0.5 * LOG2_E
    sizes = {"N": n, "G": G, "D": d, "BD": power_of_two(d)}
    launch(
        cached_decode_kernel, (B * G, S),
        qkv, k, v, cached.block_table, cached.cu_queries, cached.contexts, m_i, l_i, acc,
        qkv.stride(0), P, S, W, scale,
        BM=power_of_two(n), PAGE=cached.page_size, **sizes, **config,
    )  # fmt: skip
    launch(
        cached_join_kernel, (B * G, W),
        m_i, l_i, acc, cached.cu_queries, cached.contexts, o, S, W,
        SPLIT=SPLIT, **sizes, **tile_config("cached_join_kernel", qkv.device),
    )  # fmt: skip
    return o
