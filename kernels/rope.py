"""Rotary position embedding, in place on the q and k heads of a qkv buffer

    for each head, with its two halves x1, x2 and the angle of the token's position:
        x1' = x1 cos - x2 sin        x2' = x2 cos + x1 sin
    backward: the rotation by the opposite angle (`inverse=True`).

shapes     qkv (T, (H + 2G) d)    positions (T,) int64    cos_sin (positions, d): cos, then sin
precision  the rotation in max(fp32, dtype), one rounding
traffic    2T(H + G)d elements; bandwidth-bound
triton     a program rotates BH heads of BT tokens and reads the angles of a token once for them
tiles      shape class: the power of two that holds d, as "d128"
"""

# T = tokens, H = query heads, G = key/value heads, d = head size
# BT = tokens of a program, BH = its heads, BD = half a head padded to a power of two

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.native import at, library
from kernels.dtypes import accumulate_dtype
from kernels.integers import cdiv, power_of_two
from kernels.launch.tile_config import tile_config
from kernels.launch.triton_launch import jit, launch, tl
from kernels.spec import MODELS, TOKENS, Spec

# ---- reference: the definition


def rope_reference(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, H: int, G: int, inverse: bool = False
) -> Tensor:
    """A new (T, (H + 2G) d) with q and k rotated; differentiable."""
    dtype = accumulate_dtype(qkv.dtype)
    heads = qkv.unflatten(1, (H + 2 * G, -1)).to(dtype)  # (T, H + 2G, d)
    qk = heads[:, : H + G]  # (T, H + G, d)
    v = heads[:, H + G :]  # (T, G, d)
    angles = cos_sin[positions].to(dtype)  # (T, d)
    cos, sin = angles[:, None].chunk(2, dim=-1)  # (T, 1, d / 2)
    if inverse:
        sin = -sin
    x1, x2 = qk.chunk(2, dim=-1)  # (T, H + G, d / 2)
    rotated1 = x1 * cos - x2 * sin
    rotated2 = x2 * cos + x1 * sin
    rotated = torch.cat((rotated1, rotated2), dim=-1)  # (T, H + G, d)
    out = torch.cat((rotated, v), dim=1)  # (T, H + 2G, d)
    return out.flatten(1).to(qkv.dtype)


# ---- torch


def rope_(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, H: int, G: int, inverse: bool = False
) -> Tensor:
    """Rotate q and k inside qkv (T, (H + 2G) d) and return it."""
    assert qkv.is_contiguous() and qkv.shape[1] % (H + 2 * G) == 0, (
        f"qkv {tuple(qkv.shape)} with strides {qkv.stride()} does not hold {H} + 2 x {G} heads"
    )
    heads = qkv.unflatten(1, (H + 2 * G, -1))  # (T, H + 2G, d), a view
    qk = heads[:, : H + G]  # (T, H + G, d), a view
    x1, x2 = qk.chunk(2, dim=-1)  # (T, H + G, d / 2), views
    angles = cos_sin.index_select(0, positions)  # (T, d)
    cos, sin = angles[:, None].chunk(2, dim=-1)  # (T, 1, d / 2)
    if inverse:
        sin = -sin
    if qkv.dtype != cos.dtype:  # 16-bit heads: rotate in the accumulation dtype, round once
        x1_wide = x1.to(cos.dtype)
        x2_wide = x2.to(cos.dtype)
        x1.copy_(x1_wide * cos - x2_wide * sin)
        x2.copy_(x2_wide * cos + x1_wide * sin)
        return qkv
    x1_sin = x1 * sin
    x1.mul_(cos).sub_(x2 * sin)
    x2.mul_(cos).add_(x1_sin)
    return qkv


# ---- native: fp32 on a CPU


def rope_native_(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, H: int, G: int, inverse: bool = False
) -> Tensor:
    """As `rope_`, in C (cpu/native/rowwise.c)."""
    T = qkv.shape[0]
    d = cos_sin.shape[1]
    assert qkv.shape == (T, (H + 2 * G) * d) and positions.shape == (T,), (
        f"qkv {tuple(qkv.shape)}, {H} + 2 x {G} heads, angles {tuple(cos_sin.shape)}"
    )
    sign = -1.0 if inverse else 1.0
    library().rope(at(qkv), at(positions, torch.int64), at(cos_sin), T, H, G, d, sign)
    return qkv


# ---- triton


@jit(varying=("T",))
def rope_kernel(
    qkv_ptr,  # (T, (H + 2G) d), changed in place
    positions_ptr,  # (T,) int64
    cos_sin_ptr,  # (positions, d) fp32: cos in the first half of a row, sin in the second
    T,
    INVERSE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
):
    """Rotates BH heads of BT tokens in place; INVERSE: by the opposite angle."""
    dtype = qkv_ptr.dtype.element_ty
    half: tl.constexpr = d // 2
    row_width: tl.constexpr = (H + 2 * G) * d
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    cols = tl.arange(0, BD)  # of a half; heads of 80 or 96 leave some lanes idle
    token_mask = tokens < T
    head_mask = heads < H + G  # q and k; v is not rotated

    # cos and sin of the tokens' positions, the same for every head
    positions = tl.load(positions_ptr + tokens, mask=token_mask, other=0).to(tl.int64)
    angle_mask = token_mask[:, None] & (cols < half)[None, :]  # (BT, BD)
    angle_offsets = positions[:, None] * d + cols[None, :]
    cos_ptr = cos_sin_ptr
    sin_ptr = cos_sin_ptr + half
    cos = tl.load(cos_ptr + angle_offsets, mask=angle_mask, other=0.0)
    cos = cos.to(tl.float32)[:, None, :]  # (BT, 1, BD)
    sin = tl.load(sin_ptr + angle_offsets, mask=angle_mask, other=0.0)
    sin = sin.to(tl.float32)[:, None, :]
    if INVERSE:
        sin = -sin

    # the two halves of every head
    mask = angle_mask[:, None, :] & head_mask[None, :, None]  # (BT, BH, BD)
    row_starts = tokens.to(tl.int64)[:, None, None] * row_width
    head_starts = row_starts + heads[None, :, None] * d
    offsets = head_starts + cols[None, None, :]  # (BT, BH, BD)
    x1_ptr = qkv_ptr
    x2_ptr = qkv_ptr + half
    x1 = tl.load(x1_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x2_ptr + offsets, mask=mask, other=0.0).to(tl.float32)

    rotated1 = x1 * cos - x2 * sin
    tl.store(x1_ptr + offsets, rotated1.to(dtype), mask=mask)
    rotated2 = x2 * cos + x1 * sin
    tl.store(x2_ptr + offsets, rotated2.to(dtype), mask=mask)


def rope_triton_(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, H: int, G: int, inverse: bool = False
) -> Tensor:
    """As `rope_`, in one launch."""
    T = qkv.shape[0]
    d = cos_sin.shape[1]
    width = (H + 2 * G) * d
    assert qkv.is_contiguous() and qkv.shape[1] == width and d % 2 == 0, (
        f"qkv {tuple(qkv.shape)} with strides {qkv.stride()} does not hold {H} + 2 x {G} heads of "
        f"{d}, as many as cos_sin {tuple(cos_sin.shape)} has angles for"
    )
    assert positions.shape == (T,), f"positions {tuple(positions.shape)}, {T} tokens"
    positions = positions.contiguous()
    cos_sin = cos_sin.contiguous()
    BD = power_of_two(d // 2, least=1)
    config = tile_config("rope_kernel", qkv.device, f"d{power_of_two(d)}")
    grid = (cdiv(T, config["BT"]), cdiv(H + G, config["BH"]))
    launch(
        rope_kernel, grid, qkv, positions, cos_sin, T,
        INVERSE=inverse, H=H, G=G, d=d, BD=BD, **config,
    )  # fmt: skip
    return qkv


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    """Shape: T, H, G, d."""
    T, H, G, d = shape
    width = (H + 2 * G) * d
    angles = torch.rand(512, d // 2, generator=g, dtype=torch.float64) * 6.3
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)  # (512, d)
    qkv = torch.randn(T, width, generator=g, dtype=torch.float64)
    positions = torch.randint(512, (T,), generator=g)
    return {"qkv": qkv, "positions": positions, "cos_sin": cos_sin, "H": H, "G": G}


def _run(ops, i: dict) -> dict[str, Tensor]:
    cos_sin = i["cos_sin"].to(accumulate_dtype(i["qkv"].dtype))
    args = (i["positions"], cos_sin, i["H"], i["G"])
    rotated = ops.rope_(i["qkv"].clone(), *args)
    inverse = ops.rope_(i["qkv"].clone(), *args, inverse=True)
    return {"rotated": rotated, "inverse": inverse}


SPEC = Spec(
    "rope",
    _make_inputs,
    _run,
    fields=("rope_",),
    test_shapes=((1, 1, 1, 64), (5, 9, 3, 64), (63, 4, 4, 80), (0, 2, 1, 64)),
    bench_shapes=tuple((t, m.H, m.G, m.d) for m in MODELS.values() for t in TOKENS),
    model_shapes=lambda m: ((33, m.H, m.G, m.d),),
    interpreter_shapes=(
        (1, 1, 1, 64),
        (5, 9, 3, 64),
        (7, 4, 4, 80),
        (3, 8, 1, 96),
        (2, 3, 1, 16),
        (4, 8, 1, 128),
        (0, 2, 1, 64),
    ),
)
