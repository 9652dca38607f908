"""The Triton kernel of attention's forward, and the helpers it shares with the backward kernels

program    one per (query head, block of BM queries, row). It walks along the keys, BN at a time:
           first those that all of its queries see, then the blocks on the diagonal, where the
           causal mask matters. Softmax is accumulated online, as in FlashAttention: m_i is the
           largest score of a query so far, l_i the sum of its weights, and alpha rescales both the
           sum and the output when m_i grows.
order      The blocks of a row with most work start first, and all heads of a block start together:
           the heads of a group share their keys in L2 (H100: 5 to 28 % faster than head by head).
           A row shorter than the longest leaves programs without queries; they end at once.
addresses  bounded by the row's own start and length, so a row's result depends on that row alone
precision  softmax and sums in fp32. Operands of products stay in the dtype: P is rounded to it
traffic    No scores in memory. q is read and o written once; k and v are read once per block of
           queries, mostly from L2
tiles      shape class: "fp32", or the power of two that holds d, as "d64"
"""

# T = tokens, H = query heads, G = key/value heads, D = head size, DP = D padded to a power of two
# BM = queries of a block, BN = keys of a block, HEADS = heads in the tensor that is read (H + 2G)
# i = first query of a block, j = first key of a block, n = tokens of the row: all within the row

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.torch_form import head_size, longest_row
from kernels.integers import cdiv, power_of_two
from kernels.launch.tile_config import device_class, tile_config
from kernels.launch.triton_launch import constant, jit, launch, tl, tma_readable
from kernels.packed import Packed

LOG2_E = 1.4426950408889634  # 1 / ln 2: exp(x) = exp2(x LOG2_E); GPUs have an instruction for exp2
KERNEL_LOG2_E = constant(LOG2_E)
PAD = 128  # a row of a padded tensor begins on a multiple of this; no BM is larger

# ---- helpers compiled into the kernels


@jit
def row_source(
    ptr, start, n,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The n tokens from `start` on of a tensor (T, HEADS * D), for `read_block` to read from.

    A tensor descriptor (TMA on sm_90) where DESCRIPTORS is set, else a pointer.
    """
    base = ptr + start.to(tl.int64) * (HEADS * D)
    if DESCRIPTORS:  # bounded by the row and by each head: what is outside reads as zero
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
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Tokens i .. i + BLOCK - 1 of head h (BLOCK, DP); zero from token n and column D on."""
    if DESCRIPTORS:
        block = tl.reshape(source.load([h, i, 0]), (BLOCK, DP))
    else:
        tokens = i + tl.arange(0, BLOCK)
        cols = tl.arange(0, DP)
        inside = (tokens < n)[:, None] & (cols < D)[None, :]
        at = tokens.to(tl.int64)[:, None] * (HEADS * D) + (h * D + cols)[None, :]
        block = tl.load(source + at, mask=inside, other=0.0)
    return block


@jit
def write_block(
    ptr, start, h, i, n, block,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store `block` (BLOCK, DP) as tokens i .. i + BLOCK - 1 of head h, the part inside the row."""
    tokens = i + tl.arange(0, BLOCK)
    cols = tl.arange(0, DP)
    inside = (tokens < n)[:, None] & (cols < D)[None, :]
    at = (start + tokens).to(tl.int64)[:, None] * (HEADS * D) + (h * D + cols)[None, :]
    tl.store(ptr + at, block.to(ptr.dtype.element_ty), mask=inside)


@jit
def padded_at(start, row, h, i, BLOCKS, PAD: tl.constexpr):
    """The index of token i of a row in a tensor (H, BLOCKS * PAD), where rows begin at whole PADs.

    start // PAD + row is the first PAD of this row: the tokens before it fill start // PAD whole
    PADs, and each row before it may leave part of one PAD unused. So blocks are read without a
    mask, 16 bytes at a time.
    """
    return (tl.cast(h, tl.int64) * BLOCKS + start // PAD + row) * PAD + i


@jit
def add_keys(
    q, o, m_i, l_i, source, k_head, v_head, i, j, n,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys j .. j + BN - 1 for the queries q (BM, DP).

    o (BM, DP) is the output so far, not yet divided by l_i; m_i (BM,) the largest score so far;
    l_i (BM,) the sum of the weights so far. Returns the three.
    """
    SCALE: tl.constexpr = KERNEL_LOG2_E / D**0.5  # exp(x / sqrt(D)) = exp2(x * SCALE)
    k = read_block(source, k_head, j, n, HEADS, D, DP, BN, DESCRIPTORS)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BM, BN)
    if DIAGONAL:  # hides the keys after the row too: every query of the row comes before them
        seen = (i + tl.arange(0, BM))[:, None] >= (j + tl.arange(0, BN))[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, axis=1))  # finite: key 0 comes first, all see it
    p = tl.exp2(scores * SCALE - (m_new * SCALE)[:, None])
    alpha = tl.exp2((m_i - m_new) * SCALE)
    l_i = l_i * alpha + tl.sum(p, axis=1)
    v = read_block(source, v_head, j, n, HEADS, D, DP, BN, DESCRIPTORS)
    o = tl.dot(p.to(v.dtype), v, o * alpha[:, None], input_precision="ieee")
    return o, m_new, l_i


# ---- the kernel


@jit(varying=("T",))
def attention_forward_kernel(
    qkv_ptr, cu_seqlens_ptr, o_ptr, lse_ptr, T,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """o (T, H * D) and lse, stored as (H, T), of one block of queries of one head of one row."""
    HEADS: tl.constexpr = H + 2 * G
    h = tl.program_id(0)
    row = tl.program_id(2)
    start = tl.load(cu_seqlens_ptr + row)
    n = tl.load(cu_seqlens_ptr + row + 1) - start
    # The last block first: it has most keys.
    i = (tl.cdiv(n, BM) - 1 - tl.program_id(1)) * BM
    if i < 0:
        return
    k_head = H + h // (H // G)
    v_head = k_head + G
    source = row_source(qkv_ptr, start, n, HEADS, D, DP, BM, DESCRIPTORS)
    q = read_block(source, h, i, n, HEADS, D, DP, BM, DESCRIPTORS)
    if BN != BM:  # else the same descriptor serves the keys: making one takes a microsecond
        source = row_source(qkv_ptr, start, n, HEADS, D, DP, BN, DESCRIPTORS)
    o = tl.zeros((BM, DP), tl.float32)
    m_i = tl.full((BM,), float("-inf"), tl.float32)
    l_i = tl.zeros((BM,), tl.float32)
    diagonal = i // BN * BN  # all queries of the block see every key before this one
    for j in range(0, diagonal, BN):
        o, m_i, l_i = add_keys(
            q, o, m_i, l_i, source, k_head, v_head, i, j, n,
            HEADS, D, DP, BM, BN, DESCRIPTORS, False,
        )  # fmt: skip
    for j in range(diagonal, tl.minimum(i + BM, n), BN):
        o, m_i, l_i = add_keys(
            q, o, m_i, l_i, source, k_head, v_head, i, j, n,
            HEADS, D, DP, BM, BN, DESCRIPTORS, True,
        )  # fmt: skip
    write_block(o_ptr, start, h, i, n, o / l_i[:, None], H, D, DP, BM)
    tokens = i + tl.arange(0, BM)
    lse = m_i * D**-0.5 + tl.log(l_i)
    tl.store(lse_ptr + h.to(tl.int64) * T + start + tokens, lse, mask=tokens < n)


# ---- launches


def launch_by_blocks(
    kernel, block: str, heads: int, read: tuple[Tensor, ...], packed: Packed, H: int, D: int, *args,
    **constants,
) -> None:  # fmt: skip
    """One program per (head, block of the longest row, row).

    block   "BM" or "BN": the entry of the tile configuration that cuts a row into blocks
    heads   how many heads the grid has: H for kernels over queries, G for kernels over keys
    read    the tensors that the kernel reads through `read_block`; the first is qkv
    """
    qkv = read[0]
    DP = power_of_two(D)
    shape_class = "fp32" if qkv.dtype == torch.float32 else f"d{DP}"
    config = tile_config(kernel.__name__, qkv.device, shape_class)
    assert config["BM"] <= PAD, f"{kernel.__name__}: BM {config['BM']} over {PAD}"
    grid = (heads, cdiv(longest_row(packed), config[block]), len(packed.rows))
    constants |= {"H": H, "G": (qkv.shape[1] // D - H) // 2, "D": D, "DP": DP}
    # Without TMA the descriptors' third dimension costs cp.async; products of fp32 read registers.
    has_tma = device_class(qkv.device) not in ("sm_80", "gfx942") and qkv.dtype != torch.float32
    # Every head has to begin on 16 bytes, not only every row of the tensor.
    aligned = tma_readable(*read) and D * qkv.element_size() % 16 == 0
    launch(kernel, grid, *args, **constants, DESCRIPTORS=has_tma and aligned, **config)


def attention_forward_triton(qkv: Tensor, packed: Packed, H: int, G: int) -> tuple[Tensor, Tensor]:
    """As `attention_forward`, in one launch; lse (T, H) is a transposed view of (H, T)."""
    assert not packed.prefix, (
        "the Triton kernels of attention have no form for a shared prefix; "
        "build the micro-batch with share=False"
    )
    T = qkv.shape[0]
    d = head_size(qkv, packed, H, G)
    qkv = qkv.contiguous()
    o = qkv.new_empty(T, H * d)
    lse = qkv.new_empty(H, T, dtype=torch.float32)
    args = (qkv, packed.cu_seqlens, o, lse, T)
    launch_by_blocks(attention_forward_kernel, "BM", H, (qkv,), packed, H, d, *args)
    return o, lse.T
