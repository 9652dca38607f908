"""Stages that the main job, a study and preflight share."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.distilled import Distilled
from engine.data.encode import Example
from engine.data.rows import Row, Rows
from engine.evaluate.arms import ARM_TARGETS
from engine.evaluate.target_task import rows_to_judge
from engine.jobs.job_config import JobConfig
from engine.session import Session
from engine.train.examples import encode_examples
from engine.train.replay import ReplayPrompt, replay_examples, replay_pool
from engine.train.train import FrozenModel, train
from engine.train.validate import Validator
from model.lora import Lora
from model.trained_chat import TrainedChat, common_system


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Put the seconds that the block takes into `seconds`, under the name of the stage."""
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


def held_out_rows(
    session: Session, config: JobConfig[Any], trained_on: Sequence[Row]
) -> Rows | None:
    """The held-out rows of --eval-data, None without that flag.

    ValueError where one of them is trained on too, or does not fit the model (`rows_to_judge`).
    """
    if config.job.eval_data is None:
        return None
    data = config.data.beside(config.job.eval_data, config.job.eval_limit)
    held_out = rows_to_judge(session, data)
    trained_prompts = {_prompt_of(row) for row in trained_on}
    both = [row.id for row in held_out if _prompt_of(row) in trained_prompts]
    if both:
        raise ValueError(
            f"{len(both)} held-out rows are also trained on, first {both[:5]}: a score over them "
            "says nothing; give other --eval-data"
        )
    return held_out


def _prompt_of(row: Row) -> str:
    """A row's messages before its last answer, as one comparable text."""
    return str(row.messages[:-1])


def encode_rows(
    session: Session,
    config: JobConfig[Any],
    rows: Sequence[Row] | Sequence[Distilled],
    target: str,
    seed: int = 0,
) -> list[Example]:
    """Examples whose answers are the `target`; prints how many were encoded, cut and left out.

    target    "reference", or "target" of distilled lines (`EncodeConfig.target`)
    seed      draws which accepted rewrites --mix replaces by their references

    ValueError where turns are too long, or nothing is left.
    """
    encoding = dataclasses.replace(config.encode, target=target)
    if target == "reference":  # SFT, and plain rows: there are no rewrites to mix or to drop
        encoding = dataclasses.replace(encoding, mix=0.0, drop_rejected=False)
    return encode_examples(rows, session, config.data, encoding, seed=seed)


def prompts_for_replay(session: Session, config: JobConfig[Any]) -> list[ReplayPrompt]:
    """The general prompts of --replay, [] without it; ValueError for a fault in their file."""
    if config.replay is None or config.replay.replay is None:
        return []
    return replay_pool(session, config.replay, skip_bad=config.data.skip_bad)


def replay_rows(session: Session, config: JobConfig[Any], task_rows: int) -> list[Example]:
    """The replay rows beside `task_rows` others, [] without --replay.

    All trainings of the job share the answers in OUT/replay.jsonl.
    """
    pool = prompts_for_replay(session, config)
    if not pool:
        return []
    return replay_examples(
        session,
        config.replay,
        Path(config.job.out) / "replay.jsonl",
        pool,
        task_rows=task_rows,
        max_length=config.encode.max_length,
        seed=config.train.seed,
        sampling=config.sampling,
    )


@dataclass(frozen=True)
class TrainedArm:
    """An adapter, and how it was trained."""

    lora: Lora
    summary: dict[str, Any]  # of the training: counts, losses, seconds
    examples: list[Example]  # of the task, without replay


def train_arm(
    session: Session,
    config: JobConfig[Any],
    arm: str,
    lines: Sequence[Distilled],
    out: Path,
    validator: Validator | None = None,
) -> TrainedArm:
    """Train the adapter of an arm ("sft" or "sdft") into the run directory `out`.

    A run that was killed there continues; a finished one is only loaded. Both arms are trained on
    the same lines in the same order; only the answers differ. Under --drop-rejected SDFT's lines
    are fewer: those whose rewrite was accepted.
    """
    examples = encode_rows(session, config, lines, ARM_TARGETS[arm], config.train.seed)
    system = common_system([line.messages for line in lines])
    lora, summary = train(
        FrozenModel.of(session),
        [*examples, *replay_rows(session, config, len(examples))],
        config.lora,
        config.train,
        out,
        chat=TrainedChat.of(session.chat, system),
        validator=validator,
        resume=out.exists(),
    )
    return TrainedArm(lora, summary, examples)
