"""The form of a model's weights during a sampling run, and the way back.

A sampled text must not depend on the other sequences of its batch, so every product has one form
for the whole run. `for_sampling` chooses among three cases:

    packed           a CPU in fp32: matrices packed, the adapter merged into the packed copy
    batch-invariant  a GPU with `invariant`: plain matrices, products with fixed tiles
    plain            otherwise: the model as it is

model/packed_weights.py has the packed form of a matrix. A model may also be loaded packed
(model/weights.py), and then stays so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import registry
from kernels.cpu.prepack import PackedWeight, Prepacked, prepack
from kernels.registry import TORCH, Ops
from model.layout import GROUPS, module_name
from model.llama import Llama
from model.lora import Lora
from model.packed_weights import has_packed_form, packed_form
from model.weights import PlainWeights


def for_sampling(
    model: Llama, lora: Lora | None = None, *, release: bool = False, invariant: bool = False
) -> tuple[Llama, Lora | None]:
    """A model for a sampling run, and the adapter that its forwards must still be given.

    With packed weights that is None, for the adapter is merged into them: measured faster than two
    more products per group. `release` then frees the model's own matrices one by one as they are
    packed, so that memory does not double, until `restore_weights`; with an adapter they are kept,
    since a rounded sum cannot be separated exactly again.

    `invariant` asks for batch-invariant results. On a CPU packed weights give them; elsewhere the
    same matrices are used by another table of operations, and the adapter is not merged: in bf16
    the sum would lose small changes. ValueError where there is no such table, and for sharded
    weights.
    """
    if model.weights.is_sharded:
        raise ValueError(
            "sampling needs all weights in every process: it is done without --shard; only "
            "training and scoring share them out"
        )
    if lora is not None and lora.strength == 0:
        model.ensure_bound(lora)  # ValueError where it is another model's
        lora = None  # the seed's own weights, bit for bit
    ops = model.ops.sampled or model.ops
    uses_panels = ops.packs == "panels"
    has_onednn = Prepacked.available(model.weights["embed"])
    packed_is_invariant = uses_panels or (ops is TORCH and has_onednn)
    if invariant and not packed_is_invariant:
        invariant_ops = registry.invariant(model.ops)
        return Llama(model.config, model.weights, invariant_ops), lora
    can_pack = uses_panels or (has_onednn and ops.name != "reference")  # it takes plain matrices
    if not can_pack:
        return model, lora
    return pack_weights(model, ops, lora, release), None


def pack_weights(model: Llama, ops: Ops, lora: Lora | None, release: bool) -> Llama:
    """The model with packed matrices, `lora` merged into them, that runs on `ops`.

    With `release` and no adapter, `model` gets the packed matrices as well, and its own are freed.
    """
    if lora is not None:
        model.ensure_bound(lora)
    uses_panels = ops.packs == "panels"
    tied = model.config.tie_embeddings
    names = [name for name in model.weights if name != "embed"]
    packed = PlainWeights()
    for name in [*names, "embed"]:  # the embedding last: if tied, it is the packed head
        if name == "embed" and uses_panels and tied:
            packed[name] = packed["head"]
        else:
            packed[name] = _packed_weight(model.weights, name, lora, uses_panels)
        if release and lora is None:
            model.weights[name] = packed[name]
    return Llama(model.config, packed, ops)


def _packed_weight(
    weights: PlainWeights, name: str, lora: Lora | None, uses_panels: bool
) -> Tensor | PackedWeight:
    """A weight as the products of sampling take it, `lora` merged into it.

    A sum is not quantised: a matrix with an adapter takes four bytes a number.
    """
    weight = weights[name]
    if not has_packed_form(name, uses_panels):
        return weight
    is_packed = not isinstance(weight, Tensor)
    assert lora is None or not is_packed or weights.stays_packed, (
        f"{name} is released: restore it first"
    )
    if not _is_adapted(lora, name):
        return weight if is_packed else packed_form(name, weight, uses_panels, weights.quantised)
    if is_packed:
        weight = weight.unpack()
    return prepack(merged_weight(weight, lora, name), uses_panels)


def _is_adapted(lora: Lora | None, name: str) -> bool:
    """Whether the adapter changes the weight of this name."""
    layer, _, group_name = name.partition(".")
    if lora is None or group_name not in GROUPS:
        return False
    return lora.group(int(layer), group_name) is not None


def merged_weight(weight: Tensor, lora: Lora | None, name: str) -> Tensor:
    """W + s B A (N, K) for a weight W (N, K) by our name, W itself where it has no adapter."""
    if not _is_adapted(lora, name):
        return weight
    layer, _, group_name = name.partition(".")
    group = lora.group(int(layer), group_name)
    merged = []
    members = weight.split(group.sizes)  # (N_i, K) each
    for module, part in zip(GROUPS[group_name], members, strict=True):
        delta = lora.delta(f"{module_name(int(layer), module)}.weight")  # (N_i, K)
        merged.append(part if delta is None else part + delta)
    return torch.cat(merged)


def restore_weights(model: Llama) -> None:
    """Unpack, bit for bit, the matrices that `for_sampling` released.

    Sharded ones never are, and those of a model that was loaded packed stay as they are.
    """
    weights = model.weights
    if weights.is_sharded or weights.stays_packed:
        return
    tied = model.config.tie_embeddings
    for name, weight in weights.items():
        is_second_name = tied and name == "head"  # of the embedding
        if not isinstance(weight, Tensor) and not is_second_name:
            weights[name] = weight.unpack()
    if tied:
        weights["head"] = weights["embed"]
