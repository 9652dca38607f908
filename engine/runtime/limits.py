"""Numbers that people type are checked before any work starts: finite, and within bounds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

MOST = 10**9  # the upper bound of a number that has no bound of its own
SEEDS = (-(2**63), 2**63 - 1)  # integers of 64 bits


def check_numbers(config: Any, **bounds: tuple[float, float]) -> None:
    """ValueError naming the first number of a config dataclass that is not finite or out of bounds.

    bounds    field -> (least, most). Other fields may be 0 to MOST, and `seed` any of SEEDS
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            raise ValueError(f"{field.name} {value}: expected a finite number")
        default = SEEDS if field.name == "seed" else (0, MOST)
        low, high = bounds.get(field.name, default)
        if value < low:
            raise ValueError(f"{field.name} {value}: expected at least {low:,}")
        if value > high:
            raise ValueError(f"{field.name} {value}: expected at most {high:,}")
