"""RMSNorm     y = x * r * w      r = (mean(x^2) + eps)^(-1/2)

and, with the residual addition before it,     h = x + residual,  y = RMSNorm(h).

backward, with g = dy * w:    dx = r * (g - x * r^2 * mean(g * x))
                              dh_total = dh + dx for the form with the addition
                              dw is not computed: w is frozen under LoRA.
shapes     x, y, h, dy, dx (T, D) activation dtype    w (D,)    rstd (T,) accumulation dtype, saved
precision  statistics in max(fp32, dtype); x * r is rounded to the dtype before * w, as Llama does
traffic    forward 2TD elements (4TD with the addition), backward 3TD (4TD): bandwidth-bound
"""

# T = tokens, D = model width

from __future__ import annotations

import torch
from torch import Tensor

from kernels.spec import Spec, accumulate_dtype, autograd

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
    x_hat = x.to(rstd.dtype) * rstd[:, None]
    g = dy.to(rstd.dtype) * w
    projection = (g * x_hat).mean(-1, keepdim=True)
    return g.sub_(x_hat.mul_(projection)).mul_(rstd[:, None]).to(x.dtype)


def add_rms_norm_backward(dy: Tensor, dh: Tensor, h: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    """dh + dx: the gradient of the residual stream before the norm, (T, D)."""
    return rms_norm_backward(dy, h, w, rstd).add_(dh)


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    t, d = shape
    x, r, dy, dh = (torch.randn(t, d, generator=g, dtype=torch.float64) for _ in range(4))
    w = torch.rand(d, generator=g, dtype=torch.float64) + 0.5
    return {"x": x, "residual": r, "dy": dy, "dh": dh, "w": w, "eps": 1e-5}


def _run(ops, i: dict) -> dict[str, Tensor]:
    y, rstd = ops.rms_norm_forward(i["x"], i["w"], i["eps"])
    y2, h, rstd2 = ops.add_rms_norm_forward(i["x"], i["residual"], i["w"], i["eps"])
    return {
        "y": y,
        "dx": ops.rms_norm_backward(i["dy"], i["x"], i["w"], rstd),
        "y_add": y2,
        "h": h,
        "dh": ops.add_rms_norm_backward(i["dy"], i["dh"], h, i["w"], rstd2),
    }


SPEC = Spec(
    "rms_norm",
    _make_inputs,
    _run,
    test_shapes=((1, 64), (3, 63), (257, 576), (0, 64)),
    bench_shapes=((4096, 576), (8192, 4096)),
)
