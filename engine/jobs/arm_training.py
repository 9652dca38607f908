"""Training the arms of a job: what they are trained on is made once and shared by all of them

    Material     the distilled lines, the unguided ones, the answers for replay, the place of the
                 seed's likelihoods per token; only what the arms need is made
    train_arm    the examples of an arm, and its training into a run directory
    finished_arm the same of a finished run whose weights were deleted
    arm_cost     the tokens and seconds that it took

All arms train over one frozen model with the same seed and the same number of optimizer steps:
that of the references. An arm with fewer rows (rft) passes over them more often, one with more
(replay) less often.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.distilled import Distilled
from engine.data.encode import (
    Example,
    ExamplesOnDisk,
    check_some_are_left,
    fingerprint,
    sizes,
)
from engine.data.example_store import ExampleStore
from engine.data.row_store import StoredRows
from engine.data.rows import Row
from engine.data.subset import FirstItems
from engine.distill.distill import distill, distill_settings
from engine.distill.distill_report import DistillReport
from engine.evaluate.arm_grammar import PLAIN, Arm
from engine.jobs.costs import Cost, StageSeconds
from engine.jobs.job_config import JobConfig
from engine.jobs.stages import encode_rows, replay_config, replay_rows
from engine.measure.seed_nll import nll_under_seed
from engine.runtime.files import each_of_jsonl, read_jsonl
from engine.sampling.chat_generator import ChatGenerator
from engine.session import Session
from engine.train.losses import Loss
from engine.train.replay import refuse_held_out, replay_pool
from engine.train.temporary_examples import joined
from engine.train.train import FrozenModel, finished_summary, train
from engine.train.validate import Validator
from model.lora import Lora
from model.trained_chat import TrainedChat

# methods that are trained on rewrites shown the reference, and so need distilled.jsonl
GUIDED = ("sdft", "rft")
# methods whose examples may be more or fewer than the references
OTHER_COUNT = ("self", "rft", "replay")


@dataclass(frozen=True)
class Material:
    """What the arms are trained on."""

    folder: Path  # of the seed's likelihoods per token
    lines: Sequence[Distilled]  # references, and rewrites that were shown them; on disk
    unguided: Sequence[Distilled] | None = None  # for `self`; None where no arm needs them

    def of_rows(self, rows: Iterable[Row]) -> Material:
        """The material of these rows, which are the first ones of all."""
        turns = sum(len(row.turns) for row in rows)  # each has a line, in the order of the rows
        unguided = None if self.unguided is None else FirstItems(self.unguided, turns)
        return Material(self.folder, FirstItems(self.lines, turns), unguided)


def check_arms(
    session: Session, config: JobConfig[Any], arms: Sequence[Arm], held_out: Sequence[Row]
) -> None:
    """ValueError for arms that the other settings rule out, and for faulty prompts of replay.

    held_out    rows whose prompts must not be among those of replay
    """
    for arm in arms:
        if arm.method == "self":
            config.distill.unguided().check()
        replay = replay_config(config, arm)
        if replay is not None:
            replay.check()
            pool = replay_pool(session, replay, skip_bad=config.data.skip_bad)
            refuse_held_out(replay, pool, held_out)


def make_material(
    session: Session,
    config: JobConfig[Any],
    rows: StoredRows,
    report: DistillReport,
    arms: Sequence[Arm],
    out: Path,
    stages: StageSeconds,
) -> Material:
    """What the arms need beside the distilled lines of `report`, made in `out` where it is missing.

    Takes the seconds of every stage into `stages`. ValueError where the arm rft would have no row.
    """
    if any(arm.method == "rft" for arm in arms):
        try:
            check_some_are_left(report.lines)
        except ValueError as error:  # nothing is left
            raise ValueError(f"arm rft, which is sdft with {error}") from None
    unguided = None
    if any(arm.method == "self" for arm in arms):
        of_self = unguided_report(session, config, rows, out / "unguided.jsonl")
        stages.add_distillation("unguided", of_self)
        print(f"unguided answers, for the arm self: {of_self.text()}")
        unguided = of_self.lines
    return Material(out, report.lines, unguided)


def unguided_report(
    session: Session, config: JobConfig[Any], rows: StoredRows, file: Path
) -> DistillReport:
    """The seed's own answers to the plain prompts, verified like rewrites, in `file`."""
    unguided = config.distill.unguided()
    return distill(
        ChatGenerator(session.model, session.chat, config.sampling),
        rows,
        file,
        unguided,
        settings=distill_settings(session, rows, unguided, config.sampling),
        resume=True,
    )


@dataclass(frozen=True)
class TrainedArm:
    """An adapter, and how it was trained."""

    lora: Lora | None  # None: its weights were deleted after the training (`finished_arm`)
    summary: dict[str, Any]  # of the training: counts, losses, seconds
    examples: ExampleStore  # of the task, without replay
    replay: list[Example]
    loss: str  # that it was trained with

    @property
    def all_examples(self) -> ExamplesOnDisk:
        """The examples of the task and those of replay, as they were trained on."""
        return joined(self.examples, self.replay)


def train_arm(
    session: Session,
    config: JobConfig[Any],
    arm: Arm,
    material: Material,
    out: Path,
    stages: StageSeconds,
    validator: Validator | None = None,
) -> TrainedArm:
    """Train the adapter of an arm into the run directory `out`.

    A run that was killed there continues; a finished one is only loaded. Arms with as many rows are
    trained on the same ones in the same order; only the answers differ.
    """
    examples, replay, config = _prepared(session, config, arm, material, stages)
    trained_on = joined(examples, replay)
    if Loss.parse(config.train.loss).needs_seed:
        _score(session, trained_on, material.folder, stages)
    lora, summary = train(
        FrozenModel.of(session, material.folder),
        trained_on,
        config.lora,
        config.train,
        out,
        chat=TrainedChat.of(session.chat, examples.account.system),
        validator=validator,
        resume=out.exists(),
    )
    return TrainedArm(lora, summary, examples, replay, config.train.loss)


def finished_arm(
    session: Session,
    config: JobConfig[Any],
    arm: Arm,
    material: Material,
    out: Path,
    stages: StageSeconds,
) -> TrainedArm:
    """An arm of a finished run whose weights were deleted: everything but the adapter.

    ValueError where the run was made under other settings or on other examples.
    """
    examples, replay, config = _prepared(session, config, arm, material, stages)
    frozen = FrozenModel.of(session, material.folder)
    trained_on = joined(examples, replay)
    summary = finished_summary(frozen, trained_on, config.lora, config.train, out)
    return TrainedArm(None, summary, examples, replay, config.train.loss)


def _prepared(
    session: Session,
    config: JobConfig[Any],
    arm: Arm,
    material: Material,
    stages: StageSeconds,
) -> tuple[ExampleStore, list[Example], JobConfig[Any]]:
    """The examples of an arm's task, those of replay, and the settings of its training."""
    examples = examples_of(session, config, arm, material)
    replay = _replay(session, config, arm, len(examples), stages)
    count = len(examples) + len(replay)
    return examples, replay, config_of_arm(session, config, arm, material, count)


def examples_of(
    session: Session, config: JobConfig[Any], arm: Arm, material: Material
) -> ExampleStore:
    """The examples of an arm, without replay; prints how many were encoded, cut and left out."""
    seed = config.train.seed
    if arm.method in ("sft", "replay"):
        return encode_rows(session, config, material.lines, "reference", seed)
    if arm.method == "self":
        assert material.unguided is not None, "made for the arm self"
        return encode_rows(session, config, material.unguided, "target", seed)
    if arm.method == "rft":
        encode = dataclasses.replace(config.encode, drop_rejected=True)
        config = dataclasses.replace(config, encode=encode)
    return encode_rows(session, config, material.lines, "target", seed)


def loss_of(config: JobConfig[Any], arm: Arm) -> str:
    """The loss of an arm: the one that it names, else that of --loss."""
    return config.train.loss if arm.loss == PLAIN else arm.loss


def config_of_arm(
    session: Session, config: JobConfig[Any], arm: Arm, material: Material, count: int
) -> JobConfig[Any]:
    """The settings of an arm's training over `count` examples: its loss, rate and budget.

    The number of optimizer steps is that of the references, also where the arm has more or fewer
    examples.
    """
    changes: dict[str, Any] = {"loss": loss_of(config, arm)}
    if arm.rate is not None:
        changes["lr"] = arm.rate
    if arm.method in OTHER_COUNT and not config.train.max_steps:
        of_sft = len(encode_rows(session, config, material.lines, "reference"))
        replay = replay_config(config, Arm("sft"))
        if replay is not None:
            of_sft += replay.rows(of_sft)
        if count != of_sft:
            changes["max_steps"] = config.train.steps(of_sft)
            print(f"{arm.title}: {count} examples, {changes['max_steps']} steps as for {of_sft}")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def _replay(
    session: Session, config: JobConfig[Any], arm: Arm, task_rows: int, stages: StageSeconds
) -> list[Example]:
    """The replay rows of an arm beside `task_rows` others; [] for an arm without replay."""
    replay = replay_config(config, arm)
    if replay is None:
        return []
    file = Path(config.job.out) / "replay.jsonl"
    before = len(read_jsonl(file))
    started = time.perf_counter()
    rows = replay_rows(session, config, replay, task_rows)
    seconds = time.perf_counter() - started
    stages.add("replay", seconds, len(read_jsonl(file)) - before, 1)
    return rows


def _score(
    session: Session, examples: Sequence[Example], folder: Path, stages: StageSeconds
) -> None:
    """Take the likelihoods of the examples' tokens under the seed, for all arms that need them."""
    before = _scored_lines(folder)
    started = time.perf_counter()
    nll_under_seed(session.model, examples, folder, session.fingerprint)
    seconds = time.perf_counter() - started
    stages.add(_score_stage(examples), seconds, _scored_lines(folder) - before, len(examples))


def _score_stage(examples: Sequence[Example]) -> str:
    """The stage in which these examples are scored."""
    return f"score {fingerprint(examples)[:12]}"


def _scored_lines(folder: Path) -> int:
    """The examples that are scored in a folder so far."""
    count = 0
    for file in folder.glob("seed-nll-*.jsonl"):
        count += sum(1 for _ in each_of_jsonl(file))
    return count


# ---- cost


def arm_cost(
    arm: Arm, material: Material, trained: TrainedArm, train_seconds: float, stages: StageSeconds
) -> Cost:
    """The cost of an arm alone, of one training. Stages that other arms need too count in full.

    Generated are the tokens of the answers that the files keep: one for every turn, and those of
    replay.
    """
    generated = 0
    generate_seconds: float | None = 0.0
    if arm.method in GUIDED:
        generated = sum(line.response_tokens for line in material.lines)
        generate_seconds = stages.of("distill")
    if arm.method == "self":
        generated = sum(line.response_tokens for line in material.unguided or ())
        generate_seconds = stages.of("unguided")
    scored = 0
    score_seconds: float | None = 0.0
    if trained.replay:
        generated += sum(len(example.ids) - example.n_prompt for example in trained.replay)
        each = stages.each("replay")
        known = generate_seconds is not None and each is not None
        generate_seconds = generate_seconds + each * len(trained.replay) if known else None
    if Loss.parse(trained.loss).needs_seed:
        examples = trained.all_examples
        scored = sum(size.tokens for size in sizes(examples))
        score_seconds = stages.of(_score_stage(examples))
    return Cost(
        generated=generated,
        scored=scored,
        trained=trained.summary["tokens"],
        generate_seconds=generate_seconds,
        score_seconds=score_seconds,
        train_seconds=train_seconds,
    )
