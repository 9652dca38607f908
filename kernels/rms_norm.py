"""RMSNorm     y = x * r * w      r = (mean(x^2) + eps)^(-1/2)

and, with the residual addition before it,     h = x + residual,  y = RMSNorm(h).

backward, with g = dy * w:    dx = r * (g - x * r^2 * mean(g * x))
                              dh_total = dh + dx for the form with the addition
                              dw is not computed: w is frozen under LoRA.
shapes     x, y, h, dy, dx (T, D) activation dtype    w (D,)    rstd (T,) accumulation dtype, saved
precision  statistics in max(fp32, dtype); x * r is rounded to the dtype before * w, as Llama does
traffic    forward 2TD elements (4TD with the addition), backward 3TD (4TD): bandwidth-bound
triton     a program holds BT whole tokens in registers, D padded to BD: each element is read once
tiles      shape class: the power of two that holds D, as "D1024"
"""

# T = tokens, D = model width, BT = tokens of a program, BD = D padded to a power of two

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.native import at, library
from kernels.dtypes import accumulate_dtype
from kernels.integers import cdiv, power_of_two
from kernels.launch.tile_config import tile_config
from kernels.launch.triton_launch import jit, launch, tl
from kernels.spec import MODELS, TOKENS, Spec, autograd

# ---- reference: the definition


def rms_norm_reference(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (T, D) and rstd (T,); differentiable."""
    x32 = x.to(accumulate_dtype(x.dtype))  # (T, D)
    mean_square = x32.pow(2).mean(-1)  # (T,)
    rstd = torch.rsqrt(mean_square + eps)
    x_hat = (x32 * rstd[:, None]).to(x.dtype)  # (T, D)
    return x_hat * w, rstd


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D), h = x + residual (T, D) and rstd (T,); differentiable."""
    h = x + residual
    y, rstd = rms_norm_reference(h, w, eps)
    return y, h, rstd


def rms_norm_reference_backward(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """By autograd; eps is recovered from rstd, so that the pair's signatures agree."""
    mean_square = x.to(rstd.dtype).pow(2).mean(-1)  # (T,)
    eps = rstd.pow(-2) - mean_square  # (T,): up to rounding, eps for every token

    def forward(x: Tensor) -> Tensor:
        y, _ = rms_norm_reference(x, w, eps)
        return y

    (dx,) = autograd(forward, (x,), dy)
    return dx


def add_rms_norm_reference_backward(
    dy: Tensor, dh: Tensor, h: Tensor, w: Tensor, rstd: Tensor
) -> Tensor:
    """Gradient of both h and, the addition being linear, of x and of residual."""
    return dh + rms_norm_reference_backward(dy, h, w, rstd)


# ---- torch


def _check_shapes(x: Tensor, w: Tensor, residual: Tensor | None = None) -> None:
    """AssertionError unless x is (T, D), w (D,) and residual (T, D)."""
    assert x.dim() == 2 and w.shape == x.shape[1:], f"x {tuple(x.shape)}, w {tuple(w.shape)}"
    assert residual is None or residual.shape == x.shape, (
        f"x {tuple(x.shape)}, residual {tuple(residual.shape)}"
    )


def rms_norm_forward(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of each row of x (T, D): y (T, D) and rstd (T,)."""
    _check_shapes(x, w)
    x32 = x.to(accumulate_dtype(x.dtype))  # (T, D)
    mean_square = x32.square().mean(-1)  # (T,)
    rstd = mean_square.add_(eps).rsqrt_()
    x_hat = (x32 * rstd[:, None]).to(x.dtype)  # (T, D)
    y = x_hat.mul_(w)
    return y, rstd


def add_rms_norm_forward(
    x: Tensor, residual: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of h = x + residual: y (T, D), h (T, D), rstd (T,)."""
    _check_shapes(x, w, residual)
    h = x + residual
    y, rstd = rms_norm_forward(h, w, eps)
    return y, h, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """dx (T, D) of RMSNorm."""
    g = dy.to(rstd.dtype) * w  # (T, D)
    x32 = x.to(rstd.dtype)  # (T, D)
    mean_gx = (g * x32).mean(-1)  # (T,)
    projection = mean_gx.mul_(rstd.pow(3)).neg_()  # (T,): -r^3 mean(g x)
    dx = g.mul_(rstd[:, None]).addcmul_(x32, projection[:, None])  # r g - r^3 mean(g x) x
    return dx.to(x.dtype)


def add_rms_norm_backward(dy: Tensor, dh: Tensor, h: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """dh + dx: the gradient of the residual stream before the norm, (T, D)."""
    return rms_norm_backward(dy, h, w, rstd).add_(dh)


# ---- native: fp32 on a CPU


def rms_norm_forward_native(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm_forward`, in C (cpu/native/rowwise.c)."""
    _check_shapes(x, w)
    T, D = x.shape
    y = torch.empty_like(x)  # (T, D)
    rstd = torch.empty(T)
    no_residual = None
    no_h = None
    library().rms_norm(at(x), no_residual, at(w), at(y), no_h, at(rstd), T, D, eps)
    return y, rstd


def add_rms_norm_forward_native(
    x: Tensor, residual: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `add_rms_norm_forward`, in C, in one pass."""
    _check_shapes(x, w, residual)
    T, D = x.shape
    y = torch.empty_like(x)
    h = torch.empty_like(x)  # (T, D)
    rstd = torch.empty(T)
    library().rms_norm(at(x), at(residual), at(w), at(y), at(h), at(rstd), T, D, eps)
    return y, h, rstd


# ---- triton


@jit(varying=("T",))
def rms_norm_forward_kernel(
    x_ptr,  # (T, D)
    residual_ptr,  # (T, D), read if ADD
    w_ptr,  # (D,)
    y_ptr,  # (T, D)
    h_ptr,  # (T, D), written if ADD
    rstd_ptr,  # (T,) fp32
    T,
    eps,
    ADD: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    """y and rstd of BT tokens; ADD: of h = x + residual, which is written too."""
    dtype = x_ptr.dtype.element_ty
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    cols = tl.arange(0, BD)
    token_mask = tokens < T
    col_mask = cols < D
    mask = token_mask[:, None] & col_mask[None, :]  # (BT, BD)
    row_starts = tokens.to(tl.int64)[:, None] * D
    offsets = row_starts + cols[None, :]  # (BT, BD)

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
        h = x.to(tl.float32) + residual.to(tl.float32)
        x = h.to(dtype)
        tl.store(h_ptr + offsets, x, mask=mask)

    x32 = x.to(tl.float32)
    mean_square = tl.sum(x32 * x32, axis=1) / D  # (BT,)
    rstd = tl.rsqrt(mean_square + eps)
    x_hat = (x32 * rstd[:, None]).to(dtype)
    w = tl.load(w_ptr + cols, mask=col_mask, other=0.0)  # (BD,)
    y = x_hat.to(tl.float32) * w.to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, y.to(dtype), mask=mask)
    tl.store(rstd_ptr + tokens, rstd, mask=token_mask)


@jit(varying=("T",))
def rms_norm_backward_kernel(
    dy_ptr,  # (T, D)
    dh_ptr,  # (T, D), read if ADD
    x_ptr,  # (T, D)
    w_ptr,  # (D,)
    rstd_ptr,  # (T,) fp32
    dx_ptr,  # (T, D)
    T,
    ADD: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    """dx of BT tokens; ADD: plus dh, the gradient that reaches h past the norm."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    cols = tl.arange(0, BD)
    token_mask = tokens < T
    col_mask = cols < D
    mask = token_mask[:, None] & col_mask[None, :]  # (BT, BD)
    row_starts = tokens.to(tl.int64)[:, None] * D
    offsets = row_starts + cols[None, :]  # (BT, BD)

    w = tl.load(w_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)  # (BD,)
    rstd = tl.load(rstd_ptr + tokens, mask=token_mask, other=0.0)[:, None]  # (BT, 1)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # (BT, BD)
    x_hat = x * rstd
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = dy * w[None, :]
    projection = tl.sum(g * x_hat, axis=1) / D  # (BT,)
    dx = rstd * (g - x_hat * projection[:, None])
    if ADD:
        dx += tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _forward_triton(
    x: Tensor, residual: Tensor | None, w: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y (T, D), h (T, D) with a residual, rstd (T,)."""
    _check_shapes(x, w, residual)
    T, D = x.shape
    x = x.contiguous()
    w = w.contiguous()
    y = torch.empty_like(x)  # (T, D)
    rstd = x.new_empty(T, dtype=torch.float32)
    h = None
    if residual is not None:
        residual = residual.contiguous()
        h = torch.empty_like(x)  # (T, D)
    BD = power_of_two(D)
    config = tile_config("rms_norm_forward_kernel", x.device, f"D{BD}")
    grid = (cdiv(T, config["BT"]),)
    launch(
        rms_norm_forward_kernel, grid, x, residual, w, y, h, rstd, T, eps,
        ADD=residual is not None, D=D, BD=BD, **config,
    )  # fmt: skip
    return y, h, rstd


def rms_norm_forward_triton(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm_forward`, in one launch."""
    y, _, rstd = _forward_triton(x, None, w, eps)
    return y, rstd


def add_rms_norm_forward_triton(
    x: Tensor, residual: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `add_rms_norm_forward`, in one launch."""
    return _forward_triton(x, residual, w, eps)


def _backward_triton(dy: Tensor, dh: Tensor | None, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """dx (T, D), plus dh where there is one."""
    assert dy.shape == x.shape and rstd.shape == x.shape[:1], (
        f"dy {tuple(dy.shape)}, x {tuple(x.shape)}, rstd {tuple(rstd.shape)}"
    )
    T, D = x.shape
    dy = dy.contiguous()
    x = x.contiguous()
    w = w.contiguous()
    if dh is not None:
        dh = dh.contiguous()
    dx = torch.empty_like(x)  # (T, D)
    BD = power_of_two(D)
    config = tile_config("rms_norm_backward_kernel", x.device, f"D{BD}")
    grid = (cdiv(T, config["BT"]),)
    launch(
        rms_norm_backward_kernel, grid, dy, dh, x, w, rstd, dx, T,
        ADD=dh is not None, D=D, BD=BD, **config,
    )  # fmt: skip
    return dx


def rms_norm_backward_triton(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """As `rms_norm_backward`, in one launch."""
    return _backward_triton(dy, None, x, w, rstd)


def add_rms_norm_backward_triton(
    dy: Tensor, dh: Tensor, h: Tensor, w: Tensor, rstd: Tensor
) -> Tensor:
    """As `add_rms_norm_backward`, in one launch."""
    return _backward_triton(dy, dh, h, w, rstd)


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    """Shape: T, D."""
    T, D = shape
    inputs: dict[str, Tensor | float] = {}
    for name in ("x", "residual", "dy", "dh"):
        inputs[name] = torch.randn(T, D, generator=g, dtype=torch.float64)
    inputs["w"] = torch.rand(D, generator=g, dtype=torch.float64) + 0.5
    inputs["eps"] = 1e-5
    return inputs


def _run(ops, i: dict) -> dict[str, Tensor]:
    x = i["x"]
    w = i["w"]
    eps = i["eps"]
    y, rstd = ops.rms_norm_forward(x, w, eps)
    dx = ops.rms_norm_backward(i["dy"], x, w, rstd)
    y_add, h, rstd_add = ops.add_rms_norm_forward(x, i["residual"], w, eps)
    dh = ops.add_rms_norm_backward(i["dy"], i["dh"], h, w, rstd_add)
    return {"y": y, "dx": dx, "y_add": y_add, "h": h, "dh": dh}


SPEC = Spec(
    "rms_norm",
    _make_inputs,
    _run,
    fields=(
        "rms_norm_forward",
        "rms_norm_backward",
        "add_rms_norm_forward",
        "add_rms_norm_backward",
    ),
    test_shapes=((1, 64), (3, 63), (257, 576), (0, 64)),
    bench_shapes=tuple((t, m.D) for m in MODELS.values() for t in TOKENS),
    model_shapes=lambda m: ((33, m.D),),
)
