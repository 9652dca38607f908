"""The Triton kernels of lora_linear's backward

1. lora_up_backward_kernel  a tile of dy is read once, for dS (a sum over columns, complete within
                            its program) and for dB (a sum over tokens: parts by block of tokens)
2. lora_da_kernel           dA, in parts by chunk of tokens
3. lora_reduce_kernel       adds the parts in their order: no atomics, the same bits in every run
4. lora_dx_kernel           dx = dy W + mask * (dS A) in one pass
Rank is padded and dropout masks are drawn as in triton_forward.py.
tiles      shape classes as there; before them "drop" for dx with dropout on many tokens. The
           configuration `lora_linear_backward` names the form that the public function takes:
           kernels, or addmm, the torch form on the vendor's library
traffic    T (2K + 2N + 3R) + N K elements and the parts
"""

# T = tokens, K = inputs, N = outputs of all members, R = ranks of all adapted members
# BM = tokens of a tile, BN = its columns, BK = elements of a step, BR = ranks of a tile
# N_i = outputs of member i, RANK = ranks of a member, parts = terms of a sum over tokens

from __future__ import annotations

import torch
from torch import Tensor

from kernels.integers import cdiv, power_of_two
from kernels.launch.tile_config import tile_config
from kernels.launch.triton_launch import jit, launch, tl, tma_readable
from kernels.lora_linear.group import LoraGroup
from kernels.lora_linear.torch_form import lora_linear_backward
from kernels.lora_linear.triton_forward import (
    inner_contiguous,
    members_of,
    pick,
    pick_pointer,
    programs_for,
    shape_classes,
    tile_position,
)
from kernels.philox import Dropout, dropout_arguments, dropout_tile

# ---- kernels


@jit(varying=("T",))
def lora_up_backward_kernel(
    # dy (T, N), rows dy_stride apart; S (T, R); B_i (N_i, RANK)
    dy_ptr, s_ptr, b0_ptr, b1_ptr, b2_ptr,
    # the results: dS (T, R); the parts of dB (blocks, N, RANK) fp32
    ds_ptr, part_ptr,
    # as in `linear_tile`
    T, dy_stride, scale,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    R: tl.constexpr, RANK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dS_i = s dy_i B_i of one block of BM tokens and one member i; the block's part of dB_i."""
    block = tl.program_id(0)
    member = tl.program_id(1)
    s_start = pick(member, S0, S1, S2)  # the member's first column of S
    if s_start < 0:  # the member has no adapter
        return
    start = pick(member, 0, N0, N0 + N1)  # the member's first column of dy
    size = pick(member, N0, N1, N2)  # its columns
    tl.assume(size > 0)
    tokens = block * BM + tl.arange(0, BM)
    ranks = tl.arange(0, BR)
    rows = tokens.to(tl.int64)[:, None]  # (BM, 1)
    s_offsets = rows * R + (s_start + ranks)[None, :]
    token_mask = (tokens < T)[:, None]
    rank_mask = (ranks < RANK)[None, :]
    s_mask = token_mask & rank_mask
    s = tl.load(s_ptr + s_offsets, mask=s_mask, other=0.0)  # (BM, BR)
    b_ptr = pick_pointer(member, b0_ptr, b1_ptr, b2_ptr)
    # to the block's part, and in it to the member's rows
    part_ptr += block.to(tl.int64) * (N0 + N1 + N2) * RANK + start.to(tl.int64) * RANK
    ds = tl.zeros((BM, BR), tl.float32)
    for n in range(0, size, BN):
        cols = n + tl.arange(0, BN)
        dy_rows = dy_ptr + rows * dy_stride  # (BM, 1) addresses
        dy_at = dy_rows + (start + cols)[None, :]
        col_mask = cols < size
        dy_mask = token_mask & col_mask[None, :]
        dy = tl.load(dy_at, mask=dy_mask, other=0.0)  # (BM, BN)
        b_offsets = cols.to(tl.int64)[:, None] * RANK + ranks[None, :]  # of B_i and of its part
        b_mask = col_mask[:, None] & rank_mask
        b = tl.load(b_ptr + b_offsets, mask=b_mask, other=0.0)  # (BN, BR)
        ds = tl.dot(dy, b, ds, input_precision="ieee")
        part_at = part_ptr + b_offsets
        db = tl.dot(dy.T, s, input_precision="ieee")  # (BN, BR), this block's part
        tl.store(part_at, db, mask=b_mask)
    ds_at = ds_ptr + s_offsets
    ds_scaled = (ds * scale).to(ds_ptr.dtype.element_ty)
    tl.store(ds_at, ds_scaled, mask=s_mask)


@jit(varying=("T", "key", "threshold"))
def lora_da_kernel(
    ds_ptr,  # (T, R)
    x_ptr,  # (T, K), rows x_stride apart
    part_ptr,  # (chunks, R, K) fp32
    position_ptr,  # from here to threshold: `dropout_arguments`, used if DROP
    row_key_ptr,
    step_ptr,
    key,
    threshold,
    T,
    x_stride,
    K: tl.constexpr,
    R: tl.constexpr,
    DROP: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """This chunk of tokens' part of dA = dS^T x^: a tile of BR ranks and BK inputs.

    CHUNK tokens are added up in one program, BM at a time.
    """
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    first_col = tl.program_id(0) * BK
    cols = first_col + tl.arange(0, BK)
    chunk = tl.program_id(2)
    rank_mask = ranks < R
    col_mask = cols < K
    acc = tl.zeros((BR, BK), tl.float32)
    for m in range(0, CHUNK, BM):
        tokens = chunk * CHUNK + m + tl.arange(0, BM)
        token_mask = tokens < T
        rows = tokens.to(tl.int64)[:, None]  # (BM, 1)
        ds_rows = ds_ptr + rows * R  # (BM, 1) addresses
        ds_mask = token_mask[:, None] & rank_mask[None, :]
        ds = tl.load(ds_rows + ranks[None, :], mask=ds_mask, other=0.0)  # (BM, BR)
        x_rows = x_ptr + rows * x_stride
        x_mask = token_mask[:, None] & col_mask[None, :]
        x = tl.load(x_rows + cols[None, :], mask=x_mask, other=0.0)  # (BM, BK)
        if DROP:
            position = tl.load(position_ptr + tokens, mask=token_mask, other=0)
            row_key = tl.load(row_key_ptr + tokens, mask=token_mask, other=0)
            step = tl.load(step_ptr)
            mask = dropout_tile(position, row_key, step, key, first_col, threshold, BM, BK)
            x = (x.to(tl.float32) * mask).to(x.dtype)
        acc = tl.dot(ds.T, x, acc, input_precision="ieee")
    part_rows = (chunk.to(tl.int64) * R + ranks)[:, None] * K
    part_offsets = part_rows + cols[None, :]  # (BR, BK)
    part_mask = rank_mask[:, None] & col_mask[None, :]
    tl.store(part_ptr + part_offsets, acc, mask=part_mask)


@jit(varying=("parts",))
def lora_reduce_kernel(part_ptr, out_ptr, parts, stride, first, count, scale, BN: tl.constexpr):
    """out += scale * the sum of the parts, in their order: BN of `count` elements.

    A part begins `stride` elements after the one before; of each, elements from `first` on count.
    """
    offsets = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = offsets < count
    acc = tl.zeros((BN,), tl.float32)
    part_ptr += first
    for _ in range(parts):
        acc += tl.load(part_ptr + offsets, mask=mask, other=0.0)
        part_ptr += stride
    out = tl.load(out_ptr + offsets, mask=mask, other=0.0)
    total = out + scale * acc
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def dx_tile(
    # which tile of dx, numbered by `tile_position`
    pid,
    # operands as descriptors or pointers: dy (T, N), w (N, K), dS (T, R), A (R, K); the result dx
    dy, w, ds, a, dx_ptr,
    # dropout, as in `dropout_tile`
    position_ptr, row_key_ptr, step_ptr, key, threshold,
    # sizes
    T, dy_stride,
    K: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    # the form: with dropout; operands read through descriptors
    DROP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    # the tile configuration
    GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile of dx (BM, BN): tokens by inputs; the inner loop runs over the rows of W."""
    pid_m, pid_n = tile_position(pid, tl.cdiv(T, BM), tl.cdiv(K, BN), GROUP)
    tokens = pid_m * BM + tl.arange(0, BM)
    cols = pid_n * BN + tl.arange(0, BN)
    # Lanes outside read token 0 and column 0 again, which needs no mask; they store nothing.
    safe_tokens = tl.where(tokens < T, tokens, 0).to(tl.int64)
    safe_cols = tl.where(cols < K, cols, 0)

    # 1. dy W
    acc = tl.zeros((BM, BN), tl.float32)
    for n in range(0, N, BK):
        if DESCRIPTORS:
            dy_tile = dy.load([pid_m * BM, n])  # (BM, BK)
            w_tile = w.load([n, pid_n * BN])  # (BK, BN)
        else:
            inner = n + tl.arange(0, BK)
            inner_mask = inner < N
            dy_offsets = safe_tokens[:, None] * dy_stride + inner[None, :]
            dy_tile = tl.load(dy + dy_offsets, mask=inner_mask[None, :], other=0.0)
            w_offsets = inner.to(tl.int64)[:, None] * K + safe_cols[None, :]
            w_tile = tl.load(w + w_offsets, mask=inner_mask[:, None], other=0.0)
        acc = tl.dot(dy_tile, w_tile, acc, input_precision="ieee")

    # 2. dS A: with dropout in an accumulator of its own, which the mask multiplies
    low = acc if not DROP else tl.zeros((BM, BN), tl.float32)
    for r in tl.static_range(0, R, BR):
        if DESCRIPTORS:
            ds_tile = ds.load([pid_m * BM, r])  # (BM, BR)
            a_tile = a.load([r, pid_n * BN])  # (BR, BN)
        else:
            ranks = r + tl.arange(0, BR)
            rank_mask = ranks < R
            ds_offsets = safe_tokens[:, None] * R + ranks[None, :]
            ds_tile = tl.load(ds + ds_offsets, mask=rank_mask[None, :], other=0.0)
            a_offsets = ranks[:, None] * K + safe_cols[None, :]
            a_tile = tl.load(a + a_offsets, mask=rank_mask[:, None], other=0.0)
        low = tl.dot(ds_tile, a_tile, low, input_precision="ieee")

    # 3. dx, the sum of both (the mask is computed here: it is not kept in registers over the loop)
    dx = low
    if DROP:
        position = tl.load(position_ptr + safe_tokens)
        row_key = tl.load(row_key_ptr + safe_tokens)
        step = tl.load(step_ptr)
        first_col = pid_n * BN
        mask = dropout_tile(position, row_key, step, key, first_col, threshold, BM, BN)
        dx = acc + low * mask
    dx_mask = (tokens < T)[:, None] & (cols < K)[None, :]
    dx_offsets = tokens.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(dx_ptr + dx_offsets, dx.to(dx_ptr.dtype.element_ty), mask=dx_mask)


@jit(varying=("T", "key", "threshold", "tiles", "programs"))
def lora_dx_kernel(
    # as in `dx_tile`
    dy_ptr, w_ptr, ds_ptr, a_ptr, dx_ptr,
    position_ptr, row_key_ptr, step_ptr, key, threshold,
    T, dy_stride,
    # tiles of dx, and programs that make them
    tiles, programs,
    # as in `dx_tile`; PERSISTENT as in lora_linear_kernel
    K: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    DROP: tl.constexpr, DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx = dy W + mask * (dS A)."""
    dy = dy_ptr
    w = w_ptr
    ds = ds_ptr
    a = a_ptr
    if DESCRIPTORS:
        dy = tl.make_tensor_descriptor(dy_ptr, [T, N], [dy_stride, 1], [BM, BK])
        w = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BK, BN])
        ds = tl.make_tensor_descriptor(ds_ptr, [T, R], [R, 1], [BM, BR])
        a = tl.make_tensor_descriptor(a_ptr, [R, K], [K, 1], [BR, BN])
    if PERSISTENT:
        for pid in tl.range(tl.program_id(0), tiles, programs, num_stages=1):
            dx_tile(
                pid, dy, w, ds, a, dx_ptr, position_ptr, row_key_ptr, step_ptr, key, threshold,
                T, dy_stride, K, N, R, DROP, DESCRIPTORS, GROUP, BM, BN, BK, BR,
            )  # fmt: skip
    else:
        dx_tile(
            tl.program_id(0), dy, w, ds, a, dx_ptr, position_ptr, row_key_ptr, step_ptr, key,
            threshold, T, dy_stride, K, N, R, DROP, DESCRIPTORS, GROUP, BM, BN, BK, BR,
        )  # fmt: skip


# ---- launches


def _launch_up_backward(
    dy: Tensor, s: Tensor, group: LoraGroup, classes: tuple[str, ...]
) -> Tensor:
    """dS (T, R); adds dB into the group's views."""
    T, N = dy.shape
    (b0, b1, b2), members = members_of(group)
    config = tile_config("lora_up_backward_kernel", dy.device, *classes)
    blocks = cdiv(T, config["BM"])
    ds = torch.empty_like(s)  # (T, R)
    part = dy.new_empty(blocks, N, group.rank, dtype=torch.float32)
    grid = (blocks, len(group.sizes))
    launch(
        lora_up_backward_kernel, grid,
        dy, s, b0, b1, b2, ds, part, T, dy.stride(0), group.scale,
        **members, BR=power_of_two(group.rank), **config,
    )  # fmt: skip
    for member in group.members():
        first = member.y_columns.start * group.rank  # of the member's elements in a part
        _add_parts(part, first, group.db[member.index], group.scale)
    return ds


def _launch_da(
    ds: Tensor, x: Tensor, group: LoraGroup, dropout: Dropout | None, classes: tuple[str, ...]
) -> None:
    """Adds dA into the group's view."""
    T, K = x.shape
    R = ds.shape[1]
    config = tile_config("lora_da_kernel", x.device, *classes)
    if R <= 16:
        config["BR"] = 16
    chunks = cdiv(T, config["CHUNK"])
    part = x.new_empty(chunks, R, K, dtype=torch.float32)
    grid = (cdiv(K, config["BK"]), cdiv(R, config["BR"]), chunks)
    launch(
        lora_da_kernel, grid,
        ds, x, part, *dropout_arguments(dropout), T, x.stride(0),
        K=K, R=R, DROP=dropout is not None, **config,
    )  # fmt: skip
    _add_parts(part, 0, group.da, 1.0)


def _launch_dx(
    dy: Tensor, weight: Tensor, ds: Tensor, a: Tensor, dropout: Dropout | None,
    classes: tuple[str, ...],
) -> Tensor:  # fmt: skip
    """dx (T, K)."""
    T, N = dy.shape
    R, K = a.shape
    dx = dy.new_empty(T, K)
    if dropout is not None and classes[0].startswith("many"):
        classes = ("drop", *classes)  # a second accumulator: tiles of its own
    config = tile_config("lora_dx_kernel", dy.device, *classes)
    config["BR"] = min(config["BR"], power_of_two(R))
    tiles = cdiv(T, config["BM"]) * cdiv(K, config["BN"])
    descriptors = tma_readable(dy, weight, ds, a)
    programs, persistent = programs_for(tiles, dy, descriptors)
    launch(
        lora_dx_kernel, (programs,),
        dy, weight, ds, a, dx, *dropout_arguments(dropout), T, dy.stride(0), tiles, programs,
        K=K, N=N, R=R,
        DROP=dropout is not None, DESCRIPTORS=descriptors, PERSISTENT=persistent, **config,
    )  # fmt: skip
    return dx


def lora_linear_backward_kernels_triton(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    s: Tensor | None = None,
    group: LoraGroup | None = None,
    need_dx: bool = True,
    dropout: Dropout | None = None,
) -> Tensor | None:
    """As `lora_linear_backward`: dS with dB's parts, dA's parts, their ordered sums, dx."""
    if group is None:
        return lora_linear_backward(dy, x, weight, need_dx=need_dx)
    T = x.shape[0]
    N = weight.shape[0]
    R = group.a.shape[0]
    assert dy.shape == (T, N) and s.shape == (T, R), (
        f"dy {tuple(dy.shape)}, s {tuple(s.shape)} for x {tuple(x.shape)}, W {tuple(weight.shape)}"
    )
    dy = inner_contiguous(dy)
    x = inner_contiguous(x)
    s = s.contiguous()
    classes = shape_classes(x, group.rank)
    ds = _launch_up_backward(dy, s, group, classes)
    _launch_da(ds, x, group, dropout, classes)
    if not need_dx:
        return None
    weight = weight.contiguous()
    a = group.a.contiguous()
    return _launch_dx(dy, weight, ds, a, dropout, classes)


def _add_parts(part: Tensor, first: int, out: Tensor, scale: float) -> None:
    """out += scale times the sum over part's first dimension of elements first, first + 1, ..."""
    assert out.is_contiguous(), f"gradient {tuple(out.shape)} with strides {out.stride()}"
    count = out.numel()
    config = tile_config("lora_reduce_kernel", out.device)
    grid = (cdiv(count, config["BN"]),)
    parts = part.shape[0]
    stride = part.stride(0)
    launch(lora_reduce_kernel, grid, part, out, parts, stride, first, count, scale, **config)


BACKWARD_FORMS = {"kernels": lora_linear_backward_kernels_triton, "addmm": lora_linear_backward}


def lora_linear_backward_triton(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    s: Tensor | None = None,
    group: LoraGroup | None = None,
    need_dx: bool = True,
    dropout: Dropout | None = None,
) -> Tensor | None:
    """As `lora_linear_backward`, in the form that the tile configuration names."""
    if group is None:
        return lora_linear_backward(dy, x, weight, need_dx=need_dx)
    assert x is not None, "the gradient of A needs x"
    config = tile_config("lora_linear_backward", x.device, *shape_classes(x, group.rank))
    return BACKWARD_FORMS[config["form"]](dy, x, weight, s, group, need_dx, dropout)
