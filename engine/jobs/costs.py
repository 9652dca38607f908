"""What an arm costs: tokens that it generates, scores and trains on, and the seconds that they take

Tokens are the same in every run and may stand in any file. Seconds differ from run to run: they are
kept apart, in OUT/costs.json, and stand only in files that hold times anyway (summary.json,
study.json) and in what is printed.

A stage that several arms need is done once, and counts in full for each of them: an arm's cost is
what it would cost alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.distill.distill_report import DistillReport
from engine.evaluate.arm_grammar import title_of
from engine.runtime.files import write_json
from model.config import read_json


class Cost(NamedTuple):
    """The cost of an arm. Seconds are None where they are not known."""

    generated: int = 0  # tokens that the seed model sampled for it
    scored: int = 0  # tokens of the examples whose likelihoods under the seed it needs
    trained: int = 0  # tokens of all its optimizer steps
    generate_seconds: float | None = 0.0
    score_seconds: float | None = 0.0
    train_seconds: float | None = 0.0

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.generated + self.scored + self.trained

    @property
    def seconds(self) -> float | None:
        """All seconds; None where a part is not known."""
        parts = (self.generate_seconds, self.score_seconds, self.train_seconds)
        if None in parts:
            return None
        return sum(parts)

    def words(self, with_seconds: bool) -> str:
        """As text: 1,200 tokens generated, 0 scored, 5,000 trained, 31 s."""
        text = f"{self.generated:,} tokens generated, {self.scored:,} scored, "
        text += f"{self.trained:,} trained"
        if with_seconds:
            text += f", {_seconds(self.seconds)} s"
        return text

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict() | {"seconds": self.seconds}


def cost_table(costs: Mapping[str, Cost]) -> list[list[str]]:
    """A header, and a row for every arm, by its name."""
    rows = [
        [
            "arm",
            "generated tokens",
            "seconds",
            "scored tokens",
            "seconds",
            "trained tokens",
            "seconds",
            "all seconds",
        ]
    ]
    for name, cost in costs.items():
        rows.append(
            [
                title_of(name),
                f"{cost.generated}",
                _seconds(cost.generate_seconds),
                f"{cost.scored}",
                _seconds(cost.score_seconds),
                f"{cost.trained}",
                _seconds(cost.train_seconds),
                _seconds(cost.seconds),
            ]
        )
    return rows


def _seconds(value: float | None) -> str:
    """Seconds for a table; a dash where they are not known."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


class StageSeconds:
    """The seconds of stages that are done once for all arms, kept in a file over restarts.

    A process that is killed takes its seconds with it. So a stage's seconds are those measured,
    times all of its items over the items that were done in them.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stages: dict[str, dict[str, float]] = read_json(file, {})

    def add(self, stage: str, seconds: float, done: int, items: int) -> None:
        """Note that `done` of the stage's items took that long; nothing where none was done."""
        if done == 0:
            return
        known = self.stages.get(stage, {"seconds": 0.0, "done": 0})
        self.stages[stage] = {
            "seconds": known["seconds"] + seconds,
            "done": known["done"] + done,
            "items": items,
        }
        write_json(self.file, self.stages)

    def add_distillation(self, stage: str, report: DistillReport) -> None:
        """Note what this process took to distil a file."""
        self.add(stage, report.seconds, report.written, len(report.lines))

    def of(self, stage: str) -> float | None:
        """The seconds of the whole stage; None where it was never measured."""
        if stage not in self.stages:
            return None
        return self.each(stage) * self.stages[stage]["items"]

    def each(self, stage: str) -> float | None:
        """The seconds of one of the stage's items; None where it was never measured."""
        if stage not in self.stages:
            return None
        known = self.stages[stage]
        return known["seconds"] / known["done"]
