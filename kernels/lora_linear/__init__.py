"""Linear layer with low-rank adapters, for a group of matrices that share their input

    S   = x^ A^T                      x^ = dropout(x); A (R, K): the members' A, one below the other
    y_i = x W_i^T + s S_i B_i^T       for every member i of the group (q, k, v; o; gate, up; down)

backward   dS_i = s dy_i B_i          dB_i += s dy_i^T S_i         dA += dS^T x^
           dx   = dy W + mask * (dS A)
           W is frozen: no gradient. dx is skipped where nothing below needs it.
shapes     x, dx (T, K)    weight (N, K): the members' weights, one below the other    y, dy (T, N)
           S, dS (T, R), R = rank * adapted members    B_i (N_i, rank)
precision  products accumulate in at least fp32; dA and dB are added to fp32 buffers
saved      x and S (R / K of x); S is never recomputed, dS is made once for dB, dA and dx
The Triton kernels are in lora_linear_triton.py and lora_linear_backward_triton.py.
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
    t, k, rank, *sizes = shape
    n = sum(sizes)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    adapted = [i != 1 or len(sizes) == 2 for i in range(len(sizes))]  # q and v; gate and up
    b = tuple(normal(m, rank) if on else None for m, on in zip(sizes, adapted, strict=True))
    a = normal(rank * sum(adapted), k) / k**0.5
    group = LoraGroup(
        a,
        b,
        torch.zeros_like(a),
        tuple(None if v is None else torch.zeros_like(v) for v in b),
        tuple(sizes),
        rank,
        0.75,
    )
    keys = torch.randint(2**32, (t,), generator=g)
    dropout = Dropout(0.25, mix("dropout", 0, 0, 0), torch.arange(t), keys, torch.tensor(3))
    weight = normal(n, k) / k**0.5
    return {"x": normal(t, k), "w": weight, "dy": normal(t, n), "group": group, "drop": dropout}


def _run(ops, i: dict) -> dict[str, Tensor]:
    out = {"y_plain": ops.lora_linear_forward(i["x"], i["w"])[0]}
    out["dx_plain"] = ops.lora_linear_backward(i["dy"], i["x"], i["w"])
    for name, drop in (("", None), ("_drop", i["drop"])):
        y, s = ops.lora_linear_forward(i["x"], i["w"], i["group"], drop)
        group = i["group"]
        for grad in (group.da, *group.db):
            if grad is not None:
                grad.fill_(1.0)  # gradients are added to what is there
        dx = ops.lora_linear_backward(i["dy"], i["x"], i["w"], s, group, True, drop)
        out |= {f"y{name}": y, f"s{name}": s, f"dx{name}": dx, f"da{name}": group.da.clone()}
        out |= {f"db{j}{name}": v.clone() for j, v in enumerate(group.db) if v is not None}
    return out


def _shapes(m: Widths, tokens: tuple[int, ...], ranks: tuple[int, ...]) -> tuple:
    """Every group of a model."""
    q, kv = m.H * m.d, m.G * m.d
    groups = ((m.D, (q, kv, kv)), (q, (m.D,)), (m.D, (m.F, m.F)), (m.F, (m.D,)))
    return tuple((t, k, r, *sizes) for t in tokens for k, sizes in groups for r in ranks)


SPEC = Spec(
    "lora_linear",
    _make_inputs,
    _run,
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
