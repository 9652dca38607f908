"""Cross-entropy of a linear head, without ever holding all logits

    z = hidden head^T      nll_i = logsumexp(z_i) - z_i[target_i]
    dhidden = (softmax(z) - onehot(target)) head       the gradient of sum_i nll_i

The rows handed in are those that carry loss; the caller scales (one number per step, or one per
row). The gradient is made in the forward, chunk by chunk: two products, no logits kept, no dhead
(the head is frozen).

shapes     hidden, dhidden (N, D)    head (V, D)    targets (N,) int64    nll (N,) fp32
precision  softmax in max(fp32, dtype)
traffic    a chunk of logits at most CHUNK_BYTES; 4 N D V operations
"""

# N = rows with loss, D = model width, V = vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from kernels.lora_linear import Prepacked, linear
from kernels.spec import Spec, accumulate_dtype, autograd

CHUNK_BYTES = {
    "cpu": 32 << 20,
    "cuda": 1 << 30,
}  # small chunks stay in cache, large ones fill a GPU

# ---- reference: the definition


def nll_reference(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """nll (N,); differentiable."""
    logits = (hidden @ head.T).to(accumulate_dtype(hidden.dtype))
    return torch.logsumexp(logits, dim=-1) - logits.gather(1, targets[:, None])[:, 0]


def linear_cross_entropy_reference(
    hidden: Tensor, head: Tensor, targets: Tensor, need_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """nll and, by autograd, dhidden."""
    nll = nll_reference(hidden, head, targets)
    if not need_grad:
        return nll, None
    ones = torch.ones_like(nll)
    return nll, autograd(lambda h: nll_reference(h, head, targets), (hidden,), ones)[0]


# ---- torch


def linear_cross_entropy(
    hidden: Tensor, head: Tensor | Prepacked, targets: Tensor, need_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """nll (N,) and dhidden (N, D), the gradient of its sum; None without need_grad (scoring)."""
    n, v = hidden.shape[0], head.shape[0]
    assert targets.shape == (n,), f"targets {tuple(targets.shape)} for {n} rows"
    acc = accumulate_dtype(hidden.dtype)
    nll = hidden.new_empty(n, dtype=acc)
    dhidden = torch.empty_like(hidden) if need_grad else None
    chunk = max(1, CHUNK_BYTES[hidden.device.type] // (v * acc.itemsize))
    for i in range(0, n, chunk):
        rows = slice(i, min(i + chunk, n))
        target = targets[rows, None]
        logits = linear(hidden[rows], head).to(acc)
        sums = torch.logsumexp(logits, dim=-1, keepdim=True)
        nll[rows] = (sums - logits.gather(1, target))[:, 0]
        if need_grad:
            p = logits.sub_(sums).exp_()
            p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
            dhidden[rows] = p.to(hidden.dtype) @ head
    return nll, dhidden


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    n, d, v = shape
    return {
        "hidden": torch.randn(n, d, generator=g, dtype=torch.float64),
        "head": torch.randn(v, d, generator=g, dtype=torch.float64) / d**0.5,
        "targets": torch.randint(v, (n,), generator=g),
    }


def _run(ops, i: dict) -> dict[str, Tensor]:
    nll, dhidden = ops.linear_cross_entropy(i["hidden"], i["head"], i["targets"])
    scored, _ = ops.linear_cross_entropy(i["hidden"], i["head"], i["targets"], need_grad=False)
    return {"nll": nll, "dhidden": dhidden, "scored": scored}


SPEC = Spec(
    "linear_cross_entropy",
    _make_inputs,
    _run,
    test_shapes=((1, 16, 11), (63, 24, 257), (300, 16, 40_000), (0, 16, 11)),
    bench_shapes=((4096, 576, 49152), (8192, 4096, 32000)),
    slack=3.0,  # logits summed in chunks of another size than the reference's
    floor=1e-5,
)
