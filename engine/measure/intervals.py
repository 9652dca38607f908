"""Is a difference real? Intervals and tests for few items and few seeds

    wilson              interval of a share of right answers, also where all or none are right
    bootstrap           interval of the ratio of two sums: items are resampled
    crossed_bootstrap   the same over several seeds on the same items: both are resampled
    mcnemar             test of two arms on the same items, each right or wrong
    mcnemar_power       how often that test sees a given difference; `smallest_difference` that it
                        sees four times of five
    sign_flip_test      the same over several seeds: the signs of differences are flipped
    t_interval          interval of the mean over a few seeds
    holm                p values corrected for the number of tests that were looked at

All intervals are of 95 %, all p values two-sided. An interval of too few items is nan.

    Wilson 1927       Probable inference, the law of succession, and statistical inference
    Fisher 1935       The design of experiments, section 21 (the randomisation test)
    McNemar 1947      Note on the sampling error of the difference between correlated proportions
    Efron 1979        Bootstrap methods: another look at the jackknife (percentile intervals)
    Holm 1979         A simple sequentially rejective multiple test procedure
    Owen 2007         The pigeonhole bootstrap, arXiv 0712.1111
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

RESAMPLES = 2000
# 97.5 % points of Student's t for 1, 2, ... 12 degrees of freedom. Beyond the table the normal
# distribution's is taken, which is a little too small.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
Z_975 = 1.96


def wilson(share: float, n: int, z: float = Z_975) -> tuple[float, float]:
    """The ends of the score interval of a share p of n items (Wilson 1927).

        (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    (nan, nan) where n is 0.
    """
    if n == 0:
        return math.nan, math.nan
    scale = 1 + z * z / n
    center = (share + z * z / (2 * n)) / scale
    variance = share * (1 - share) / n + z * z / (4 * n * n)
    half_width = z * math.sqrt(variance) / scale
    low = max(0.0, center - half_width)
    high = min(1.0, center + half_width)
    return low, high


def bootstrap(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The ends of the percentile interval of sum(sums) / sum(weights) (Efron 1979).

    The n items are resampled with replacement, always by the same draws: the same items give the
    same interval. (nan, nan) for fewer than two items.
    """
    n = len(sums)
    if n < 2:
        return math.nan, math.nan
    values = np.array(sums, dtype=np.float64)  # (n,)
    w = np.array(weights, dtype=np.float64)  # (n,)
    draws = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))  # numbers of items
    drawn_values = values[draws].sum(1)  # (RESAMPLES,)
    drawn_weights = w[draws].sum(1)  # (RESAMPLES,)
    return _percentile_interval(drawn_values / drawn_weights)


def _percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points of resampled values (RESAMPLES,)."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def lost_won(before: Sequence[float], after: Sequence[float]) -> tuple[int, int]:
    """The number of items on which `after` is worse than `before`, and on which it is better."""
    pairs = list(zip(before, after, strict=True))
    lost = sum(a > b for a, b in pairs)
    won = sum(a < b for a, b in pairs)
    return int(lost), int(won)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact p value of McNemar's test (1947): are two arms equally good?

    only_first, only_second: items that only one of the two arms got right. If the arms are equally
    good, each of these n items is a fair coin:

        p = 2 P(K <= min(only_first, only_second)),  K ~ Binomial(n, 1/2)

    1.0 where the arms differ on no item.
    """
    n = only_first + only_second
    k = min(only_first, only_second)
    ways = sum(math.comb(n, i) for i in range(k + 1))
    tail = ways / 2**n
    return min(1.0, 2 * tail)


def mcnemar_power(n: int, lost: float, won: float, level: float = 0.05) -> float:
    """The probability that `mcnemar` is below `level` for n independent items.

    lost, won    probabilities that only the first, and that only the second arm is right on an item

        sum_d P(D = d) P(K <= c_d or K >= d - c_d | D = d)
        D ~ Binomial(n, lost + won) items differ, K ~ Binomial(d, won / (lost + won)) of them won

    c_d is the largest count at which the test on d differing items is below `level`. Exact, no
    normal approximation. 0 where the arms never differ.
    """
    differ = lost + won
    if differ == 0:
        return 0.0
    power = 0.0
    differing = _binomial(n, differ)  # (n + 1,), the probability of every d
    for d in range(n + 1):
        if differing[d] < 1e-15:
            continue
        extreme = 2 * np.cumsum(_binomial(d, 0.5)) < level  # (d + 1,), by the smaller count
        counts = np.arange(d + 1)
        is_seen = extreme[np.minimum(counts, d - counts)]  # (d + 1,), by K
        power += differing[d] * float(_binomial(d, won / differ)[is_seen].sum())
    return power


def smallest_difference(n: int, differ: float, power: float = 0.8) -> float:
    """The smallest share won - lost that McNemar's test on n items sees with this probability.

    differ    share of the items on which exactly one of the two arms is right

    nan where even winning all of them is not seen that often. Accurate to 0.0001.
    """
    if mcnemar_power(n, 0.0, differ) < power:
        return math.nan
    low, high = 0.0, differ
    while high - low > 1e-4:
        middle = (low + high) / 2
        if mcnemar_power(n, (differ - middle) / 2, (differ + middle) / 2) < power:
            low = middle
        else:
            high = middle
    return high


def _binomial(n: int, p: float) -> np.ndarray:
    """The probabilities (n + 1,) of 0, 1, ..., n successes in n trials."""
    if p in (0.0, 1.0):
        certain = np.zeros(n + 1)
        certain[round(n * p)] = 1.0
        return certain
    k = np.arange(n + 1)
    log_factorials = _log_factorials(n)
    log_ways = log_factorials[n] - log_factorials[k] - log_factorials[n - k]
    return np.exp(log_ways + k * math.log(p) + (n - k) * math.log1p(-p))


@cache
def _log_factorials(n: int) -> np.ndarray:
    """The logarithms (n + 1,) of 0!, 1!, ..., n!."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


def crossed_bootstrap(
    sums: Sequence[Sequence[float]], weights: Sequence[float]
) -> tuple[float, float, float]:
    """The mean over S seeds of sum(sums[s]) / sum(weights), and the ends of its interval.

    sums      (S, n): n items under S seeds
    weights   (n,)

    Items are resampled with replacement, the same for all seeds, and the seeds independently of the
    items (Owen 2007). To compare two arms on the same items, give the differences of their sums:
    every draw then holds both arms. With few seeds the variance between seeds is estimated too
    small, by (S - 1) / S. The interval is nan for fewer than two items.
    """
    values = np.array(sums, dtype=np.float64)
    w = np.array(weights, dtype=np.float64)
    seeds, n = values.shape
    mean = float(values.sum() / (seeds * w.sum()))
    if n < 2:
        return mean, math.nan, math.nan
    random = np.random.default_rng(0)
    item_shares = np.full(n, 1 / n)
    seed_shares = np.full(seeds, 1 / seeds)
    item_counts = random.multinomial(n, item_shares, size=RESAMPLES)  # (RESAMPLES, n)
    seed_counts = random.multinomial(seeds, seed_shares, size=RESAMPLES)  # (RESAMPLES, S)
    item_sums = seed_counts @ values  # (RESAMPLES, n), over the drawn seeds
    drawn_values = (item_sums * item_counts).sum(1)  # (RESAMPLES,)
    drawn_weights = seeds * (item_counts @ w)  # (RESAMPLES,)
    low, high = _percentile_interval(drawn_values / drawn_weights)
    return mean, low, high


def sign_flip_test(differences: Sequence[int]) -> float:
    """The exact p value of the sum of differences, if each one's sign is a fair coin (Fisher 1935).

    An item's difference is the number of seeds at which one arm was right, less the number at which
    the other was: an item's answers under several seeds depend on each other, so they are flipped
    together. With one seed this is `mcnemar`.

        p = P(|sum of +-|d_i|| >= |sum of d_i|)

    The distribution of the sum is built item by item: a sum x is reached from x - |d| or x + |d|.
    """
    sizes = [abs(d) for d in differences if d != 0]
    largest = sum(sizes)
    probabilities = np.ones(1)  # of the sums -s, -s + 1, ..., s, where s is the sum of sizes so far
    for size in sizes:
        minus = np.pad(probabilities, (0, 2 * size))
        plus = np.pad(probabilities, (2 * size, 0))
        probabilities = (minus + plus) / 2
    flipped_sums = np.arange(len(probabilities)) - largest  # -largest, ..., largest
    is_extreme = np.abs(flipped_sums) >= abs(sum(differences))
    return min(1.0, float(probabilities[is_extreme].sum()))


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of n values and the ends of its interval (Student's t).

        mean +- t s / sqrt(n),  s^2 = sum (v - mean)^2 / (n - 1),  t of n - 1 degrees of freedom

    The interval is nan for a single value.
    """
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan, math.nan
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    deviation = math.sqrt(variance)
    row = n - 2  # of the table, which begins at one degree of freedom
    t = T_975[row] if row < len(T_975) else Z_975
    half_width = t * deviation / math.sqrt(n)
    return mean, mean - half_width, mean + half_width


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of m tests corrected for their number (Holm 1979), in the order given.

    With p_1 <= p_2 <= ... <= p_m the corrected value of the k-th is

        max over j <= k of  min(1, (m - j + 1) p_j)

    Of the tests below a level after it, the chance that one or more is wrong is at most that level,
    however the tests depend on each other.
    """
    count = len(p_values)
    order = sorted(range(count), key=lambda i: p_values[i])
    corrected = [1.0] * count
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (count - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
