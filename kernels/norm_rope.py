"""RMSNorm of every q and k head, then its rotary embedding, in one pass (Qwen3)

    for each head x of q and k, with the weight w of its kind and the angle of its token:
        r = (mean(x^2) + eps)^(-1/2)        y = x r w
        z1 = y1 cos - y2 sin                z2 = y2 cos + y1 sin      y1, y2: the halves of y
    the heads of v are copied.

backward, with dy = dz rotated by the opposite angle and g = dy * w:
        dx = r * (g - x r * mean(g * x r))
        dw is not computed: w is frozen under LoRA.
shapes     qkv, z (T, (H + 2G) d)    norms (2d,): the weight of q, then that of k
           positions (T,) int64      cos_sin (positions, d): cos, then sin
precision  all in max(fp32, dtype), one rounding
traffic    forward 2T(H + 2G)d elements, backward 3T(H + G)d; bandwidth-bound. As two operations
           they are 4T(H + G)d and 5T(H + G)d, and a launch more. The forward does not work in
           place, for the backward reads the heads before their norm: training keeps those alone
           and computes z again from them, so a layer keeps no more for its backward than one
           without this norm. r is computed again too, from heads that the backward reads anyway
triton     a program holds whole heads: BH heads of BT tokens, and reads a token's angles once for
           them
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
from kernels.rope import rope_, rope_reference
from kernels.spec import MODELS, TOKENS, Spec, autograd

# ---- reference: the definition


def norm_rope_reference(
    qkv: Tensor, norms: Tensor, eps: float, positions: Tensor, cos_sin: Tensor, H: int, G: int
) -> Tensor:
    """z (T, (H + 2G) d); differentiable."""
    dtype = accumulate_dtype(qkv.dtype)
    heads = qkv.unflatten(1, (H + 2 * G, -1)).to(dtype)  # (T, H + 2G, d)
    q, k, v = heads.split((H, G, G), dim=1)  # (T, H, d), (T, G, d), (T, G, d)
    q_norm, k_norm = norms.to(dtype).chunk(2)  # (d,), (d,)
    normed_q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + eps) * q_norm
    normed_k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + eps) * k_norm
    normed = torch.cat((normed_q, normed_k, v), dim=1)  # (T, H + 2G, d)
    return rope_reference(normed.flatten(1), positions, cos_sin, H, G).to(qkv.dtype)


def norm_rope_reference_backward_(
    dqkv: Tensor,
    qkv: Tensor,
    norms: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    H: int,
    G: int,
) -> Tensor:
    """By autograd."""

    def forward(qkv: Tensor) -> Tensor:
        return norm_rope_reference(qkv, norms, eps, positions, cos_sin, H, G)

    (dx,) = autograd(forward, (qkv,), dqkv)
    return dqkv.copy_(dx)


# ---- torch


def _check_shapes(
    qkv: Tensor, norms: Tensor, positions: Tensor, cos_sin: Tensor, H: int, G: int
) -> None:
    """AssertionError unless qkv holds the heads, and each head and token has its numbers."""
    d = cos_sin.shape[1]
    assert qkv.is_contiguous() and qkv.shape[1] == (H + 2 * G) * d and d % 2 == 0, (
        f"qkv {tuple(qkv.shape)} with strides {qkv.stride()} does not hold {H} + 2 x {G} heads of "
        f"{d}, as many as cos_sin {tuple(cos_sin.shape)} has angles for"
    )
    assert norms.shape == (2 * d,) and positions.shape == qkv.shape[:1], (
        f"norms {tuple(norms.shape)}, positions {tuple(positions.shape)}, qkv {tuple(qkv.shape)}"
    )


def _normed_heads(qkv: Tensor, eps: float, H: int, G: int) -> tuple[Tensor, Tensor]:
    """x r (T, H + G, d) of the q and k heads of qkv, and r (T, H + G, 1), both at least fp32."""
    heads = qkv.unflatten(1, (H + 2 * G, -1))  # (T, H + 2G, d), a view
    x = heads[:, : H + G].to(accumulate_dtype(qkv.dtype))  # (T, H + G, d)
    mean_square = x.square().mean(-1, keepdim=True)  # (T, H + G, 1)
    rstd = mean_square.add_(eps).rsqrt_()
    return x * rstd, rstd


def _head_weights(norms: Tensor, dtype: torch.dtype, H: int, G: int) -> Tensor:
    """The weight of every q and k head, (H + G, d)."""
    q_norm, k_norm = norms.to(dtype).chunk(2)  # (d,), (d,)
    return torch.cat((q_norm.expand(H, -1), k_norm.expand(G, -1)))


def norm_rope_forward(
    qkv: Tensor, norms: Tensor, eps: float, positions: Tensor, cos_sin: Tensor, H: int, G: int
) -> Tensor:
    """A new z (T, (H + 2G) d): q and k of qkv normalised and rotated, v as it is."""
    _check_shapes(qkv, norms, positions, cos_sin, H, G)
    x_hat, rstd = _normed_heads(qkv, eps, H, G)  # (T, H + G, d)
    normed = x_hat.mul_(_head_weights(norms, rstd.dtype, H, G)).flatten(1)  # (T, (H + G) d)
    rotated = rope_(normed, positions, cos_sin, H + G, 0)  # every head of it
    v = qkv[:, rotated.shape[1] :]  # (T, G d)
    return torch.cat((rotated.to(qkv.dtype), v), dim=1)


def norm_rope_backward_(
    dqkv: Tensor,
    qkv: Tensor,
    norms: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    H: int,
    G: int,
) -> Tensor:
    """Turn dqkv, the gradient (T, (H + 2G) d) of z, into that of qkv, and return it."""
    _check_shapes(qkv, norms, positions, cos_sin, H, G)
    assert dqkv.shape == qkv.shape and dqkv.is_contiguous(), (
        f"dqkv {tuple(dqkv.shape)} with strides {dqkv.stride()}, qkv {tuple(qkv.shape)}"
    )
    x_hat, rstd = _normed_heads(qkv, eps, H, G)  # (T, H + G, d), (T, H + G, 1)
    qk_width = x_hat.shape[1] * x_hat.shape[2]  # (H + G) d
    dz = dqkv[:, :qk_width].to(rstd.dtype, copy=True, memory_format=torch.contiguous_format)
    dy = rope_(dz, positions, cos_sin, H + G, 0, inverse=True).view(x_hat.shape)
    g = dy.mul_(_head_weights(norms, rstd.dtype, H, G))  # (T, H + G, d)
    mean_gx = (g * x_hat).mean(-1, keepdim=True)  # (T, H + G, 1)
    dx = g.sub_(x_hat.mul_(mean_gx)).mul_(rstd)
    dqkv[:, :qk_width] = dx.flatten(1)  # v's part is right already
    return dqkv


# ---- native: fp32 on a CPU


def norm_rope_forward_native(
    qkv: Tensor, norms: Tensor, eps: float, positions: Tensor, cos_sin: Tensor, H: int, G: int
) -> Tensor:
    """As `norm_rope_forward`, in C (cpu/native/rowwise.c)."""
    _check_shapes(qkv, norms, positions, cos_sin, H, G)
    T = qkv.shape[0]
    d = cos_sin.shape[1]
    z = torch.empty_like(qkv)  # (T, (H + 2G) d)
    library().norm_rope(
        at(qkv), at(norms), at(positions, torch.int64), at(cos_sin), at(z), T, H, G, d, eps
    )
    return z


# ---- triton


@jit(varying=("T",))
def norm_rope_forward_kernel(
    qkv_ptr,  # (T, (H + 2G) d)
    norms_ptr,  # (2d,): the weight of q, then that of k
    positions_ptr,  # (T,) int64
    cos_sin_ptr,  # (positions, d) fp32: cos in the first half of a row, sin in the second
    z_ptr,  # (T, (H + 2G) d)
    T,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
):
    """z of BH heads of BT tokens; the heads of v are copied."""
    dtype = qkv_ptr.dtype.element_ty
    half: tl.constexpr = d // 2
    row_width: tl.constexpr = (H + 2 * G) * d
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    cols = tl.arange(0, BD)  # of a half; heads of 80 or 96 leave some lanes idle
    token_mask = tokens < T
    head_mask = heads < H + 2 * G
    col_mask = cols < half
    is_value = heads >= H + G  # not normalised, not rotated

    # the two halves of every head
    head_cols_mask = head_mask[:, None] & col_mask[None, :]  # (BH, BD)
    mask = token_mask[:, None, None] & head_cols_mask[None, :, :]  # (BT, BH, BD)
    row_starts = tokens.to(tl.int64)[:, None, None] * row_width
    head_starts = row_starts + heads[None, :, None] * d
    offsets = head_starts + cols[None, None, :]  # (BT, BH, BD)
    x1 = tl.load(qkv_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(qkv_ptr + half + offsets, mask=mask, other=0.0).to(tl.float32)

    # norm
    mean_square = tl.sum(x1 * x1 + x2 * x2, axis=2) / d  # (BT, BH)
    rstd = tl.rsqrt(mean_square + eps)[:, :, None]  # (BT, BH, 1)
    norm_starts = tl.where(heads < H, 0, d)  # (BH,)
    norm_offsets = norm_starts[:, None] + cols[None, :]  # (BH, BD)
    w1 = tl.load(norms_ptr + norm_offsets, mask=head_cols_mask, other=0.0).to(tl.float32)
    w2 = tl.load(norms_ptr + half + norm_offsets, mask=head_cols_mask, other=0.0).to(tl.float32)
    y1 = x1 * rstd * w1[None, :, :]
    y2 = x2 * rstd * w2[None, :, :]

    # rotation: cos and sin of the tokens' positions, the same for every head
    positions = tl.load(positions_ptr + tokens, mask=token_mask, other=0).to(tl.int64)
    angle_mask = token_mask[:, None] & col_mask[None, :]  # (BT, BD)
    angle_offsets = positions[:, None] * d + cols[None, :]
    cos = tl.load(cos_sin_ptr + angle_offsets, mask=angle_mask, other=0.0)
    cos = cos.to(tl.float32)[:, None, :]  # (BT, 1, BD)
    sin = tl.load(cos_sin_ptr + half + angle_offsets, mask=angle_mask, other=0.0)
    sin = sin.to(tl.float32)[:, None, :]
    z1 = y1 * cos - y2 * sin
    z2 = y2 * cos + y1 * sin

    z1 = tl.where(is_value[None, :, None], x1, z1)
    z2 = tl.where(is_value[None, :, None], x2, z2)
    tl.store(z_ptr + offsets, z1.to(dtype), mask=mask)
    tl.store(z_ptr + half + offsets, z2.to(dtype), mask=mask)


@jit(varying=("T",))
def norm_rope_backward_kernel(
    dqkv_ptr,  # (T, (H + 2G) d), changed in place: dz of q and k becomes dx
    qkv_ptr,  # (T, (H + 2G) d)
    norms_ptr,  # (2d,): the weight of q, then that of k
    positions_ptr,  # (T,) int64
    cos_sin_ptr,  # (positions, d) fp32: cos in the first half of a row, sin in the second
    T,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
):
    """dx of BH heads of q and k of BT tokens."""
    dtype = dqkv_ptr.dtype.element_ty
    half: tl.constexpr = d // 2
    row_width: tl.constexpr = (H + 2 * G) * d
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    cols = tl.arange(0, BD)  # of a half
    token_mask = tokens < T
    head_mask = heads < H + G
    col_mask = cols < half
    head_cols_mask = head_mask[:, None] & col_mask[None, :]  # (BH, BD)
    mask = token_mask[:, None, None] & head_cols_mask[None, :, :]  # (BT, BH, BD)
    row_starts = tokens.to(tl.int64)[:, None, None] * row_width
    head_starts = row_starts + heads[None, :, None] * d
    offsets = head_starts + cols[None, None, :]  # (BT, BH, BD)

    # dy = dz rotated by the opposite angle
    positions = tl.load(positions_ptr + tokens, mask=token_mask, other=0).to(tl.int64)
    angle_mask = token_mask[:, None] & col_mask[None, :]  # (BT, BD)
    angle_offsets = positions[:, None] * d + cols[None, :]
    cos = tl.load(cos_sin_ptr + angle_offsets, mask=angle_mask, other=0.0)
    cos = cos.to(tl.float32)[:, None, :]  # (BT, 1, BD)
    sin = tl.load(cos_sin_ptr + half + angle_offsets, mask=angle_mask, other=0.0)
    sin = sin.to(tl.float32)[:, None, :]
    dz1 = tl.load(dqkv_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dz2 = tl.load(dqkv_ptr + half + offsets, mask=mask, other=0.0).to(tl.float32)
    dy1 = dz1 * cos + dz2 * sin
    dy2 = dz2 * cos - dz1 * sin

    # g = dy w
    norm_starts = tl.where(heads < H, 0, d)  # (BH,)
    norm_offsets = norm_starts[:, None] + cols[None, :]  # (BH, BD)
    w1 = tl.load(norms_ptr + norm_offsets, mask=head_cols_mask, other=0.0).to(tl.float32)
    w2 = tl.load(norms_ptr + half + norm_offsets, mask=head_cols_mask, other=0.0).to(tl.float32)
    g1 = dy1 * w1[None, :, :]
    g2 = dy2 * w2[None, :, :]

    # dx = r (g - x r mean(g x r))
    x1 = tl.load(qkv_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(qkv_ptr + half + offsets, mask=mask, other=0.0).to(tl.float32)
    mean_square = tl.sum(x1 * x1 + x2 * x2, axis=2) / d  # (BT, BH)
    rstd = tl.rsqrt(mean_square + eps)[:, :, None]  # (BT, BH, 1)
    x_hat1 = x1 * rstd
    x_hat2 = x2 * rstd
    mean_gx = tl.sum(g1 * x_hat1 + g2 * x_hat2, axis=2) / d  # (BT, BH)
    dx1 = rstd * (g1 - x_hat1 * mean_gx[:, :, None])
    dx2 = rstd * (g2 - x_hat2 * mean_gx[:, :, None])
    tl.store(dqkv_ptr + offsets, dx1.to(dtype), mask=mask)
    tl.store(dqkv_ptr + half + offsets, dx2.to(dtype), mask=mask)


def norm_rope_forward_triton(
    qkv: Tensor, norms: Tensor, eps: float, positions: Tensor, cos_sin: Tensor, H: int, G: int
) -> Tensor:
    """As `norm_rope_forward`, in one launch."""
    _check_shapes(qkv, norms, positions, cos_sin, H, G)
    T = qkv.shape[0]
    d = cos_sin.shape[1]
    positions = positions.contiguous()
    cos_sin = cos_sin.contiguous()
    norms = norms.contiguous()
    z = torch.empty_like(qkv)  # (T, (H + 2G) d)
    config = tile_config("norm_rope_forward_kernel", qkv.device, f"d{power_of_two(d)}")
    grid = (cdiv(T, config["BT"]), cdiv(H + 2 * G, config["BH"]))
    launch(
        norm_rope_forward_kernel, grid, qkv, norms, positions, cos_sin, z, T, eps,
        H=H, G=G, d=d, BD=power_of_two(d // 2, least=1), **config,
    )  # fmt: skip
    return z


def norm_rope_backward_triton_(
    dqkv: Tensor,
    qkv: Tensor,
    norms: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    H: int,
    G: int,
) -> Tensor:
    """As `norm_rope_backward_`, in one launch."""
    _check_shapes(qkv, norms, positions, cos_sin, H, G)
    assert dqkv.shape == qkv.shape and dqkv.is_contiguous(), (
        f"dqkv {tuple(dqkv.shape)} with strides {dqkv.stride()}, qkv {tuple(qkv.shape)}"
    )
    T = qkv.shape[0]
    d = cos_sin.shape[1]
    positions = positions.contiguous()
    cos_sin = cos_sin.contiguous()
    norms = norms.contiguous()
    config = tile_config("norm_rope_backward_kernel", qkv.device, f"d{power_of_two(d)}")
    grid = (cdiv(T, config["BT"]), cdiv(H + G, config["BH"]))
    launch(
        norm_rope_backward_kernel, grid, dqkv, qkv, norms, positions, cos_sin, T, eps,
        H=H, G=G, d=d, BD=power_of_two(d // 2, least=1), **config,
    )  # fmt: skip
    return dqkv


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    """Shape: T, H, G, d."""
    T, H, G, d = shape
    width = (H + 2 * G) * d
    angles = torch.rand(512, d // 2, generator=g, dtype=torch.float64) * 6.3
    return {
        "qkv": torch.randn(T, width, generator=g, dtype=torch.float64),
        "dqkv": torch.randn(T, width, generator=g, dtype=torch.float64),
        "norms": torch.rand(2 * d, generator=g, dtype=torch.float64) + 0.5,
        "eps": 1e-5,
        "positions": torch.randint(512, (T,), generator=g),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=1),  # (512, d)
        "H": H,
        "G": G,
    }


def _run(ops, i: dict) -> dict[str, Tensor]:
    qkv = i["qkv"]
    cos_sin = i["cos_sin"].to(accumulate_dtype(qkv.dtype))
    args = (i["norms"], i["eps"], i["positions"], cos_sin, i["H"], i["G"])
    z = ops.norm_rope_forward(qkv, *args)
    dx = ops.norm_rope_backward_(i["dqkv"].clone(), qkv, *args)
    return {"z": z, "dx": dx}


SPEC = Spec(
    "norm_rope",
    _make_inputs,
    _run,
    fields=("norm_rope_forward", "norm_rope_backward_"),
    test_shapes=((1, 1, 1, 64), (5, 9, 3, 64), (63, 4, 4, 80), (0, 2, 1, 64)),
    bench_shapes=tuple((t, m.H, m.G, m.d) for m in MODELS.values() for t in TOKENS),
    model_shapes=lambda m: ((33, m.H, m.G, m.d),),
    used_by=lambda m: m.qk_norm,
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
