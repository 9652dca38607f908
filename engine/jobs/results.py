"""The results of the main job: what its stages found, summary.json, the closing table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.distill.distill_report import DistillReport
from engine.distill.seed_likelihoods import LikelihoodSums
from engine.evaluate.arm_grammar import DEFAULT_ARMS, Arm, way_of
from engine.evaluate.arms import Arms
from engine.evaluate.further_measures import further_measures
from engine.evaluate.target_task import Score, summary
from engine.evaluate.tasks.run import tasks_table
from engine.evaluate.tasks.scores import Scores
from engine.jobs.arm_training import Material, TrainedArm, arm_cost, train_arm
from engine.jobs.comparison import Goal, comparison_record, comparison_text
from engine.jobs.costs import Cost, StageSeconds, cost_table
from engine.jobs.job_config import JobConfig
from engine.runtime.run_record import environment
from engine.runtime.terminal import table
from engine.session import Session
from engine.train.validate import Validator


@dataclass
class Results:
    """The results of the stages, filled in as they finish."""

    distilled: DistillReport | None = None
    likelihood: LikelihoodSums | None = None  # None with --no-score
    material: Material | None = None
    trained: dict[str, TrainedArm] = field(default_factory=dict)  # by name of the arm at scale 1
    costs: dict[str, Cost] = field(default_factory=dict)  # by name of the arm at scale 1
    arms: Arms = field(default_factory=dict)  # the seed, and every arm's adapter at its scale
    titles: dict[str, str] = field(default_factory=dict)  # of `arms`, for people
    hashes: dict[str, str] = field(default_factory=dict)  # of all adapters that OUT has measured
    # by name of the arm; drift and norms without the seed
    scores: dict[str, Score] = field(default_factory=dict)
    tasks: Scores = field(default_factory=dict)
    drift: dict[str, dict[str, Any]] = field(default_factory=dict)
    task_drift: dict[str, dict[str, Any]] = field(default_factory=dict)
    norms: dict[str, dict[str, Any]] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)  # the arms compared at equal target
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, since the last start

    def train(
        self,
        session: Session,
        config: JobConfig[Any],
        arm: Arm,
        out: Path,
        stages: StageSeconds,
        validator: Validator | None,
    ) -> None:
        """Train an arm into OUT/<its directory>, and add it up."""
        trained = train_arm(
            session, config, arm, self.material, out / arm.directory, stages, validator
        )
        self.trained[arm.name] = trained
        seconds = trained.summary["seconds"]
        self.costs[arm.name] = arm_cost(arm, self.material, trained, seconds, stages)

    def measure(self, arms: Sequence[Arm]) -> None:
        """Make these arms the ones to measure, each at its scale."""
        self.arms = {"seed": None}
        self.titles = {"seed": "seed"}
        for arm in arms:
            self.arms[arm.name] = self.training_of(arm.name).lora.scaled(arm.scale)
            self.titles[arm.name] = arm.title

    def training_of(self, name: str) -> TrainedArm:
        """The training of an arm, by the arm's name."""
        return self.trained[Arm.parse(name).trained().name]

    def costs_of_ways(self) -> dict[str, Cost]:
        """The cost of the first training of every way (method and loss)."""
        costs: dict[str, Cost] = {}
        for name, cost in self.costs.items():
            costs.setdefault(way_of(name), cost)
        return costs

    def record(self, session: Session) -> dict[str, Any]:
        """The content of summary.json, except the settings."""
        likelihood = None
        if self.likelihood is not None:
            likelihood = dataclasses.asdict(self.likelihood)
        return {
            "environment": environment(),
            "model": session.facts(),
            "distilled": {
                "counts": dict(self.distilled.counts),
                "differ": self.distilled.differ,
            },
            "likelihood": likelihood,
            "training": {arm: trained.summary for arm, trained in self.trained.items()},
            "evaluation": summary(self.scores),
            "tasks": self.tasks,
            "retention": self.drift,
            "retention_task": self.task_drift,
            "update_norms": self.norms,
            "arms": self.titles,
            "costs": {arm: cost.record() for arm, cost in self.costs.items()},
            "cost_table": cost_table(self.costs),
            "equal_target": comparison_record(self.goals, self.costs_of_ways()),
            "seconds": self.seconds,
        }


# ---- the closing table


def closing_text(config: JobConfig[Any], out: Path, results: Results) -> str:
    """The table of the arms, and the places of the files."""
    header = [
        "",
        f"target ({config.distill.verify})",
        "95 % interval",
        "held-out NLL",
        "KL to seed",
        "KL from seed",
        "same top-1",
        "train loss",
        "train s",
    ]
    arms = [[title, *_cells(arm, results)] for arm, title in results.titles.items()]
    text = [table([header, *arms]), ""]
    further = further_measures(results.task_drift, results.norms)
    if further:
        text += [further, ""]
    text.append(results.distilled.text())
    if results.likelihood is not None:
        text.append(results.likelihood.text())
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in results.seconds.items())
    text.append(f"seconds since the last start: {seconds}")
    text += [
        "KL to and from seed, KL(seed || tuned) and KL(tuned || seed): nats per token over the "
        "seed's own answers to general prompts; lower is less forgotten.",
        f"distilled data {out}/distilled.jsonl, adapters {_directories(out, results)} (PEFT "
        "layout), "
        f"answers {out}/evaluation.jsonl, drift {out}/retention.jsonl, all figures "
        f"{out}/summary.json",
    ]
    if (config.job.arms, config.job.scales) != (DEFAULT_ARMS, None):
        costs = results.costs_of_ways()
        text += ["", "what each arm costs alone:", table(cost_table(results.costs))]
        text += comparison_text(results.goals, costs, with_seconds=True)
    return "\n".join(text) + tasks_table(results.tasks)


def _directories(out: Path, results: Results) -> str:
    """The run directories of the trainings, for a sentence."""
    folders = [f"{out}/{Arm.parse(name).directory}" for name in results.trained]
    if len(folders) == 1:
        return folders[0]
    return f"{', '.join(folders[:-1])} and {folders[-1]}"


def _cells(arm: str, results: Results) -> list[str]:
    """An arm's line of the table, after its name."""
    target = ["-", "-", "-"]
    if arm in results.scores:
        score = results.scores[arm]
        target = [*score.cells(), f"{score.nll:.3f}"]

    # the seed model has no drift from itself
    drift = results.drift.get(arm, {"kl": 0.0, "reverse_kl": 0.0, "agreement": 1.0})
    retention_cells = [
        f"{drift['kl']:.4f}",
        f"{drift['reverse_kl']:.4f}",
        f"{drift['agreement']:.1%}",
    ]

    training_cells = ["-", "-"]
    if arm != "seed":
        training = results.training_of(arm).summary
        loss = f"{training['first_loss']:.3f} -> {training['last_loss']:.3f}"
        training_cells = [loss, f"{training['seconds']:.0f}"]
    return [*target, *retention_cells, *training_cells]
