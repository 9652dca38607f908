"""The Triton kernels of attention.py, where the mathematics, the shapes and the contract stand

forward    a program per (block of BM queries, head, row) walks along the keys, BN at a time: first
           those that all of its queries see, then the diagonal. Softmax is kept up as it goes
backward   1. dq likewise, and delta on the way
           2. dk and dv: a program per (block of BN keys, key/value head, row) walks along the
              queries of all the heads of its group, so that nothing is added up in memory: no
              atomics, the same bits every time
The blocks of a row start with those that have most work, of all heads: a group's share its keys in
L2 (H100: 5 to 28 % faster than head by head). Programs behind a shorter row end at once.
A row's result depends on that row alone: its start and length bound every address.
precision  softmax and sums in fp32; operands of products in the dtype: P and dS are rounded to it
traffic    no scores in memory. Forward reads q and writes o once and reads k, v once per block of
           queries, mostly from L2; dk and dv read q and do once per block of keys
tiles      shape class: "fp32", or the power of two that holds d, as "d64"
"""


# T = tokens, H = query heads, G = key/value heads, D = head size, DP = D padded to a power of two

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.torch_form import head_size, longest_row
from kernels.launch.tile_config import device_class, tile
from kernels.launch.triton_launch import cdiv, described, jit, launch, power_of_two, tl
from kernels.packed import Packed

PAD = 128  # a row of a padded tensor begins on a multiple of this; no BM is larger

# ---- helpers compiled into the kernels


@jit
def heads_of(
    ptr, start, n,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The n tokens from `start` on of a tensor (T, HEADS * D), for `read_block`."""
    base = ptr + start.to(tl.int64) * (HEADS * D)
    if DESCRIBED:  # bounded by the row and by each head
        source = tl.make_tensor_descriptor(
            base, [HEADS, n, D], [D, HEADS * D, 1], block_shape=[1, BLOCK, DP]
        )
    else:
        source = base
    return source


@jit
def read_block(
    source, h, i, n,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Tokens i .. i + BLOCK - 1 of head h (BLOCK, DP); zero from token n and column D on."""
    if DESCRIBED:
        block = tl.reshape(source.load([h, i, 0]), (BLOCK, DP))
    else:
        rows, cols = i + tl.arange(0, BLOCK), tl.arange(0, DP)
        inside = (rows < n)[:, None] & (cols < D)[None, :]
        at = rows.to(tl.int64)[:, None] * (HEADS * D) + (h * D + cols)[None, :]
        block = tl.load(source + at, mask=inside, other=0.0)
    return block


@jit
def write_block(
    ptr, start, h, i, n, block,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store what of `block` (BLOCK, DP) is inside the row, at tokens i .. i + BLOCK - 1 of h."""
    rows, cols = i + tl.arange(0, BLOCK), tl.arange(0, DP)
    inside = (rows < n)[:, None] & (cols < D)[None, :]
    at = (start + rows).to(tl.int64)[:, None] * (HEADS * D) + (h * D + cols)[None, :]
    tl.store(ptr + at, block.to(ptr.dtype.element_ty), mask=inside)


@jit
def padded_at(start, row, h, i, BLOCKS, PAD: tl.constexpr):
    """Where token i of a row is in a tensor (H, BLOCKS * PAD) whose rows begin on multiples of PAD.

    A row has room for whole PADs: what the rows before it do not fill of theirs lets this one begin
    at start // PAD + row PADs. So blocks are read without a mask, and 16 bytes at a time.
    """
    return (tl.cast(h, tl.int64) * BLOCKS + start // PAD + row) * PAD + i


@jit
def add_keys(
    q, o, top, total, heads, k_head, v_head, i, j, n,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DESCRIBED: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Keys j .. j + BN - 1 into queries' o (BM, DP), largest score `top` and sum `total` (BM,)."""
    LOG2: tl.constexpr = 1.4426950408889634 / D**0.5  # exp(x / sqrt(D)) = exp2(x * LOG2)
    k = read_block(heads, k_head, j, n, HEADS, D, DP, BN, DESCRIBED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BM, BN)
    if DIAGONAL:  # hides the keys behind the row too: they lie behind each of its queries
        seen = (i + tl.arange(0, BM))[:, None] >= (j + tl.arange(0, BN))[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))  # finite: key 0 comes first, all see it
    p = tl.exp2(scores * LOG2 - (higher * LOG2)[:, None])
    shrink = tl.exp2((top - higher) * LOG2)
    total = total * shrink + tl.sum(p, axis=1)
    v = read_block(heads, v_head, j, n, HEADS, D, DP, BN, DESCRIBED)
    o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
    return o, higher, total


@jit(varying=("T",))
def attention_forward_kernel(
    qkv_ptr, cu_seqlens_ptr, o_ptr, lse_ptr, T,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DESCRIBED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = H + 2 * G
    h, row = tl.program_id(0), tl.program_id(2)
    start = tl.load(cu_seqlens_ptr + row)
    n = tl.load(cu_seqlens_ptr + row + 1) - start
    i = (tl.cdiv(n, BM) - 1 - tl.program_id(1)) * BM  # last queries first: they have most keys
    if i < 0:
        return
    k_head = H + h // (H // G)
    heads = heads_of(qkv_ptr, start, n, HEADS, D, DP, BM, DESCRIBED)
    q = read_block(heads, h, i, n, HEADS, D, DP, BM, DESCRIBED)
    if BN != BM:  # a descriptor takes a microsecond to make
        heads = heads_of(qkv_ptr, start, n, HEADS, D, DP, BN, DESCRIBED)
    o = tl.zeros((BM, DP), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    diagonal = i // BN * BN  # all queries of the block see the keys before this one
    for j in range(0, diagonal, BN):
        o, top, total = add_keys(
            q, o, top, total, heads, k_head, k_head + G, i, j, n,
            HEADS, D, DP, BM, BN, DESCRIBED, False,
        )  # fmt: skip
    for j in range(diagonal, tl.minimum(i + BM, n), BN):
        o, top, total = add_keys(
            q, o, top, total, heads, k_head, k_head + G, i, j, n,
            HEADS, D, DP, BM, BN, DESCRIBED, True,
        )  # fmt: skip
    write_block(o_ptr, start, h, i, n, o / total[:, None], H, D, DP, BM)
    rows = i + tl.arange(0, BM)
    lse = top * D**-0.5 + tl.log(total)
    tl.store(lse_ptr + h.to(tl.int64) * T + start + rows, lse, mask=rows < n)


def launch_by_blocks(
    kernel, block: str, heads: int, read: tuple[Tensor, ...], packed: Packed, H: int, D: int, *args,
    **constants,
) -> None:  # fmt: skip
    """A program per (head, block of the longest row, row); `read`: what read_block is used on."""
    qkv = read[0]
    DP = power_of_two(D)
    row = tile(kernel.__name__, qkv.device, "fp32" if qkv.dtype == torch.float32 else f"d{DP}")
    assert row["BM"] <= PAD, f"{kernel.__name__}: BM {row['BM']} over {PAD}"
    grid = (heads, cdiv(longest_row(packed), row[block]), len(packed.rows))
    constants |= {"H": H, "G": (qkv.shape[1] // D - H) // 2, "D": D, "DP": DP}
    # Without TMA the descriptors' third dimension costs cp.async; products of fp32 read registers.
    tma = device_class(qkv.device) not in ("sm_80", "gfx942") and qkv.dtype != torch.float32
    aligned = described(*read) and D * qkv.element_size() % 16 == 0  # every head, not only rows
    launch(kernel, grid, *args, **constants, DESCRIBED=tma and aligned, **row)


def attention_forward_triton(qkv: Tensor, packed: Packed, H: int, G: int) -> tuple[Tensor, Tensor]:
    """As `attention_forward`, in one launch; lse (T, H) is the transpose of what is stored."""
    assert not packed.prefix, "these kernels know no prefix: MicroBatch.build with share=False"
    d = head_size(qkv, packed, H, G)
    qkv = qkv.contiguous()
    o = qkv.new_empty(qkv.shape[0], H * d)
    lse = qkv.new_empty(H, qkv.shape[0], dtype=torch.float32)
    args = (qkv, packed.cu_seqlens, o, lse, qkv.shape[0])
    launch_by_blocks(attention_forward_kernel, "BM", H, (qkv,), packed, H, d, *args)
    return o, lse.T
