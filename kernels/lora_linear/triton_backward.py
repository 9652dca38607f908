"""The Triton kernels of lora_linear.py's backward; mathematics, shapes and contract stand there

1. a tile of dy is read once for dS (a sum over columns, whole within its program) and for dB (a sum
   over rows: parts by block of rows)
2. dA in parts by chunk of rows
3. parts are added in their order by a kernel of its own: no atomics
4. dx = dy W + mask * (dS A) in one pass
Rank is padded and dropout drawn again as in lora_linear_triton.py.
tiles      shape classes as there; before them "drop" for dx with dropout on many tokens. The row
           lora_linear_backward names the public function's form: kernels, addmm
traffic    T (2K + 2N + 3R) + N K elements and the parts
"""

# T = tokens, K = inputs, N = outputs of all members, R = ranks of all adapted members

from __future__ import annotations

import torch
from torch import Tensor

from kernels.launch.tile_config import tile
from kernels.launch.triton_launch import cdiv, described, jit, launch, power_of_two, tl
from kernels.lora_linear.group import LoraGroup
from kernels.lora_linear.torch_form import lora_linear_backward
from kernels.lora_linear.triton_forward import (
    inner_contiguous,
    launch_tiles,
    members_of,
    pick,
    pick_pointer,
    shape_classes,
    tile_of,
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
    """Each tile of dy is read once: dS_i = s dy_i B_i, and this block of rows' share of dB_i."""
    chunk, member = tl.program_id(0), tl.program_id(1)
    s_begin = pick(member, S0, S1, S2)
    if s_begin < 0:
        return
    begin, size = pick(member, 0, N0, N0 + N1), pick(member, N0, N1, N2)
    tl.assume(size > 0)
    rows, ranks = chunk * BM + tl.arange(0, BM), tl.arange(0, BR)
    s_at = rows.to(tl.int64)[:, None] * R + (s_begin + ranks)[None, :]
    s_mask = (rows < T)[:, None] & (ranks < RANK)[None, :]
    s = tl.load(s_ptr + s_at, mask=s_mask, other=0.0)
    b_ptr = pick_pointer(member, b0_ptr, b1_ptr, b2_ptr)
    part_ptr += chunk.to(tl.int64) * (N0 + N1 + N2) * RANK + begin.to(tl.int64) * RANK
    ds = tl.zeros((BM, BR), tl.float32)
    for n in range(0, size, BN):
        cols = n + tl.arange(0, BN)
        dy = tl.load(
            dy_ptr + rows.to(tl.int64)[:, None] * dy_stride + (begin + cols)[None, :],
            mask=(rows < T)[:, None] & (cols < size)[None, :], other=0.0,
        )  # fmt: skip
        at = cols.to(tl.int64)[:, None] * RANK + ranks[None, :]
        inside = (cols < size)[:, None] & (ranks < RANK)[None, :]
        b = tl.load(b_ptr + at, mask=inside, other=0.0)
        ds = tl.dot(dy, b, ds, input_precision="ieee")
        tl.store(part_ptr + at, tl.dot(dy.T, s, input_precision="ieee"), mask=inside)
    tl.store(ds_ptr + s_at, (ds * scale).to(ds_ptr.dtype.element_ty), mask=s_mask)


@jit(varying=("T", "key", "threshold"))
def lora_da_kernel(
    ds_ptr, x_ptr, part_ptr, position_ptr, row_key_ptr, step_ptr, key, threshold, T, x_stride,
    K: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr, CHUNK: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """This chunk of rows' share of dA = dS^T x^."""
    ranks, cols = tl.program_id(1) * BR + tl.arange(0, BR), tl.program_id(0) * BK + tl.arange(0, BK)
    chunk = tl.program_id(2)
    acc = tl.zeros((BR, BK), tl.float32)
    for m in range(0, CHUNK, BM):
        rows = chunk * CHUNK + m + tl.arange(0, BM)
        here = (rows < T)[:, None]
        at = rows.to(tl.int64)[:, None]
        ds = tl.load(ds_ptr + at * R + ranks[None, :], mask=here & (ranks < R)[None, :], other=0.0)
        inside = here & (cols < K)[None, :]
        x = tl.load(x_ptr + at * x_stride + cols[None, :], mask=inside, other=0.0)
        if DROP:
            position = tl.load(position_ptr + rows, mask=rows < T, other=0)
            row_key = tl.load(row_key_ptr + rows, mask=rows < T, other=0)
            first = tl.program_id(0) * BK
            mask = dropout_tile(position, row_key, tl.load(step_ptr), key, first, threshold, BM, BK)
            x = (x.to(tl.float32) * mask).to(x.dtype)
        acc = tl.dot(ds.T, x, acc, input_precision="ieee")
    at = (chunk.to(tl.int64) * R + ranks)[:, None] * K + cols[None, :]
    tl.store(part_ptr + at, acc, mask=(ranks < R)[:, None] & (cols < K)[None, :])


@jit(varying=("parts",))
def lora_reduce_kernel(part_ptr, out_ptr, parts, stride, first, count, scale, BN: tl.constexpr):
    """out += scale * the sum of the parts, in their order."""
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
    pid, dy, w, ds, a, dx_ptr, position_ptr, row_key_ptr, step_ptr, key, threshold,
    T, dy_stride, K: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    DROP: tl.constexpr, DESCRIBED: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile of dx; the inner loop is over W's rows. dy, w, ds, a: descriptors, or pointers."""
    pid_m, pid_n = tile_of(pid, tl.cdiv(T, BM), tl.cdiv(K, BN), GROUP)
    rows, cols = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    safe_rows = tl.where(rows < T, rows, 0).to(tl.int64)
    safe_cols = tl.where(cols < K, cols, 0)
    acc = tl.zeros((BM, BN), tl.float32)
    for n in range(0, N, BK):
        if DESCRIBED:
            dy_tile, w_tile = dy.load([pid_m * BM, n]), w.load([n, pid_n * BN])
        else:
            inner = n + tl.arange(0, BK)
            at = safe_rows[:, None] * dy_stride + inner[None, :]
            dy_tile = tl.load(dy + at, mask=(inner < N)[None, :], other=0.0)
            at = inner.to(tl.int64)[:, None] * K + safe_cols[None, :]
            w_tile = tl.load(w + at, mask=(inner < N)[:, None], other=0.0)
        acc = tl.dot(dy_tile, w_tile, acc, input_precision="ieee")
    low = acc if not DROP else tl.zeros((BM, BN), tl.float32)
    for r in tl.static_range(0, R, BR):
        if DESCRIBED:
            ds_tile, a_tile = ds.load([pid_m * BM, r]), a.load([r, pid_n * BN])
        else:
            ranks = r + tl.arange(0, BR)
            live = ranks < R
            at = safe_rows[:, None] * R + ranks[None, :]
            ds_tile = tl.load(ds + at, mask=live[None, :], other=0.0)
            at = ranks[:, None] * K + safe_cols[None, :]
            a_tile = tl.load(a + at, mask=live[:, None], other=0.0)
        low = tl.dot(ds_tile, a_tile, low, input_precision="ieee")
    if DROP:
        position, row_key = tl.load(position_ptr + safe_rows), tl.load(row_key_ptr + safe_rows)
        low = acc + low * dropout_tile(
            position, row_key, tl.load(step_ptr), key, pid_n * BN, threshold, BM, BN
        )
    inside = (rows < T)[:, None] & (cols < K)[None, :]
    at = rows.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(dx_ptr + at, low.to(dx_ptr.dtype.element_ty), mask=inside)


@jit(varying=("T", "key", "threshold", "tiles", "programs"))
def lora_dx_kernel(
    dy_ptr, w_ptr, ds_ptr, a_ptr, dx_ptr, position_ptr, row_key_ptr, step_ptr, key, threshold,
    T, dy_stride, tiles, programs, K: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    DROP: tl.constexpr, DESCRIBED: tl.constexpr, PERSISTENT: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx = dy W + mask * (dS A); PERSISTENT as in lora_linear_kernel."""
    dy, w, ds, a = dy_ptr, w_ptr, ds_ptr, a_ptr
    if DESCRIBED:
        dy = tl.make_tensor_descriptor(dy_ptr, [T, N], [dy_stride, 1], [BM, BK])
        w = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BK, BN])
        ds = tl.make_tensor_descriptor(ds_ptr, [T, R], [R, 1], [BM, BR])
        a = tl.make_tensor_descriptor(a_ptr, [R, K], [K, 1], [BR, BN])
    if PERSISTENT:
        for pid in tl.range(tl.program_id(0), tiles, programs, num_stages=1):
            dx_tile(
                pid, dy, w, ds, a, dx_ptr, position_ptr, row_key_ptr, step_ptr, key, threshold,
                T, dy_stride, K, N, R, DROP, DESCRIBED, GROUP, BM, BN, BK, BR,
            )  # fmt: skip
    else:
        dx_tile(
            tl.program_id(0), dy, w, ds, a, dx_ptr, position_ptr, row_key_ptr, step_ptr, key,
            threshold, T, dy_stride, K, N, R, DROP, DESCRIBED, GROUP, BM, BN, BK, BR,
        )  # fmt: skip


# ---- launches


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
    T, K = x.shape
    R, N = group.a.shape[0], weight.shape[0]
    assert dy.shape == (T, N) and s.shape == (T, R), (
        f"dy {tuple(dy.shape)}, s {tuple(s.shape)} for x {tuple(x.shape)}, W {tuple(weight.shape)}"
    )
    dy, x, s = inner_contiguous(dy), inner_contiguous(x), s.contiguous()
    weight, a = weight.contiguous(), group.a.contiguous()
    (b, members), classes = members_of(group), shape_classes(x, group.rank)
    drop, DROP, BR = dropout_arguments(dropout), dropout is not None, power_of_two(group.rank)

    row = tile("lora_up_backward_kernel", x.device, *classes)
    parts, ds = cdiv(T, row["BM"]), torch.empty_like(s)
    part = x.new_empty(parts, N, group.rank, dtype=torch.float32)
    launch(
        lora_up_backward_kernel, (parts, len(group.sizes)),
        dy, s, *b, ds, part, T, dy.stride(0), group.scale, **members, BR=BR, **row,
    )  # fmt: skip
    for i, columns, _ in group.members():
        _reduce(part, columns.start * group.rank, group.db[i], group.scale)

    row = tile("lora_da_kernel", x.device, *classes)
    row["BR"] = 16 if R <= 16 else row["BR"]
    parts = cdiv(T, row["CHUNK"])
    part = x.new_empty(parts, R, K, dtype=torch.float32)
    launch(
        lora_da_kernel, (cdiv(K, row["BK"]), cdiv(R, row["BR"]), parts),
        ds, x, part, *drop, T, x.stride(0), K=K, R=R, DROP=DROP, **row,
    )  # fmt: skip
    _reduce(part, 0, group.da, 1.0)
    if not need_dx:
        return None

    form = ("drop",) if DROP and classes[0].startswith("many") else ()  # a second accumulator
    row = tile("lora_dx_kernel", x.device, *form, *classes)
    dx = x.new_empty(T, K)
    launch_tiles(
        lora_dx_kernel, cdiv(T, row["BM"]) * cdiv(K, row["BN"]), x, described(dy, weight, ds, a),
        dy, weight, ds, a, dx, *drop, T, dy.stride(0), K=K, N=N, R=R, DROP=DROP,
        **row | {"BR": min(row["BR"], power_of_two(R))},
    )  # fmt: skip
    return dx


def lora_linear_backward_triton(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    s: Tensor | None = None,
    group: LoraGroup | None = None,
    need_dx: bool = True,
    dropout: Dropout | None = None,
) -> Tensor | None:
    """As `lora_linear_backward`, in the form that the table of tiles says: kernels, addmm."""
    if group is None:
        return lora_linear_backward(dy, x, weight, need_dx=need_dx)
    assert x is not None, "the gradient of A needs x"
    row = tile("lora_linear_backward", x.device, *shape_classes(x, group.rank))
    return BACKWARD_FORMS[row["form"]](dy, x, weight, s, group, need_dx, dropout)


BACKWARD_FORMS = {"kernels": lora_linear_backward_kernels_triton, "addmm": lora_linear_backward}


def _reduce(part: Tensor, first: int, out: Tensor, scale: float) -> None:
    """out += scale times the sum over part's first dimension of elements first, first + 1, ..."""
    assert out.is_contiguous(), f"gradient {tuple(out.shape)} with strides {out.stride()}"
    row, n = tile("lora_reduce_kernel", out.device), out.numel()
    args = (part, out, part.shape[0], part.stride(0), first, n, scale)
    launch(lora_reduce_kernel, (cdiv(n, row["BN"]),), *args, **row)
