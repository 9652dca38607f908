"""Frozen weights sharded over the processes of a job by torch's FSDP2

A unit is gathered as one: a layer, or as many rows of the embedding or the head as have about as
many numbers as a layer. Each process holds its rows of every matrix and norm of a unit. The rest is
gathered by one all-gather (`unshard` of torch.distributed.fsdp.fully_shard) and freed again
(`reshard`); the following unit is gathered meanwhile. Nothing else of FSDP is used: no module runs,
there is no hook and no gradient.

A process holds at most its share, two layers and a buffer, and for the loss the whole head. Every
process must ask for the same units in the same order. Only the last norm, D numbers, is whole
everywhere. The interface is that of model/weights.py.
"""

# V = vocabulary, D = model width, T = tokens

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kernels.integers import cdiv


class BroadcastAllGather:
    """FSDP's all-gather on gloo: every share is broadcast straight into its place in the output.

    gloo's own all-gather makes two copies more. One buffer serves all units: FSDP copies a gathered
    unit out of it before the next gather begins.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(0)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The beginning of the buffer, grown where it is too small."""
        if self.buffer.numel() < math.prod(size):
            self.buffer = torch.empty(math.prod(size), dtype=dtype, device=device)
        return self.buffer[: math.prod(size)].view(*size)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,  # this process's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        for rank, part in enumerate(output_tensor.chunk(group.size())):
            dist.broadcast(part, group=group, group_src=rank)


class Unit(torch.nn.Module):
    """Parameters without storage, which FSDP shards and holds."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))


class ShardedWeights(Mapping[str, Tensor]):
    """The weights by our names (model/layout.py); a layer is whole only inside `with layer(i)`.

    Made without numbers: this process has to fill the rows that `local` names.
    """

    is_sharded = True

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], device: str | torch.device, dtype: torch.dtype
    ) -> None:
        assert dist.is_initialized(), "weights are sharded over the processes of a job"
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.norm = torch.empty(shapes["norm"], device=device, dtype=dtype)
        self.gathered_head: Tensor | None = None  # while it is whole
        units: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            layer, _, parameter = name.partition(".")
            if parameter:
                units.setdefault(layer, {})[parameter] = shape
        layer_size = sum(map(math.prod, units["0"].values()))  # numbers of one layer
        self.parts: dict[str, list[tuple[str, int]]] = {}  # of embed and head: (unit, first row)
        for name in sorted({"embed", "head"} & shapes.keys()):
            rows, width = shapes[name]
            starts = range(0, rows, cdiv(layer_size, width))
            self.parts[name] = [(f"{name} from {i}", i) for i in starts]
            for unit, i in self.parts[name]:
                units[unit] = {"rows": (min(rows - i, starts.step), width)}
        self.parts.setdefault("head", self.parts["embed"])
        self.names = ["norm", *(name for name in shapes if name != "norm")]
        mesh = init_device_mesh(torch.device(device).type, (self.size,))
        self.units = {name: Unit(parameters, dtype) for name, parameters in units.items()}
        all_gather = BroadcastAllGather()
        for module in self.units.values():
            fully_shard(module, mesh=mesh)
            module.to_empty(device=device)
            if torch.device(device).type == "cpu":  # gathered by gloo
                module.set_custom_all_gather(all_gather)
        # beside the share: the buffer of a gather, the unit and the next, or the head
        head_size = math.prod(shapes["embed"])
        self.gather_bytes = dtype.itemsize * (2 * layer_size + max(layer_size, head_size))

    def local(self, name: str) -> list[tuple[Tensor, int]]:
        """The rows of a weight that this process holds: tensors, each with the number of its first
        row."""
        if name == "norm":
            return [(self.norm, 0)]
        layer, _, parameter = name.partition(".")
        pieces = []
        for unit, start in self.parts.get(name, [(layer, 0)]):
            weight = getattr(self.units[unit], parameter or "rows")
            share = cdiv(len(weight), self.size)  # rows; the last processes may have fewer, or none
            first = min(len(weight), self.rank * share)
            rows = weight.to_local()
            assert len(rows) == min(len(weight), first + share) - first, f"{name}: cut elsewhere"
            pieces.append((rows, start + first))
        return pieces

    def refuse(self, fault: str | None) -> None:
        """ValueError in every process of the job if one of them has a fault in its rows."""
        faults = torch.tensor(int(fault is not None), device=self.norm.device)
        dist.all_reduce(faults, dist.ReduceOp.MAX)
        if faults.item():
            raise ValueError(fault or "another process of the job found a fault in the weights")

    @contextlib.contextmanager
    def _unit(self, unit: str, then: str | None = None) -> Iterator[None]:
        """Inside `with` a unit is whole, and the gathering of `then` is under way."""
        module = self.units[unit]
        module.unshard()  # or waits for the one under way
        if then is not None:
            self.units[then].unshard(async_op=True)
        try:
            yield
        finally:
            module.reshard()

    def layer(self, i: int, then: int | None = None) -> contextlib.AbstractContextManager[None]:
        """Inside `with` layer i is whole, and the gathering of layer `then` is under way."""
        return self._unit(str(i), None if then is None else str(then))

    def _all_rows(self, name: str) -> Iterator[tuple[Tensor, int]]:
        """All rows of embed or head, part by part: (rows, D) and the number of the first."""
        order = [unit for unit, _ in self.parts[name]]
        for (unit, first), then in zip(self.parts[name], [*order[1:], None], strict=True):
            with self._unit(unit, then):
                yield self.units[unit].rows, first

    def embed(self, tokens: Tensor) -> Tensor:
        """The rows of the embedding (T, D) that belong to tokens (T,)."""
        h = self.norm.new_empty(len(tokens), len(self.norm))
        for rows, first in self._all_rows("embed"):
            index = tokens - first
            inside = ((index >= 0) & (index < len(rows)))[:, None]
            h = torch.where(inside, rows[index.clamp(0, len(rows) - 1)], h)
        return h

    @contextlib.contextmanager
    def head(self) -> Iterator[Tensor]:
        """Inside `with` the head (V, D) is whole."""
        unit, last = self.parts["head"][-1]
        head = self.norm.new_empty(last + len(self.units[unit].rows), len(self.norm))
        for rows, first in self._all_rows("head"):
            head[first : first + len(rows)] = rows
        self.gathered_head = head
        try:
            yield head
        finally:
            self.gathered_head = None

    def __getitem__(self, name: str) -> Tensor:
        if name == "norm":
            return self.norm
        if name in self.parts:
            head = self.gathered_head if name == "head" else None
            assert head is not None, f"{name} is not whole now"
            return head
        layer, _, parameter = name.partition(".")
        weight = getattr(self.units[layer], parameter)
        assert not isinstance(weight, DTensor), f"{name} is not whole now"
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
