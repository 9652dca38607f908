"""Sequences whose items are made or read when they are asked for"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


class OnDemand(Sequence[Item]):
    """A sequence that is given by `__len__` and `item`; a slice of it is a list."""

    @abstractmethod
    def item(self, number: int) -> Item:
        """The item at a place, 0 <= number < len(self)."""

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self.item(number) for number in range(*index.indices(len(self)))]
        number = operator.index(index)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self.item(number)

    def __iter__(self) -> Iterator[Item]:
        for number in range(len(self)):  # not until an IndexError, which might be a fault of `item`
            yield self.item(number)
