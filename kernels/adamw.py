"""AdamW on flat buffers, and the norm that clips the gradient

    g = scale * grad                         (1 / tokens of the step, times the clip factor)
    m = b1 m + (1 - b1) g                    v = b2 v + (1 - b2) g^2
    p = p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    compute = p                              the compute-dtype copy, in the same pass

(Loshchilov & Hutter 2019, decoupled decay, as torch.optim.AdamW orders it.)

shapes     params, grads, m, v, compute (P,)    scalars: four () fp64 (StepScalars)
precision  masters, moments and gradients fp32 (fp64 where the model is)
traffic    reads 4P, writes 3P and the copy, once per optimizer step
triton     one launch for the step, which reads the scalars on the device
           the norm in fp64: a partial sum per program, added in order by a second launch
tiles      BP elements per program; one configuration for every P
"""

# P = trained parameters

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.integers import cdiv
from kernels.launch.tile_config import tile_config
from kernels.launch.triton_launch import jit, launch, tl
from kernels.packed import upload
from kernels.spec import Spec


@dataclass(frozen=True)
class AdamW:
    """The numbers that do not change from step to step."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled; the paper's runs use none

    def scalars(
        self, lr: float, step: int, scale: float, device: str | torch.device
    ) -> StepScalars:
        """The numbers of one step, copied to the device at once without waiting for it.

        lr: learning rate. step: counts from 1. scale: factor of the gradient.
        """
        assert step >= 1, f"steps count from 1, got {step}"
        correction1 = 1 - self.beta1**step
        correction2 = 1 - self.beta2**step
        uploaded = upload([lr, correction1, correction2, scale], torch.float64, device)  # (4,)
        return StepScalars(*uploaded.unbind())


class StepScalars(NamedTuple):
    """The numbers that change from step to step: () fp64 each, on the device of the parameters."""

    lr: Tensor
    correction1: Tensor  # 1 - b1^t, bias correction of the first moment
    correction2: Tensor  # 1 - b2^t, bias correction of the second moment
    scale: Tensor  # factor of the gradient

    def clipped(self, clip_factor: Tensor) -> StepScalars:
        """These, with the gradient also multiplied by `clip_factor`, () fp64."""
        return self._replace(scale=self.scale * clip_factor)


# ---- reference: the definition


def adamw_reference_(
    params: Tensor,
    grads: Tensor,
    m: Tensor,
    v: Tensor,
    scalars: StepScalars,
    config: AdamW,
    compute: Tensor | None = None,
) -> None:
    """In fp64 from beginning to end; in place on params, m, v and compute."""
    lr, correction1, correction2, scale = scalars
    g = scale * grads.double()
    m64 = config.beta1 * m.double() + (1 - config.beta1) * g
    v64 = config.beta2 * v.double() + (1 - config.beta2) * g * g
    decayed = params.double() * (1 - lr * config.weight_decay)
    denominator = (v64 / correction2).sqrt() + config.eps
    update = (m64 / correction1) / denominator
    m.copy_(m64)
    v.copy_(v64)
    params.copy_(decayed - lr * update)
    if compute is not None:
        compute.copy_(params)


def grad_norm_reference(grads: Tensor) -> Tensor:
    """Euclidean norm, () fp64."""
    return grads.double().square().sum().sqrt()


# ---- torch


def adamw_(
    params: Tensor,
    grads: Tensor,
    m: Tensor,
    v: Tensor,
    scalars: StepScalars,
    config: AdamW,
    compute: Tensor | None = None,
) -> None:
    """One step, in place on params, m, v and compute; grads are left as they are.

    All memory is taken before anything is changed, so that a step can be tried again where it is
    short.
    """
    assert params.shape == grads.shape == m.shape == v.shape, (
        f"params {params.shape}, grads {grads.shape}, m {m.shape}, v {v.shape}: expected one shape"
    )
    # () tensors do not promote, so g and all else stay in the dtype of params
    lr, correction1, correction2, scale = scalars
    g = grads * scale
    denominator = torch.empty_like(v)
    update = torch.empty_like(m)
    decay = 1 - lr * config.weight_decay
    m.lerp_(g, 1 - config.beta1)
    v.mul_(config.beta2).addcmul_(g, g, value=1 - config.beta2)
    torch.div(v, correction2, out=denominator).sqrt_().add_(config.eps)
    if config.weight_decay:
        params.mul_(decay)
    torch.div(m, correction1, out=update).mul_(lr).div_(denominator)
    params.sub_(update)
    if compute is not None:
        compute.copy_(params)


def grad_norm(grads: Tensor) -> Tensor:
    """Euclidean norm of the flat gradient, () fp64 on its device."""
    return torch.linalg.vector_norm(grads, dtype=torch.float64)


# ---- triton


@jit
def adamw_kernel(
    params_ptr,  # (P,)
    grads_ptr,  # (P,)
    m_ptr,  # (P,)
    v_ptr,  # (P,)
    compute_ptr,  # (P,), written if COPY
    lr_ptr,  # () fp64, as the three that follow
    correction1_ptr,
    correction2_ptr,
    scale_ptr,
    P,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    weight_decay,
    COPY: tl.constexpr,
    BP: tl.constexpr,
):
    """One step of BP parameters; COPY: the compute-dtype copy too."""
    offsets = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    mask = offsets < P
    lr = tl.load(lr_ptr).to(tl.float32)
    correction1 = tl.load(correction1_ptr).to(tl.float32)
    correction2 = tl.load(correction2_ptr).to(tl.float32)
    scale = tl.load(scale_ptr).to(tl.float32)
    p = tl.load(params_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grads_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = grad * scale
    m = tl.load(m_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(tl.float32)

    # b x + (1 - b) y as x + (1 - b)(y - x): fp32(0.999) is off by 1.3e-5 of 1 - 0.999
    m += one_minus_beta1 * (g - m)
    v += one_minus_beta2 * (g * g - v)
    m_hat = m / correction1
    v_hat = v / correction2
    update = m_hat / (tl.sqrt(v_hat) + eps)
    step = lr * (update + weight_decay * p)
    p = (p - step).to(params_ptr.dtype.element_ty)

    tl.store(m_ptr + offsets, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + offsets, v.to(v_ptr.dtype.element_ty), mask=mask)
    tl.store(params_ptr + offsets, p, mask=mask)
    if COPY:
        tl.store(compute_ptr + offsets, p.to(compute_ptr.dtype.element_ty), mask=mask)


@jit
def sum_of_squares_kernel(x_ptr, sums_ptr, P, BP: tl.constexpr):
    """sums[program] = the sum of BP squares of x (P,), in fp64."""
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * BP + tl.arange(0, BP)
    x = tl.load(x_ptr + offsets, mask=offsets < P, other=0.0).to(tl.float64)
    total = tl.sum(x * x, axis=0)
    tl.store(sums_ptr + program, total)


@jit
def root_of_sum_kernel(sums_ptr, norm_ptr, P, BP: tl.constexpr):
    """norm () = the root of the sum of P partial sums (P,), by one program: BP lanes, then one."""
    lane_totals = tl.zeros((BP,), tl.float64)
    for start in range(0, P, BP):
        offsets = start + tl.arange(0, BP)
        lane_totals += tl.load(sums_ptr + offsets, mask=offsets < P, other=0.0)
    total = tl.sum(lane_totals, axis=0)
    tl.store(norm_ptr, tl.sqrt(total))


def adamw_triton_(
    params: Tensor,
    grads: Tensor,
    m: Tensor,
    v: Tensor,
    scalars: StepScalars,
    config: AdamW,
    compute: Tensor | None = None,
) -> None:
    """As `adamw_`, in one launch."""
    tensors = [params, grads, m, v]
    if compute is not None:
        tensors.append(compute)
    assert all(t.shape == params.shape and t.is_contiguous() for t in tensors), (
        f"expected flat buffers of one size, got {[(t.shape, t.stride()) for t in tensors]}"
    )
    P = params.numel()
    tiles = tile_config("adamw_kernel", params.device)
    grid = (cdiv(P, tiles["BP"]),)
    one_minus_beta1 = 1 - config.beta1
    one_minus_beta2 = 1 - config.beta2
    launch(
        adamw_kernel, grid, params, grads, m, v, compute,
        scalars.lr, scalars.correction1, scalars.correction2, scalars.scale, P,
        one_minus_beta1, one_minus_beta2, config.eps, config.weight_decay,
        COPY=compute is not None, **tiles,
    )  # fmt: skip


def grad_norm_triton(grads: Tensor) -> Tensor:
    """As `grad_norm`, in two launches."""
    grads = grads.contiguous()
    P = grads.numel()
    tiles = tile_config("sum_of_squares_kernel", grads.device)
    # a multiple of 16, so that the second launch reads whole vectors
    programs = 16 * cdiv(P, 16 * tiles["BP"])
    sums = grads.new_empty(programs, dtype=torch.float64)
    launch(sum_of_squares_kernel, (programs,), grads, sums, P, **tiles)

    tiles = tile_config("root_of_sum_kernel", grads.device)
    norm = grads.new_empty((), dtype=torch.float64)
    launch(root_of_sum_kernel, (1,), sums, norm, programs, **tiles)
    return norm


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    """Shape: P."""
    inputs = {}
    for name in ("params", "grads", "m", "v"):
        inputs[name] = torch.randn(shape, generator=g, dtype=torch.float64)
    inputs["v"] = inputs["v"].square()
    return inputs


def _run(ops, i: dict) -> dict[str, Tensor]:
    """Three steps with weight decay; a compute copy in bf16 where the masters are fp32."""
    params = i["params"]
    grads = i["grads"]
    m = i["m"]
    v = i["v"]
    config = AdamW(weight_decay=0.1)
    compute_dtype = torch.bfloat16 if params.dtype == torch.float32 else params.dtype
    compute = torch.empty_like(params, dtype=compute_dtype)
    norm = ops.grad_norm(grads)
    for step in (1, 2, 3):
        scalars = config.scalars(1e-2, step, 0.5, params.device)
        ops.adamw_(params, grads, m, v, scalars, config, compute)
    return {"params": params, "m": m, "v": v, "compute": compute, "norm": norm}


SPEC = Spec(
    "adamw",
    _make_inputs,
    _run,
    fields=("adamw_", "grad_norm"),
    test_shapes=((0,), (1,), (257,), (100_003,)),
    # r 8 on q, v of SmolLM2-135M; r 16 on every matrix of Llama-2-7B and of Llama-3-8B
    bench_shapes=((460_800,), (39_976_960,), (41_943_040,)),
    interpreter_shapes=((0,), (1,), (257,), (5_003,)),
    slack=4.0,  # the reference rounds once per step, a pass in fp32 several times
    floor=1e-6,
)
