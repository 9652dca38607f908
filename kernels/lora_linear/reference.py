"""The definition of a linear layer with low-rank adapters."""


# T = tokens, K = inputs, N = outputs of all members, R = ranks of all adapted members

from __future__ import annotations

import torch
from torch import Tensor

from kernels.lora_linear.group import LoraGroup
from kernels.philox import Dropout
from kernels.spec import autograd

# ---- reference: the definition


def lora_linear_reference(
    x: Tensor, weight: Tensor, group: LoraGroup | None = None, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor | None]:
    """y (T, N) and S (T, R); differentiable in x and, through the group's views, in A and B."""
    y = x @ weight.T
    if group is None:
        return y, None
    dropped = x if dropout is None else x * dropout.mask(x.shape[1], x.dtype)
    s = dropped @ group.a.T
    parts = list(y.split(group.sizes, dim=1))
    for i, _, s_columns in group.members():
        parts[i] = parts[i] + group.scale * (s[:, s_columns] @ group.b[i].T)
    return torch.cat(parts, dim=1), s


def lora_linear_reference_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    s: Tensor | None = None,
    group: LoraGroup | None = None,
    need_dx: bool = True,
    dropout: Dropout | None = None,
) -> Tensor | None:
    """By autograd; adds dA and dB into the group's views. Without a group x may be None."""
    if group is None:
        return dy @ weight if need_dx else None
    assert x is not None, "the gradient of A needs x"
    adapted = [b for b in group.b if b is not None]

    def forward(x: Tensor, a: Tensor, *b: Tensor) -> Tensor:
        it = iter(b)
        views = tuple(None if old is None else next(it) for old in group.b)
        rebound = LoraGroup(a, views, group.da, group.db, group.sizes, group.rank, group.scale)
        return lora_linear_reference(x, weight, rebound, dropout)[0]

    dx, da, *db = autograd(forward, (x, group.a, *adapted), dy)
    group.da.add_(da)
    for (i, _, _), grad in zip(group.members(), db, strict=True):
        group.db[i].add_(grad)
    return dx if need_dx else None
