"""The definition of a linear layer with low-rank adapters. In fp64 it is the truth."""

# T = tokens, K = inputs, N = outputs of all members, R = ranks of all adapted members

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kernels.lora_linear.group import LoraGroup
from kernels.philox import Dropout
from kernels.spec import autograd


def lora_linear_reference(
    x: Tensor, weight: Tensor, group: LoraGroup | None = None, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor | None]:
    """y (T, N) and S (T, R); differentiable in x and, through the group's views, in A and B."""
    y = x @ weight.T
    if group is None:
        return y, None
    dropped = x if dropout is None else x * dropout.mask(x.shape[1], x.dtype)  # (T, K)
    s = dropped @ group.a.T
    parts = list(y.split(group.sizes, dim=1))  # per member (T, N_i)
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
    """dx (T, K), None without need_dx; adds dA and dB, by autograd, into the group's views.

    Without a group dx does not depend on x, which may be None.
    """
    if group is None:
        return dy @ weight if need_dx else None
    assert x is not None, "the gradient of A needs x"
    members = [i for i, _, _ in group.members()]

    def forward(x: Tensor, a: Tensor, *adapted_b: Tensor) -> Tensor:
        b = list(group.b)
        for i, leaf in zip(members, adapted_b, strict=True):
            b[i] = leaf
        leaves = dataclasses.replace(group, a=a, b=tuple(b))
        return lora_linear_reference(x, weight, leaves, dropout)[0]

    dx, da, *db = autograd(forward, (x, group.a, *(group.b[i] for i in members)), dy)
    group.da.add_(da)
    for i, grad in zip(members, db, strict=True):
        group.db[i].add_(grad)
    return dx if need_dx else None
