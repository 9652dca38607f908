"""The size of an adapter's update: how far training moved the weights, module by module

    ||dW||_F,  dW = s B A      Frobenius norm; s is the adapter's scale (alpha / rank and the like),
                               times the strength at which it is used

dW has N K numbers, its factors (N + K) r. The norm is taken from products of r x r numbers:

    ||s B A||_F^2 = s^2 trace(A^T B^T B A) = s^2 trace((B^T B) (A A^T))
                  = s^2 sum_ij (B^T B)_ij (A A^T)_ij        both products are symmetric

All in fp64. Squared norms add up: those of all modules of a kind, of a layer, of the whole adapter
are sums of squares. `relative` divides by the norm of the same modules' weights, ||W||_F. This is
the parameter shift of 2402.13669, for LoRA.
"""

# N = outputs of a linear layer, K = inputs, r = rank

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.layout import place_of
from model.llama import Llama
from model.lora import Lora, a_name, b_name

ROWS_AT_ONCE = 1024  # rows of a weight that are in fp64 at a time


class ModuleNorms(NamedTuple):
    """The squared norms of one module."""

    layer: int
    kind: str  # "self_attn.q_proj"
    update: float  # ||s B A||_F^2
    weight: float  # ||W||_F^2


def update_norms(model: Llama, lora: Lora) -> dict[str, Any]:
    """The norms of an adapter's update, whole and by part.

    norm          ||s B A||_F of all adapted modules together
    weight_norm   ||W||_F of the same modules of the seed model
    relative      norm / weight_norm
    kinds         by kind of module ("self_attn.q_proj"), all layers together: the same three
    layers        by number of the layer, all its adapted modules together: the same three
    modules       by full name: the same three

    The model's weights must be whole in this process.
    """
    assert not model.is_sharded, "norms of sharded weights are not supported: one process only"
    norms: dict[str, ModuleNorms] = {}
    for module in _adapted_modules(lora):
        _, _, layer, kind = module.split(".", 3)  # model, layers, 3, self_attn.q_proj
        update = squared_update_norm(lora, module)
        weight = _squared_weight_norm(model, lora, module)
        norms[module] = ModuleNorms(int(layer), kind, update, weight)

    by_kind: dict[str, list[ModuleNorms]] = {}
    by_layer: dict[int, list[ModuleNorms]] = {}
    for of_module in norms.values():
        by_kind.setdefault(of_module.kind, []).append(of_module)
        by_layer.setdefault(of_module.layer, []).append(of_module)
    found: dict[str, Any] = _together(norms.values())
    found["kinds"] = {kind: _together(group) for kind, group in by_kind.items()}
    found["layers"] = {str(layer): _together(by_layer[layer]) for layer in sorted(by_layer)}
    found["modules"] = {module: _together([of_module]) for module, of_module in norms.items()}
    return found


def squared_update_norm(lora: Lora, module: str) -> float:
    """||s B A||_F^2 of one adapted module, given its full name."""
    a = lora.view(lora.params, a_name(module)).double()  # (r, K)
    b = lora.view(lora.params, b_name(module)).double()  # (N, r)
    gram_a = a @ a.T  # (r, r)
    gram_b = b.T @ b  # (r, r)
    product = (gram_a * gram_b).sum().item()
    scale = lora.strength * lora.group_scale(module)
    return scale * scale * max(0.0, product)  # rounding may leave -1e-30 where B A is 0


def _adapted_modules(lora: Lora) -> list[str]:
    """The full names of the modules that the adapter changes, in layout order."""
    modules = []
    for name in lora.slots:
        module, _, end = name.partition(".lora_")
        if end.startswith("B"):
            modules.append(module)
    return modules


def _squared_weight_norm(model: Llama, lora: Lora, module: str) -> float:
    """||W||_F^2 of one module of the seed model."""
    place = place_of(f"{module}.weight", model.config)
    outputs, _ = lora.slots[b_name(module)].shape  # N
    ((group, _),) = model.weights.local(place.name)  # all members of its group
    weight = group[place.first_row : place.first_row + outputs]  # (N, K)
    return sum(_squares(weight[i : i + ROWS_AT_ONCE]) for i in range(0, outputs, ROWS_AT_ONCE))


def _squares(rows: Tensor) -> float:
    """The sum of the squares of some numbers, in fp64."""
    return rows.to(torch.float64).square().sum().item()


def _together(group: Iterable[ModuleNorms]) -> dict[str, float]:
    """The norms of several modules as one."""
    group = list(group)
    norm = math.sqrt(sum(of_module.update for of_module in group))
    weight_norm = math.sqrt(sum(of_module.weight for of_module in group))
    relative = norm / weight_norm if weight_norm else math.nan
    return {"norm": norm, "weight_norm": weight_norm, "relative": relative}
