"""AdamW on flat buffers, and the norm that clips the gradient

    g = scale * grad                         (1 / tokens of the step, times the clip factor)
    m = b1 m + (1 - b1) g                    v = b2 v + (1 - b2) g^2
    p = p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    compute = p                              the compute-dtype copy, in the same pass

(Loshchilov & Hutter 2019, decoupled decay, as torch.optim.AdamW orders it.)

shapes     params, grads, m, v, compute (P,)    scalars (4,): lr, 1 - b1^t, 1 - b2^t, scale
precision  masters, moments and gradients fp32 (fp64 where the model is)
traffic    reads 4P, writes 3P, once per optimizer step
"""

# P = trained parameters

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.spec import Spec


@dataclass(frozen=True)
class AdamW:
    """What does not change from step to step."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled; the paper's runs use none

    def scalars(self, lr: float, step: int, scale: float, device: str | torch.device) -> Tensor:
        """The numbers that do change, as one (4,) fp64 tensor; `step` counts from 1."""
        assert step >= 1, f"steps count from 1, got {step}"
        corrections = (1 - self.beta1**step, 1 - self.beta2**step)
        return torch.tensor([lr, *corrections, scale], dtype=torch.float64, device=device)


# ---- reference: the definition


def adamw_reference_(
    params: Tensor,
    grads: Tensor,
    m: Tensor,
    v: Tensor,
    scalars: Tensor,
    config: AdamW,
    compute: Tensor | None = None,
) -> None:
    """In fp64 from beginning to end."""
    lr, correction1, correction2, scale = scalars.double()
    g = scale * grads.double()
    m64 = config.beta1 * m.double() + (1 - config.beta1) * g
    v64 = config.beta2 * v.double() + (1 - config.beta2) * g * g
    decayed = params.double() * (1 - lr * config.weight_decay)
    update = (m64 / correction1) / ((v64 / correction2).sqrt() + config.eps)
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
    scalars: Tensor,
    config: AdamW,
    compute: Tensor | None = None,
) -> None:
    """One step, in place on params, m, v and compute; grads are left as they are."""
    assert params.shape == grads.shape == m.shape == v.shape and scalars.shape == (4,), (
        f"params {params.shape}, grads {grads.shape}, m {m.shape}, v {v.shape}, {scalars.shape}"
    )
    lr, correction1, correction2, scale = scalars.unbind()  # () fp64: scalars, not promoting
    g = grads * scale
    m.lerp_(g, 1 - config.beta1)
    v.mul_(config.beta2).addcmul_(g, g, value=1 - config.beta2)
    denominator = (v / correction2).sqrt_().add_(config.eps)
    if config.weight_decay:
        params.mul_(1 - lr * config.weight_decay)
    params.sub_((m / correction1).mul_(lr).div_(denominator))
    if compute is not None:
        compute.copy_(params)


def grad_norm(grads: Tensor) -> Tensor:
    """Euclidean norm of the flat gradient, () fp64 on its device."""
    return torch.linalg.vector_norm(grads, dtype=torch.float64)


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    params, grads, m, v = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4))
    return {"params": params, "grads": grads, "m": m, "v": v.square()}


def _run(ops, i: dict) -> dict[str, Tensor]:
    config = AdamW(weight_decay=0.1)
    compute = torch.empty_like(i["params"])
    norm = ops.grad_norm(i["grads"])
    for step in (1, 2, 3):
        scalars = config.scalars(1e-2, step, 0.5, i["params"].device)
        ops.adamw_(i["params"], i["grads"], i["m"], i["v"], scalars, config, compute)
    return {"params": i["params"], "m": i["m"], "v": i["v"], "compute": compute, "norm": norm}


SPEC = Spec(
    "adamw",
    _make_inputs,
    _run,
    test_shapes=((1,), (257,), (100_003,)),
    bench_shapes=((460_800,), (20_000_000,)),
    slack=4.0,  # the reference rounds once per step, a pass in fp32 several times
    floor=1e-6,
)
