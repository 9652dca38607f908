"""A few of many rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def evenly_spaced(items: Sequence[Any], n: int) -> list[Any]:
    """At most n of the items, evenly spaced, the first among them."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]
