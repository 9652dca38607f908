"""Linear layer with low-rank adapters, for a group of matrices that share their input

A frozen bias may be added: Qwen2's q, k and v have one. The backward does not depend on it.

    S   = x^ A^T                      x^ = dropout(x); A (R, K): the members' A, one below the other
    y_i = x W_i^T + s S_i B_i^T (+ bias_i)
                                      for every member i of the group (q, k, v; o; gate, up; down)

backward   dS_i = s dy_i B_i          dB_i += s dy_i^T S_i         dA += dS^T x^
           dx   = dy W + mask * (dS A)
           W and the bias are frozen: no gradient. dx is skipped where nothing below needs it.
shapes     x, dx (T, K)    weight (N, K): the members' weights, one below the other    y, dy (T, N)
           bias (N,): the members' biases, one after the other
           S, dS (T, R), R = rank * adapted members    B_i (N_i, rank)
precision  products accumulate in at least fp32; dA and dB are added to fp32 buffers
traffic    T K + N K + T N elements and T R for S, forward; the backward reads dy, x, W and S again
saved      x and S (R / K of x); S is never recomputed, dS is made once for dB, dA and dx

group.py            LoraGroup, the adapters of a group as views into the flat buffers
reference.py        the definition
torch_form.py       a product and rank-R updates of it
triton_forward.py   S and y: fused in one launch, split in two, or the torch form (a tile chooses)
triton_backward.py  dS and dB, dA, dx
batch_invariant.py  the operation `linear` and a form of the forward whose rows do not depend on T
"""

# T = tokens, K = inputs, N = outputs of all members, R = ranks of all adapted members

from __future__ import annotations

import torch
from torch import Tensor

from kernels.lora_linear.group import LoraGroup
from kernels.philox import Dropout, mix
from kernels.spec import MODELS, TOKENS, Spec, Widths

# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    """Shape: T, K, rank and the outputs of every member."""
    T, K, rank, *sizes = shape
    N = sum(sizes)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    R = 0
    b: list[Tensor | None] = []
    db: list[Tensor | None] = []
    for i, size in enumerate(sizes):
        # of three members the first and the last have adapters (q and v), of two both (gate, up)
        if i == 1 and len(sizes) != 2:
            b.append(None)
            db.append(None)
            continue
        R += rank
        b.append(normal(size, rank))
        db.append(torch.zeros(size, rank, dtype=torch.float64))
    a = normal(R, K) / K**0.5
    da = torch.zeros_like(a)
    group = LoraGroup(a, tuple(b), da, tuple(db), tuple(sizes), rank, scale=0.75)

    dropout = Dropout(
        p=0.25,
        key=mix("dropout", 0, 0, 0),
        positions=torch.arange(T),
        row_keys=torch.randint(2**32, (T,), generator=g),
        step=torch.tensor(3),
    )
    weight = normal(N, K) / K**0.5
    x = normal(T, K)
    dy = normal(T, N)
    bias = normal(N)
    return {"x": x, "w": weight, "dy": dy, "group": group, "drop": dropout, "bias": bias}


def _run(ops, i: dict) -> dict[str, Tensor]:
    """Without adapters, with them, and with dropout; gradients on top of ones. y with a bias."""
    x = i["x"]
    dy = i["dy"]
    weight = i["w"]
    group = i["group"]
    y, _ = ops.lora_linear_forward(x, weight)
    dx = ops.lora_linear_backward(dy, x, weight)
    outputs = {"y_plain": y, "dx_plain": dx}
    outputs["y_plain_bias"], _ = ops.lora_linear_forward(x, weight, bias=i["bias"])
    for suffix, dropout in (("", None), ("_drop", i["drop"])):
        y, s = ops.lora_linear_forward(x, weight, group, dropout)
        biased, _ = ops.lora_linear_forward(x, weight, group, dropout, i["bias"])
        for grad in (group.da, *group.db):
            if grad is not None:
                grad.fill_(1.0)  # gradients are added to what the buffer holds
        dx = ops.lora_linear_backward(dy, x, weight, s, group, dropout=dropout)
        outputs[f"y{suffix}"] = y
        outputs[f"y_bias{suffix}"] = biased
        outputs[f"s{suffix}"] = s
        outputs[f"dx{suffix}"] = dx
        outputs[f"da{suffix}"] = group.da.clone()
        for member, db in enumerate(group.db):
            if db is not None:
                outputs[f"db{member}{suffix}"] = db.clone()
    return outputs


def _shapes(m: Widths, tokens: tuple[int, ...], ranks: tuple[int, ...]) -> tuple:
    """The shapes, as `_make_inputs` takes them, of every group of a model."""
    q = m.H * m.d
    kv = m.G * m.d
    groups = [
        (m.D, (q, kv, kv)),  # q, k, v
        (q, (m.D,)),  # o
        (m.D, (m.F, m.F)),  # gate, up
        (m.F, (m.D,)),  # down
    ]
    shapes = []
    for T in tokens:
        for K, sizes in groups:
            for rank in ranks:
                shapes.append((T, K, rank, *sizes))
    return tuple(shapes)


SPEC = Spec(
    "lora_linear",
    _make_inputs,
    _run,
    fields=("lora_linear_forward", "lora_linear_backward"),
    test_shapes=(
        (1, 16, 4, 8),
        (3, 63, 1, 9, 5, 7),
        (65, 96, 8, 96, 32, 32),
        (33, 40, 20, 24, 8),
        (257, 32, 40, 16, 8, 40),
        (17, 48, 128, 33),
        (0, 16, 4, 8, 8),
    ),
    bench_shapes=tuple(s for m in MODELS.values() for s in _shapes(m, TOKENS, (8, 16, 64))),
    model_shapes=lambda m: _shapes(m, (17, 65), (16,)),
    slack=3.0,  # y is rounded twice (product, then adapter added) where the reference sums parts
    floor=1e-5,  # a different summation order over K is not an error
)
