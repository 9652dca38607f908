"""Is a difference real? Intervals and tests for few items and few seeds

wilson              interval of a share of right answers, also where all or none are (Wilson 1927)
bootstrap           interval of the ratio of two sums, items resampled (percentile, Efron 1979)
crossed_bootstrap   the same over several seeds on the same items: items and seeds are resampled
mcnemar             test of two arms on the same items, right or wrong (exact, McNemar 1947)
sign_flip_test      the same over several seeds: signs of differences flipped (exact, Fisher 1935)
t_interval          interval of the mean over a few seeds (Student's t)

All intervals are of 95 %, all p values two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
# 97.5 % points of Student's t by degrees of freedom; beyond the table the normal's, a little small.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
Z_975 = 1.96


def wilson(share: float, n: int, z: float = Z_975) -> tuple[float, float]:
    """Score interval of a share of n items; (nan, nan) for none."""
    if not n:
        return math.nan, math.nan
    scale = 1 + z * z / n
    center = (share + z * z / (2 * n)) / scale
    half_width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, center - half_width), min(1.0, center + half_width)


def bootstrap(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Interval of sum(sums) / sum(weights), the items resampled with replacement.

    The same items give the same interval. (nan, nan) for fewer than two items.
    """
    n = len(sums)
    if n < 2:
        return math.nan, math.nan
    values, w = np.array([sums, weights], dtype=np.float64)
    draws = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    ratios = values[draws].sum(1) / w[draws].sum(1)  # (RESAMPLES,)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def lost_won(before: Sequence[float], after: Sequence[float]) -> tuple[int, int]:
    """Items on which `after` is worse than `before`, and on which it is better."""
    pairs = list(zip(before, after, strict=True))
    lost = sum(a > b for a, b in pairs)
    won = sum(a < b for a, b in pairs)
    return int(lost), int(won)


def mcnemar(only_first: int, only_second: int) -> float:
    """p of the counts of items that only one of two arms got right, if the arms are equally good.

    1.0 where they differ on no item.
    """
    n = only_first + only_second
    k = min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def crossed_bootstrap(
    sums: Sequence[Sequence[float]], weights: Sequence[float]
) -> tuple[float, float, float]:
    """Mean over S seeds of sum(sums[s]) / sum(weights), and the ends of its interval.

    sums (S, n): n items under S seeds; weights (n,). Items are resampled with replacement, the
    same for all seeds, and, where there are several, seeds independently of them (Owen 2007). To
    compare two arms on the same items give the differences of their sums: every draw then holds
    both. With few seeds the seeds' part is too small, by (S - 1) / S. The interval is nan for fewer
    than two items.
    """
    values = np.array(sums, dtype=np.float64)
    w = np.array(weights, dtype=np.float64)
    seeds, n = values.shape
    mean = float(values.sum() / (seeds * w.sum()))
    if n < 2:
        return mean, math.nan, math.nan
    random = np.random.default_rng(0)
    # how often each item, and each seed, is drawn
    items = random.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # (RESAMPLES, n)
    drawn = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)  # (RESAMPLES, S)
    ratios = ((drawn @ values) * items).sum(1) / (seeds * (items @ w))  # (RESAMPLES,)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return mean, float(low), float(high)


def sign_flip_test(differences: Sequence[int]) -> float:
    """p of the sum of the items' differences if each difference's sign is a coin's, exactly.

    An item's difference is the number of seeds at which one arm was right, less those at which the
    other was: an item's answers under several seeds depend on each other and are flipped together.
    With one seed this is `mcnemar`.
    """
    sizes = [abs(d) for d in differences if d]
    largest = sum(sizes)
    probabilities = np.ones(1)  # of the sums -s, ..., s of the s = sum of the sizes so far
    for size in sizes:
        minus = np.pad(probabilities, (0, 2 * size))
        plus = np.pad(probabilities, (2 * size, 0))
        probabilities = (minus + plus) / 2
    distance = np.abs(np.arange(len(probabilities)) - largest)
    extreme = distance >= abs(sum(differences))
    return min(1.0, float(probabilities[extreme].sum()))


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a few values and the ends of its interval; nan for a single value."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    t = T_975[n - 2] if n - 2 < len(T_975) else Z_975
    half_width = t * deviation / math.sqrt(n)
    return mean, mean - half_width, mean + half_width
