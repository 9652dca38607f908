"""SwiGLU     h = silu(gate) * up      silu(z) = z sigma(z),  sigma the logistic function

backward, with s = sigma(gate):    dup   = dh * gate * s
                                   dgate = dh * up * s * (1 + gate * (1 - s))
shapes     gate_up (T, 2F): gate then up    h, dh (T, F)    dgate_up (T, 2F)
precision  silu in max(fp32, dtype), rounded to the dtype before * up, as Llama does
traffic    forward 3TF elements, backward 5TF; sigma is recomputed, nothing is saved
triton     a program holds a tile of BT tokens x BF columns of gate and of up: one pass
tiles      one shape class
"""

# T = tokens, F = feed-forward width, BT x BF = tokens and columns of a program

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.native import at, library
from kernels.cpu.rowwise import rowwise
from kernels.dtypes import accumulate_dtype
from kernels.integers import cdiv
from kernels.launch.tile_config import tile_config
from kernels.launch.triton_launch import jit, launch, tl
from kernels.spec import MODELS, TOKENS, Spec, autograd

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
    return rowwise(torch.ops.aten.silu, gate).mul_(up)


def swiglu_backward(dh: Tensor, gate_up: Tensor) -> Tensor:
    """dgate_up (T, 2F)."""
    acc = accumulate_dtype(dh.dtype)
    gate, up = gate_up.chunk(2, dim=-1)  # (T, F), views
    gate = gate.to(acc)
    up = up.to(acc)
    dh = dh.to(acc)
    dgate_up = torch.empty_like(gate_up)
    dgate, dup = dgate_up.chunk(2, dim=-1)  # (T, F), views
    silu_backward = torch.ops.aten.silu_backward  # one pass for the whole slope
    if acc == dgate_up.dtype:
        torch.mul(torch.ops.aten.silu(gate), dh, out=dup)
        torch.mul(dh, up, out=dgate)
        silu_backward.grad_input(dgate, gate, grad_input=dgate)
    else:
        dup.copy_(torch.ops.aten.silu(gate).mul_(dh))
        dgate.copy_(silu_backward(dh * up, gate))
    return dgate_up


# ---- native: fp32 on a CPU


def swiglu_forward_native(gate_up: Tensor) -> Tensor:
    """As `swiglu_forward`, in C (cpu/native/rowwise.c)."""
    T = gate_up.shape[0]
    F = gate_up.shape[1] // 2
    h = torch.empty(T, F)
    library().swiglu(at(gate_up), h.data_ptr(), T, F)
    return h


# ---- triton


@jit(varying=("T",))
def swiglu_forward_kernel(
    gate_up_ptr, h_ptr, T, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """A tile of h; gate is in columns 0 .. F - 1 of gate_up, up in the F after them."""
    tokens = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    cols = (tl.program_id(1) * BF + tl.arange(0, BF))[None, :]
    inside = (tokens < T) & (cols < F)
    at = tokens * (2 * F) + cols
    gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)  # (BT, BF)
    up = tl.load(gate_up_ptr + F + at, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(h_ptr.dtype.element_ty)
    h = (silu.to(tl.float32) * up).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + tokens * F + cols, h, mask=inside)


@jit(varying=("T",))
def swiglu_backward_kernel(
    dh_ptr, gate_up_ptr, dgate_up_ptr, T, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """A tile of dgate and the same tile of dup."""
    tokens = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    cols = (tl.program_id(1) * BF + tl.arange(0, BF))[None, :]
    inside = (tokens < T) & (cols < F)
    at = tokens * (2 * F) + cols
    gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)  # (BT, BF)
    up = tl.load(gate_up_ptr + F + at, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + tokens * F + cols, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = dh * up * (s * (1 + gate * (1 - s)))
    dup = dh * (gate * s)
    dtype = dgate_up_ptr.dtype.element_ty
    tl.store(dgate_up_ptr + at, dgate.to(dtype), mask=inside)
    tl.store(dgate_up_ptr + F + at, dup.to(dtype), mask=inside)


def _launch_tiles(kernel, gate_up: Tensor, *args: Tensor) -> None:
    """One program per tile of h (T, F)."""
    T = gate_up.shape[0]
    F = gate_up.shape[1] // 2
    config = tile_config(kernel.__name__, gate_up.device)
    grid = (cdiv(T, config["BT"]), cdiv(F, config["BF"]))
    launch(kernel, grid, *args, T, F=F, **config)


def swiglu_forward_triton(gate_up: Tensor) -> Tensor:
    """As `swiglu_forward`, in one launch."""
    assert gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, f"gate_up {tuple(gate_up.shape)}"
    gate_up = gate_up.contiguous()
    h = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _launch_tiles(swiglu_forward_kernel, gate_up, gate_up, h)
    return h


def swiglu_backward_triton(dh: Tensor, gate_up: Tensor) -> Tensor:
    """As `swiglu_backward`, in one launch."""
    assert gate_up.shape == (dh.shape[0], 2 * dh.shape[1]), (
        f"dh {tuple(dh.shape)}, gate_up {tuple(gate_up.shape)}"
    )
    dh = dh.contiguous()
    gate_up = gate_up.contiguous()
    dgate_up = torch.empty_like(gate_up)
    _launch_tiles(swiglu_backward_kernel, gate_up, dh, gate_up, dgate_up)
    return dgate_up


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    """Shape: T, F."""
    T, F = shape
    gate_up = 3 * torch.randn(T, 2 * F, generator=g, dtype=torch.float64)
    dh = torch.randn(T, F, generator=g, dtype=torch.float64)
    return {"gate_up": gate_up, "dh": dh}


def _run(ops, i: dict) -> dict[str, Tensor]:
    return {
        "h": ops.swiglu_forward(i["gate_up"]),
        "dgate_up": ops.swiglu_backward(i["dh"], i["gate_up"]),
    }


SPEC = Spec(
    "swiglu",
    _make_inputs,
    _run,
    fields=("swiglu_forward", "swiglu_backward"),
    test_shapes=((1, 32), (3, 63), (257, 96), (0, 32)),
    bench_shapes=tuple((t, m.F) for m in MODELS.values() for t in TOKENS),
    model_shapes=lambda m: ((33, m.F),),
    interpreter_shapes=((1, 32), (3, 63), (7, 96), (0, 32)),
)
