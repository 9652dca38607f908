"""Frozen weights spread over the processes of a job by torch's FSDP2

A unit is what is whole at one time: a layer, the embedding, the head (where they are tied, the
embedding again). Each process holds its rows of every matrix and norm of a unit. `whole(unit)`
gathers the rest by one all-gather and gives it up again (`unshard` and `reshard` of
torch.distributed.fsdp.fully_shard); the unit that comes next is gathered meanwhile. Nothing else of
FSDP is used: there is no module that runs, no hook and no gradient.

Every process must ask for the same units in the same order. Only the last norm, D numbers, is whole
everywhere.
"""

# D = model width, n = processes

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

WHOLE = "norm"  # held by everybody


class Unit(torch.nn.Module):
    """Parameters without numbers, for FSDP to cut and to hold."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))


class ShardedWeights(Mapping[str, Tensor]):
    """The weights by our names (model/weights.py), whole inside `whole(unit)` only.

    Made without numbers: `local` are the rows that this process has to fill.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], device: str | torch.device, dtype: torch.dtype
    ) -> None:
        assert dist.is_initialized(), "weights are sharded over the processes of a job"
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.norm = torch.empty(shapes[WHOLE], device=device, dtype=dtype)
        self.places = {name: _place(name) for name in shapes if name != WHOLE}
        units: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, (unit, parameter) in self.places.items():
            units.setdefault(unit, {})[parameter] = shapes[name]
        self.places.setdefault("head", self.places["embed"])
        kind = torch.device(device).type
        mesh = init_device_mesh(kind, (self.size,))
        self.units = {name: Unit(held, dtype) for name, held in units.items()}
        for module in self.units.values():
            fully_shard(module, mesh=mesh)
            module.to_empty(device=device)
        sizes = {unit: sum(map(math.prod, held.values())) for unit, held in units.items()}
        ends = max(sizes[self.places[name][0]] for name in ("embed", "head"))
        # what a gather holds beside the shares: its buffer and the unit; of layers, the next too
        self.gathered = dtype.itemsize * max(2 * ends, 3 * sizes["0"])

    def local(self, name: str) -> tuple[Tensor, int]:
        """The rows of a weight that this process holds, and the number of the first."""
        if name == WHOLE:
            return self.norm, 0
        parameter = self._parameter(name)
        rows = parameter.shape[0]
        each = -(-rows // self.size)  # the last processes may have fewer, or none
        first = min(rows, self.rank * each)
        held = parameter.to_local()
        assert len(held) == min(rows, first + each) - first, f"{name}: FSDP cut it elsewhere"
        return held, first

    @contextlib.contextmanager
    def whole(self, unit: str, then: str | None = None) -> Iterator[None]:
        """Inside `with` the unit is whole; the gathering of `then` is under way."""
        module = self.units[self.places[unit][0] if unit in self.places else unit]
        module.unshard()  # or waits for the one under way
        if then is not None:
            self.units[then].unshard(async_op=True)
        try:
            yield
        finally:
            module.reshard()

    def _parameter(self, name: str) -> Tensor:
        unit, parameter = self.places[name]
        return getattr(self.units[unit], parameter)

    def __getitem__(self, name: str) -> Tensor:
        if name == WHOLE:
            return self.norm
        weight = self._parameter(name)
        assert not isinstance(weight, DTensor), f"{name} is whole inside whole() only"
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter((WHOLE, *self.places))

    def __len__(self) -> int:
        return 1 + len(self.places)


def _place(name: str) -> tuple[str, str]:
    """(unit, parameter) of a weight: 3.qkv -> 3, qkv; embed -> embed, weight."""
    unit, _, parameter = name.partition(".")
    return unit, parameter or "weight"
