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
    x: Tensor,
    weight: Tensor,
    group: LoraGroup | None = None,
    dropout: Dropout | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y (T, N) and S (T, R); differentiable in x and, through the group's views, in A and B."""
    y = x @ weight.T  # (T, N)
    if bias is not None:
        y = y + bias
    if group is None:
        return y, None
    x_hat = x if dropout is None else x * dropout.mask(x.shape[1], x.dtype)  # (T, K)
    s = x_hat @ group.a.T  # (T, R)
    parts = list(y.split(group.sizes, dim=1))  # per member (T, N_i)
    for member in group.members():
        s_i = s[:, member.s_columns]  # (T, rank)
        b_i = group.b[member.index]  # (N_i, rank)
        update = s_i @ b_i.T  # (T, N_i)
        parts[member.index] = parts[member.index] + group.scale * update
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
    adapted = [member.index for member in group.members()]
    adapted_b = [group.b[i] for i in adapted]

    def forward(x: Tensor, a: Tensor, *b_leaves: Tensor) -> Tensor:
        b = list(group.b)
        for i, b_i in zip(adapted, b_leaves, strict=True):
            b[i] = b_i
        leaves = dataclasses.replace(group, a=a, b=tuple(b))
        y, _ = lora_linear_reference(x, weight, leaves, dropout)
        return y

    dx, da, *adapted_db = autograd(forward, (x, group.a, *adapted_b), dy)
    group.da.add_(da)
    for i, db_i in zip(adapted, adapted_db, strict=True):
        group.db[i].add_(db_i)
    return dx if need_dx else None
