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
    x32 = x.to(accumulate_dtype(x.dtype))
    rstd = torch.rsqrt(x32.pow(2).mean(-1) + eps)
    return (x32 * rstd[:, None]).to(x.dtype) * w, rstd


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D), h = x + residual (T, D) and rstd (T,); differentiable."""
    h = x + residual
    y, rstd = rms_norm_reference(h, w, eps)
    return y, h, rstd


def rms_norm_reference_backward(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """By autograd; eps is recovered from rstd, so that the pair's signatures agree."""
    eps = rstd.pow(-2) - x.to(rstd.dtype).pow(2).mean(-1)

    def normed(x: Tensor) -> Tensor:
        x32 = x.to(rstd.dtype)
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1) + eps)[:, None]).to(x.dtype) * w

    return autograd(normed, (x,), dy)[0]


def add_rms_norm_reference_backward(
    dy: Tensor, dh: Tensor, h: Tensor, w: Tensor, rstd: Tensor
) -> Tensor:
    """Gradient of both h and, the addition being linear, of x and of residual."""
    return dh + rms_norm_reference_backward(dy, h, w, rstd)


# ---- torch


def rms_norm_forward(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of each row of x (T, D): y (T, D) and rstd (T,)."""
    assert x.dim() == 2 and w.shape == x.shape[1:], f"x {tuple(x.shape)}, w {tuple(w.shape)}"
    x32 = x.to(accumulate_dtype(x.dtype))
    rstd = x32.square().mean(-1).add_(eps).rsqrt_()
    return (x32 * rstd[:, None]).to(x.dtype).mul_(w), rstd


def add_rms_norm_forward(
    x: Tensor, residual: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of h = x + residual: y (T, D), h (T, D), rstd (T,)."""
    assert x.shape == residual.shape, f"x {tuple(x.shape)}, residual {tuple(residual.shape)}"
    h = x + residual
    y, rstd = rms_norm_forward(h, w, eps)
    return y, h, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """dx (T, D) of RMSNorm."""
    g = dy.to(rstd.dtype) * w  # (T, D)
    x32 = x.to(rstd.dtype)
    projection = (g * x32).mean(-1).mul_(rstd.pow(3)).neg_()  # (T,): -r^3 mean(g x)
    return g.mul_(rstd[:, None]).addcmul_(x32, projection[:, None]).to(x.dtype)


def add_rms_norm_backward(dy: Tensor, dh: Tensor, h: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """dh + dx: the gradient of the residual stream before the norm, (T, D)."""
    return rms_norm_backward(dy, h, w, rstd).add_(dh)


# ---- native: fp32 on a CPU


def rms_norm_forward_native(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm_forward`, in C (cpu/native/rowwise.c)."""
    assert x.dim() == 2 and w.shape == x.shape[1:], f"x {tuple(x.shape)}, w {tuple(w.shape)}"
    T, D = x.shape
    y = torch.empty_like(x)
    rstd = torch.empty(T)
    no_residual = no_h = None
    library().rms_norm(at(x), no_residual, at(w), y.data_ptr(), no_h, rstd.data_ptr(), T, D, eps)
    return y, rstd


def add_rms_norm_forward_native(
    x: Tensor, residual: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `add_rms_norm_forward`, in C, in one pass."""
    assert x.shape == residual.shape and w.shape == x.shape[1:], (
        f"x {tuple(x.shape)}, residual {tuple(residual.shape)}, w {tuple(w.shape)}"
    )
    T, D = x.shape
    y = torch.empty_like(x)
    h = torch.empty_like(x)
    rstd = torch.empty(T)
    library().rms_norm(
        at(x), at(residual), at(w), y.data_ptr(), h.data_ptr(), rstd.data_ptr(), T, D, eps
    )
    return y, h, rstd


# ---- triton


@jit(varying=("T",))
def rms_norm_forward_kernel(
    x_ptr, residual_ptr, w_ptr, y_ptr, h_ptr, rstd_ptr, T, eps,
    ADD: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """y and rstd of BT tokens; ADD: of h = x + residual, which is written too."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    cols = tl.arange(0, BD)
    inside = (tokens < T)[:, None] & (cols < D)[None, :]
    at = tokens.to(tl.int64)[:, None] * D + cols[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)  # (BT, BD)
    if ADD:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(h_ptr + at, x, mask=inside)
    x32 = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x32 * x32, axis=1) / D + eps)  # (BT,)
    x_hat = (x32 * rstd[:, None]).to(x_ptr.dtype.element_ty)
    w = tl.load(w_ptr + cols, mask=cols < D, other=0.0)
    y = x_hat.to(tl.float32) * w.to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + tokens, rstd, mask=tokens < T)


@jit(varying=("T",))
def rms_norm_backward_kernel(
    dy_ptr, dh_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, T,
    ADD: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dx of BT tokens; ADD: plus dh, the gradient that reaches h past the norm."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    cols = tl.arange(0, BD)
    inside = (tokens < T)[:, None] & (cols < D)[None, :]
    at = tokens.to(tl.int64)[:, None] * D + cols[None, :]
    w = tl.load(w_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + tokens, mask=tokens < T, other=0.0)[:, None]
    x_hat = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd  # (BT, BD)
    g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * w[None, :]
    projection = tl.sum(g * x_hat, axis=1) / D  # (BT,)
    dx = rstd * (g - x_hat * projection[:, None])
    if ADD:
        dx += tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _launch_by_tokens(kernel, x: Tensor, *args, **constants) -> None:
    """One program per BT tokens of x (T, D)."""
    T, D = x.shape
    BD = power_of_two(D)
    config = tile_config(kernel.__name__, x.device, f"D{BD}")
    launch(kernel, (cdiv(T, config["BT"]),), *args, D=D, BD=BD, **constants, **config)


def _forward_triton(
    x: Tensor, residual: Tensor | None, w: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y (T, D), h (T, D) with a residual, rstd (T,)."""
    assert x.dim() == 2 and w.shape == x.shape[1:], f"x {tuple(x.shape)}, w {tuple(w.shape)}"
    assert residual is None or residual.shape == x.shape, (
        f"x {tuple(x.shape)}, residual {tuple(residual.shape)}"
    )
    T = x.shape[0]
    x = x.contiguous()
    w = w.contiguous()
    y = torch.empty_like(x)
    rstd = x.new_empty(T, dtype=torch.float32)
    h = None
    if residual is not None:
        residual = residual.contiguous()
        h = torch.empty_like(x)
    args = (x, residual, w, y, h, rstd, T, eps)
    _launch_by_tokens(rms_norm_forward_kernel, x, *args, ADD=h is not None)
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
    dy = dy.contiguous()
    x = x.contiguous()
    w = w.contiguous()
    if dh is not None:
        dh = dh.contiguous()
    dx = torch.empty_like(x)
    args = (dy, dh, x, w, rstd, dx, x.shape[0])
    _launch_by_tokens(rms_norm_backward_kernel, x, *args, ADD=dh is not None)
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
    inputs = {
        name: torch.randn(T, D, generator=g, dtype=torch.float64)
        for name in ("x", "residual", "dy", "dh")
    }
    w = torch.rand(D, generator=g, dtype=torch.float64) + 0.5
    return inputs | {"w": w, "eps": 1e-5}


def _run(ops, i: dict) -> dict[str, Tensor]:
    y, rstd = ops.rms_norm_forward(i["x"], i["w"], i["eps"])
    dx = ops.rms_norm_backward(i["dy"], i["x"], i["w"], rstd)
    y_add, h, rstd_add = ops.add_rms_norm_forward(i["x"], i["residual"], i["w"], i["eps"])
    dh = ops.add_rms_norm_backward(i["dy"], i["dh"], h, i["w"], rstd_add)
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
