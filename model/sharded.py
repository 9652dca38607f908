"""Frozen weights sharded over the processes of a job by torch's FSDP2

A unit is gathered as one: a layer, or as many rows of the embedding or the head as have about as
many numbers as a layer. Each process holds its rows of every matrix and norm of a unit. The rows of
the other processes are gathered by one all-gather (`unshard` of torch.distributed.fsdp.fully_shard)
and freed after use (`reshard`); the following unit is gathered meanwhile. Nothing else of FSDP is
used: no module runs, there is no hook and no gradient.

A process holds at most its share, two layers and a buffer, and for the loss the whole head. Every
process must ask for the same units in the same order. Only the last norm, D numbers, is whole
everywhere. The interface is that of model/weights.py.
"""

# V = vocabulary, D = model width, T = tokens

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kernels.integers import cdiv


class BroadcastAllGather:
    """FSDP's all-gather on gloo: every share is broadcast straight into its place in the output.

    gloo's own all-gather makes two more copies. All units use one buffer: FSDP copies a gathered
    unit out of it before the next gather begins. Shares travel as bytes, for which dtypes gloo
    knows depends on torch's version.

    `through_host`: shares of a GPU are copied to host memory, broadcast there, and copied back.
    """

    def __init__(self, through_host: bool = False) -> None:
        self.through_host = through_host
        self.buffer = torch.empty(0)
        self.host = torch.empty(0, dtype=torch.uint8)  # with as many bytes as the largest output

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The beginning of the buffer, in the shape `size`; the buffer grows if it is too small."""
        numbers = math.prod(size)
        if self.buffer.numel() < numbers:
            self.buffer = torch.empty(numbers, dtype=dtype, device=device)
        return self.buffer[:numbers].view(*size)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,  # this process's part of the output
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        output = output_tensor.view(torch.uint8)
        if self.through_host:
            self._gather_through_host(output, group)
            return
        for rank, part in enumerate(output.chunk(group.size())):
            dist.broadcast(part, group=group, group_src=rank)

    def _gather_through_host(self, output: Tensor, group: dist.ProcessGroup) -> None:
        if self.host.numel() < output.numel():
            self.host = torch.empty(
                output.numel(), dtype=torch.uint8, pin_memory=torch.cuda.is_available()
            )
        parts = output.chunk(group.size())
        host_parts = self.host[: output.numel()].chunk(group.size())
        host_parts[group.rank()].copy_(parts[group.rank()])
        for rank, part in enumerate(host_parts):
            dist.broadcast(part, group=group, group_src=rank)
        output.copy_(self.host[: output.numel()])


def carries_by_gloo(backends: str, device_type: str) -> bool:
    """Whether gloo carries tensors of this device, by torch's text "cpu:gloo,cuda:nccl"."""
    return f"{device_type}:gloo" in backends.split(",")


class Unit(torch.nn.Module):
    """Parameters without storage, which FSDP shards and holds."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))


class Part(NamedTuple):
    """A unit that holds rows of the embedding or of the head."""

    unit: str
    first_row: int


class ShardedWeights(Mapping[str, Tensor]):
    """The weights by our names (model/layout.py); a layer is whole only inside `with layer(i)`.

    A new object holds no values: each process has to fill the rows that `local` returns.
    """

    is_sharded = True

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], device: str | torch.device, dtype: torch.dtype
    ) -> None:
        assert dist.is_initialized(), "weights are sharded over the processes of a job"
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.names = ["norm", *(name for name in shapes if name != "norm")]
        self.norm = torch.empty(shapes["norm"], device=device, dtype=dtype)
        self.gathered_head: Tensor | None = None  # set while the head is whole

        # 1. the units and their shapes: layers first, then parts of embed and head
        unit_shapes = _layer_shapes(shapes)
        layer_size = sum(math.prod(shape) for shape in unit_shapes["0"].values())
        self.parts: dict[str, list[Part]] = {}  # of embed and head, in the order of their rows
        for name in ("embed", "head"):
            if name not in shapes:  # embeddings are tied: the head is the embedding
                self.parts[name] = self.parts["embed"]
                continue
            rows, width = shapes[name]
            rows_at_once = cdiv(layer_size, width)
            self.parts[name] = []
            for first in range(0, rows, rows_at_once):
                part = Part(f"{name} from {first}", first)
                self.parts[name].append(part)
                unit_shapes[part.unit] = {"rows": (min(rows - first, rows_at_once), width)}

        # 2. shard each unit over the processes
        device_type = torch.device(device).type
        mesh = init_device_mesh(device_type, (self.size,))
        self.units = {name: Unit(parameters, dtype) for name, parameters in unit_shapes.items()}
        by_gloo = carries_by_gloo(dist.get_backend_config(), device_type)
        all_gather = BroadcastAllGather(through_host=device_type != "cpu")
        for unit in self.units.values():
            fully_shard(unit, mesh=mesh)
            unit.to_empty(device=device)
            if by_gloo:
                unit.set_custom_all_gather(all_gather)

        # memory beside the share: the buffer of a gather, and this unit and the next, or the head
        head_size = math.prod(shapes["embed"])
        self.gather_bytes = dtype.itemsize * (2 * layer_size + max(layer_size, head_size))

    def local(self, name: str) -> list[tuple[Tensor, int]]:
        """The rows of a weight that this process holds.

        They come as tensors, each with the number of its first row.
        """
        if name == "norm":
            return [(self.norm, 0)]
        if name in self.parts:
            parts = self.parts[name]
            parameter = "rows"
        else:
            layer, _, parameter = name.partition(".")
            parts = [Part(layer, 0)]
        pieces = []
        for part in parts:
            weight = getattr(self.units[part.unit], parameter)
            rows = weight.to_local()
            # FSDP gives every process as many rows; the last ones may have fewer, or none
            share = cdiv(len(weight), self.size)
            first = min(len(weight), self.rank * share)
            end = min(len(weight), first + share)
            assert len(rows) == end - first, (
                f"{name}: FSDP gave this process {len(rows)} rows, expected {first} to {end}"
            )
            pieces.append((rows, part.first_row + first))
        return pieces

    def refuse(self, fault: str | None) -> None:
        """ValueError in every process of the job if one of them has a fault in its rows."""
        faults = torch.tensor(int(fault is not None))  # on the CPU, where gloo carries it
        dist.all_reduce(faults, dist.ReduceOp.MAX)
        if faults.item():
            raise ValueError(fault or "another process of the job found a fault in the weights")

    @contextlib.contextmanager
    def _unit(self, unit: str, then: str | None = None) -> Iterator[None]:
        """Inside `with` a unit is whole, and the gathering of the unit `then` is under way."""
        module = self.units[unit]
        module.unshard()  # waits for the gathering, if it is under way already
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
        parts = self.parts[name]
        following = [part.unit for part in parts[1:]] + [None]
        for part, then in zip(parts, following, strict=True):
            with self._unit(part.unit, then):
                yield self.units[part.unit].rows, part.first_row

    def embed(self, tokens: Tensor) -> Tensor:
        """The rows of the embedding (T, D) that belong to tokens (T,)."""
        h = self.norm.new_empty(len(tokens), len(self.norm))  # (T, D)
        for rows, first in self._all_rows("embed"):
            index = tokens - first  # (T,)
            inside = (index >= 0) & (index < len(rows))  # (T,)
            candidates = rows[index.clamp(0, len(rows) - 1)]  # (T, D)
            h = torch.where(inside[:, None], candidates, h)
        return h

    @contextlib.contextmanager
    def head(self) -> Iterator[Tensor]:
        """Inside `with` the head (V, D) is whole."""
        last_part = self.parts["head"][-1]
        vocab = last_part.first_row + len(self.units[last_part.unit].rows)
        head = self.norm.new_empty(vocab, len(self.norm))  # (V, D)
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
        assert name != "embed", "embed is never whole: use embed(tokens)"
        if name == "head":
            assert self.gathered_head is not None, "head is whole only inside `with head()`"
            return self.gathered_head
        layer, _, parameter = name.partition(".")
        weight = getattr(self.units[layer], parameter)
        assert not isinstance(weight, DTensor), f"{name} is whole only inside `with layer({layer})`"
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _layer_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Layer ("0", "1", ...) -> parameter ("qkv", "attn_norm", ...) -> shape."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer, _, parameter = name.partition(".")
        if parameter:  # not embed, norm or head
            layers.setdefault(layer, {})[parameter] = shape
    return layers
