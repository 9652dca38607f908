"""Memory that runs out on purpose: every new tensor asks first."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Memory(TorchDispatchMode):
    """Counts the tensors that are made inside, and refuses some as a full device does.

    refused    number, from 1, of the tensor that is refused; 0: none
    largest    bytes of the largest tensor that is never refused; each above it always is

    Tensors below `least` bytes do not count: an allocator has those in its first block.
    """

    def __init__(self, refused: int = 0, largest: float = float("inf"), least: int = 1024) -> None:
        super().__init__()
        self.refused = refused
        self.largest = largest
        self.least = least
        self.made = 0
        self.peak = 0  # bytes of the largest tensor that was asked for
        self.refusals = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if self.refused and self.refusals:  # it was the only one: the rest need not be counted
            return out
        inputs = {t.untyped_storage()._cdata for t in _tensors((*args, *(kwargs or {}).values()))}
        for tensor in _tensors((out,)):
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs and storage.nbytes() >= self.least:
                self._ask(storage.nbytes())
        return out

    def _ask(self, size: int) -> None:
        self.made += 1
        self.peak = max(self.peak, size)
        if self.made == self.refused or size > self.largest:
            self.refusals += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")


def _tensors(values: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples and lists."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found
