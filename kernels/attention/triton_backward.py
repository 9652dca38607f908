"""The Triton kernels of the backward of attention."""


# T = tokens, H = query heads, G = key/value heads, D = head size, DP = D padded to a power of two

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.torch_form import head_size
from kernels.attention.triton_forward import (
    PAD,
    heads_of,
    launch_by_blocks,
    padded_at,
    read_block,
    write_block,
)
from kernels.launch.triton_launch import jit, tl
from kernels.packed import Packed


@jit
def add_dq(
    q, do, lse, delta, dq, heads, k_head, v_head, i, j, n,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DESCRIBED: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """dq (BM, DP), but for the scale, with what keys j .. j + BN - 1 give. lse in base 2."""
    LOG2: tl.constexpr = 1.4426950408889634 / D**0.5
    k = read_block(heads, k_head, j, n, HEADS, D, DP, BN, DESCRIBED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BM, BN)
    if DIAGONAL:
        seen = (i + tl.arange(0, BM))[:, None] >= (j + tl.arange(0, BN))[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    p = tl.exp2(scores * LOG2 - lse[:, None])
    v = read_block(heads, v_head, j, n, HEADS, D, DP, BN, DESCRIBED)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@jit(varying=("T", "BLOCKS"))
def attention_dq_kernel(
    do_ptr, qkv_ptr, o_ptr, lse_ptr, cu_seqlens_ptr, dqkv_ptr, lse2_ptr, delta_ptr, T, BLOCKS,
    PAD: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DESCRIBED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = H + 2 * G
    h, row = tl.program_id(0), tl.program_id(2)
    start = tl.load(cu_seqlens_ptr + row)
    n = tl.load(cu_seqlens_ptr + row + 1) - start
    i = (tl.cdiv(n, BM) - 1 - tl.program_id(1)) * BM
    if i < 0:
        return
    do_heads = heads_of(do_ptr, start, n, H, D, DP, BM, DESCRIBED)
    do = read_block(do_heads, h, i, n, H, D, DP, BM, DESCRIBED)
    o_heads = heads_of(o_ptr, start, n, H, D, DP, BM, False)
    o = read_block(o_heads, h, i, n, H, D, DP, BM, False)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)  # (BM,)
    rows = i + tl.arange(0, BM)
    at = h.to(tl.int64) * T + start + rows
    # infinity makes P zero for the queries behind the row
    lse = tl.load(lse_ptr + at, mask=rows < n, other=float("inf")) * 1.4426950408889634
    at = padded_at(start, row, h, rows, BLOCKS, PAD)
    tl.store(lse2_ptr + at, lse)
    tl.store(delta_ptr + at, delta)
    if tl.program_id(1) == 0:  # has the last queries: fills up the row's last PAD behind them
        behind = i + BM + tl.arange(0, PAD)
        inside = behind < tl.cdiv(n, PAD) * PAD
        there = padded_at(start, row, h, behind, BLOCKS, PAD)
        tl.store(lse2_ptr + there, tl.full((PAD,), float("inf"), tl.float32), mask=inside)
        tl.store(delta_ptr + there, tl.zeros((PAD,), tl.float32), mask=inside)
    k_head = H + h // (H // G)
    heads = heads_of(qkv_ptr, start, n, HEADS, D, DP, BM, DESCRIBED)
    q = read_block(heads, h, i, n, HEADS, D, DP, BM, DESCRIBED)
    if BN != BM:  # a descriptor takes a microsecond to make
        heads = heads_of(qkv_ptr, start, n, HEADS, D, DP, BN, DESCRIBED)
    dq = tl.zeros((BM, DP), tl.float32)
    diagonal = i // BN * BN
    for j in range(0, diagonal, BN):
        dq = add_dq(
            q, do, lse, delta, dq, heads, k_head, k_head + G, i, j, n,
            HEADS, D, DP, BM, BN, DESCRIBED, False,
        )  # fmt: skip
    for j in range(diagonal, tl.minimum(i + BM, n), BN):
        dq = add_dq(
            q, do, lse, delta, dq, heads, k_head, k_head + G, i, j, n,
            HEADS, D, DP, BM, BN, DESCRIBED, True,
        )  # fmt: skip
    write_block(dqkv_ptr, start, h, i, n, dq * D**-0.5, HEADS, D, DP, BM)


@jit(varying=("BLOCKS",))
def attention_dkv_kernel(
    do_ptr, qkv_ptr, lse2_ptr, delta_ptr, cu_seqlens_ptr, dqkv_ptr, BLOCKS,
    PAD: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DESCRIBED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = H + 2 * G
    LOG2: tl.constexpr = 1.4426950408889634 / D**0.5
    g, row = tl.program_id(0), tl.program_id(2)
    start = tl.load(cu_seqlens_ptr + row)
    n = tl.load(cu_seqlens_ptr + row + 1) - start
    j = tl.program_id(1) * BN
    if j >= n:
        return
    heads = heads_of(qkv_ptr, start, n, HEADS, D, DP, BN, DESCRIBED)
    k = read_block(heads, H + g, j, n, HEADS, D, DP, BN, DESCRIBED)
    v = read_block(heads, H + G + g, j, n, HEADS, D, DP, BN, DESCRIBED)
    if BN != BM:
        heads = heads_of(qkv_ptr, start, n, HEADS, D, DP, BM, DESCRIBED)
    do_heads = heads_of(do_ptr, start, n, H, D, DP, BM, DESCRIBED)
    dk = tl.zeros((BN, DP), tl.float32)
    dv = tl.zeros((BN, DP), tl.float32)
    first = j // BM * BM  # no query of an earlier block sees these keys
    blocks = tl.cdiv(n - first, BM)
    for step in range(0, H // G * blocks):  # the group's heads, one after the other
        h = g * (H // G) + step // blocks
        i = first + step % blocks * BM
        rows = i + tl.arange(0, BM)
        at = padded_at(start, row, h, rows, BLOCKS, PAD)
        q = read_block(heads, h, i, n, HEADS, D, DP, BM, DESCRIBED)
        lse = tl.load(lse2_ptr + at)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BN, BM)
        seen = rows[None, :] >= (j + tl.arange(0, BN))[:, None]
        p = tl.exp2(tl.where(seen, scores * LOG2 - lse[None, :], float("-inf")))
        do = read_block(do_heads, h, i, n, H, D, DP, BM, DESCRIBED)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + at)
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    write_block(dqkv_ptr, start, H + g, j, n, dk * D**-0.5, HEADS, D, DP, BN)
    write_block(dqkv_ptr, start, H + G + g, j, n, dv, HEADS, D, DP, BN)


def attention_backward_triton(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, packed: Packed, H: int, G: int
) -> Tensor:
    """As `attention_backward`, in two launches: dq, then dk and dv.

    The first leaves the second delta, and lse in base 2, padded as `padded_at` says.
    """
    d = head_size(qkv, packed, H, G)
    assert do.shape == o.shape == (len(qkv), H * d) and lse.shape == (len(qkv), H), (
        f"do {tuple(do.shape)}, o {tuple(o.shape)}, lse {tuple(lse.shape)}, qkv {tuple(qkv.shape)}"
    )
    do, qkv, o, lse = do.contiguous(), qkv.contiguous(), o.contiguous(), lse.T.contiguous()
    dqkv, blocks = torch.empty_like(qkv), len(qkv) // PAD + len(packed.rows)
    lse2, delta = lse.new_empty(2, H, blocks * PAD)
    args = (do, qkv, o, lse, packed.cu_seqlens, dqkv, lse2, delta, len(qkv), blocks)
    launch_by_blocks(attention_dq_kernel, "BM", H, (qkv, do), packed, H, d, *args, PAD=PAD)
    args = (do, qkv, lse2, delta, packed.cu_seqlens, dqkv, blocks)
    launch_by_blocks(attention_dkv_kernel, "BN", G, (qkv, do), packed, H, d, *args, PAD=PAD)
    return dqkv
