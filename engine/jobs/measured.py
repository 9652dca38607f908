"""What a run measured, item by item, and the means and intervals of an arm over its training seeds.

The main job and a study measure the same things: right answers and likelihoods of the held-out
rows, verdicts on further tasks, drift from the seed on general prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.evaluate.arm_grammar import title_of
from engine.evaluate.target_task import ANSWER, NATS, nll_file
from engine.measure.intervals import crossed_bootstrap, wilson
from engine.runtime.files import read_jsonl

DRIFT_NAMES = ("kl", "reverse_kl", "agree")
_NUMBER = (float, int)
# fields of a line of retention.jsonl
DRIFT = {
    "arm": str,
    "prompt": str,
    "kl": _NUMBER,
    "reverse_kl": _NUMBER,
    "agree": int,
    "tokens": int,
}


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
    training: dict[str, float] = field(default_factory=dict)  # budget, losses, seconds
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
    """A point of a comparison: an arm under a setting, with a run for every training seed."""

    name: str  # of the setting; "" for the seed model
    arm: str  # its name in the files: seed, sft, stm:2.5, sft@0.5, sft step 40
    runs: list[MeasuredRun]
    listed: bool = True  # False: only --scales or --checkpoints ask for it, not --arms
    estimates: dict[str, Estimate] = field(default_factory=dict, repr=False)  # found so far

    @property
    def title(self) -> str:
        """The arm's name that people are shown."""
        return title_of(self.arm)

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
        if name == "task_kl":
            of_runs = [[line["kl"] for line in run.task_drift] for run in self.runs]
            return Sums(np.array(of_runs), [line["tokens"] for line in first.task_drift])
        if name == "nll":
            return Sums(np.array([run.nll for run in self.runs]), first.tokens)
        values = []
        for run in self.runs:
            values.append([line[name] for line in run.drift])
        return Sums(np.array(values), [line["tokens"] for line in first.drift])

    def estimate(self, name: str) -> Estimate:
        """A mean and its interval; `name` is right, nll, kl, reverse_kl, agree or task_kl.

        The share of right answers has Wilson's interval, as if the seeds were one run: where all
        are wrong a bootstrap would have no spread.
        """
        if name not in self.estimates:
            self.estimates[name] = self._estimate(name)
        return self.estimates[name]

    def _estimate(self, name: str) -> Estimate:
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


def all_points(seed: ArmResults, groups: Sequence[Sequence[ArmResults]]) -> list[ArmResults]:
    """The seed model, then all points of the groups, each once: settings may share a run."""
    points = {(seed.arm, seed.name): seed}
    for group in groups:
        for point in group:
            points[point.arm, point.name] = point
    return list(points.values())


# ---- reading measurements


def held_out_runs(file: Path, arms: Iterable[str], ids: Sequence[str]) -> dict[str, MeasuredRun]:
    """The measurements of arms on the held-out rows of these ids, by arm.

    file    of the answers (engine/evaluate/target_task.py); without lines where nothing is judged
    """
    answers = {(line["arm"], line["id"]): line for line in read_jsonl(file, ANSWER)}
    nats = {(line["arm"], line["id"]): line for line in read_jsonl(nll_file(file), NATS)}
    runs = {}
    for arm in arms:
        right = None
        if answers:  # --verify none judges no answers
            right = [answers[arm, row]["ok"] for row in ids]
        runs[arm] = MeasuredRun(
            ids=list(ids),
            right=right,
            nll=[nats[arm, row]["nll"] for row in ids],
            tokens=[nats[arm, row]["tokens"] for row in ids],
        )
    return runs


def drift_lines(file: Path, arms: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """The lines of a complete retention file, by arm, the general prompts in one order."""
    lines = {(line["arm"], line["prompt"]): line for line in read_jsonl(file, DRIFT)}
    prompts = list(dict.fromkeys(prompt for _, prompt in lines))
    return {arm: [lines[arm, prompt] for prompt in prompts] for arm in arms}
