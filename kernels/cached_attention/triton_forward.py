"""The Triton kernels of attention over a paged cache

queries    The n heads of a group and a sequence's m new tokens are one list of n m queries, where
           query f is head f % n of token f / n. So a tile of BM queries reads the group's keys once
           for all of them.
decode     sampled and draft tokens. A tile takes the queries of up to DECODE_QUERIES / n tokens of
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

# T = new tokens, B = sequences, H = query heads, G = key/value heads, d = D = head size
# N = n = H / G query heads of a group, BD = D padded to a power of two
# P = pages of the longest sequence, S = parts of the longest context
# W = queries of a group of the sequence that has most
# BM = queries of a tile, BN = keys of a step, PAGE = tokens of a page

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
    qkv_ptr, k_ptr, v_ptr, page_ptr, offset_ptr, stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """BW of the G * D keys, and of the values, of one token; the heads lie end to end in qkv."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BW + tl.arange(0, BW)
    inside = cols < G * D
    # The cache is (pages, G, PAGE, D): where the token's line of head 0 is, then that of each head.
    line = tl.load(page_ptr + token) * G * PAGE + tl.load(offset_ptr + token)
    at = (line + cols // D * PAGE) * D + cols % D
    source = qkv_ptr + token * stride + H * D + cols
    tl.store(k_ptr + at, tl.load(source, mask=inside, other=0.0), mask=inside)
    tl.store(v_ptr + at, tl.load(source + G * D, mask=inside, other=0.0), mask=inside)


# ---- helpers compiled into the attention kernels


@jit
def load_queries(
    qkv_ptr, start, new, stride, queries, g,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """q (BM, BD) of the numbered `queries` of key/value head g; zero where there is none.

    start: the sequence's first new token; new: how many it has; stride: elements of a token in qkv.
    """
    cols = tl.arange(0, BD)
    at = (start + queries // N).to(tl.int64) * stride + (g * N + queries % N) * D
    inside = (queries < new * N)[:, None] & (cols < D)[None, :]
    return tl.load(qkv_ptr + at[:, None] + cols[None, :], mask=inside, other=0.0)


@jit
def add_cached_keys(
    q, m_i, l_i, acc, k_ptr, v_ptr, block_table_ptr, begin, end, positions, g, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys begin .. begin + BN - 1 of a sequence of `end` tokens.

    positions (BM,): a query sees the keys up to its own position. m_i, l_i (BM,) and acc (BM, BD)
    are the largest score, the sum of weights and the output so far; returned after the step.
    """
    keys = begin + tl.arange(0, BN)
    cols = tl.arange(0, BD)
    page = tl.load(block_table_ptr + keys // PAGE, mask=keys < end, other=0)  # (BN,) int64
    at = ((page * G + g) * PAGE + keys % PAGE)[:, None] * D + cols[None, :]
    inside = (keys < end)[:, None] & (cols < D)[None, :]
    k = tl.load(k_ptr + at, mask=inside, other=0.0)  # (BN, BD)
    scores = tl.dot(q, k.T, input_precision="ieee") * scale  # (BM, BN)
    scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, axis=1))
    p = tl.exp2(scores - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)  # (BN, BD)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l_i * alpha + tl.sum(p, axis=1), acc


# ---- decode: the parts of every context, then their join


@jit(varying=("P", "S", "W"))
def cached_decode_kernel(
    qkv_ptr, k_ptr, v_ptr, block_table_ptr, cu_ptr, contexts_ptr, m_ptr, l_ptr, acc_ptr,
    stride, P, S, W, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """m_i, l_i (B, G, W, S) and the unnormalised output acc (B, G, W, S, D) of one part."""
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
    for begin in range(part * SPLIT, tl.minimum(part * SPLIT + SPLIT, end), BN):
        m_i, l_i, acc = add_cached_keys(
            q, m_i, l_i, acc, k_ptr, v_ptr, block_table_ptr, begin, end, positions, g, scale,
            G, D, BD, PAGE, BN,
        )  # fmt: skip
    at = (tl.program_id(0).to(tl.int64) * W + queries) * S + part
    cols = tl.arange(0, BD)
    inside = queries < new * N
    tl.store(m_ptr + at, m_i, mask=inside)
    tl.store(l_ptr + at, l_i, mask=inside)
    acc_at = at[:, None] * D + cols[None, :]
    tl.store(acc_ptr + acc_at, acc, mask=inside[:, None] & (cols < D)[None, :])


@jit(varying=("S", "W"))
def cached_join_kernel(
    m_ptr, l_ptr, acc_ptr, cu_ptr, contexts_ptr, o_ptr, S, W,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SPLIT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """o of one query: its parts, BS at a time, rescaled to a common maximum and added in order."""
    sequence = tl.program_id(0) // G
    g = tl.program_id(0) % G
    query = tl.program_id(1)
    start = tl.load(cu_ptr + sequence)
    context = tl.load(contexts_ptr + sequence)
    new = tl.load(cu_ptr + sequence + 1) - start
    if query >= new * N:
        return
    first = (tl.program_id(0).to(tl.int64) * W + query) * S  # the query's part 0
    parts = (context + new + SPLIT - 1) // SPLIT
    cols = tl.arange(0, BD)
    m_i = -1e30
    l_i = 0.0
    out = tl.zeros((BD,), tl.float32)
    for begin in range(0, parts, BS):
        part = begin + tl.arange(0, BS)
        part_m = tl.load(m_ptr + first + part, mask=part < parts, other=-1e30)  # (BS,)
        part_l = tl.load(l_ptr + first + part, mask=part < parts, other=0.0)
        inside = (part < parts)[:, None] & (cols < D)[None, :]
        at = (first + part)[:, None] * D + cols[None, :]
        acc = tl.load(acc_ptr + at, mask=inside, other=0.0)  # (BS, BD)
        m_new = tl.maximum(m_i, tl.max(part_m, axis=0))
        alpha = tl.exp2(m_i - m_new)
        part_alpha = tl.exp2(part_m - m_new)
        l_i = l_i * alpha + tl.sum(part_l * part_alpha, axis=0)
        out = out * alpha + tl.sum(acc * part_alpha[:, None], axis=0)
        m_i = m_new
    at = ((start + query // N).to(tl.int64) * G * N + g * N + query % N) * D + cols
    tl.store(o_ptr + at, (out / l_i).to(o_ptr.dtype.element_ty), mask=cols < D)


# ---- extend


@jit(varying=("P",))
def cached_extend_kernel(
    qkv_ptr, k_ptr, v_ptr, block_table_ptr, cu_ptr, contexts_ptr, o_ptr, stride, P, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """o of BM queries of one key/value head of one sequence."""
    sequence = tl.program_id(0) // G
    g = tl.program_id(0) % G
    start = tl.load(cu_ptr + sequence)
    context = tl.load(contexts_ptr + sequence)
    new = tl.load(cu_ptr + sequence + 1) - start
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM  # the longest walks begin first
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
    # No query of the tile sees further than its last one.
    for begin in range(0, tl.minimum(context + (first + BM - 1) // N + 1, end), BN):
        m_i, l_i, acc = add_cached_keys(
            q, m_i, l_i, acc, k_ptr, v_ptr, block_table_ptr, begin, end, positions, g, scale,
            G, D, BD, PAGE, BN,
        )  # fmt: skip
    cols = tl.arange(0, BD)
    at = (start + queries // N).to(tl.int64) * (G * N * D) + (g * N + queries % N) * D
    inside = (queries < new * N)[:, None] & (cols < D)[None, :]
    out = (acc / l_i[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + at[:, None] + cols[None, :], out, mask=inside)


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
    H, G, d = head_counts(qkv, k, v, cached)
    n = H // G
    BD = power_of_two(d)
    if cached.decode:  # a sequence with more new tokens becomes several with the same pages
        cached = cached.pieces(max(1, DECODE_QUERIES // n))
    B = len(cached.query_lens)
    P = cached.block_table.shape[1]
    W = n * max(cached.query_lens, default=0)
    o = qkv.new_empty(qkv.shape[0], H * d)
    inputs = (qkv, k, v, cached.block_table, cached.cu_queries, cached.contexts)
    scale = d**-0.5 * LOG2_E  # exp(x / sqrt(d)) = exp2(x scale)
    sizes = {"N": n, "G": G, "D": d, "BD": BD}
    bytes_each = qkv.element_size()
    classes = (f"D{BD}x{bytes_each}", f"x{bytes_each}")
    if not cached.decode:
        config = tile_config("cached_extend_kernel", qkv.device, *classes)
        grid = (B * G, cdiv(W, config["BM"]))
        launch(
            cached_extend_kernel, grid, *inputs, o, qkv.stride(0), P, scale,
            PAGE=cached.page_size, **sizes, **config,
        )  # fmt: skip
        return o

    config = tile_config("cached_decode_kernel", qkv.device, *classes)
    SPLIT = config["SPLIT"]
    assert SPLIT % config["BN"] == 0, f"parts of {SPLIT} tokens in steps of {config['BN']}"
    lengths = zip(cached.query_lens, cached.context_lens, strict=True)
    longest = max((new + context for new, context in lengths), default=0)
    S = cdiv(longest, SPLIT)
    m_i = qkv.new_empty(B, G, W, S, dtype=torch.float32)
    l_i = qkv.new_empty(B, G, W, S, dtype=torch.float32)
    acc = qkv.new_empty(B, G, W, S, d, dtype=torch.float32)
    launch(
        cached_decode_kernel, (B * G, S), *inputs, m_i, l_i, acc, qkv.stride(0), P, S, W, scale,
        BM=power_of_two(n), PAGE=cached.page_size, **sizes, **config,
    )  # fmt: skip
    launch(
        cached_join_kernel, (B * G, W), m_i, l_i, acc, cached.cu_queries, cached.contexts, o, S, W,
        SPLIT=SPLIT, **sizes, **tile_config("cached_join_kernel", qkv.device),
    )  # fmt: skip
    return o
