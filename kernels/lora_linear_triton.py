"""The Triton kernels of lora_linear.py, where the mathematics, the shapes and the contract stand

forward    fused   one K loop with two accumulators: a tile of x is loaded once for x W^T and x A^T,
                   the adapter goes onto the fp32 accumulator at the end, S is written once
           split   S first, then the K loop, then S B^T onto the accumulator
           addmm   the torch form on the vendor's library
backward   1. a tile of dy is read once for dS (a sum over columns, whole within its program) and
              for dB (a sum over rows: parts by block of rows)
           2. dA in parts by chunk of rows
           3. parts are added in their order by a kernel of its own: no atomics
           4. dx = dy W + mask * (dS A) in one pass
An output tile never straddles two members. Rank is padded inside to a power of two, at least 16.
Dropout is drawn again from its key wherever x^ is needed. With dropout the forward is always split:
every column tile of the fused form would draw the whole mask again.
tiles      shape classes: "fp32 r16" (padded rank), "fp32"; else "few r16" (at most 64 tokens),
           "many r16", "few", "many"; before them "drop" for dx with dropout on many tokens. The
           rows lora_linear_forward and lora_linear_backward name the public functions' form.
traffic    forward T (K + N + 2R) + N K elements; backward T (2K + 2N + 3R) + N K and the parts
"""

# T = tokens, K = inputs, N = outputs of all members, R = ranks of all adapted members

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._triton import cdiv, described, jit, launch, power_of_two, tl
from kernels.lora_linear import LoraGroup, lora_linear_backward, lora_linear_forward
from kernels.philox import Dropout, dropout_arguments, dropout_tile
from kernels.tiles import device_processors, tile

FEW = 64  # tokens up to which a product waits for its weights

# ---- helpers compiled into the kernels


@jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column) of output tile `pid`; GROUP rows of tiles at a time, so that L2 holds them."""
    first = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    return first + inside % height, inside // height


@jit
def pick(i, a, b, c):
    """The i-th of three scalars."""
    return tl.where(i == 0, a, tl.where(i == 1, b, c))


@jit
def pick_pointer(i, a, b, c):
    """The i-th of three pointers."""
    chosen = a
    if i == 1:
        chosen = b
    if i == 2:
        chosen = c
    return chosen


# ---- kernels


@jit(varying=("T", "key", "threshold"))
def lora_down_kernel(
    x_ptr, a_ptr, s_ptr, position_ptr, row_key_ptr, step_ptr, key, threshold, T, x_stride,
    K: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """S = x^ A^T"""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    safe_rows = tl.where(rows < T, rows, 0).to(tl.int64)  # what is read twice is not stored
    safe_ranks = tl.where(ranks < R, ranks, 0)
    if DROP:
        position, row_key = tl.load(position_ptr + safe_rows), tl.load(row_key_ptr + safe_rows)
        step = tl.load(step_ptr)
    acc = tl.zeros((BM, BR), tl.float32)
    for k in range(0, K, BK):
        cols = k + tl.arange(0, BK)
        inside = (cols < K)[None, :]
        x = tl.load(x_ptr + safe_rows[:, None] * x_stride + cols[None, :], mask=inside, other=0.0)
        a = tl.load(a_ptr + safe_ranks[:, None] * K + cols[None, :], mask=inside, other=0.0)
        if DROP:
            mask = dropout_tile(position, row_key, step, key, k, threshold, BM, BK)
            x = (x.to(tl.float32) * mask).to(x.dtype)
        acc = tl.dot(x, a.T, acc, input_precision="ieee")
    at = rows.to(tl.int64)[:, None] * R + ranks[None, :]
    tl.store(
        s_ptr + at, acc.to(s_ptr.dtype.element_ty), mask=(rows < T)[:, None] & (ranks < R)[None, :]
    )


@jit
def linear_tile(
    pid, x, w, a_ptr, b0_ptr, b1_ptr, b2_ptr, s_ptr, y_ptr, T, x_stride, scale,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
    FUSED: tl.constexpr, DESCRIBED: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile of y inside a member. x, w: their descriptors, or pointers."""
    t0, t1 = (N0 + BN - 1) // BN, (N1 + BN - 1) // BN
    tiles_n = t0 + t1 + (N2 + BN - 1) // BN
    pid_m, pid_n = tile_of(pid, tl.cdiv(T, BM), tiles_n, GROUP)
    member = (pid_n >= t0).to(tl.int32) + (pid_n >= t0 + t1).to(tl.int32)
    first = (pid_n - pick(member, 0, t0, t0 + t1)) * BN  # column within the member
    begin, size = pick(member, 0, N0, N0 + N1), pick(member, N0, N1, N2)
    s_begin = pick(member, S0, S1, S2)
    rows, cols = pid_m * BM + tl.arange(0, BM), first + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    live = ranks < tl.where(s_begin >= 0, RANK, 0)
    safe_rows = tl.where(rows < T, rows, 0).to(tl.int64)
    safe_cols = (begin + tl.where(cols < size, cols, 0)).to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    s_acc = tl.zeros((BM, BR), tl.float32)
    for k in range(0, K, BK):
        inner = k + tl.arange(0, BK)
        inside = (inner < K)[None, :]
        if DESCRIBED:  # rows of w behind the member are another's: columns that are not stored
            x_tile, w_tile = x.load([pid_m * BM, k]), w.load([begin + first, k])
        else:
            at = safe_rows[:, None] * x_stride + inner[None, :]
            x_tile = tl.load(x + at, mask=inside, other=0.0)
            w_tile = tl.load(w + safe_cols[:, None] * K + inner[None, :], mask=inside, other=0.0)
        acc = tl.dot(x_tile, w_tile.T, acc, input_precision="ieee")
        if FUSED and RANK > 0:
            at = (s_begin + ranks)[:, None] * K + inner[None, :]
            a = tl.load(a_ptr + at, mask=live[:, None] & inside, other=0.0)
            s_acc = tl.dot(x_tile, a.T, s_acc, input_precision="ieee")
    if RANK > 0:
        s_at = s_ptr + rows.to(tl.int64)[:, None] * R + (s_begin + ranks)[None, :]
        s_mask = (rows < T)[:, None] & live[None, :]
        if FUSED:
            if first == 0:
                tl.store(s_at, s_acc.to(s_ptr.dtype.element_ty), mask=s_mask)
            s = s_acc
        else:
            s = tl.load(s_at, mask=s_mask, other=0.0).to(tl.float32)
        b_ptr = pick_pointer(member, b0_ptr, b1_ptr, b2_ptr)
        b_at = tl.where(cols < size, cols, 0).to(tl.int64)[:, None] * RANK + ranks[None, :]
        b = tl.load(b_ptr + b_at, mask=live[None, :], other=0.0)
        acc = tl.dot((s * scale).to(b.dtype), b.T, acc, input_precision="ieee")
    y_at = rows.to(tl.int64)[:, None] * (N0 + N1 + N2) + (begin + cols)[None, :]
    inside = (rows < T)[:, None] & (cols < size)[None, :]
    tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=inside)


@jit(varying=("T", "tiles", "programs"))
def lora_linear_kernel(
    x_ptr, w_ptr, a_ptr, b0_ptr, b1_ptr, b2_ptr, s_ptr, y_ptr, T, x_stride, scale, tiles, programs,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
    FUSED: tl.constexpr, DESCRIBED: tl.constexpr, PERSISTENT: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y_i = x W_i^T + s S_i B_i^T; FUSED makes S_i on the way.

    S0, S1, S2: the member's first column of S, or -1 where it has no adapter. RANK 0: nobody has.
    PERSISTENT: a program makes every `programs`-th of the tiles, with descriptors made once. That
    loop has one stage: for a K of one step triton would else keep several tiles in flight.
    """
    x, w = x_ptr, w_ptr
    if DESCRIBED:
        x = tl.make_tensor_descriptor(x_ptr, [T, K], [x_stride, 1], [BM, BK])
        w = tl.make_tensor_descriptor(w_ptr, [N0 + N1 + N2, K], [K, 1], [BN, BK])
    if PERSISTENT:
        for pid in tl.range(tl.program_id(0), tiles, programs, num_stages=1):
            linear_tile(
                pid, x, w, a_ptr, b0_ptr, b1_ptr, b2_ptr, s_ptr, y_ptr, T, x_stride, scale,
                K, N0, N1, N2, S0, S1, S2, R, RANK, FUSED, DESCRIBED, GROUP, BM, BN, BK, BR,
            )  # fmt: skip
    else:
        linear_tile(
            tl.program_id(0), x, w, a_ptr, b0_ptr, b1_ptr, b2_ptr, s_ptr, y_ptr, T, x_stride, scale,
            K, N0, N1, N2, S0, S1, S2, R, RANK, FUSED, DESCRIBED, GROUP, BM, BN, BK, BR,
        )  # fmt: skip


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


def members_of(group: LoraGroup) -> tuple[list[Tensor], dict[str, int]]:
    """The three B pointers (any valid one where there is none) and the constants of the members."""
    assert len(group.sizes) <= 3, f"{len(group.sizes)} members; the kernels know up to 3"
    constants = {f"N{i}": 0 for i in range(3)} | {f"S{i}": -1 for i in range(3)}
    some = next(b for b in group.b if b is not None)
    assert all(b is None or b.is_contiguous() for b in group.b), "B must be contiguous"
    pointers = [some] * 3
    for i, size in enumerate(group.sizes):
        constants[f"N{i}"] = size
    for i, _, s_columns in group.members():
        pointers[i], constants[f"S{i}"] = group.b[i], s_columns.start
    return pointers, constants | {"R": group.a.shape[0], "RANK": group.rank}


def _shape_classes(x: Tensor, rank: int) -> tuple[str, ...]:
    """fp32 first, for its products need small tiles; then tokens and rank; then tokens."""
    rows, ranks = "few" if x.shape[0] <= FEW else "many", f"r{power_of_two(rank)}"
    if x.dtype == torch.float32:
        return f"fp32 {ranks}", "fp32", rows
    return f"{rows} {ranks}", rows


def launch_tiles(
    kernel: Any, tiles: int, x: Tensor, by_descriptor: bool, *args: Any, **constants: Any
) -> None:
    """A program per tile; on sm_90, for many tokens, one per multiprocessor that makes several.

    There making descriptors and filling the pipeline anew for every tile costs 4 to 9 % (H100).
    """
    processors = device_processors(x.device) if by_descriptor and x.shape[0] > FEW else 0
    programs = min(tiles, processors or tiles)
    constants |= {"DESCRIBED": by_descriptor, "PERSISTENT": processors > 0}
    launch(kernel, (programs,), *args, tiles, programs, **constants)


def _inner_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _forward_kernels(
    x: Tensor, weight: Tensor, group: LoraGroup | None, dropout: Dropout | None, fused: bool
) -> tuple[Tensor, Tensor | None]:
    if group is None:
        return lora_linear_forward(x, weight)
    T, K = x.shape
    assert group.a.shape[1] == K == weight.shape[1] and sum(group.sizes) == weight.shape[0], (
        f"x {tuple(x.shape)}, W {tuple(weight.shape)}, A {tuple(group.a.shape)}, {group.sizes}"
    )
    x, weight, a = _inner_contiguous(x), weight.contiguous(), group.a.contiguous()
    (b, members), classes = members_of(group), _shape_classes(x, group.rank)
    s, y = x.new_empty(T, a.shape[0]), x.new_empty(T, weight.shape[0])
    if not fused:
        row = tile("lora_down_kernel", x.device, *classes)
        row["BR"] = 16 if a.shape[0] <= 16 else row["BR"]
        launch(
            lora_down_kernel, (cdiv(T, row["BM"]), cdiv(a.shape[0], row["BR"])),
            x, a, s, *dropout_arguments(dropout), T, x.stride(0),
            K=K, R=a.shape[0], DROP=dropout is not None, **row,
        )  # fmt: skip
    row = tile("lora_linear_kernel", x.device, *classes)
    tiles_n = sum(cdiv(n, row["BN"]) for n in group.sizes)
    launch_tiles(
        lora_linear_kernel, cdiv(T, row["BM"]) * tiles_n, x, described(x, weight),
        x, weight, a, *b, s, y, T, x.stride(0), group.scale, K=K, **members,
        FUSED=fused, BR=power_of_two(group.rank), **row,
    )  # fmt: skip
    return y, s


def lora_linear_forward_fused_triton(
    x: Tensor, weight: Tensor, group: LoraGroup | None = None, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `lora_linear_forward`, in one launch; with dropout two, or every tile would redraw it."""
    return _forward_kernels(x, weight, group, dropout, fused=dropout is None)


def lora_linear_forward_split_triton(
    x: Tensor, weight: Tensor, group: LoraGroup | None = None, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `lora_linear_forward`, in two launches: S, then the product with the adapter added."""
    return _forward_kernels(x, weight, group, dropout, fused=False)


def lora_linear_forward_triton(
    x: Tensor, weight: Tensor, group: LoraGroup | None = None, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `lora_linear_forward`, in the form that the table of tiles says: fused, split, addmm."""
    if group is None:
        return lora_linear_forward(x, weight)
    row = tile("lora_linear_forward", x.device, *_shape_classes(x, group.rank))
    return FORWARD_FORMS[row["form"]](x, weight, group, dropout)


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
    dy, x, s = _inner_contiguous(dy), _inner_contiguous(x), s.contiguous()
    weight, a = weight.contiguous(), group.a.contiguous()
    (b, members), classes = members_of(group), _shape_classes(x, group.rank)
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
    x: Tensor,
    weight: Tensor,
    s: Tensor | None = None,
    group: LoraGroup | None = None,
    need_dx: bool = True,
    dropout: Dropout | None = None,
) -> Tensor | None:
    """As `lora_linear_backward`, in the form that the table of tiles says: kernels, addmm."""
    if group is None:
        return lora_linear_backward(dy, x, weight, need_dx=need_dx)
    row = tile("lora_linear_backward", x.device, *_shape_classes(x, group.rank))
    return BACKWARD_FORMS[row["form"]](dy, x, weight, s, group, need_dx, dropout)


FORWARD_FORMS = {
    "fused": lora_linear_forward_fused_triton,
    "split": lora_linear_forward_split_triton,
    "addmm": lora_linear_forward,
}
BACKWARD_FORMS = {"kernels": lora_linear_backward_kernels_triton, "addmm": lora_linear_backward}


def _reduce(part: Tensor, first: int, out: Tensor, scale: float) -> None:
    """out += scale times the sum over part's first dimension of elements first, first + 1, ..."""
    assert out.is_contiguous(), f"gradient {tuple(out.shape)} with strides {out.stride()}"
    row, n = tile("lora_reduce_kernel", out.device), out.numel()
    args = (part, out, part.shape[0], part.stride(0), first, n, scale)
    launch(lora_reduce_kernel, (cdiv(n, row["BN"]),), *args, **row)
