"""The Triton kernels of lora_linear's forward, in three forms

A bias is added to the fp32 accumulator at the end, too (BIAS).

fused   one launch. One K loop with two accumulators: a tile of x is loaded once for x W^T and for
        x A^T; the adapter is added to the fp32 accumulator at the end, and S is written once.
split   two launches: S first, then the K loop and S B^T on top of its accumulator
addmm   the torch form, on the vendor's library
With dropout the forward is always split: in the fused form every tile of columns would draw the
whole mask. No mask is stored: kernels draw it from its key wherever they need x^.

padding    An output tile never straddles two members. Rank is padded inside a kernel to a power of
           two, at least 16.
tiles      shape classes: "fp32 r16" (padded rank), "fp32"; else "few r16" (at most 64 tokens),
           "many r16", "few", "many". For lora_linear_kernel, where S is made in the loop,
           "fused many r16" and so on come before them. The configuration `lora_linear_forward`
           names the form that the public function takes.
traffic    T (K + N + 2R) + N K elements
"""

# T = tokens, K = inputs, N = outputs of all members, R = ranks of all adapted members
# BM = tokens of a tile, BN = columns of y of a tile, BK = inputs of a step, BR = ranks of a tile
# N_i = outputs of member i, RANK = ranks of a member, pid = number of a program or tile

from __future__ import annotations

import torch
from torch import Tensor

from kernels.integers import cdiv, power_of_two
from kernels.launch.tile_config import Config, device_processors, tile_config
from kernels.launch.triton_launch import jit, launch, tl, tma_readable
from kernels.lora_linear.group import LoraGroup
from kernels.lora_linear.torch_form import lora_linear_forward
from kernels.philox import Dropout, dropout_arguments, dropout_tile

FEW = 64  # up to so many tokens, the time of a product is that of reading its weights

# ---- helpers compiled into the kernels


@jit
def tile_position(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(pid_m, pid_n) of output tile `pid`.

    Tiles are numbered down GROUP rows of tiles before the next column, so that L2 holds them.
    """
    first_m = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first_m, GROUP)
    inside = pid % (GROUP * tiles_n)
    pid_m = first_m + inside % height
    pid_n = inside // height
    return pid_m, pid_n


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
    x_ptr,  # (T, K), rows x_stride apart
    a_ptr,  # (R, K)
    s_ptr,  # (T, R)
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
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """S = x^ A^T: a tile of BM tokens and BR ranks. DROP: with dropout."""
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    token_mask = tokens < T
    rank_mask = ranks < R
    # Lanes outside read token 0 and rank 0 again, which needs no mask; they store nothing.
    safe_tokens = tl.where(token_mask, tokens, 0).to(tl.int64)
    safe_ranks = tl.where(rank_mask, ranks, 0)
    if DROP:
        position = tl.load(position_ptr + safe_tokens)
        row_key = tl.load(row_key_ptr + safe_tokens)
        step = tl.load(step_ptr)

    x_rows = x_ptr + safe_tokens[:, None] * x_stride  # (BM, 1) addresses
    a_rows = a_ptr + safe_ranks[:, None] * K  # (BR, 1) addresses
    acc = tl.zeros((BM, BR), tl.float32)
    for k in range(0, K, BK):
        cols = k + tl.arange(0, BK)
        col_mask = (cols < K)[None, :]
        x = tl.load(x_rows + cols[None, :], mask=col_mask, other=0.0)  # (BM, BK)
        a = tl.load(a_rows + cols[None, :], mask=col_mask, other=0.0)  # (BR, BK)
        if DROP:
            drop_mask = dropout_tile(position, row_key, step, key, k, threshold, BM, BK)
            x = (x.to(tl.float32) * drop_mask).to(x.dtype)
        acc = tl.dot(x, a.T, acc, input_precision="ieee")

    s_offsets = tokens.to(tl.int64)[:, None] * R + ranks[None, :]
    s_mask = token_mask[:, None] & rank_mask[None, :]
    tl.store(s_ptr + s_offsets, acc.to(s_ptr.dtype.element_ty), mask=s_mask)


@jit
def linear_tile(
    # which tile of y, numbered by `tile_position`
    pid,
    # operands: x (T, K) and w (N, K) as descriptors or pointers; A (R, K), B_i (N_i, RANK)
    x, w, a_ptr, b0_ptr, b1_ptr, b2_ptr,
    # S (T, R), written if FUSED, else read; the bias (N,), read if BIAS; the result y (T, N)
    s_ptr, bias_ptr, y_ptr,
    # sizes that vary, and the adapters' factor s
    T, x_stride, scale,
    # the width of x
    K: tl.constexpr,
    # the members' numbers of outputs, 0 for a member that does not exist
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    # the members' first columns of S, -1 without an adapter
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    # the width of S, and of one member's part of it
    R: tl.constexpr, RANK: tl.constexpr,
    # the form: S made on the way; operands read through descriptors; a bias added
    FUSED: tl.constexpr, DESCRIPTORS: tl.constexpr, BIAS: tl.constexpr,
    # the tile configuration
    GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile of y (BM, BN) inside one member: y_i = x W_i^T + s S_i B_i^T, + bias_i if BIAS."""
    # 1. The member that the tile belongs to, and the tile's place in it.
    tiles0 = (N0 + BN - 1) // BN  # tiles across member 0
    tiles1 = (N1 + BN - 1) // BN
    tiles2 = (N2 + BN - 1) // BN
    tiles01 = tiles0 + tiles1
    pid_m, pid_n = tile_position(pid, tl.cdiv(T, BM), tiles01 + tiles2, GROUP)
    member = (pid_n >= tiles0).to(tl.int32) + (pid_n >= tiles01).to(tl.int32)
    first_tile = pick(member, 0, tiles0, tiles01)  # of the member
    first_col = (pid_n - first_tile) * BN  # of the tile, counted within the member
    start = pick(member, 0, N0, N0 + N1)  # the member's first column of y, and row of w
    size = pick(member, N0, N1, N2)  # its columns
    s_start = pick(member, S0, S1, S2)  # its first column of S

    # 2. The tokens, columns (counted within the member) and ranks of the tile.
    tokens = pid_m * BM + tl.arange(0, BM)
    cols = first_col + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    rank_mask = ranks < tl.where(s_start >= 0, RANK, 0)  # none without an adapter
    # Lanes outside read token 0 and column 0 again, which needs no mask; they store nothing.
    safe_tokens = tl.where(tokens < T, tokens, 0).to(tl.int64)
    safe_cols = tl.where(cols < size, cols, 0)
    safe_w_rows = (start + safe_cols).to(tl.int64)

    # 3. The product over K, and on the way S = x A^T.
    acc = tl.zeros((BM, BN), tl.float32)
    s_acc = tl.zeros((BM, BR), tl.float32)
    for k in range(0, K, BK):
        inner = k + tl.arange(0, BK)
        inner_mask = (inner < K)[None, :]
        if DESCRIPTORS:
            x_tile = x.load([pid_m * BM, k])  # (BM, BK)
            # Rows of w after the member's are the next member's: columns that are not stored.
            w_tile = w.load([start + first_col, k])  # (BN, BK)
        else:
            x_offsets = safe_tokens[:, None] * x_stride + inner[None, :]
            x_tile = tl.load(x + x_offsets, mask=inner_mask, other=0.0)
            w_rows = w + safe_w_rows[:, None] * K  # (BN, 1) addresses
            w_tile = tl.load(w_rows + inner[None, :], mask=inner_mask, other=0.0)
        acc = tl.dot(x_tile, w_tile.T, acc, input_precision="ieee")
        if FUSED and RANK > 0:
            a_offsets = (s_start + ranks)[:, None] * K + inner[None, :]
            a_mask = rank_mask[:, None] & inner_mask
            a = tl.load(a_ptr + a_offsets, mask=a_mask, other=0.0)  # (BR, BK)
            s_acc = tl.dot(x_tile, a.T, s_acc, input_precision="ieee")

    # 4. The adapter: + s S_i B_i^T. From here on masks are computed again, for one that is named
    # above would be kept in registers over the loop.
    if RANK > 0:
        s_rows = s_ptr + tokens.to(tl.int64)[:, None] * R  # (BM, 1) addresses
        s_at = s_rows + (s_start + ranks)[None, :]
        s_mask = (tokens < T)[:, None] & rank_mask[None, :]
        if FUSED:
            if first_col == 0:  # every tile of the member has made it; one writes it
                tl.store(s_at, s_acc.to(s_ptr.dtype.element_ty), mask=s_mask)
            s = s_acc
        else:
            s = tl.load(s_at, mask=s_mask, other=0.0).to(tl.float32)
        b_ptr = pick_pointer(member, b0_ptr, b1_ptr, b2_ptr)
        b_rows = tl.where(cols < size, cols, 0).to(tl.int64)
        b_offsets = b_rows[:, None] * RANK + ranks[None, :]
        b = tl.load(b_ptr + b_offsets, mask=rank_mask[None, :], other=0.0)  # (BN, BR)
        s_scaled = (s * scale).to(b.dtype)
        acc = tl.dot(s_scaled, b.T, acc, input_precision="ieee")

    # 5. The bias.
    if BIAS:
        bias_at = bias_ptr + start + tl.where(cols < size, cols, 0)
        bias = tl.load(bias_at).to(tl.float32)  # (BN,)
        acc += bias[None, :]

    # 6. The result.
    y_rows = tokens.to(tl.int64)[:, None] * (N0 + N1 + N2)
    y_offsets = y_rows + (start + cols)[None, :]
    y_mask = (tokens < T)[:, None] & (cols < size)[None, :]
    tl.store(y_ptr + y_offsets, acc.to(y_ptr.dtype.element_ty), mask=y_mask)


@jit(varying=("T", "tiles", "programs"))
def lora_linear_kernel(
    # as in `linear_tile`
    x_ptr, w_ptr, a_ptr, b0_ptr, b1_ptr, b2_ptr,
    s_ptr, bias_ptr, y_ptr,
    T, x_stride, scale,
    # tiles of y, and programs that make them
    tiles, programs,
    # as in `linear_tile`, and PERSISTENT
    K: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    R: tl.constexpr, RANK: tl.constexpr,
    FUSED: tl.constexpr, DESCRIPTORS: tl.constexpr, BIAS: tl.constexpr, PERSISTENT: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y_i = x W_i^T + s S_i B_i^T, + bias_i if BIAS; FUSED makes S_i on the way.

    RANK 0: no member has an adapter. PERSISTENT: a program makes every `programs`-th of the tiles,
    with descriptors made once. That loop has one stage: for a K of one step triton would else keep
    several tiles in flight.
    """
    x = x_ptr
    w = w_ptr
    if DESCRIPTORS:
        N = N0 + N1 + N2
        x = tl.make_tensor_descriptor(x_ptr, [T, K], [x_stride, 1], [BM, BK])
        w = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BN, BK])
    if PERSISTENT:
        for pid in tl.range(tl.program_id(0), tiles, programs, num_stages=1):
            linear_tile(
                pid, x, w, a_ptr, b0_ptr, b1_ptr, b2_ptr, s_ptr, bias_ptr, y_ptr, T, x_stride,
                scale, K, N0, N1, N2, S0, S1, S2, R, RANK, FUSED, DESCRIPTORS, BIAS, GROUP,
                BM, BN, BK, BR,
            )  # fmt: skip
    else:
        linear_tile(
            tl.program_id(0), x, w, a_ptr, b0_ptr, b1_ptr, b2_ptr, s_ptr, bias_ptr, y_ptr, T,
            x_stride, scale, K, N0, N1, N2, S0, S1, S2, R, RANK, FUSED, DESCRIPTORS, BIAS, GROUP,
            BM, BN, BK, BR,
        )  # fmt: skip


# ---- launches


def members_of(group: LoraGroup) -> tuple[list[Tensor], dict[str, int]]:
    """The B of three members, and the constants of `linear_tile` that describe the members.

    A member without an adapter gets another one's B: the kernels need a pointer, and read nothing.
    """
    assert len(group.sizes) <= 3, f"{len(group.sizes)} members; the kernels know up to 3"
    assert all(b is None or b.is_contiguous() for b in group.b), "B must be contiguous"
    adapted = group.members()
    any_b = group.b[adapted[0].index]
    pointers = [any_b, any_b, any_b]
    constants = {"N0": 0, "N1": 0, "N2": 0, "S0": -1, "S1": -1, "S2": -1}
    for i, size in enumerate(group.sizes):
        constants[f"N{i}"] = size
    for member in adapted:
        pointers[member.index] = group.b[member.index]
        constants[f"S{member.index}"] = member.s_columns.start
    constants["R"] = group.a.shape[0]
    constants["RANK"] = group.rank
    return pointers, constants


def shape_classes(x: Tensor, rank: int) -> tuple[str, ...]:
    """The shape classes of x (T, K) and a rank, the most specific first.

    fp32 has classes of its own, for its products need small tiles.
    """
    tokens = "few" if x.shape[0] <= FEW else "many"
    ranks = f"r{power_of_two(rank)}"
    if x.dtype == torch.float32:
        return f"fp32 {ranks}", "fp32", tokens
    return f"{tokens} {ranks}", tokens


def programs_for(tiles: int, x: Tensor, by_descriptor: bool) -> tuple[int, bool]:
    """How many programs make `tiles` tiles, and whether each makes several (PERSISTENT).

    A program per tile; on sm_90, for many tokens, one per multiprocessor. There making descriptors
    and filling the pipeline anew for every tile costs 4 to 9 % (H100).
    """
    if not by_descriptor or x.shape[0] <= FEW:
        return tiles, False
    processors = device_processors(x.device)  # 0: a program per tile on this device
    if processors == 0:
        return tiles, False
    return min(tiles, processors), True


def count_tiles(T: int, sizes: tuple[int, ...], config: Config) -> int:
    """Tiles of y (T, N): none straddles two members."""
    tiles_m = cdiv(T, config["BM"])
    tiles_n = sum(cdiv(size, config["BN"]) for size in sizes)
    return tiles_m * tiles_n


def inner_contiguous(t: Tensor) -> Tensor:
    """t, or a copy of it, in which the elements of a row lie without gaps."""
    return t if t.stride(1) == 1 else t.contiguous()


def _launch_down(
    x: Tensor, a: Tensor, s: Tensor, dropout: Dropout | None, classes: tuple[str, ...]
) -> None:
    """s (T, R) = x^ A^T in one launch."""
    T, K = x.shape
    R = a.shape[0]
    config = tile_config("lora_down_kernel", x.device, *classes)
    if R <= 16:
        config["BR"] = 16
    grid = (cdiv(T, config["BM"]), cdiv(R, config["BR"]))
    launch(
        lora_down_kernel, grid, x, a, s, *dropout_arguments(dropout), T, x.stride(0),
        K=K, R=R, DROP=dropout is not None, **config,
    )  # fmt: skip


def _forward_kernels(
    x: Tensor,
    weight: Tensor,
    group: LoraGroup | None,
    dropout: Dropout | None,
    bias: Tensor | None,
    fused: bool,
) -> tuple[Tensor, Tensor | None]:
    """The fused form, without dropout, or the split one."""
    if group is None:
        return lora_linear_forward(x, weight, bias=bias)
    T, K = x.shape
    N = weight.shape[0]
    assert group.a.shape[1] == K == weight.shape[1] and sum(group.sizes) == N, (
        f"x {tuple(x.shape)}, W {tuple(weight.shape)}, A {tuple(group.a.shape)}, {group.sizes}"
    )
    x = inner_contiguous(x)
    weight = weight.contiguous()
    a = group.a.contiguous()  # (R, K)
    (b0, b1, b2), members = members_of(group)
    s = x.new_empty(T, a.shape[0])  # (T, R)
    y = x.new_empty(T, N)
    classes = shape_classes(x, group.rank)
    if fused:  # a second accumulator: tiles of its own
        config = tile_config("lora_linear_kernel", x.device, f"fused {classes[0]}", *classes)
    else:
        _launch_down(x, a, s, dropout, classes)
        config = tile_config("lora_linear_kernel", x.device, *classes)
    tiles = count_tiles(T, group.sizes, config)
    descriptors = tma_readable(x, weight)
    programs, persistent = programs_for(tiles, x, descriptors)
    launch(
        lora_linear_kernel, (programs,),
        x, weight, a, b0, b1, b2, s, bias, y, T, x.stride(0), group.scale, tiles, programs,
        K=K, **members, FUSED=fused, DESCRIPTORS=descriptors, BIAS=bias is not None,
        PERSISTENT=persistent, BR=power_of_two(group.rank), **config,
    )  # fmt: skip
    return y, s


def lora_linear_forward_fused_triton(
    x: Tensor,
    weight: Tensor,
    group: LoraGroup | None = None,
    dropout: Dropout | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `lora_linear_forward`, in one launch; with dropout in two (the split form)."""
    return _forward_kernels(x, weight, group, dropout, bias, fused=dropout is None)


def lora_linear_forward_split_triton(
    x: Tensor,
    weight: Tensor,
    group: LoraGroup | None = None,
    dropout: Dropout | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `lora_linear_forward`, in two launches: S, then the product with the adapter added."""
    return _forward_kernels(x, weight, group, dropout, bias, fused=False)


FORWARD_FORMS = {
    "fused": lora_linear_forward_fused_triton,
    "split": lora_linear_forward_split_triton,
    "addmm": lora_linear_forward,
}


def lora_linear_forward_triton(
    x: Tensor,
    weight: Tensor,
    group: LoraGroup | None = None,
    dropout: Dropout | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `lora_linear_forward`, in the form that the tile configuration names."""
    if group is None:
        return lora_linear_forward(x, weight, bias=bias)
    config = tile_config("lora_linear_forward", x.device, *shape_classes(x, group.rank))
    return FORWARD_FORMS[config["form"]](x, weight, group, dropout, bias)
