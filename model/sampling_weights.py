"""The form of a model's weights during a sampling run, and the way back.

A sampled text must not depend on the other sequences of its batch, so every product has one form
for the whole run. `for_sampling` chooses among three cases:

    packed           a CPU in fp32: matrices packed, the adapter merged into the packed copy
    batch-invariant  a GPU with `invariant`: plain matrices, products with fixed tiles
    plain            everything else: the model as it is

A packed matrix is in panels of our own C (kernels/cpu/panels.py; the embedding too) where the
table of operations has them, else in oneDNN's layout (kernels/cpu/prepack.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import registry
from kernels.cpu.prepack import Prepacked, prepack
from kernels.registry import TORCH, Ops
from model.layout import GROUPS, module_name
from model.llama import Llama
from model.lora import Lora
from model.weights import PlainWeights


def for_sampling(
    model: Llama, lora: Lora | None = None, *, release: bool = False, invariant: bool = False
) -> tuple[Llama, Lora | None]:
    """A model whose every product has one form for a whole run, and the adapter still to pass.

    Packed weights take the adapter in: measured faster than two more products per group, and the
    base stays as it is. `release` then gives up the model's own matrices one by one as they are
    packed, so that memory does not double, until `restore_weights`; with an adapter they are kept,
    since a sum cannot be taken apart exactly.

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
    ops = model.ops.sampled or model.ops
    panels = ops.packs == "panels"
    onednn = Prepacked.available(model.weights["embed"])
    if invariant and not panels and not (ops is TORCH and onednn):
        return Llama(model.config, model.weights, registry.invariant(model.ops)), lora
    if not panels and (ops.name == "reference" or not onednn):  # REFERENCE takes plain matrices
        return model, lora
    return pack_weights(model, ops, lora, release), None


def pack_weights(model: Llama, ops: Ops, lora: Lora | None, release: bool) -> Llama:
    """The model with packed matrices, `lora` merged into them, that runs on `ops`.

    With `release` and no adapter, `model` holds the packed matrices as well, and its own are freed.
    """
    if lora is not None:
        model.ensure_bound(lora)
    panels = ops.packs == "panels"
    tied = model.config.tie_embeddings
    names = [name for name in model.weights if name != "embed"]
    packed = PlainWeights()
    for name in [*names, "embed"]:  # the embedding last: if tied, it is the packed head
        weight = model.weights[name]
        assert lora is None or isinstance(weight, Tensor), "released: restore it first"
        if name == "embed" and panels and tied:
            packed[name] = packed["head"]
        elif isinstance(weight, Tensor) and _is_packed(name, panels):
            packed[name] = prepack(merged_weight(weight, lora, name), panels)
        else:
            packed[name] = weight
        if release and lora is None:
            model.weights[name] = packed[name]
    return Llama(model.config, packed, ops)


def _is_packed(name: str, panels: bool) -> bool:
    """Whether a weight of this name has a packed form: the embedding has one in panels alone."""
    if name == "embed":
        return panels
    return name == "head" or name.partition(".")[2] in GROUPS


def merged_weight(weight: Tensor, lora: Lora | None, name: str) -> Tensor:
    """W + s B A for a group's matrix W, member by member; W itself where nothing adapts it."""
    layer, _, group = name.partition(".")
    if lora is None or group not in GROUPS or lora.group(int(layer), group) is None:
        return weight
    parts = []
    members = weight.split(lora.group(int(layer), group).sizes)
    for module, part in zip(GROUPS[group], members, strict=True):
        delta = lora.delta(f"{module_name(int(layer), module)}.weight")
        parts.append(part if delta is None else part + delta)
    return torch.cat(parts)


def restore_weights(model: Llama) -> None:
    """Take back, bit for bit, the matrices that `for_sampling` released."""
    weights, tied = model.weights, model.config.tie_embeddings
    for name, weight in weights.items():
        shared = tied and name == "head"
        if not isinstance(weight, Tensor) and not shared:
            weights[name] = weight.unpack()
    if tied:
        weights["head"] = weights["embed"]
