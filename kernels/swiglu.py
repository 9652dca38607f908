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
    gate, up = gate_up.chunk(2, dim=-1)  # (T, F)
    gate32 = gate.to(accumulate_dtype(gate.dtype))
    silu = gate32 * torch.sigmoid(gate32)  # (T, F)
    return silu.to(gate.dtype) * up


def swiglu_reference_backward(dh: Tensor, gate_up: Tensor) -> Tensor:
    """By autograd."""
    (dgate_up,) = autograd(swiglu_reference, (gate_up,), dh)
    return dgate_up


# ---- torch


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """h (T, F) of gate_up (T, 2F)."""
    gate, up = gate_up.chunk(2, dim=-1)  # (T, F), views
    silu = rowwise(torch.ops.aten.silu, gate)  # (T, F)
    return silu.mul_(up)


def swiglu_backward(dh: Tensor, gate_up: Tensor) -> Tensor:
    """dgate_up (T, 2F)."""
    acc = accumulate_dtype(dh.dtype)
    gate, up = gate_up.chunk(2, dim=-1)  # (T, F), views
    gate = gate.to(acc)
    up = up.to(acc)
    dh = dh.to(acc)
    dgate_up = torch.empty_like(gate_up)
    dgate, dup = dgate_up.chunk(2, dim=-1)  # (T, F), views
    silu = torch.ops.aten.silu
    silu_backward = torch.ops.aten.silu_backward  # one pass for the whole slope
    if acc == dgate_up.dtype:  # nothing to round: written into dgate_up without a copy
        torch.mul(silu(gate), dh, out=dup)
        torch.mul(dh, up, out=dgate)
        silu_backward.grad_input(dgate, gate, grad_input=dgate)
    else:
        dup.copy_(silu(gate).mul_(dh))
        dgate.copy_(silu_backward(dh * up, gate))
    return dgate_up


# ---- native: fp32 on a CPU


def swiglu_forward_native(gate_up: Tensor) -> Tensor:
    """As `swiglu_forward`, in C (cpu/native/rowwise.c)."""
    T = gate_up.shape[0]
    F = gate_up.shape[1] // 2
    h = torch.empty(T, F)
    library().swiglu(at(gate_up), at(h), T, F)
    return h


# ---- triton


@jit(varying=("T",))
def swiglu_forward_kernel(
    gate_up_ptr,  # (T, 2F)
    h_ptr,  # (T, F)
    T,
    F: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """A tile of h; gate is in columns 0 .. F - 1 of gate_up, up in the F after them."""
    dtype = h_ptr.dtype.element_ty
    token_ids = tl.program_id(0) * BT + tl.arange(0, BT)
    tokens = token_ids.to(tl.int64)[:, None]  # (BT, 1)
    cols = (tl.program_id(1) * BF + tl.arange(0, BF))[None, :]  # (1, BF)
    mask = (tokens < T) & (cols < F)  # (BT, BF)
    gate_ptr = gate_up_ptr
    up_ptr = gate_up_ptr + F
    offsets = tokens * (2 * F) + cols  # of gate and of up
    h_offsets = tokens * F + cols

    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    silu = gate * tl.sigmoid(gate)
    h = silu.to(dtype).to(tl.float32) * up
    tl.store(h_ptr + h_offsets, h.to(dtype), mask=mask)


@jit(varying=("T",))
def swiglu_backward_kernel(
    dh_ptr,  # (T, F)
    gate_up_ptr,  # (T, 2F)
    dgate_up_ptr,  # (T, 2F)
    T,
    F: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """A tile of dgate and the same tile of dup."""
    dtype = dgate_up_ptr.dtype.element_ty
    token_ids = tl.program_id(0) * BT + tl.arange(0, BT)
    tokens = token_ids.to(tl.int64)[:, None]  # (BT, 1)
    cols = (tl.program_id(1) * BF + tl.arange(0, BF))[None, :]  # (1, BF)
    mask = (tokens < T) & (cols < F)  # (BT, BF)
    gate_ptr = gate_up_ptr
    up_ptr = gate_up_ptr + F
    dgate_ptr = dgate_up_ptr
    dup_ptr = dgate_up_ptr + F
    offsets = tokens * (2 * F) + cols  # of gate, up, dgate and dup
    dh_offsets = tokens * F + cols

    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + dh_offsets, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dsilu = dh * up
    slope = s * (1 + gate * (1 - s))  # of silu at gate
    dgate = dsilu * slope
    dup = dh * (gate * s)
    tl.store(dgate_ptr + offsets, dgate.to(dtype), mask=mask)
    tl.store(dup_ptr + offsets, dup.to(dtype), mask=mask)


def _tiles(kernel_name: str, h: Tensor) -> tuple[tuple[int, int], dict]:
    """The grid, one program per tile of h (T, F), and the tile configuration."""
    T, F = h.shape
    config = tile_config(kernel_name, h.device)
    grid = (cdiv(T, config["BT"]), cdiv(F, config["BF"]))
    return grid, config


def swiglu_forward_triton(gate_up: Tensor) -> Tensor:
    """As `swiglu_forward`, in one launch."""
    assert gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, f"gate_up {tuple(gate_up.shape)}"
    T = gate_up.shape[0]
    F = gate_up.shape[1] // 2
    gate_up = gate_up.contiguous()
    h = gate_up.new_empty(T, F)
    grid, config = _tiles("swiglu_forward_kernel", h)
    launch(swiglu_forward_kernel, grid, gate_up, h, T, F=F, **config)
    return h


def swiglu_backward_triton(dh: Tensor, gate_up: Tensor) -> Tensor:
    """As `swiglu_backward`, in one launch."""
    T, F = dh.shape
    assert gate_up.shape == (T, 2 * F), f"dh {tuple(dh.shape)}, gate_up {tuple(gate_up.shape)}"
    dh = dh.contiguous()
    gate_up = gate_up.contiguous()
    dgate_up = torch.empty_like(gate_up)  # (T, 2F)
    grid, config = _tiles("swiglu_backward_kernel", dh)
    launch(swiglu_backward_kernel, grid, dh, gate_up, dgate_up, T, F=F, **config)
    return dgate_up


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    """Shape: T, F."""
    T, F = shape
    gate_up = 3 * torch.randn(T, 2 * F, generator=g, dtype=torch.float64)
    dh = torch.randn(T, F, generator=g, dtype=torch.float64)
    return {"gate_up": gate_up, "dh": dh}


def _run(ops, i: dict) -> dict[str, Tensor]:
    h = ops.swiglu_forward(i["gate_up"])
    dgate_up = ops.swiglu_backward(i["dh"], i["gate_up"])
    return {"h": h, "dgate_up": dgate_up}


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
