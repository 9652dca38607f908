"""The Triton kernels of lora_linear's backward

1. lora_up_backward_kernel  a tile of dy is read once, for dS (a sum over columns, complete within
                            its program) and for dB (a sum over tokens: parts by block of tokens)
2. lora_da_kernel           dA, in parts by chunk of tokens
3. lora_reduce_kernel       adds the parts in their order: no atomics, the same bits in every run
4. lora_dx_kernel           dx = dy W + mask * (dS A) in one pass
Rank is padded and dropout drawn again as in triton_forward.py.
tiles      shape classes as there; before them "drop" for dx with dropout on many tokens. The
           configuration `lora_linear_backward` names the form that the public function takes:
           kernels, or addmm, the torch form on the vendor's library
traffic    T (2K + 2N + 3R) + N K elements and the parts
"""

# T = tokens, K = inputs, N = outputs of all members, R = ranks of all adapted members
# BM = tokens of a tile, BN = its columns, BK = elements of a step, BR = ranks of a tile

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
    launch_tiles,
    members_of,
    pick,
    pick_pointer,
    shape_classes,
    tile_position,
)
from kernels.philox import Dropout, dropout_arguments, dropout_tile

# ---- kernels


@jit(varying=("T",))
def lora_up_backward_kernel(
    dy_ptr, s_ptr, b0_ptr, b1_ptr, b2_ptr, ds_ptr, part_ptr, T, dy_stride, scale,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dS_i = s dy_i B_i of one block of BM tokens and one member i, and the block's part of dB_i.

    part_ptr: (blocks, N0 + N1 + N2, RANK) fp32. Arguments otherwise as in `linear_tile`.
    """
    block = tl.program_id(0)
    member = tl.program_id(1)
    s_begin = pick(member, S0, S1, S2)
    if s_begin < 0:  # the member has no adapter
        return
    begin = pick(member, 0, N0, N0 + N1)  # the member's first column of dy
    size = pick(member, N0, N1, N2)
    tl.assume(size > 0)
    tokens = block * BM + tl.arange(0, BM)
    ranks = tl.arange(0, BR)
    s_at = tokens.to(tl.int64)[:, None] * R + (s_begin + ranks)[None, :]
    s_mask = (tokens < T)[:, None] & (ranks < RANK)[None, :]
    s = tl.load(s_ptr + s_at, mask=s_mask, other=0.0)
    b_ptr = pick_pointer(member, b0_ptr, b1_ptr, b2_ptr)
    part_ptr += block.to(tl.int64) * (N0 + N1 + N2) * RANK + begin.to(tl.int64) * RANK
    ds = tl.zeros((BM, BR), tl.float32)
    for n in range(0, size, BN):
        cols = n + tl.arange(0, BN)
        dy_at = dy_ptr + tokens.to(tl.int64)[:, None] * dy_stride + (begin + cols)[None, :]
        dy_inside = (tokens < T)[:, None] & (cols < size)[None, :]
        dy = tl.load(dy_at, mask=dy_inside, other=0.0)  # (BM, BN)
        at = cols.to(tl.int64)[:, None] * RANK + ranks[None, :]
        inside = (cols < size)[:, None] & (ranks < RANK)[None, :]
        b = tl.load(b_ptr + at, mask=inside, other=0.0)  # (BN, BR)
        ds = tl.dot(dy, b, ds, input_precision="ieee")
        db = tl.dot(dy.T, s, input_precision="ieee")  # (BN, BR), this block's part
        tl.store(part_ptr + at, db, mask=inside)
    tl.store(ds_ptr + s_at, (ds * scale).to(ds_ptr.dtype.element_ty), mask=s_mask)


@jit(varying=("T", "key", "threshold"))
def lora_da_kernel(
    ds_ptr, x_ptr, part_ptr, position_ptr, row_key_ptr, step_ptr, key, threshold, T, x_stride,
    K: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr, CHUNK: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """This chunk of tokens' part of dA = dS^T x^: a tile of BR ranks and BK inputs.

    CHUNK tokens are added up in one program, BM at a time. part_ptr: (chunks, R, K) fp32.
    """
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    chunk = tl.program_id(2)
    acc = tl.zeros((BR, BK), tl.float32)
    for m in range(0, CHUNK, BM):
        tokens = chunk * CHUNK + m + tl.arange(0, BM)
        here = (tokens < T)[:, None]
        at = tokens.to(tl.int64)[:, None]
        ds = tl.load(ds_ptr + at * R + ranks[None, :], mask=here & (ranks < R)[None, :], other=0.0)
        inside = here & (cols < K)[None, :]
        x = tl.load(x_ptr + at * x_stride + cols[None, :], mask=inside, other=0.0)  # (BM, BK)
        if DROP:
            position = tl.load(position_ptr + tokens, mask=tokens < T, other=0)
            row_key = tl.load(row_key_ptr + tokens, mask=tokens < T, other=0)
            first = tl.program_id(0) * BK
            mask = dropout_tile(position, row_key, tl.load(step_ptr), key, first, threshold, BM, BK)
            x = (x.to(tl.float32) * mask).to(x.dtype)
        acc = tl.dot(ds.T, x, acc, input_precision="ieee")
    at = (chunk.to(tl.int64) * R + ranks)[:, None] * K + cols[None, :]
    tl.store(part_ptr + at, acc, mask=(ranks < R)[:, None] & (cols < K)[None, :])


@jit(varying=("parts",))
def lora_reduce_kernel(part_ptr, out_ptr, parts, stride, first, count, scale, BN: tl.constexpr):
    """out += scale * the sum of the parts, in their order: BN of `count` elements.

    A part begins `stride` elements after the one before; of each, elements from `first` on count.
    """
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    part_ptr += first
    for _ in range(parts):
        acc += tl.load(part_ptr + at, mask=at < count, other=0.0)
        part_ptr += stride
    out = tl.load(out_ptr + at, mask=at < count, other=0.0)
    tl.store(out_ptr + at, (out + scale * acc).to(out_ptr.dtype.element_ty), mask=at < count)


@jit
def dx_tile(
    # which tile of dx, numbered by `tile_position`
    pid,
    # operands as descriptors or pointers: dy (T, N), w (N, K), dS (T, R), A (R, K); the result dx
    dy, w, ds, a, dx_ptr,
    # dropout: what `dropout_tile` takes
    position_ptr, row_key_ptr, step_ptr, key, threshold,
    # sizes
    T, dy_stride, K: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    # the form: with dropout; operands read through descriptors
    DROP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    # the tile configuration
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile of dx (BM, BN): tokens by inputs; the inner loop runs over the rows of W."""
    pid_m, pid_n = tile_position(pid, tl.cdiv(T, BM), tl.cdiv(K, BN), GROUP)
    tokens = pid_m * BM + tl.arange(0, BM)
    cols = pid_n * BN + tl.arange(0, BN)
    # Lanes outside read token 0 and column 0 again, which needs no mask; they store nothing.
    safe_tokens = tl.where(tokens < T, tokens, 0).to(tl.int64)
    safe_cols = tl.where(cols < K, cols, 0)

    # dy W
    acc = tl.zeros((BM, BN), tl.float32)
    for n in range(0, N, BK):
        if DESCRIPTORS:
            dy_tile = dy.load([pid_m * BM, n])
            w_tile = w.load([n, pid_n * BN])
        else:
            inner = n + tl.arange(0, BK)
            at = safe_tokens[:, None] * dy_stride + inner[None, :]
            dy_tile = tl.load(dy + at, mask=(inner < N)[None, :], other=0.0)
            at = inner.to(tl.int64)[:, None] * K + safe_cols[None, :]
            w_tile = tl.load(w + at, mask=(inner < N)[:, None], other=0.0)
        acc = tl.dot(dy_tile, w_tile, acc, input_precision="ieee")

    # dS A: with dropout in an accumulator of its own, which the mask multiplies
    low = acc if not DROP else tl.zeros((BM, BN), tl.float32)
    for r in tl.static_range(0, R, BR):
        if DESCRIPTORS:
            ds_tile = ds.load([pid_m * BM, r])
            a_tile = a.load([r, pid_n * BN])
        else:
            ranks = r + tl.arange(0, BR)
            inside = ranks < R
            at = safe_tokens[:, None] * R + ranks[None, :]
            ds_tile = tl.load(ds + at, mask=inside[None, :], other=0.0)
            at = ranks[:, None] * K + safe_cols[None, :]
            a_tile = tl.load(a + at, mask=inside[:, None], other=0.0)
        low = tl.dot(ds_tile, a_tile, low, input_precision="ieee")
    if DROP:
        position = tl.load(position_ptr + safe_tokens)
        row_key = tl.load(row_key_ptr + safe_tokens)
        first = pid_n * BN
        mask = dropout_tile(
            position, row_key, tl.load(step_ptr), key, first, threshold, BM, BN
        )  # (BM, BN)
        low = acc + low * mask
    inside = (tokens < T)[:, None] & (cols < K)[None, :]
    at = tokens.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(dx_ptr + at, low.to(dx_ptr.dtype.element_ty), mask=inside)


@jit(varying=("T", "key", "threshold", "tiles", "programs"))
def lora_dx_kernel(
    dy_ptr, w_ptr, ds_ptr, a_ptr, dx_ptr, position_ptr, row_key_ptr, step_ptr, key, threshold,
    T, dy_stride, tiles, programs, K: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    DROP: tl.constexpr, DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx = dy W + mask * (dS A). Arguments as in `dx_tile`; PERSISTENT as in lora_linear_kernel."""
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
    b, members = members_of(group)
    config = tile_config("lora_up_backward_kernel", dy.device, *classes)
    blocks = cdiv(T, config["BM"])
    ds = torch.empty_like(s)
    part = dy.new_empty(blocks, N, group.rank, dtype=torch.float32)
    launch(
        lora_up_backward_kernel, (blocks, len(group.sizes)),
        dy, s, *b, ds, part, T, dy.stride(0), group.scale,
        **members, BR=power_of_two(group.rank), **config,
    )  # fmt: skip
    for i, columns, _ in group.members():
        _add_parts(part, columns.start * group.rank, group.db[i], group.scale)
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
    launch(
        lora_da_kernel, (cdiv(K, config["BK"]), cdiv(R, config["BR"]), chunks),
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
    many_dropped = dropout is not None and classes[0].startswith("many")
    first = ("drop",) if many_dropped else ()  # a second accumulator: tiles of its own
    config = tile_config("lora_dx_kernel", dy.device, *first, *classes)
    config["BR"] = min(config["BR"], power_of_two(R))
    tiles = cdiv(T, config["BM"]) * cdiv(K, config["BN"])
    launch_tiles(
        lora_dx_kernel, tiles, dy, tma_readable(dy, weight, ds, a),
        dy, weight, ds, a, dx, *dropout_arguments(dropout), T, dy.stride(0),
        K=K, N=N, R=R, DROP=dropout is not None, **config,
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
    N, R = weight.shape[0], group.a.shape[0]
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
    return _launch_dx(dy, weight.contiguous(), ds, group.a.contiguous(), dropout, classes)


def _add_parts(part: Tensor, first: int, out: Tensor, scale: float) -> None:
    """out += scale times the sum over part's first dimension of elements first, first + 1, ..."""
    assert out.is_contiguous(), f"gradient {tuple(out.shape)} with strides {out.stride()}"
    count = out.numel()
    config = tile_config("lora_reduce_kernel", out.device)
    grid = (cdiv(count, config["BN"]),)
    args = (part, out, part.shape[0], part.stride(0), first, count, scale)
    launch(lora_reduce_kernel, grid, *args, **config)


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
