"""The weights of a model in memory, behind one interface: plain here, sharded in model/sharded.py

weights[name]            a matrix or norm by our name (model/layout.py)
weights.embed(tokens)    (T, D) rows of the embedding
with weights.layer(i, then):      inside, all of layer i is whole; `then` is gathered meanwhile
with weights.head() as head:      inside, the head (V, D) is whole
weights.local(name)      the rows that this process holds: [(rows, number of the first), ...]
weights.is_sharded       whether the processes of a job share the weights out
weights.gather_bytes     bytes that gathering takes beside the share; 0 where nothing is gathered
"""

# T = tokens, D = model width, V = vocabulary

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from kernels.cpu.prepack import PackedWeight
from model.hf_checkpoint import Checkpoint, why_not_finite
from model.layout import checkpoint_shapes, place_of, weight_shapes
from model.packed_weights import has_packed_form, packed_form
from model.quantised_file import QuantisedFile, find_quantised

if TYPE_CHECKING:  # torch's FSDP takes a second to import
    from model.sharded import ShardedWeights


class PlainWeights(dict[str, "Tensor | PackedWeight"]):
    """All weights of a model, whole in this process. Tied embeddings stand under both names."""

    is_sharded = False
    gather_bytes = 0
    stays_packed = False  # loaded packed, for sampling alone: no plain matrices come back
    quantised: QuantisedFile | None = None  # the matrices as the GGUF has them that they are from

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take; what stands under two names counts once."""
        by_identity = {id(weight): weight.nbytes for weight in self.values()}
        return sum(by_identity.values())

    def embed(self, tokens: Tensor) -> Tensor:
        """The rows of the embedding (T, D) that belong to tokens (T,)."""
        return self["embed"][tokens]

    @contextlib.contextmanager
    def layer(self, i: int, then: int | None = None) -> Iterator[None]:
        """Nothing to gather: every layer is whole."""
        yield

    @contextlib.contextmanager
    def head(self) -> Iterator[Tensor | PackedWeight]:
        """The head (V, D)."""
        yield self["head"]

    def local(self, name: str) -> list[tuple[Tensor, int]]:
        """All rows of a weight, and the number of the first; packed weights are unpacked."""
        weight = self[name]
        if not isinstance(weight, Tensor):
            weight = weight.unpack()
        return [(weight, 0)]


Weights: TypeAlias = "PlainWeights | ShardedWeights"


def load_weights(
    checkpoint: Checkpoint,
    device: str | torch.device,
    dtype: torch.dtype,
    shard: bool = False,
) -> Weights:
    """All weights of a checkpoint in `dtype`, the members of each group one below the other.

    With `shard` each process of the job reads and holds only its own rows. Tensors are read one by
    one, the largest first, each file opened anew, so that the pages of the memory map are released
    at once and the peak stays near the size of the loaded model. ValueError naming a tensor that
    holds NaN or an infinite number; with `shard` every process raises it, after reading all.
    """
    config = checkpoint.config
    weights = _empty_weights(weight_shapes(config), device, dtype, shard)
    shapes = checkpoint_shapes(config)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    first_fault = None
    for name in sorted(shapes, key=lambda name: sizes[name], reverse=True):
        place = place_of(name, config)
        begin = place.first_row
        end = begin + shapes[name][0]
        for target, target_begin in weights.local(place.name):
            fault = _read_into(target, target_begin, checkpoint, name, begin, end)
            if fault is not None and not weights.is_sharded:
                raise ValueError(fault)
            if first_fault is None:
                first_fault = fault
    if weights.is_sharded:
        weights.refuse(first_fault)
        return weights
    weights.quantised = find_quantised(checkpoint.directory, config)
    if config.tie_embeddings:
        weights["head"] = weights["embed"]
    return weights


def load_packed_weights(checkpoint: Checkpoint) -> PlainWeights:
    """All weights of a checkpoint in fp32 on the CPU, each matrix packed as soon as it is read.

    For sampling alone, in panels (packed_weights.py). The largest matrix is read first, so that the
    peak is little more than the packed weights, or that matrix in fp32. ValueError as for
    `load_weights`.
    """
    config = checkpoint.config
    quantised = find_quantised(checkpoint.directory, config)
    shapes = weight_shapes(config)
    on_disk = checkpoint_shapes(config)
    stored: dict[str, list[str]] = {name: [] for name in shapes}  # the tensors of each weight
    for name in on_disk:
        stored[place_of(name, config).name].append(name)
    loaded: dict[str, Tensor | PackedWeight] = {}
    for name in sorted(shapes, key=lambda name: math.prod(shapes[name]), reverse=True):
        weight = torch.empty(shapes[name], dtype=torch.float32)
        for part in stored[name]:
            begin = place_of(part, config).first_row
            end = begin + on_disk[part][0]
            fault = _read_into(weight, 0, checkpoint, part, begin, end)
            if fault is not None:
                raise ValueError(fault)
        if has_packed_form(name, uses_panels=True):
            weight = packed_form(name, weight, True, quantised)
        loaded[name] = weight
    weights = PlainWeights({name: loaded[name] for name in shapes})
    weights.stays_packed = True
    if config.tie_embeddings:
        weights["head"] = weights["embed"]
    return weights


def _empty_weights(
    shapes: dict[str, tuple[int, ...]], device: str | torch.device, dtype: torch.dtype, shard: bool
) -> Weights:
    """Weights of these shapes, to be filled."""
    if shard:
        from model.sharded import ShardedWeights

        return ShardedWeights(shapes, device, dtype)
    weights = PlainWeights()
    for name, shape in shapes.items():
        weights[name] = torch.empty(shape, device=device, dtype=dtype)
    return weights


def _read_into(
    target: Tensor,  # rows of one of our weights, from target_begin on
    target_begin: int,
    checkpoint: Checkpoint,
    name: str,  # of a checkpoint tensor, which is rows tensor_begin .. tensor_end - 1 of our weight
    tensor_begin: int,
    tensor_end: int,
) -> str | None:
    """Copy the rows of a checkpoint tensor that belong into `target`.

    Returns why they cannot be used, None where they can.
    """
    begin = max(tensor_begin, target_begin)
    end = min(tensor_end, target_begin + len(target))
    if begin >= end:
        return None
    rows = target[begin - target_begin : end - target_begin]
    rows.copy_(checkpoint.rows(name, begin - tensor_begin, end - tensor_begin))
    return why_not_finite(rows, name, checkpoint.files[name].file)
