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
# HEADS = heads in the tensor that is read: H + 2G in qkv (query, key, value heads), H in o and do
# start = first token of the row, n = tokens of the row
# i, j = first query and first key of a block, counted from `start`
# BM = queries of a block, BN = keys of a block, BLOCK = BM or BN: tokens of the block that is read
# DESCRIPTORS: whether blocks are read through tensor descriptors

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
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The n tokens from `start` on of a tensor (T, HEADS * D), for `read_block` to read from.

    A tensor descriptor (TMA on sm_90) where DESCRIPTORS is set, else a pointer.
    """
    base = ptr + start.to(tl.int64) * (HEADS * D)
    if DESCRIPTORS:  # bounded by the row and by each head: what is outside reads as zero
        source = tl.make_tensor_descriptor(
            base,
            shape=[HEADS, n, D],
            strides=[D, HEADS * D, 1],
            block_shape=[1, BLOCK, DP],
        )
    else:
        source = base
    return source


@jit
def read_block(
    source, h, i, n,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Tokens i .. i + BLOCK - 1 of head h (BLOCK, DP); zero from token n and column D on."""
    if DESCRIPTORS:
        block = source.load([h, i, 0])  # (1, BLOCK, DP)
        block = tl.reshape(block, (BLOCK, DP))
    else:
        tokens = i + tl.arange(0, BLOCK)
        cols = tl.arange(0, DP)
        in_row = tokens < n
        inside = in_row[:, None] & (cols < D)[None, :]
        token_offsets = tokens.to(tl.int64)[:, None] * (HEADS * D)  # (BLOCK, 1)
        col_offsets = (h * D + cols)[None, :]  # (1, DP)
        offsets = token_offsets + col_offsets
        block = tl.load(source + offsets, mask=inside, other=0.0)
    return block


@jit
def write_block(
    ptr, start, h, i, n, block,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store `block` (BLOCK, DP) as tokens i .. i + BLOCK - 1 of head h, the part inside the row."""
    tokens = i + tl.arange(0, BLOCK)
    cols = tl.arange(0, DP)
    in_row = tokens < n
    inside = in_row[:, None] & (cols < D)[None, :]
    token_offsets = (start + tokens).to(tl.int64)[:, None] * (HEADS * D)  # (BLOCK, 1)
    col_offsets = (h * D + cols)[None, :]  # (1, DP)
    offsets = token_offsets + col_offsets
    tl.store(ptr + offsets, block.to(ptr.dtype.element_ty), mask=inside)


@jit
def padded_offset(start, row, h, i, BLOCKS, PAD: tl.constexpr):
    """The index of token i of a row in a tensor (H, BLOCKS * PAD), where rows begin at whole PADs.

    The tokens before the row fill start // PAD whole PADs, and each of the `row` rows before it may
    leave part of one PAD unused. So blocks are read without a mask, 16 bytes at a time.
    """
    head_start = tl.cast(h, tl.int64) * BLOCKS  # in PADs
    row_start = head_start + start // PAD + row  # in PADs
    return row_start * PAD + i


@jit
def causal_mask(i, j, BM: tl.constexpr, BN: tl.constexpr):
    """(BM, BN): whether query i + a sees key j + b, that is j + b <= i + a."""
    queries = (i + tl.arange(0, BM))[:, None]
    keys = (j + tl.arange(0, BN))[None, :]
    return queries >= keys


@jit
def add_keys(
    q, o, m_i, l_i,
    source, k_head, v_head, i, j, n,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys j .. j + BN - 1 for the queries q (BM, DP).

    o (BM, DP) is the output so far, not yet divided by l_i; m_i (BM,) the largest score so far;
    l_i (BM,) the sum of the weights so far. Returns the three.
    """
    SCALE: tl.constexpr = KERNEL_LOG2_E / D**0.5  # exp(x / sqrt(D)) = exp2(x * SCALE)
    k = read_block(source, k_head, j, n, HEADS, D, DP, BN, DESCRIPTORS)  # (BN, DP)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BM, BN)
    if DIAGONAL:  # hides the keys after the row too: every query of the row comes before them
        seen = causal_mask(i, j, BM, BN)
        scores = tl.where(seen, scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, axis=1))  # finite: key 0 comes first, all see it
    p = tl.exp2(scores * SCALE - (m_new * SCALE)[:, None])  # (BM, BN)
    alpha = tl.exp2((m_i - m_new) * SCALE)
    l_i = l_i * alpha + tl.sum(p, axis=1)
    v = read_block(source, v_head, j, n, HEADS, D, DP, BN, DESCRIPTORS)  # (BN, DP)
    p = p.to(v.dtype)
    o = tl.dot(p, v, o * alpha[:, None], input_precision="ieee")
    return o, m_new, l_i


# ---- the kernel


@jit(varying=("T",))
def attention_forward_kernel(
    qkv_ptr,  # (T, HEADS * D)
    cu_seqlens_ptr,  # (rows + 1,) int32
    o_ptr,  # (T, H * D), written
    lse_ptr,  # (H, T) fp32, written
    T,
    H: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """o and lse of one block of queries of one head of one row.

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
    k_head = H + h // (H // G)  # its values are G heads further

    source = row_source(qkv_ptr, start, n, HEADS, D, DP, BM, DESCRIPTORS)
    q = read_block(source, h, i, n, HEADS, D, DP, BM, DESCRIPTORS)  # (BM, DP)
    if BN != BM:  # else the same descriptor serves the keys: making one takes a microsecond
        source = row_source(qkv_ptr, start, n, HEADS, D, DP, BN, DESCRIPTORS)

    o = tl.zeros((BM, DP), tl.float32)
    m_i = tl.full((BM,), float("-inf"), tl.float32)
    l_i = tl.zeros((BM,), tl.float32)
    diagonal = i // BN * BN  # all queries of the block see every key before this one
    for j in range(0, diagonal, BN):
        o, m_i, l_i = add_keys(
            q, o, m_i, l_i, source, k_head, k_head + G, i, j, n,
            HEADS, D, DP, BM, BN, DESCRIPTORS, DIAGONAL=False,
        )  # fmt: skip
    for j in range(diagonal, tl.minimum(i + BM, n), BN):
        o, m_i, l_i = add_keys(
            q, o, m_i, l_i, source, k_head, k_head + G, i, j, n,
            HEADS, D, DP, BM, BN, DESCRIPTORS, DIAGONAL=True,
        )  # fmt: skip

    o = o / l_i[:, None]
    write_block(o_ptr, start, h, i, n, o, H, D, DP, BM)
    tokens = i + tl.arange(0, BM)
    lse = m_i * D**-0.5 + tl.log(l_i)
    lse_ptrs = lse_ptr + h.to(tl.int64) * T + start + tokens
    tl.store(lse_ptrs, lse, mask=tokens < n)


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
    G = (qkv.shape[1] // D - H) // 2
    DP = power_of_two(D)
    is_fp32 = qkv.dtype == torch.float32
    config = tile_config(kernel.__name__, qkv.device, "fp32" if is_fp32 else f"d{DP}")
    assert config["BM"] <= PAD, f"{kernel.__name__}: BM {config['BM']} over {PAD}"
    blocks = cdiv(longest_row(packed), config[block])
    grid = (heads, blocks, len(packed.rows))
    # Without TMA the descriptors' third dimension costs cp.async; products of fp32 read registers.
    has_tma = device_class(qkv.device) not in ("sm_80", "gfx942") and not is_fp32
    # Every head has to begin on 16 bytes, not only every row of the tensor.
    is_aligned = tma_readable(*read) and D * qkv.element_size() % 16 == 0
    constants |= {"H": H, "G": G, "D": D, "DP": DP, "DESCRIPTORS": has_tma and is_aligned}
    launch(kernel, grid, *args, **constants, **config)


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
