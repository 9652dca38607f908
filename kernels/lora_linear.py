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

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.philox import Dropout, mix
from kernels.prepack import PackedWeight, linear
from kernels.spec import MODELS, TOKENS, Spec, Widths, autograd


@dataclass(frozen=True)
class LoraGroup:
    """The adapters of one group: views into the flat buffers of a `Lora`."""

    a: Tensor  # (R, K) compute dtype
    b: tuple[Tensor | None, ...]  # per member (N_i, rank) compute dtype, None where not adapted
    da: Tensor  # (R, K) accumulates
    db: tuple[Tensor | None, ...]  # per member (N_i, rank), accumulate
    sizes: tuple[int, ...]  # N_i
    rank: int
    scale: float  # s

    def members(self) -> list[tuple[int, slice, slice]]:
        """(i, columns of y, columns of S) of every adapted member."""
        found, column, s_column = [], 0, 0
        for i, size in enumerate(self.sizes):
            if self.b[i] is not None:
                columns = slice(column, column + size)
                found.append((i, columns, slice(s_column, s_column + self.rank)))
                s_column += self.rank
            column += size
        return found


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
    x: Tensor,
    weight: Tensor,
    s: Tensor | None = None,
    group: LoraGroup | None = None,
    need_dx: bool = True,
    dropout: Dropout | None = None,
) -> Tensor | None:
    """By autograd; adds dA and dB into the group's views."""
    if group is None:
        return autograd(lambda x: x @ weight.T, (x,), dy)[0] if need_dx else None
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


# ---- torch


def lora_linear_forward(
    x: Tensor,
    weight: Tensor | PackedWeight,
    group: LoraGroup | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y (T, N) and, with a group, S (T, R) for the backward."""
    assert x.dim() == 2 and x.shape[1] == weight.shape[1], (
        f"x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}"
    )
    y = linear(x, weight)
    if group is None:
        return y, None
    assert sum(group.sizes) == weight.shape[0], f"{group.sizes} do not add to {weight.shape[0]}"
    dropped = x if dropout is None else x * dropout.mask(x.shape[1], x.dtype)
    s = F.linear(dropped, group.a)
    for i, columns, s_columns in group.members():
        y[:, columns].addmm_(s[:, s_columns], group.b[i].T, alpha=group.scale)
    return y, s


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    s: Tensor | None = None,
    group: LoraGroup | None = None,
    need_dx: bool = True,
    dropout: Dropout | None = None,
) -> Tensor | None:
    """dx (T, K), or None where not needed; adds dA and dB into the group's views."""
    dx = dy @ weight if need_dx else None
    if group is None:
        return dx
    ds = torch.empty_like(s)
    for i, columns, s_columns in group.members():
        dy_i, b = dy[:, columns], group.b[i]
        ds[:, s_columns] = dy_i @ b
        _add_product(group.db[i], dy_i.T, s[:, s_columns], group.scale)
    ds.mul_(group.scale)
    if dropout is None:
        _add_product(group.da, ds.T, x, 1.0)
        return dx.addmm_(ds, group.a) if need_dx else None
    mask = dropout.mask(x.shape[1], x.dtype)
    _add_product(group.da, ds.T, x * mask, 1.0)
    return dx.add_((ds @ group.a).mul_(mask)) if need_dx else None


def _add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """out += alpha left right, in out's dtype (fp32 masters under 16-bit activations)."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=alpha)
    else:
        out.add_((left @ right).to(out.dtype), alpha=alpha)


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
