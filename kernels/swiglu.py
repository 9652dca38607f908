"""SwiGLU     h = silu(gate) * up      silu(z) = z sigma(z),  sigma the logistic function

backward, with s = sigma(gate):    dup   = dh * gate * s
                                   dgate = dh * up * s * (1 + gate * (1 - s))
shapes     gate_up (T, 2F): gate then up    h, dh (T, F)    dgate_up (T, 2F)
precision  silu in max(fp32, dtype), rounded to the dtype before * up, as Llama does
traffic    forward 3TF elements, backward 5TF; sigma is recomputed, nothing is saved
"""

# T = tokens, F = feed-forward width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.spec import Spec, accumulate_dtype, autograd

# ---- reference: the definition


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """h (T, F); differentiable."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate32 = gate.to(accumulate_dtype(gate.dtype))
    return (gate32 * torch.sigmoid(gate32)).to(gate.dtype) * up


def swiglu_reference_backward(dh: Tensor, gate_up: Tensor) -> Tensor:
    """By autograd."""
    return autograd(swiglu_reference, (gate_up,), dh)[0]


# ---- torch


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """h (T, F) of gate_up (T, 2F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(dh: Tensor, gate_up: Tensor) -> Tensor:
    """dgate_up (T, 2F)."""
    acc = accumulate_dtype(dh.dtype)
    gate, up = (half.to(acc) for half in gate_up.chunk(2, dim=-1))
    dgate_up = torch.empty_like(gate_up)
    dgate, dup = dgate_up.chunk(2, dim=-1)
    s = torch.sigmoid(gate)
    silu = gate * s
    dh = dh.to(acc)
    dup.copy_(dh * silu)
    # s * (1 + gate * (1 - s)) = s + silu * (1 - s)
    slope = silu.mul_(1 - s).add_(s)
    dgate.copy_(slope.mul_(dh).mul_(up))
    return dgate_up


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    t, f = shape
    gate_up = 3 * torch.randn(t, 2 * f, generator=g, dtype=torch.float64)
    return {"gate_up": gate_up, "dh": torch.randn(t, f, generator=g, dtype=torch.float64)}


def _run(ops, i: dict) -> dict[str, Tensor]:
    return {
        "h": ops.swiglu_forward(i["gate_up"]),
        "dgate_up": ops.swiglu_backward(i["dh"], i["gate_up"]),
    }


SPEC = Spec(
    "swiglu",
    _make_inputs,
    _run,
    test_shapes=((1, 32), (3, 63), (257, 96), (0, 32)),
    bench_shapes=((4096, 1536), (8192, 11008)),
)
