"""Stages that the main job, a study and preflight share."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.data.distilled import Distilled
from engine.data.encode import Example
from engine.data.example_store import ExampleStore
from engine.data.rows import Row, Rows
from engine.evaluate.arm_grammar import Arm, parse_arms
from engine.evaluate.target_task import rows_to_judge
from engine.jobs.job_config import JobConfig
from engine.session import Session
from engine.train.replay import OWN, ReplayConfig, replay_examples, replay_pool
from engine.train.temporary_examples import temporary_examples


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
    held_out_prompts = {_prompt_of(row) for row in held_out}
    trained_prompts: set[str] = set()  # those of them that are trained on
    for row in trained_on:
        prompt = _prompt_of(row)
        if prompt in held_out_prompts:
            trained_prompts.add(prompt)
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
) -> ExampleStore:
    """Examples whose answers are the `target`; prints how many were encoded, cut and left out.

    target    "reference", or "target" of distilled lines (`EncodeConfig.target`)
    seed      draws which accepted rewrites --mix replaces by their references

    ValueError where turns are too long, or nothing is left.
    """
    encoding = dataclasses.replace(config.encode, target=target)
    if target == "reference":  # SFT, and plain rows: there are no rewrites to mix or to drop
        encoding = dataclasses.replace(encoding, mix=0.0, drop_rejected=False)
    return temporary_examples(rows, session, config.data, encoding, seed=seed)


def replay_config(config: JobConfig[Any], arm: Arm) -> ReplayConfig | None:
    """The replay of an arm, None for none.

    The arm `replay:SHARE` has its share of the prompts that --replay names, else of ours. Where no
    arm is called so, --replay and --replay-share are for all arms.
    """
    given = config.replay or ReplayConfig()
    if arm.method == "replay":
        return dataclasses.replace(given, replay=given.replay or OWN, replay_share=arm.share)
    has_arm = any(other.method == "replay" for other in parse_arms(config.job.arms))
    return None if has_arm or given.replay is None else given


def replay_rows(
    session: Session, config: JobConfig[Any], replay: ReplayConfig, task_rows: int
) -> list[Example]:
    """The replay rows beside `task_rows` others.

    All trainings of the job share the answers in OUT/replay.jsonl.
    """
    return replay_examples(
        session,
        replay,
        Path(config.job.out) / "replay.jsonl",
        replay_pool(session, replay, skip_bad=config.data.skip_bad),
        task_rows=task_rows,
        max_length=config.encode.max_length,
        seed=config.train.seed,
        sampling=config.sampling,
    )
