"""Is a difference real? Intervals and tests for few items and few seeds.

bootstrap     the ratio of two sums over resampled items (percentile interval, Efron 1979)
mcnemar       two arms on the same items, right or wrong (exact, McNemar 1947)
student       the mean over a few seeds (Student's t)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
# 97.5 % points of Student's t by degrees of freedom; beyond the table the normal's, a little small.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def bootstrap(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """95 % interval of sum(sums) / sum(weights), the items being drawn again with replacement.

    The same items give the same interval. (nan, nan) for fewer than two items.
    """
    if len(sums) < 2:
        return math.nan, math.nan
    pairs = np.array([sums, weights], dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    ratios = pairs[0][draws].sum(1) / pairs[1][draws].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of the counts of items that only one of two arms got right, under no difference.

    1.0 where they differ on no item.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def student(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a few values and its 95 % interval; the interval is nan for a single one."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = (T975[n - 2] if n - 2 < len(T975) else 1.96) * deviation / math.sqrt(n)
    return mean, mean - half, mean + half
