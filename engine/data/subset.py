"""Some of many rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.runtime.on_demand import OnDemand


def evenly_spaced(items: Sequence[Any], n: int) -> list[Any]:
    """At most n of the items, evenly spaced, the first among them."""
    count = len(items)
    n = min(n, count)
    return [items[i * count // n] for i in range(n)]


class FirstItems(OnDemand[Any]):
    """The first `count` of the items, which are not copied."""

    def __init__(self, items: Sequence[Any], count: int) -> None:
        """ValueError where there are fewer."""
        if count > len(items):
            raise ValueError(f"the first {count} of {len(items)} items")
        self._items = items
        self._count = count

    def __len__(self) -> int:
        return self._count

    def item(self, number: int) -> Any:
        return self._items[number]
