"""Numbers that people type: finite, and within bounds, before any work starts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

MOST = 10**9  # of what has no bound of its own
SEEDS = (-(2**63), 2**63 - 1)


def check_numbers(config: Any, **bounds: tuple[float, float]) -> None:
    """ValueError naming the first number of a config dataclass that is not finite or out of bounds.

    bounds    field -> (least, most); the rest go from 0 to MOST, what is called seed may be any
              number of 64 bits
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            raise ValueError(f"{field.name} {value}: a finite number is wanted")
        low, high = bounds.get(field.name, SEEDS if field.name == "seed" else (0, MOST))
        if value < low:
            raise ValueError(f"{field.name} {value}: at least {low:,} is wanted")
        if value > high:
            raise ValueError(f"{field.name} {value}: at most {high:,} is wanted")
