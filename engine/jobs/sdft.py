"""The main job: distil, train SFT and SDFT under identical settings, measure both, print the table

    OUT/distilled.jsonl          the rewrites (engine/distill), .meta.json and .scores.jsonl beside
    OUT/sft/, OUT/sdft/          run directories; the same settings, but references or targets
    OUT/evaluation.jsonl         greedy answers of seed, sft and sdft to the held-out rows
    OUT/tasks/TASK.jsonl         their answers to the tasks that were named
    OUT/seed_answers.jsonl       the seed's answers to general prompts
    OUT/retention.jsonl          drift from the seed over these answers
    OUT/tokens.jsonl, OUT/answers.jsonl    what only the report shows (engine/report/collect.py)
    OUT/summary.json, OUT/table.txt, OUT/report.html

Every stage keeps the rows it has finished, and a complete stage is skipped: after a kill the same
command continues. The weights are loaded once.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.rows import Rows
from engine.data.subset import evenly_spaced
from engine.distill.distill import can_be_asked, distill, distill_settings
from engine.distill.distill_report import DistillReport
from engine.distill.seed_likelihoods import LikelihoodSums, score
from engine.evaluate.arms import ARM_NAMES, TUNED, Arms, adapter_hashes
from engine.evaluate.retention import retention
from engine.evaluate.target_task import Score, evaluate, summary
from engine.evaluate.tasks.run import run_tasks, tasks_table
from engine.evaluate.tasks.scores import Scores
from engine.jobs.job_config import JobConfig
from engine.jobs.stages import TrainedArm, encode_rows, held_out_rows, timed, train_arm
from engine.measure.seed_answers import seed_answers
from engine.report.collect import token_nll, tuned_answers
from engine.report.page import write_report
from engine.runtime.files import write_json, write_text
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.locking import lock_directory
from engine.runtime.run_record import environment
from engine.runtime.terminal import table
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import SamplerConfig
from engine.session import Session
from engine.train.validate import Validator


@dataclass(frozen=True)
class SdftConfig:
    """The settings of the whole job that belong to no single stage."""

    out: str  # directory of the run; the same command resumes there
    eval_data: str | None = None  # held-out rows that the seed model and both adapters answer,
    #   checked with --verify [default: none (the target task is not scored)]
    eval_limit: int | None = None  # use only the first N held-out rows [default: all]
    eval_max_new: int = 256  # most new tokens in an answer to a held-out row
    retention_max_new: int = 96  # most new tokens in an answer to a general prompt
    no_score: bool = False  # do not measure the seed model's likelihood of references and rewrites
    report_rows: int = 48  # training rows that the report shows with the likelihood of every token
    report_answers: int = 16  # general prompts, and held-out rows, that the report shows with the
    #   answers to them

    def check(self) -> None:
        """ValueError for a number that is out of its bounds."""
        if self.report_rows < 0 or self.report_answers < 0:
            raise ValueError(
                f"report_rows {self.report_rows}, report_answers {self.report_answers}: expected "
                "at least 0"
            )
        at_least_one = (1, MOST)
        check_numbers(
            self,
            eval_limit=at_least_one,
            eval_max_new=at_least_one,
            retention_max_new=at_least_one,
        )


Config = JobConfig[SdftConfig]


def sdft_job(config: Config) -> dict[str, Any]:
    """Load the model and run the job under the lock of its directory."""
    out = Path(config.job.out)
    with lock_directory(out):
        config = config.as_begun(out / "distilled.jsonl")
        return run(Session.open(config.model), config, out)


def run(session: Session, config: Config, out: Path) -> dict[str, Any]:
    """All stages in order; returns the content of summary.json."""
    session.require_one_process("the whole job")
    started = time.perf_counter()
    config.check()
    settings = config.settings()
    config = config.as_published()
    inputs = load_inputs(session, config)
    results = Results()
    seconds = results.seconds

    with timed(seconds, "distill"):
        results.distilled = distil_rows(session, config, out, inputs.rows)
    print(results.distilled.text())

    if not config.job.no_score:
        with timed(seconds, "score"):
            results.likelihood = score_lines(session, config, out, inputs.rows, results)
        print(results.likelihood.text())

    lines = results.distilled.lines
    for arm in TUNED:
        with timed(seconds, f"train {arm}"):
            results.trained[arm] = train_arm(
                session, config, arm, lines, out / arm, inputs.validator
            )

    if inputs.held_out:
        with timed(seconds, "evaluate"):
            results.scores = answer_held_out(session, config, out, inputs.held_out, results)

    if config.tasks is not None and config.tasks.task:
        with timed(seconds, "tasks"):
            greedy = config.sampling.greedy(SamplerConfig.max_new_tokens)
            results.tasks = run_tasks(session, config.tasks, results.arms, out / "tasks", greedy)

    with timed(seconds, "retention"):
        results.drift = measure_retention(session, config, out, results)

    with timed(seconds, "report"):
        collect_for_report(session, config, out, inputs.held_out, results)
    seconds["all"] = time.perf_counter() - started

    record = {"settings": settings} | results.record(session)
    write_json(out / "summary.json", record)
    text = closing_text(config, out, results)
    write_text(out / "table.txt", text + "\n")
    print("\n" + text)
    print(write_report([out], out / "report.html"))
    return record


@dataclass(frozen=True)
class Inputs:
    """The data of the job, read and checked."""

    rows: Rows  # to train on
    held_out: Rows | None  # None without --eval-data
    validator: Validator | None  # None without --val-every


@dataclass
class Results:
    """The results of the stages, filled in as they finish."""

    distilled: DistillReport | None = None
    likelihood: LikelihoodSums | None = None  # None with --no-score
    trained: dict[str, TrainedArm] = field(default_factory=dict)  # by "sft", "sdft"
    scores: dict[str, Score] = field(default_factory=dict)  # by "seed", "sft", "sdft"
    tasks: Scores = field(default_factory=dict)
    drift: dict[str, dict[str, Any]] = field(default_factory=dict)  # by "sft", "sdft"
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, since the last start

    @property
    def arms(self) -> Arms:
        """The adapter of every arm; the seed model has none."""
        adapters = {arm: trained.lora for arm, trained in self.trained.items()}
        return {"seed": None} | adapters

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
            "seconds": self.seconds,
        }


# ---- the stages


def load_inputs(session: Session, config: Config) -> Inputs:
    """Read every file; ValueError for a fault in any of them, before hours of work."""
    rows = config.data.load(check=can_be_asked(session.chat, config.distill))
    held_out = held_out_rows(session, config, rows)
    examples = encode_rows(session, config, rows, "reference")
    config.train.highest_rate(len(examples))  # ValueError where the rate stays 0
    validator = None
    if config.validate is not None and config.validate.val_every:
        validator = Validator(config.validate, config.data, session)
    return Inputs(rows, held_out, validator)


def distil_rows(session: Session, config: Config, out: Path, rows: Rows) -> DistillReport:
    """Rewrite the references into OUT/distilled.jsonl."""
    return distill(
        ChatGenerator(session.model, session.chat, config.sampling),
        rows,
        out / "distilled.jsonl",
        config.distill,
        settings=distill_settings(session, rows, config.distill, config.sampling),
        resume=True,
    )


def score_lines(
    session: Session, config: Config, out: Path, rows: Rows, results: Results
) -> LikelihoodSums:
    """The seed's likelihoods of references and rewrites, in OUT/distilled.jsonl.scores.jsonl."""
    settings = distill_settings(session, rows, config.distill, config.sampling)
    file = out / "distilled.jsonl.scores.jsonl"
    return score(
        session.model,
        session.chat,
        results.distilled.lines,
        file,
        settings,
        invariant=config.sampling.invariant,
    )


def answer_held_out(
    session: Session, config: Config, out: Path, held_out: Rows, results: Results
) -> dict[str, Score]:
    """Greedy answers of all arms to the held-out rows, judged, in OUT/evaluation.jsonl."""
    max_new = config.job.eval_max_new
    verify = config.distill.verify
    settings = _arm_settings(session, out) | {
        "data": held_out.sha256,
        "rows": len(held_out),
        "verify": verify,
        "max_new": max_new,
    }
    generator = ChatGenerator(session.model, session.chat, config.sampling.greedy(max_new))
    file = out / "evaluation.jsonl"
    return evaluate(generator, held_out, verify, results.arms, file, settings)


def measure_retention(
    session: Session, config: Config, out: Path, results: Results
) -> dict[str, dict[str, Any]]:
    """Drift of both adapters over the seed's answers, in OUT/retention.jsonl."""
    limit = {"max_new": config.job.retention_max_new}
    generator = _general_generator(session, config)
    answers = seed_answers(generator, out / "seed_answers.jsonl", session.settings | limit)
    settings = _arm_settings(session, out) | limit
    return retention(session.model, answers, results.arms, out / "retention.jsonl", settings)


def collect_for_report(
    session: Session, config: Config, out: Path, held_out: Rows | None, results: Results
) -> None:
    """Write OUT/tokens.jsonl and OUT/answers.jsonl."""
    settings = _arm_settings(session, out)
    tokenizer = session.chat.tokenizer
    shown = config.job.report_rows
    sft = evenly_spaced(results.trained["sft"].examples, shown)
    sdft = evenly_spaced(results.trained["sdft"].examples, shown)
    token_nll(session.model, tokenizer, sft, sdft, out / "tokens.jsonl", settings)
    tuned_answers(
        _general_generator(session, config),
        results.arms,
        out,
        held_out or [],
        config.job.report_answers,
        settings | {"max_new": config.job.retention_max_new},
    )


def _arm_settings(session: Session, out: Path) -> dict[str, Any]:
    """The settings of a file whose content depends on the trained adapters."""
    directories = [str(out / arm) for arm in TUNED]
    return session.settings | {"adapters": adapter_hashes(directories)}


def _general_generator(session: Session, config: Config) -> ChatGenerator:
    """Greedy answers to general prompts, of --retention-max-new tokens at most for every arm."""
    greedy = config.sampling.greedy(config.job.retention_max_new)
    return ChatGenerator(session.model, session.chat, greedy)


# ---- the closing table


def closing_text(config: Config, out: Path, results: Results) -> str:
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
    arms = [[name, *_cells(arm, results)] for arm, name in ARM_NAMES.items()]
    text = [table([header, *arms]), "", results.distilled.text()]
    if results.likelihood is not None:
        text.append(results.likelihood.text())
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in results.seconds.items())
    text.append(f"seconds since the last start: {seconds}")
    text += [
        "KL to and from seed, KL(seed || tuned) and KL(tuned || seed): nats per token over the "
        "seed's own answers to general prompts; lower is less forgotten.",
        f"distilled data {out}/distilled.jsonl, adapters {out}/sft and {out}/sdft (PEFT layout), "
        f"answers {out}/evaluation.jsonl, drift {out}/retention.jsonl, all figures "
        f"{out}/summary.json",
    ]
    return "\n".join(text) + tasks_table(results.tasks)


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
    if arm in results.trained:
        training = results.trained[arm].summary
        loss = f"{training['first_loss']:.3f} -> {training['last_loss']:.3f}"
        training_cells = [loss, f"{training['seconds']:.0f}"]
    return [*target, *retention_cells, *training_cells]
