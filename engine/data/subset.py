"""A few of many rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def evenly_spaced(items: Sequence[Any], n: int) -> list[Any]:
    """At most n of the items, evenly spaced, the first among them."""
    count = len(items)
    n = min(n, count)
    return [items[i * count // n] for i in range(n)]
