"""Comparison at equal target: how far has each arm drifted where all are equally good?

An arm that learns little forgets little. So arms are compared where they are equally good.

    point         an arm's training measured once: at a checkpoint, a scale, a rate. It has a
                  goodness g (share of right answers, or -NLL of the held-out references: higher
                  is better) and a drift d (KL to the seed: lower is better), each the mean over
                  the training seeds. The seed model, with drift 0, is a point of every arm: it is
                  every adapter at scale 0
    frontier      the points of an arm that none of its own points beats (at least as good, drifted
                  no more), in the order of their drift, joined by straight lines in goodness and
                  the square root of the drift. KL is a squared distance: it grows with the square
                  of a small step, as goodness grows with the step. (A line in the KL itself would
                  give an arm between two of its points too much drift, up to a quarter of the
                  larger one's between the seed and it.)
    least drift   d(t), the drift at which the frontier reaches goodness t. 0 where the seed
                  reaches it; none where no point of the arm does
    compared      the arms whose best point gains on the seed at least REACH of what the best point
                  of all arms gains. The other arms do not reach the target
    target        the highest goodness that all compared arms reach: the least of their best points

Intervals and p values are by bootstrap (Efron 1979; Owen 2007 for crossed factors): held-out rows,
general prompts and training seeds are resampled with replacement, independently of each other and
the same for all arms and points. In every draw the means, the frontiers, the target and the drifts
are found anew; only the set of compared arms is fixed.

    interval      2.5 % and 97.5 % points of the draws
    p             of a difference, two-sided: 2 (1 + min(draws <= 0, draws >= 0)) / (draws + 1)

What this does not see: of many noisy points the frontier takes the best, so an arm with more
points looks a little better; with few training seeds their part is estimated too small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

REACH = 0.5  # share of the largest gain on the seed that an arm must have to be compared
DRAWS = 10_000  # so many that Holm's correction of 60 differences can still see one
CHUNK = 500  # draws at a time, for memory


@dataclass(frozen=True)
class Items:
    """What all arms were measured on: n held-out rows, m general prompts."""

    row_weights: np.ndarray  # (n,) tokens of a row, or 1 for right answers
    prompt_weights: np.ndarray  # (m,) tokens of the seed's answer
    seed: np.ndarray  # (n,) goodness of the seed model, summed over each row


@dataclass(frozen=True)
class ArmPoints:
    """The P points of an arm under S training seeds, summed over each item."""

    goodness: np.ndarray  # (P, S, n)
    drift: np.ndarray  # (P, S, m)


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """Least drift of arm `first` less that of arm `second`."""

    first: int  # places of the arms in the list that was compared
    second: int
    drift: Interval
    p: float


@dataclass(frozen=True)
class EqualTarget:
    """The result of `at_equal_target`; lists are in the order of the arms."""

    seed: float  # goodness of the seed model
    target: float | None  # None where no arm gains anything on the seed
    best: list[float]  # goodness of the best point of each arm
    drifts: list[Interval | None]  # least drift at the target; None: the arm does not reach it
    differences: list[Difference]  # of all pairs of compared arms


class Counts(NamedTuple):
    """How often every row, prompt and seed is in each of B draws."""

    rows: np.ndarray  # (B, n)
    prompts: np.ndarray  # (B, m)
    seeds: np.ndarray  # (B, S)


def at_equal_target(arms: Sequence[ArmPoints], items: Items) -> EqualTarget:
    """Compare arms at the best target that all compared arms reach; see the definitions above.

    The same measurements give the same result. Intervals are nan and p is 1 where there are fewer
    than two rows or prompts.
    """
    seeds = arms[0].goodness.shape[1]
    once = Counts(
        np.ones((1, len(items.row_weights))),
        np.ones((1, len(items.prompt_weights))),
        np.ones((1, seeds)),
    )
    seed = float(_seed_goodness(items, once)[0])
    points = [_means(arm, items, once) for arm in arms]
    best = [float(goodness.max()) for goodness, _ in points]
    compared = compared_arms(seed, best)
    if not compared:
        return EqualTarget(seed, None, best, [None] * len(arms), [])

    measured = _drifts([arms[i] for i in compared], items, once)  # (1, compared)
    target = min(best[i] for i in compared)
    drawn = [_drifts([arms[i] for i in compared], items, counts) for counts in _draws(items, seeds)]
    draws = np.concatenate(drawn)  # (DRAWS, compared)
    can_resample = min(len(items.row_weights), len(items.prompt_weights)) > 1
    if not can_resample:
        draws = np.full_like(draws, math.nan)

    drifts: list[Interval | None] = [None] * len(arms)
    for place, i in enumerate(compared):
        drifts[i] = _interval(measured[0, place], draws[:, place])
    differences = []
    for a, b in itertools.combinations(range(len(compared)), 2):
        by_draw = draws[:, a] - draws[:, b]
        value = _interval(measured[0, a] - measured[0, b], by_draw)
        p = two_sided_p(by_draw) if can_resample else 1.0
        differences.append(Difference(compared[a], compared[b], value, p))
    return EqualTarget(seed, target, best, drifts, differences)


def compared_arms(seed: float, best: Sequence[float]) -> list[int]:
    """The places of the arms that are compared, by the goodness of their best points.

    Those that gain at least REACH of the largest gain on the seed; [] where no arm gains anything.
    """
    gains = [of_arm - seed for of_arm in best]
    largest = max(gains)
    if largest <= 0:
        return []
    return [i for i, gain in enumerate(gains) if gain >= REACH * largest]


def least_drift(goodness: np.ndarray, drift: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The drift at which the frontier of P points reaches the target; nan where it never does.

    goodness, drift    (..., P), in any order; drift at least 0
    target             (...,)
    """
    # 1. the points by drift, of equal drift the best first; the best so far at each of them
    order = np.lexsort((-goodness, drift), axis=-1)
    g = np.take_along_axis(goodness, order, -1)  # (..., P)
    root = np.sqrt(np.take_along_axis(drift, order, -1))  # (..., P)
    best_so_far = np.maximum.accumulate(g, -1)  # (..., P)
    # 2. the first point that reaches the target, which is on the frontier
    reaches = best_so_far >= target[..., None]  # (..., P)
    last = reaches.argmax(-1)[..., None]  # (..., 1)
    g_last, root_last = _pick(g, last), _pick(root, last)
    # 3. the point of the frontier before it: the first that was as good as the best so far
    before = np.maximum(last - 1, 0)
    g_before = _pick(best_so_far, before)
    place = (g == g_before[..., None]).argmax(-1)[..., None]
    root_before = _pick(root, place)
    # 4. the straight line between the two
    rise = g_last - g_before
    has_line = (last[..., 0] > 0) & (rise > 0)
    share = np.where(has_line, (target - g_before) / np.where(has_line, rise, 1.0), 1.0)
    found = np.where(has_line, root_before + share * (root_last - root_before), root_last)
    return np.where(reaches.any(-1), found**2, math.nan)


def _pick(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The value at `place` (..., 1) of the last axis: (...,)."""
    return np.take_along_axis(values, place, -1)[..., 0]


def two_sided_p(draws: np.ndarray) -> float:
    """The two-sided bootstrap p value of draws (B,) of a difference that may be 0."""
    low = int((draws <= 0).sum())
    high = int((draws >= 0).sum())
    return min(1.0, 2 * (1 + min(low, high)) / (len(draws) + 1))


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


# ---- resampling


def _draws(items: Items, seeds: int) -> Iterator[Counts]:
    """DRAWS draws, CHUNK at a time, always the same."""
    random = np.random.default_rng(0)
    n, m = len(items.row_weights), len(items.prompt_weights)
    for start in range(0, DRAWS, CHUNK):
        size = min(CHUNK, DRAWS - start)
        rows = random.multinomial(n, np.full(n, 1 / n), size=size)
        prompts = random.multinomial(m, np.full(m, 1 / m), size=size)
        of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=size)
        yield Counts(rows.astype(np.float64), prompts.astype(np.float64), of_seeds)


def _drifts(arms: Sequence[ArmPoints], items: Items, counts: Counts) -> np.ndarray:
    """The least drift of every arm at the target of each draw: (B, arms)."""
    points = [_means(arm, items, counts) for arm in arms]
    bests = np.stack([goodness.max(-1) for goodness, _ in points], -1)  # (B, arms)
    target = bests.min(-1)  # (B,)
    return np.stack([least_drift(goodness, drift, target) for goodness, drift in points], -1)


def _means(arm: ArmPoints, items: Items, counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Goodness and drift of the seed model and of an arm's P points in B draws: (B, 1 + P) each."""
    goodness = _mean(arm.goodness, items.row_weights, counts.rows, counts.seeds)  # (B, P)
    drift = _mean(arm.drift, items.prompt_weights, counts.prompts, counts.seeds)  # (B, P)
    seed = _seed_goodness(items, counts)[:, None]  # (B, 1)
    no_drift = np.zeros_like(seed)
    drift = np.maximum(drift, 0.0)  # rounding may leave -1e-17 where nothing moved
    return np.concatenate([seed, goodness], -1), np.concatenate([no_drift, drift], -1)


def _seed_goodness(items: Items, counts: Counts) -> np.ndarray:
    """Goodness of the seed model in B draws: (B,)."""
    return (counts.rows @ items.seed) / (counts.rows @ items.row_weights)


def _mean(
    values: np.ndarray, weights: np.ndarray, item_counts: np.ndarray, seed_counts: np.ndarray
) -> np.ndarray:
    """Means per unit of weight of values (P, S, items) in B draws: (B, P)."""
    points, seeds, items = values.shape
    sums = item_counts @ values.reshape(points * seeds, items).T  # (B, P S)
    by_seed = sums.reshape(-1, points, seeds) * seed_counts[:, None, :]  # (B, P, S)
    drawn_weights = seeds * (item_counts @ weights)  # (B,)
    return by_seed.sum(-1) / drawn_weights[:, None]
