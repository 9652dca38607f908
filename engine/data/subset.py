"""Some of many rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def evenly_spaced(items: Sequence[Any], n: int) -> list[Any]:
    """At most n of the items, evenly spaced, the first among them."""
    count = len(items)
    n = min(n, count)
    return [items[i * count // n] for i in range(n)]


class FirstItems(Sequence[Any]):
    """The first `count` of the items, which are not copied."""

    def __init__(self, items: Sequence[Any], count: int) -> None:
        """ValueError where there are fewer."""
        if count > len(items):
            raise ValueError(f"the first {count} of {len(items)} items")
        self._items = items
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._count))]
        number = index + self._count if index < 0 else index
        if not 0 <= number < self._count:
            raise IndexError(f"item {index} of {self._count}")
        return self._items[number]
