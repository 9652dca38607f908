"""The findings of a study: target against retention per arm, differences with intervals, in words

Everything is paired: both arms answered the same held-out rows and were compared with the seed over
the same answers to the same general prompts. A difference is SDFT - SFT.

    interval     `crossed_bootstrap` (engine/measure/intervals.py): held-out rows, or general
                 prompts, are resampled, the same for both arms and all seeds; with several
                 training seeds the seeds are resampled too
    p            right or wrong on the same rows: McNemar's exact test for each training seed;
                 combined, the exact test that flips the signs of the rows' differences, each summed
                 over the seeds. It is a test over rows; the spread over seeds is in the interval

A difference is reported where its interval leaves out zero and, on the target, the combined p is
below 0.05 too; otherwise "no difference seen". Nothing corrects for looking at many settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from engine.evaluate.arms import ARM_NAMES
from engine.measure.intervals import crossed_bootstrap, lost_won, mcnemar, sign_flip_test, wilson
from engine.runtime.terminal import table

SIGNIFICANT = 0.05  # a difference of verdicts is reported below this p
DRIFT_NAMES = ("kl", "reverse_kl", "agree")
NOT_SEEN = "no difference seen"


class Estimate(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


class Sums(NamedTuple):
    """A measurement summed over the tokens of each item, under every training seed."""

    values: np.ndarray  # (seeds, items)
    weights: list[int]  # (items,) tokens


@dataclass
class MeasuredRun:
    """The measurements of one run, item by item."""

    ids: list[str]  # held-out rows
    right: list[bool] | None  # None where nothing is judged
    nll: list[float]  # nats of the references, summed over `tokens`
    tokens: list[int]
    drift: list[dict[str, Any]] = field(default_factory=list)  # lines of retention.jsonl
    training: dict[str, float] = field(default_factory=dict)  # study.training_figures
    tasks: dict[str, list[bool]] = field(default_factory=dict)  # "task scorer" -> verdicts
    task_drift: list[dict[str, Any]] = field(default_factory=list)  # of retention_task.jsonl
    norms: dict[str, Any] = field(default_factory=dict)  # of the update (`update_norms`)

    def figures(self) -> dict[str, Any]:
        """Counts of right answers and means per token, for study.json."""
        figures: dict[str, Any] = {
            "nll": sum(self.nll) / sum(self.tokens),
            "training": self.training,
        }
        if self.right is not None:
            figures["right"] = sum(self.right)
        if self.tasks:
            figures["tasks"] = {name: sum(verdicts) for name, verdicts in self.tasks.items()}
        if self.drift:
            tokens = sum(line["tokens"] for line in self.drift)
            for name in DRIFT_NAMES:
                figures[name] = sum(line[name] for line in self.drift) / tokens
        if self.task_drift:
            tokens = sum(line["tokens"] for line in self.task_drift)
            figures["task_kl"] = sum(line["kl"] for line in self.task_drift) / tokens
        if self.norms:
            figures["update_norms"] = self.norms
        return figures


@dataclass
class ArmResults:
    """A setting and arm with its runs, one for every training seed."""

    name: str  # of the setting; "" for the seed model
    arm: str  # seed | sft | sdft
    runs: list[MeasuredRun]

    @property
    def judged(self) -> bool:
        """Whether answers to the held-out rows were judged."""
        return self.runs[0].right is not None

    @property
    def has_task_drift(self) -> bool:
        """Whether drift was measured on the held-out rows; the seed has none anywhere."""
        return self.arm == "seed" or bool(self.runs[0].task_drift)

    @property
    def norm(self) -> float:
        """Frobenius norm of the update, the mean over the runs; 0 for the seed."""
        return sum(run.norms.get("norm", 0.0) for run in self.runs) / len(self.runs)

    @property
    def seconds(self) -> float:
        """Seconds of training, the mean over the runs."""
        return sum(run.training["seconds"] for run in self.runs) / len(self.runs)

    def on_task(self, task: str) -> ArmResults:
        """The same runs, with their verdicts on a further task in place of the held-out rows."""
        runs = [MeasuredRun([], run.tasks[task], [], []) for run in self.runs]
        return ArmResults(self.name, self.arm, runs)

    def right(self) -> np.ndarray:
        """Verdicts as (seeds, rows) int64 of 0 and 1."""
        return np.array([run.right for run in self.runs], dtype=np.int64)

    def sums(self, name: str) -> Sums:
        """The sums of "nll" over the held-out rows, or of one of DRIFT_NAMES over the prompts;
        "task_kl" is the KL over the seed's answers to the held-out rows.
        """
        first = self.runs[0]
        values = []
        if name == "nll":
            return Sums(np.array([run.nll for run in self.runs]), first.tokens)
        if name == "task_kl":
            for run in self.runs:
                values.append([line["kl"] for line in run.task_drift])
            return Sums(np.array(values), [line["tokens"] for line in first.task_drift])
        for run in self.runs:
            values.append([line[name] for line in run.drift])
        return Sums(np.array(values), [line["tokens"] for line in first.drift])

    def estimate(self, name: str) -> Estimate:
        """A mean and its interval; `name` is right, nll, kl, reverse_kl, agree or task_kl.

        The share of right answers has Wilson's interval, as if the seeds were one run: where all
        are wrong a bootstrap would have no spread.
        """
        if name == "right":
            right = self.right()
            share = float(right.mean())
            low, high = wilson(share, right.shape[1])
            return Estimate(share, low, high)
        # drift is measured against the seed model itself
        if self.arm == "seed" and name == "agree":
            return Estimate(1.0, 1.0, 1.0)
        if self.arm == "seed" and name != "nll":
            return Estimate(0.0, 0.0, 0.0)
        sums = self.sums(name)
        return Estimate(*crossed_bootstrap(sums.values, sums.weights))

    def figures(self) -> dict[str, Any]:
        """Every figure of these runs, for study.json."""
        figures: dict[str, Any] = {"setting": self.name, "arm": self.arm, "runs": len(self.runs)}
        names = ["nll", *DRIFT_NAMES]
        if self.judged:
            names = ["right", *names]
        if self.has_task_drift:
            names.append("task_kl")
        for name in names:
            mean, low, high = self.estimate(name)
            figures[name] = {"value": mean, "interval": (low, high)}
        figures["by_seed"] = [run.figures() for run in self.runs]
        return figures


Pairs = Sequence[Sequence[ArmResults]]  # (SFT, SDFT) of every setting


def all_arms(seed: ArmResults, pairs: Pairs) -> list[ArmResults]:
    """The seed model, then all arms, each once: settings that differ in the mix share their SFT."""
    arms = {(seed.arm, seed.name): seed}
    for pair in pairs:
        for arm in pair:
            arms[arm.arm, arm.name] = arm
    return list(arms.values())


# ---- differences


def difference(sft: ArmResults, sdft: ArmResults) -> dict[str, Any]:
    """SDFT - SFT in every measurement, with intervals, tests and words."""
    found: dict[str, Any] = {"setting": sdft.name}
    for name in ("nll", *DRIFT_NAMES):
        of_sft = sft.sums(name)
        of_sdft = sdft.sums(name)
        by_item = of_sdft.values - of_sft.values  # (seeds, items)
        found[name] = Estimate(*crossed_bootstrap(by_item, of_sft.weights))
    if sft.has_task_drift and sdft.has_task_drift:
        of_sft = sft.sums("task_kl")
        by_item = sdft.sums("task_kl").values - of_sft.values
        found["task_kl"] = Estimate(*crossed_bootstrap(by_item, of_sft.weights))
    if sdft.judged:
        found |= verdict_difference(sft, sdft)
    found["words"] = in_words(found)
    return found


def verdict_difference(sft: ArmResults, sdft: ArmResults) -> dict[str, Any]:
    """SDFT - SFT in right answers: the mean with its interval, and the tests."""
    by_row = sdft.right() - sft.right()  # (seeds, rows) of -1, 0 and 1
    equal_weights = [1.0] * by_row.shape[1]
    counts = []  # for every training seed: rows that only SFT, and that only SDFT got right
    for of_sft, of_sdft in zip(sft.right(), sdft.right(), strict=True):
        lost, won = lost_won(of_sft, of_sdft)
        counts.append([lost, won])
    return {
        "right": Estimate(*crossed_bootstrap(by_row, equal_weights)),
        "lost_won": counts,
        "p_by_seed": [mcnemar(lost, won) for lost, won in counts],
        "p": sign_flip_test(by_row.sum(0).tolist()),
    }


def in_words(found: dict[str, Any]) -> str:
    """A difference as text; NOT_SEEN where an interval holds 0."""
    parts = []
    if "right" in found:
        parts.append("target: " + _verdict_words(found, "SDFT better", "SFT better"))
    parts.append(
        "held-out NLL: " + _mean_words(found["nll"], "SDFT fits better", "SFT fits better")
    )
    parts.append("KL to seed: " + _mean_words(found["kl"], "SDFT forgot less", "SFT forgot less"))
    if "task_kl" in found:
        words = _mean_words(found["task_kl"], "SDFT moved less", "SFT moved less")
        parts.append(f"KL to seed on the task: {words}")
    return "; ".join(parts)


def _mean_words(estimate: Estimate, if_less: str, if_more: str) -> str:
    """The words for a difference of NLL or KL: lower is better."""
    mean, low, high = estimate
    words = NOT_SEEN
    if high < 0:
        words = if_less
    elif low > 0:
        words = if_more
    return f"{words} ({mean:+.4f}, {low:+.4f} to {high:+.4f})"


def _verdict_words(found: dict[str, Any], if_more: str, if_less: str) -> str:
    """The words for a difference of the shares of right answers, by interval and test."""
    mean, low, high = found["right"]
    words = NOT_SEEN
    if found["p"] < SIGNIFICANT and low > 0:
        words = if_more
    elif found["p"] < SIGNIFICANT and high < 0:
        words = if_less
    interval = f"{100 * mean:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f}"
    return f"{words} ({interval}, p {_p_values(found)})"


def _p_values(found: dict[str, Any]) -> str:
    """The combined p, and those of the training seeds where there are several."""
    combined = f"{found['p']:.3f}"
    if len(found["p_by_seed"]) == 1:
        return combined
    by_seed = ", ".join(f"{p:.3f}" for p in found["p_by_seed"])
    return f"{combined} (by seed {by_seed})"


# ---- the Pareto front


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For every point (goodness, drift): whether no other point beats it."""
    front = []
    for point in points:
        beaten = any(_beats(other, point) for other in points)
        front.append(not beaten)
    return front


def _beats(other: tuple[float, float], point: tuple[float, float]) -> bool:
    """Whether `other` is at least as good and drifted no more, and the two are not equal."""
    goodness, drift = point
    other_goodness, other_drift = other
    return other_goodness >= goodness and other_drift <= drift and other != point


def _front_of(arms: Sequence[ArmResults]) -> list[bool]:
    """For every arm: whether it is on the Pareto front of target against KL to the seed."""
    points = []
    for arm in arms:
        goodness = arm.estimate("right").mean if arm.judged else -arm.estimate("nll").mean
        points.append((goodness, arm.estimate("kl").mean))
    return pareto_front(points)


# ---- the text


def findings(seed: ArmResults, pairs: Pairs, verify: str) -> tuple[dict[str, Any], str]:
    """The findings as study.json holds them, and the closing table."""
    arms = all_arms(seed, pairs)
    on_front = _front_of(arms)
    header = [
        "setting",
        "arm",
        f"target ({verify})",
        "95 % interval",
        "held-out NLL",
        "KL to seed",
        "95 % interval",
        "KL from seed",
        "same top-1",
        "KL, task",
        "update norm",
        "examples",
        "steps",
        "tokens",
        "loss tokens",
        "front",
    ]
    lines = [header]
    figures = []
    for arm, is_best in zip(arms, on_front, strict=True):
        mark = "*" if is_best else ""
        lines.append([arm.name or "-", ARM_NAMES[arm.arm], *_cells(arm), mark])
        figures.append(arm.figures() | {"front": is_best})

    differences = [difference(sft, sdft) for sft, sdft in pairs]
    tasks, task_lines = task_differences(seed, pairs)
    text = [table(lines), "", "SDFT - SFT:"]
    text += [f"  {found['setting']}: {found['words']}" for found in differences]
    text += task_lines
    text += ["", *_notes(seed, pairs)]
    record = {"points": figures, "differences": differences, "elsewhere": tasks}
    return record, "\n".join(text)


def _cells(arm: ArmResults) -> list[str]:
    """An arm's line of the table, after its names and before its mark."""
    target = ["-", "-"]
    if arm.judged:
        right = arm.estimate("right")
        target = [_share(arm), f"{right.low:.1%} - {right.high:.1%}"]

    kl = arm.estimate("kl")
    kl_interval = f"{kl.low:.4f} - {kl.high:.4f}"
    budget = ["-", "-", "-", "-"]
    if arm.arm == "seed":
        kl_interval = "-"
    else:
        training = arm.runs[0].training  # other seeds differ in the draw of the mix at most
        names = ("examples", "steps", "tokens", "response_tokens")
        budget = [f"{training[name]}" for name in names]
    return [
        *target,
        f"{arm.estimate('nll').mean:.3f}",
        f"{kl.mean:.4f}",
        kl_interval,
        f"{arm.estimate('reverse_kl').mean:.4f}",
        f"{arm.estimate('agree').mean:.1%}",
        f"{arm.estimate('task_kl').mean:.4f}" if arm.has_task_drift else "-",
        f"{arm.norm:.3f}",
        *budget,
    ]


def _share(arm: ArmResults) -> str:
    """Share of right answers over all seeds, with the count of each seed."""
    right = arm.right()  # (seeds, rows)
    counts = "+".join(str(count) for count in right.sum(1))
    return f"{right.mean():.1%} ({counts}/{right.shape[1]})"


def task_differences(seed: ArmResults, pairs: Pairs) -> tuple[list[dict[str, Any]], list[str]]:
    """The --task tasks, by setting and scorer: figures for study.json, and lines of the text."""
    found: list[dict[str, Any]] = []
    lines = [["setting", "task, scorer", "seed", "SFT", "SDFT", "SDFT - SFT"]]
    for sft, sdft in pairs:
        for name in seed.runs[0].tasks:
            of_seed, of_sft, of_sdft = seed.on_task(name), sft.on_task(name), sdft.on_task(name)
            verdicts = verdict_difference(of_sft, of_sdft)
            words = _verdict_words(verdicts, "higher", "lower")
            found.append({"setting": sdft.name, "task": name, "words": words} | verdicts)
            shares = [_share(of_seed), _share(of_sft), _share(of_sdft)]
            lines.append([sdft.name, name, *shares, words])
    if not found:
        return [], []
    return found, ["", "elsewhere:", table(lines)]


def _notes(seed: ArmResults, pairs: Pairs) -> list[str]:
    """How to read the table."""
    first_sft = pairs[0][0]
    seeds = len(first_sft.runs)
    several = seeds > 1
    rows = len(seed.runs[0].ids)
    prompts = len(first_sft.runs[0].drift)
    resampled = (
        f"the {rows} held-out rows or the {prompts} general prompts drawn again, the same for "
        "both arms"
    )
    if several:
        resampled += f" and all seeds, and the {seeds} training seeds too"
    notes = [
        "KL in nats per token over the seed's own answers to general prompts: to seed is "
        "KL(seed || tuned), from seed KL(tuned || seed); lower is less forgotten. KL, task: the "
        "same over its answers to the held-out prompts. update norm: Frobenius norm of all updates "
        "s B A together. front: no other line is better at both target and KL to seed.",
        f"Intervals of differences, NLL and KL: 95 %, 2000 bootstrap draws, {resampled}.",
    ]
    if seed.judged:
        as_one = ", as if all seeds were one run" if several else ""
        notes.append(f"The interval of a share is Wilson's over rows{as_one}.")
        test = "p: McNemar's exact test on the same rows"
        if several:
            test += (
                " for every seed; combined: exact, signs of the rows' differences summed over seeds"
            )
        notes.append(
            f"{test}. A difference is called one where p < 0.05 and the interval leaves out 0."
        )
    if several:
        notes.append(f"With {seeds} seeds the seeds' part of an interval is rather too small.")
    else:
        notes.append("One training seed: how much another would change is not in any interval.")
    return notes
