"""A linear layer with low-rank adapters on torch products, forward and backward written out."""

# T = tokens, K = inputs, N = outputs of all members, R = ranks of all adapted members

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.prepack import PackedWeight, linear
from kernels.lora_linear.group import LoraGroup
from kernels.philox import Dropout


def lora_linear_forward(
    x: Tensor,
    weight: Tensor | PackedWeight,
    group: LoraGroup | None = None,
    dropout: Dropout | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y (T, N) and, with a group, S (T, R) for the backward; bias (N,)."""
    assert x.dim() == 2 and x.shape[1] == weight.shape[1], (
        f"x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}"
    )
    y = linear(x, weight, bias)  # (T, N)
    if group is None:
        return y, None
    assert sum(group.sizes) == weight.shape[0], f"{group.sizes} do not add to {weight.shape[0]}"
    x_hat = x if dropout is None else x * dropout.mask(x.shape[1], x.dtype)  # (T, K)
    s = F.linear(x_hat, group.a)  # (T, R)
    for member in group.members():
        y_i = y[:, member.y_columns]  # (T, N_i), a view
        s_i = s[:, member.s_columns]  # (T, rank)
        b_i = group.b[member.index]  # (N_i, rank)
        y_i.addmm_(s_i, b_i.T, alpha=group.scale)
    return y, s


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    s: Tensor | None = None,
    group: LoraGroup | None = None,
    need_dx: bool = True,
    dropout: Dropout | None = None,
) -> Tensor | None:
    """dx (T, K), or None where not needed; adds dA and dB into the group's views.

    Without a group x may be None.
    """
    assert x is not None or group is None, "the gradient of A needs x"
    dx = dy @ weight if need_dx else None  # (T, K)
    if group is None:
        return dx

    ds = torch.empty_like(s)  # (T, R)
    for member in group.members():
        dy_i = dy[:, member.y_columns]  # (T, N_i)
        s_i = s[:, member.s_columns]  # (T, rank)
        ds[:, member.s_columns] = dy_i @ group.b[member.index]
        _add_product(group.db[member.index], dy_i.T, s_i, group.scale)
    ds.mul_(group.scale)

    if dropout is None:
        _add_product(group.da, ds.T, x, 1.0)
        if need_dx:
            dx.addmm_(ds, group.a)
        return dx
    mask = dropout.mask(x.shape[1], x.dtype)  # (T, K)
    _add_product(group.da, ds.T, x * mask, 1.0)
    if need_dx:
        dx_hat = ds @ group.a  # (T, K)
        dx.add_(dx_hat.mul_(mask))
    return dx


def _add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """out += alpha left right, in out's dtype (fp32 masters under 16-bit activations)."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=alpha)
    else:
        out.add_((left @ right).to(out.dtype), alpha=alpha)
