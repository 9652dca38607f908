"""The Triton kernels of lora_linear.py's forward; mathematics, shapes and contract stand there

forward    fused   one K loop with two accumulators: a tile of x is loaded once for x W^T and x A^T,
                   the adapter goes onto the fp32 accumulator at the end, S is written once
           split   S first, then the K loop, then S B^T onto the accumulator
           addmm   the torch form on the vendor's library
An output tile never straddles two members. Rank is padded inside to a power of two, at least 16.
Dropout is drawn again from its key wherever x^ is needed. With dropout the forward is always split:
every column tile of the fused form would draw the whole mask again.
tiles      shape classes: "fp32 r16" (padded rank), "fp32"; else "few r16" (at most 64 tokens),
           "many r16", "few", "many"; of lora_linear_kernel before them "fused many r16" and so on
           where S is made in the loop. The row lora_linear_forward names the public function's form
traffic    T (K + N + 2R) + N K elements
The backward is in lora_linear_backward_triton.py.
"""

# T = tokens, K = inputs, N = outputs of all members, R = ranks of all adapted members

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.launch.tile_config import device_processors, tile
from kernels.launch.triton_launch import cdiv, described, jit, launch, power_of_two, tl
from kernels.lora_linear.group import LoraGroup
from kernels.lora_linear.torch_form import lora_linear_forward
from kernels.philox import Dropout, dropout_arguments, dropout_tile

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


def shape_classes(x: Tensor, rank: int) -> tuple[str, ...]:
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


def inner_contiguous(t: Tensor) -> Tensor:
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
    x, weight, a = inner_contiguous(x), weight.contiguous(), group.a.contiguous()
    (b, members), classes = members_of(group), shape_classes(x, group.rank)
    s, y = x.new_empty(T, a.shape[0]), x.new_empty(T, weight.shape[0])
    if not fused:
        row = tile("lora_down_kernel", x.device, *classes)
        row["BR"] = 16 if a.shape[0] <= 16 else row["BR"]
        launch(
            lora_down_kernel, (cdiv(T, row["BM"]), cdiv(a.shape[0], row["BR"])),
            x, a, s, *dropout_arguments(dropout), T, x.stride(0),
            K=K, R=a.shape[0], DROP=dropout is not None, **row,
        )  # fmt: skip
    form = (f"fused {classes[0]}",) if fused else ()  # a second accumulator
    row = tile("lora_linear_kernel", x.device, *form, *classes)
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
    row = tile("lora_linear_forward", x.device, *shape_classes(x, group.rank))
    return FORWARD_FORMS[row["form"]](x, weight, group, dropout)


FORWARD_FORMS = {
    "fused": lora_linear_forward_fused_triton,
    "split": lora_linear_forward_split_triton,
    "addmm": lora_linear_forward,
}
