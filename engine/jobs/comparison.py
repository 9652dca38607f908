"""Ways of fine-tuning compared at equal target: a table, and in words which of them nothing beats

A way is a method and a loss (`sdft`, `stm:2.5`). All of its points (checkpoints, scales, rates,
ranks) make one frontier, and the ways are compared where all are equally good, by
engine/measure/equal_target.py, which has the definitions. Two measures of goodness are taken in
turn: the share of right answers, and the NLL of the held-out references. A difference is stated
where its p value is below 0.05 after Holm's correction for all pairs under both measures.

Only ways that were measured at the same scales are tested against each other. Half of an adapter's
strength may give nearly all of what it learned at a quarter of its drift, and a straight line from
the seed to scale 1 does not see that: the same adapter at one scale would lose against itself at
two. For the same reason a comparison at scale 1 alone carries a caution.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.evaluate.arm_grammar import STEP, Arm, title_of, way_of
from engine.jobs.costs import Cost
from engine.jobs.measured import ArmResults
from engine.measure.equal_target import (
    ArmPoints,
    Difference,
    EqualTarget,
    Interval,
    Items,
    at_equal_target,
)
from engine.measure.intervals import holm
from engine.runtime.terminal import table

SIGNIFICANT = 0.05  # a difference is stated below this p value


@dataclass(frozen=True)
class Pair:
    """Two compared ways, the one that drifted less first."""

    less: str
    more: str
    drift: Interval  # of `less` less that of `more`, at most 0
    p: float  # corrected for the number of pairs

    @property
    def is_seen(self) -> bool:
        """Whether the difference is stated."""
        return self.p < SIGNIFICANT


@dataclass(frozen=True)
class Goal:
    """The comparison under one measure of goodness."""

    measure: str  # right or nll
    ways: list[str]
    points: list[int]  # of each way
    found: EqualTarget
    pairs: list[Pair]  # those that are tested
    scales: dict[str, tuple[float, ...]]  # at which each way was measured

    @property
    def untested(self) -> list[tuple[str, str]]:
        """The pairs of ways that reach the target and were measured at different scales."""
        pairs = itertools.combinations(self.reaching(), 2)
        return [(a, b) for a, b in pairs if self.scales[a] != self.scales[b]]

    @property
    def has_one_scale(self) -> bool:
        """Whether no way was measured at another scale than 1."""
        return set(self.scales.values()) == {(1.0,)}

    def reaching(self) -> list[str]:
        """The ways that reach the target."""
        return [way for way, drift in zip(self.ways, self.found.drifts, strict=True) if drift]

    def unbeaten(self) -> list[str]:
        """The ways that reach the target and that no other is seen to beat, least drift first."""
        beaten = {pair.more for pair in self.pairs if pair.is_seen}
        drifts = {}
        for way, drift in zip(self.ways, self.found.drifts, strict=True):
            if drift is not None and way not in beaten:
                drifts[way] = drift.value
        return sorted(drifts, key=drifts.__getitem__)

    def shown(self, goodness: float) -> str:
        """A goodness as people read it: a share, or nats per token."""
        return f"{goodness:.1%}" if self.measure == "right" else f"{-goodness:.3f}"


def compare(seed: ArmResults, points: Sequence[ArmResults]) -> list[Goal]:
    """The ways of these points compared, under each measure of goodness; [] for fewer than two."""
    by_way: dict[str, list[ArmResults]] = {}
    for point in points:
        by_way.setdefault(way_of(point.arm), []).append(point)
    if len(by_way) < 2:
        return []
    measures = ["right", "nll"] if seed.judged else ["nll"]
    ways = list(by_way)
    scales = {way: _scales(of_way) for way, of_way in by_way.items()}
    counts = [len(of_way) for of_way in by_way.values()]
    found = {measure: _at_equal_target(seed, by_way, measure) for measure in measures}
    tested: dict[str, list[Difference]] = {}
    for measure, result in found.items():
        tested[measure] = []
        for one in result.differences:
            if scales[ways[one.first]] == scales[ways[one.second]]:
                tested[measure].append(one)
    # one correction for all pairs that are looked at
    p_values = [one.p for of_measure in tested.values() for one in of_measure]
    corrected = iter(holm(p_values))
    goals = []
    for measure, result in found.items():
        pairs = []
        for one in tested[measure]:
            pairs.append(_pair(ways[one.first], ways[one.second], one.drift, next(corrected)))
        goals.append(Goal(measure, ways, counts, result, pairs, scales))
    return goals


def _scales(points: Sequence[ArmResults]) -> tuple[float, ...]:
    """The scales at which finished adapters were measured, in order."""
    names = [point.arm for point in points if STEP not in point.arm]
    return tuple(sorted({Arm.parse(name).scale for name in names}))


def _at_equal_target(
    seed: ArmResults, by_way: Mapping[str, Sequence[ArmResults]], measure: str
) -> EqualTarget:
    """`at_equal_target` of the ways' points; goodness is `right`, or `nll` with a minus sign."""
    any_point = next(iter(by_way.values()))[0]
    prompt_weights = np.array(any_point.sums("kl").weights, dtype=np.float64)
    if measure == "right":
        of_seed = seed.right()[0].astype(np.float64)  # (rows,)
        row_weights = np.ones(len(of_seed))
    else:
        sums = seed.sums("nll")
        of_seed = -sums.values[0]
        row_weights = np.array(sums.weights, dtype=np.float64)
    arms = []
    for points in by_way.values():
        goodness = [_goodness(point, measure) for point in points]
        drift = [point.sums("kl").values for point in points]
        arms.append(ArmPoints(np.array(goodness, dtype=np.float64), np.array(drift)))
    return at_equal_target(arms, Items(row_weights, prompt_weights, of_seed))


def _goodness(point: ArmResults, measure: str) -> np.ndarray:
    """(seeds, rows), summed over each row; higher is better."""
    return point.right() if measure == "right" else -point.sums("nll").values


def _pair(first: str, second: str, drift: Interval, p: float) -> Pair:
    """The pair with the way that drifted less in front."""
    if drift.value <= 0:
        return Pair(first, second, drift, p)
    turned = Interval(-drift.value, -drift.high, -drift.low)
    return Pair(second, first, turned, p)


# ---- for study.json and summary.json


def comparison_record(goals: Sequence[Goal], costs: Mapping[str, Cost]) -> dict[str, Any]:
    """The comparisons as JSON, with their words and seconds. costs: of each way, by its name."""
    record: dict[str, Any] = {}
    for goal in goals:
        found = goal.found
        ways = []
        for way, count, best, drift in zip(
            goal.ways, goal.points, found.best, found.drifts, strict=True
        ):
            interval = None if drift is None else (drift.low, drift.high)
            ways.append(
                {
                    "way": way,
                    "points": count,
                    "best": best,
                    "reaches": drift is not None,
                    "kl": None if drift is None else drift.value,
                    "interval": interval,
                }
            )
        record[goal.measure] = {
            "seed": found.seed,
            "target": found.target,
            "ways": ways,
            "pairs": [
                {
                    "less": pair.less,
                    "more": pair.more,
                    "difference": pair.drift.value,
                    "interval": (pair.drift.low, pair.drift.high),
                    "p_holm": pair.p,
                    "seen": pair.is_seen,
                }
                for pair in goal.pairs
            ],
            "untested": goal.untested,
            "scales": goal.scales,
            "unbeaten": goal.unbeaten(),
            "table": goal_table(goal, costs),
            "title": goal_title(goal),
            "words": goal_words(goal, costs, with_seconds=True),
        }
    return record


# ---- in words


def comparison_text(
    goals: Sequence[Goal], costs: Mapping[str, Cost], *, with_seconds: bool
) -> list[str]:
    """The comparisons as lines of text."""
    lines = []
    for goal in goals:
        lines += ["", goal_title(goal), table(goal_table(goal, costs))]
        lines += [f"  {sentence}" for sentence in goal_words(goal, costs, with_seconds)]
    if goals:
        lines += ["", NOTE]
    return lines


NOTE = (
    "At equal target: the arms that gain at least half of the largest gain on the seed are "
    "compared at the best target that all of them reach. KL there: an arm's points that none of "
    "its own beats (the seed at 0 among them, as its scale 0), joined by straight lines in the "
    "root of the KL, where they reach that target. Intervals: 95 %, 10,000 bootstrap draws of "
    "rows, prompts and training seeds, the target found anew in each; a difference is stated where "
    "p < 0.05 after Holm's correction for all pairs that are tested."
)


def goal_title(goal: Goal) -> str:
    """The line over a comparison's table."""
    name = "right answers" if goal.measure == "right" else "held-out NLL"
    if goal.found.target is None:
        return f"at equal {name}: no arm is better than the seed"
    target = goal.shown(goal.found.target)
    return f"at equal {name}, {target} (seed {goal.shown(goal.found.seed)}):"


def goal_table(goal: Goal, costs: Mapping[str, Cost]) -> list[list[str]]:
    """A header, and a row for every way."""
    rows = [
        [
            "arm",
            "points",
            "best",
            "KL to seed there",
            "95 % interval",
            "generated tokens",
            "scored",
            "trained",
        ]
    ]
    found = goal.found
    for way, count, best, drift in zip(
        goal.ways, goal.points, found.best, found.drifts, strict=True
    ):
        cells = ["does not reach" if found.target is not None else "-", "-"]
        if drift is not None:
            cells = [f"{drift.value:.4f}", f"{drift.low:.4f} - {drift.high:.4f}"]
        cost = costs[way]
        tokens = [f"{cost.generated}", f"{cost.scored}", f"{cost.trained}"]
        rows.append([title_of(way), str(count), goal.shown(best), *cells, *tokens])
    return rows


def goal_words(goal: Goal, costs: Mapping[str, Cost], with_seconds: bool) -> list[str]:
    """Sentences: what nothing beats and at which cost, what is seen, what is not, who stays out."""
    if goal.found.target is None:
        return ["Nothing to compare: no arm is better than the seed."]
    sentences = []
    unbeaten = goal.unbeaten()
    sentences.append(f"Nothing beats {_listed(unbeaten)}.")
    cheapest = min(unbeaten, key=lambda way: costs[way].tokens)
    cost = costs[cheapest].words(with_seconds)
    subject = "Its cost"
    if len(unbeaten) > 1:
        subject = f"The fewest tokens of these takes {title_of(cheapest)}"
    sentences.append(f"{subject}: {cost}.")
    for pair in goal.pairs:
        if pair.is_seen:
            difference = f"{pair.drift.value:.4f}, {pair.drift.low:.4f} to {pair.drift.high:.4f}"
            sentences.append(
                f"{title_of(pair.less)} forgets less than {title_of(pair.more)} "
                f"({difference}; p {pair.p:.3f})."
            )
    unseen: dict[str, list[str]] = {}
    for pair in goal.pairs:
        if not pair.is_seen:
            unseen.setdefault(pair.less, []).append(pair.more)
    for way, others in unseen.items():
        each = "each of " if len(others) > 1 else ""
        sentences.append(f"No difference seen between {title_of(way)} and {each}{_listed(others)}.")
    sentences += _cautions(goal)
    out = [way for way in goal.ways if way not in goal.reaching()]
    if out:
        best = dict(zip(goal.ways, goal.found.best, strict=True))
        named = ", ".join(f"{title_of(way)} (best {goal.shown(best[way])})" for way in out)
        verb = "does not reach it" if len(out) == 1 else "do not reach it"
        sentences.append(f"{named} {verb}.")
    return sentences


def _cautions(goal: Goal) -> list[str]:
    """Sentences on pairs that are not tested, and on ways without a curve."""
    sentences = []
    if goal.untested:
        pairs = ", ".join(f"{title_of(a)} and {title_of(b)}" for a, b in goal.untested)
        sentences.append(
            f"Not tested, since they were measured at different scales: {pairs}. --scales measures "
            "all arms at the same."
        )
    if goal.has_one_scale:
        sentences.append(
            "All were measured at full strength alone: an arm that is better than the target "
            "appears with too much drift. --scales 0.25,0.5,0.75,1 gives each its own curve."
        )
    return sentences


def _listed(ways: Sequence[str]) -> str:
    """Names joined by commas and "and"."""
    names = [title_of(way) for way in ways]
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]}"
