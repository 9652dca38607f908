"""The Triton kernels of attention's backward: first dq, then dk and dv

attention_dq_kernel    one program per (query head, block of BM queries, row), which walks along the
                       keys as the forward does. It also leaves two things for the second kernel:
                       delta, and lse in base 2.
attention_dkv_kernel   one program per (key/value head, block of BN keys, row), which walks along
                       the queries of all heads of its group. So no sum is made in memory: no
                       atomics, and the same bits in every run.
delta and lse travel between the two in padded tensors (H, BLOCKS * PAD), see `padded_offset`: reads
need no mask, and places after a row's end hold lse = infinity, which makes P zero there.
precision, order of programs, addresses and tiles are those of triton_forward.py; P and dS are
rounded to the dtype before their products
traffic    dq reads q, do and o once, and k and v once per block of queries; dk and dv read k and v
           once, and q and do once per block of keys
"""

# T = tokens, H = query heads, G = key/value heads, D = head size, DP = D padded to a power of two
# HEADS = heads in the tensor that is read: H + 2G in qkv (query, key, value heads), H in o and do
# start = first token of the row, n = tokens of the row
# i, j = first query and first key of a block, counted from `start`
# BM = queries of a block, BN = keys of a block
# BLOCKS * PAD = length of a padded tensor; DESCRIPTORS: whether blocks are read through descriptors

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.torch_form import head_size
from kernels.attention.triton_forward import (
    KERNEL_LOG2_E,
    PAD,
    causal_mask,
    launch_by_blocks,
    padded_offset,
    read_block,
    row_source,
    write_block,
)
from kernels.launch.triton_launch import jit, tl
from kernels.packed import Packed


@jit
def add_dq(
    q, do, lse2, delta, dq,
    source, k_head, v_head, i, j, n,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """dq (BM, DP), not yet scaled, plus what keys j .. j + BN - 1 give. lse2 (BM,) is in base 2."""
    SCALE: tl.constexpr = KERNEL_LOG2_E / D**0.5  # exp(x / sqrt(D)) = exp2(x * SCALE)
    k = read_block(source, k_head, j, n, HEADS, D, DP, BN, DESCRIPTORS)  # (BN, DP)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BM, BN)
    if DIAGONAL:
        seen = causal_mask(i, j, BM, BN)
        scores = tl.where(seen, scores, float("-inf"))
    p = tl.exp2(scores * SCALE - lse2[:, None])
    v = read_block(source, v_head, j, n, HEADS, D, DP, BN, DESCRIPTORS)  # (BN, DP)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")  # (BM, BN)
    ds = p * (dp - delta[:, None])
    ds = ds.to(k.dtype)
    return tl.dot(ds, k, dq, input_precision="ieee")


@jit
def fill_last_pad(lse2_ptr, delta_ptr, start, row, h, after, n, BLOCKS, PAD: tl.constexpr):
    """lse2 = infinity and delta = 0 from token `after` on, to the end of the row's last PAD."""
    tokens = after + tl.arange(0, PAD)
    inside = tokens < tl.cdiv(n, PAD) * PAD
    offsets = padded_offset(start, row, h, tokens, BLOCKS, PAD)
    infinity = tl.full((PAD,), float("inf"), tl.float32)
    tl.store(lse2_ptr + offsets, infinity, mask=inside)
    zero = tl.zeros((PAD,), tl.float32)
    tl.store(delta_ptr + offsets, zero, mask=inside)


@jit(varying=("T", "BLOCKS"))
def attention_dq_kernel(
    do_ptr,  # (T, H * D)
    qkv_ptr,  # (T, HEADS * D)
    o_ptr,  # (T, H * D)
    lse_ptr,  # (H, T) fp32
    cu_seqlens_ptr,  # (rows + 1,) int32
    dqkv_ptr,  # (T, HEADS * D): its dq is written
    lse2_ptr,  # (H, BLOCKS * PAD) fp32, written: lse in base 2
    delta_ptr,  # (H, BLOCKS * PAD) fp32, written
    T, BLOCKS,
    PAD: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head of one row; delta and lse2 of the same queries.

    grid: (H, blocks of the longest row, rows)
    """
    HEADS: tl.constexpr = H + 2 * G
    h = tl.program_id(0)
    row = tl.program_id(2)
    start = tl.load(cu_seqlens_ptr + row)
    n = tl.load(cu_seqlens_ptr + row + 1) - start
    block = tl.cdiv(n, BM) - 1 - tl.program_id(1)  # the last block first: it has most keys
    i = block * BM
    if i < 0:
        return

    # delta = sum(do * o), and lse in base 2
    do_source = row_source(do_ptr, start, n, H, D, DP, BM, DESCRIPTORS)
    do = read_block(do_source, h, i, n, H, D, DP, BM, DESCRIPTORS)  # (BM, DP)
    o_source = row_source(o_ptr, start, n, H, D, DP, BM, False)
    o = read_block(o_source, h, i, n, H, D, DP, BM, False)  # (BM, DP)
    products = do.to(tl.float32) * o.to(tl.float32)  # (BM, DP)
    delta = tl.sum(products, axis=1)  # (BM,)
    tokens = i + tl.arange(0, BM)
    lse_offsets = h.to(tl.int64) * T + start + tokens
    # Infinity after the row's end makes P zero for the queries there.
    lse = tl.load(lse_ptr + lse_offsets, mask=tokens < n, other=float("inf"))  # (BM,)
    lse2 = lse * KERNEL_LOG2_E
    offsets = padded_offset(start, row, h, tokens, BLOCKS, PAD)
    tl.store(lse2_ptr + offsets, lse2)
    tl.store(delta_ptr + offsets, delta)
    if tl.program_id(1) == 0:  # has the row's last queries
        fill_last_pad(lse2_ptr, delta_ptr, start, row, h, i + BM, n, BLOCKS, PAD)

    # dq, along the keys
    k_head = H + h // (H // G)  # its values are G heads further
    source = row_source(qkv_ptr, start, n, HEADS, D, DP, BM, DESCRIPTORS)
    q = read_block(source, h, i, n, HEADS, D, DP, BM, DESCRIPTORS)  # (BM, DP)
    if BN != BM:  # else the same descriptor serves the keys: making one takes a microsecond
        source = row_source(qkv_ptr, start, n, HEADS, D, DP, BN, DESCRIPTORS)
    dq = tl.zeros((BM, DP), tl.float32)
    diagonal = i // BN * BN  # all queries of the block see every key before this one
    for j in range(0, diagonal, BN):
        dq = add_dq(
            q, do, lse2, delta, dq, source, k_head, k_head + G, i, j, n,
            HEADS, D, DP, BM, BN, DESCRIPTORS, DIAGONAL=False,
        )  # fmt: skip
    for j in range(diagonal, tl.minimum(i + BM, n), BN):
        dq = add_dq(
            q, do, lse2, delta, dq, source, k_head, k_head + G, i, j, n,
            HEADS, D, DP, BM, BN, DESCRIPTORS, DIAGONAL=True,
        )  # fmt: skip
    dq = dq * D**-0.5
    write_block(dqkv_ptr, start, h, i, n, dq, HEADS, D, DP, BM)


@jit(varying=("BLOCKS",))
def attention_dkv_kernel(
    do_ptr,  # (T, H * D)
    qkv_ptr,  # (T, HEADS * D)
    lse2_ptr,  # (H, BLOCKS * PAD) fp32: lse in base 2
    delta_ptr,  # (H, BLOCKS * PAD) fp32
    cu_seqlens_ptr,  # (rows + 1,) int32
    dqkv_ptr,  # (T, HEADS * D): its dk and dv are written
    BLOCKS,
    PAD: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key/value head of one row.

    grid: (G, blocks of the longest row, rows)
    """
    HEADS: tl.constexpr = H + 2 * G
    SCALE: tl.constexpr = KERNEL_LOG2_E / D**0.5  # exp(x / sqrt(D)) = exp2(x * SCALE)
    g = tl.program_id(0)
    row = tl.program_id(2)
    start = tl.load(cu_seqlens_ptr + row)
    n = tl.load(cu_seqlens_ptr + row + 1) - start
    j = tl.program_id(1) * BN
    if j >= n:
        return

    source = row_source(qkv_ptr, start, n, HEADS, D, DP, BN, DESCRIPTORS)
    k_head = H + g
    k = read_block(source, k_head, j, n, HEADS, D, DP, BN, DESCRIPTORS)  # (BN, DP)
    v_head = H + G + g
    v = read_block(source, v_head, j, n, HEADS, D, DP, BN, DESCRIPTORS)  # (BN, DP)
    if BN != BM:
        source = row_source(qkv_ptr, start, n, HEADS, D, DP, BM, DESCRIPTORS)
    do_source = row_source(do_ptr, start, n, H, D, DP, BM, DESCRIPTORS)

    dk = tl.zeros((BN, DP), tl.float32)
    dv = tl.zeros((BN, DP), tl.float32)
    first = j // BM * BM  # no query of an earlier block sees these keys
    blocks = tl.cdiv(n - first, BM)
    for step in range(0, H // G * blocks):  # the heads of the group, one after the other
        h = g * (H // G) + step // blocks
        i = first + step % blocks * BM
        tokens = i + tl.arange(0, BM)
        offsets = padded_offset(start, row, h, tokens, BLOCKS, PAD)
        q = read_block(source, h, i, n, HEADS, D, DP, BM, DESCRIPTORS)  # (BM, DP)
        lse2 = tl.load(lse2_ptr + offsets)  # (BM,)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BN, BM)
        seen = tokens[None, :] >= (j + tl.arange(0, BN))[:, None]
        scores = scores * SCALE - lse2[None, :]
        p = tl.exp2(tl.where(seen, scores, float("-inf")))
        do = read_block(do_source, h, i, n, H, D, DP, BM, DESCRIPTORS)  # (BM, DP)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + offsets)  # (BM,)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # (BN, BM)
        ds = p * (dp - delta[None, :])
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    dk = dk * D**-0.5
    write_block(dqkv_ptr, start, k_head, j, n, dk, HEADS, D, DP, BN)
    write_block(dqkv_ptr, start, v_head, j, n, dv, HEADS, D, DP, BN)


def attention_backward_triton(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, packed: Packed, H: int, G: int
) -> Tensor:
    """As `attention_backward`, in two launches: dq, then dk and dv."""
    T = len(qkv)
    d = head_size(qkv, packed, H, G)
    assert do.shape == o.shape == (T, H * d) and lse.shape == (T, H), (
        f"do {tuple(do.shape)}, o {tuple(o.shape)}, lse {tuple(lse.shape)}, qkv {tuple(qkv.shape)}"
    )
    do = do.contiguous()
    qkv = qkv.contiguous()
    o = o.contiguous()
    lse = lse.T.contiguous()  # (H, T), as the kernels store it
    dqkv = torch.empty_like(qkv)
    blocks = T // PAD + len(packed.rows)
    lse2, delta = lse.new_empty(2, H, blocks * PAD)
    read = (qkv, do)
    args = (do, qkv, o, lse, packed.cu_seqlens, dqkv, lse2, delta, T, blocks)
    launch_by_blocks(attention_dq_kernel, "BM", H, read, packed, H, d, *args, PAD=PAD)
    args = (do, qkv, lse2, delta, packed.cu_seqlens, dqkv, blocks)
    launch_by_blocks(attention_dkv_kernel, "BN", G, read, packed, H, d, *args, PAD=PAD)
    return dqkv
