"""Is a difference real? Intervals and tests for few items and few seeds.

wilson        a share of right answers, also where all or none are (Wilson 1927)
bootstrap     the ratio of two sums over resampled items (percentile interval, Efron 1979)
crossed       the same over several seeds on the same items: items and seeds are drawn again
mcnemar       two arms on the same items, right or wrong (exact, McNemar 1947)
sign_flip     the same over several seeds: the signs of the items' differences (exact, Fisher 1935)
student       the mean over a few seeds (Student's t)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
# 97.5 % points of Student's t by degrees of freedom; beyond the table the normal's, a little small.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % score interval of a share of n items (Wilson 1927); nan where there are none."""
    if not n:
        return math.nan, math.nan
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


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


def lost_won(before: Sequence[float], after: Sequence[float]) -> tuple[int, int]:
    """Items on which `after` is worse than `before`, and on which it is better."""
    pairs = list(zip(before, after, strict=True))
    return sum(int(a > b) for a, b in pairs), sum(int(a < b) for a, b in pairs)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of the counts of items that only one of two arms got right, under no difference.

    1.0 where they differ on no item.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def crossed(
    sums: Sequence[Sequence[float]], weights: Sequence[float]
) -> tuple[float, float, float]:
    """Mean over S seeds of sum(sums[s]) / sum(weights), and its 95 % interval.

    sums (S, n): n items under S seeds; weights (n,). Items are drawn again with replacement, the
    same for all seeds, and, where there are several, seeds independently of them (Owen 2007). To
    compare two arms on the same items give the differences of their sums: every draw then holds
    both. With few seeds the seeds' part is too small, by (S - 1) / S. The interval is nan for fewer
    than two items.
    """
    values, w = np.array(sums, dtype=np.float64), np.array(weights, dtype=np.float64)
    seeds, n = values.shape
    mean = float(values.sum() / (seeds * w.sum()))
    if n < 2:
        return mean, math.nan, math.nan
    random = np.random.default_rng(0)
    items = random.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    drawn = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    ratios = ((drawn @ values) * items).sum(1) / (seeds * (items @ w))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return mean, float(low), float(high)


def sign_flip(differences: Sequence[int]) -> float:
    """Two-sided p of the sum of the items' differences where each sign is a coin's, exactly.

    An item's difference is the seeds at which one arm was right, less those at which the other was:
    an item's answers under several seeds hang together and are flipped together. With one seed this
    is `mcnemar`.
    """
    sizes = [abs(d) for d in differences if d]
    middle, chances = sum(sizes), np.ones(1)  # chances[i]: of the sum i - middle, so far
    for size in sizes:
        chances = (np.pad(chances, (0, 2 * size)) + np.pad(chances, (2 * size, 0))) / 2
    away = np.abs(np.arange(len(chances)) - middle) >= abs(sum(differences))
    return min(1.0, float(chances[away].sum()))


def student(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a few values and its 95 % interval; the interval is nan for a single one."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = (T975[n - 2] if n - 2 < len(T975) else 1.96) * deviation / math.sqrt(n)
    return mean, mean - half, mean + half
