"""The main job: distil, train the arms under identical settings, measure them, print the table

    OUT/distilled.jsonl          the rewrites (engine/distill), .meta.json and .scores.jsonl beside
    OUT/sft/, OUT/sdft/          run directories; the same settings, but references or targets
    OUT/stm-2.5/, ...            those of further arms (--arms), and what they need, made once:
                                 unguided.jsonl, replay.jsonl, seed-nll-*.jsonl (arm_training.py)
    OUT/evaluation.jsonl         greedy answers of the seed and of all arms to the held-out rows
    OUT/tasks/TASK.jsonl         their answers to the tasks that were named
    OUT/seed_answers.jsonl       the seed's answers to general prompts
    OUT/retention.jsonl          drift from the seed over these answers
    OUT/retention_task.jsonl     drift from the seed over its answers to the held-out rows
    OUT/tokens.jsonl, OUT/answers.jsonl    what only the report shows (engine/report/collect.py)
    OUT/summary.json, OUT/table.txt, OUT/report.html
    OUT/costs.json               seconds of what was made once for several arms

Every stage keeps the rows it has finished, and a complete stage is skipped: after a kill the same
command continues. The weights are loaded once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.disk_tables import TextsById
from engine.data.encode import Example, names
from engine.data.row_store import StoredRows
from engine.data.rows import Rows
from engine.data.subset import evenly_spaced
from engine.distill.distill import can_be_asked, distill, distill_settings
from engine.distill.distill_report import DistillReport
from engine.distill.seed_likelihoods import LikelihoodSums, score
from engine.evaluate.arm_grammar import (
    DEFAULT_ARMS,
    Arm,
    parse_arm_scales,
    parse_arms,
    trainings,
)
from engine.evaluate.arms import Arms, adapter_hashes, tuned
from engine.evaluate.retention import retention
from engine.evaluate.target_task import Score, evaluate, nll_file
from engine.evaluate.task_retention import row_answers, task_retention
from engine.evaluate.tasks.run import run_tasks
from engine.jobs.arm_training import check_arms, examples_of, make_material
from engine.jobs.comparison import Goal, compare
from engine.jobs.costs import StageSeconds
from engine.jobs.earlier_arms import admit_arms
from engine.jobs.job_config import JobConfig
from engine.jobs.measured import ArmResults, drift_lines, held_out_runs
from engine.jobs.results import Results, closing_text
from engine.jobs.stages import encode_rows, held_out_rows, timed
from engine.measure.seed_answers import seed_answers
from engine.measure.update_norms import update_norms
from engine.report.collect import token_nll, tuned_answers
from engine.report.page import write_report
from engine.runtime.files import write_json, write_text
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.temporary import TemporaryNumbers
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import SamplerConfig
from engine.session import Session
from engine.train.validate import Validator

# files whose lines depend on the trained adapters
MEASUREMENTS = (
    "evaluation.jsonl",
    "retention.jsonl",
    "retention_task.jsonl",
    "tokens.jsonl",
    "answers.jsonl",
)


@dataclass(frozen=True)
class SdftConfig:
    """The settings of the whole job that belong to no single stage."""

    out: str  # directory of the run; the same command resumes there
    eval_data: str | None = None  # held-out rows that the seed model and both adapters answer,
    #   checked with --verify [default: none (the target task is not scored)]
    eval_limit: int | None = None  # use only the first N held-out rows [default: all]
    eval_max_new: int = 256  # most new tokens in an answer to a held-out row
    retention_max_new: int = 96  # most new tokens in an answer to a general prompt
    arms: str = DEFAULT_ARMS  # ways of training to compare: METHOD[+LOSS][@SCALE][%RATE] joined by
    #   commas; methods: sft (references), sdft (accepted rewrites), self (the model's own answers),
    #   rft (accepted rewrites only), replay:0.2 (references and own answers to general prompts);
    #   losses, alone or behind a +: those of train.py --loss, as in stm:2.5,dft,sdft+dft; @0.5:
    #   the adapter at half its strength; %3e-4: another --lr
    scales: str | None = None  # strengths at which every adapter is measured, beside those of
    #   --arms, as in 0.25,0.5,0.75,1: a whole curve from one training [default: only those]
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
        self.all_arms()

    def all_arms(self) -> list[Arm]:
        """The arms of --arms, then the same at every scale of --scales, each once."""
        arms = parse_arms(self.arms)
        if self.scales is not None:
            scales = parse_arm_scales(self.scales)
            arms += [arm.at(scale) for arm in trainings(arms) for scale in scales]
        return list(dict.fromkeys(arms))


Config = JobConfig[SdftConfig]


def sdft_job(config: Config) -> dict[str, Any]:
    """Load the model and run the job under the lock of its directory."""
    return config.run_locked(run)


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
    stages = StageSeconds(out / "costs.json")
    stages.add_distillation("distill", results.distilled)

    if not config.job.no_score:
        with timed(seconds, "score"):
            results.likelihood = score_lines(session, config, out, inputs.rows, results)
        print(results.likelihood.text())

    arms = config.job.all_arms()
    results.material = make_material(
        session, config, inputs.rows, results.distilled, arms, out, stages
    )
    for arm in trainings(arms):
        with timed(seconds, f"train {arm.name}"):
            results.train(session, config, arm, out, stages, inputs.validator)
    results.measure(arms)
    results.hashes = adapters_of(out, arms)

    if inputs.held_out:
        with timed(seconds, "evaluate"):
            results.scores = answer_held_out(session, config, out, inputs.held_out, results)

    if config.tasks is not None and config.tasks.task:
        with timed(seconds, "tasks"):
            greedy = config.sampling.greedy(SamplerConfig.max_new_tokens)
            results.tasks = run_tasks(session, config.tasks, results.arms, out / "tasks", greedy)

    with timed(seconds, "retention"):
        results.drift = measure_retention(session, config, out, results)
        results.norms = measure_norms(session, results.arms)

    if inputs.held_out:
        with timed(seconds, "task retention"):
            results.task_drift = measure_task_retention(
                session, config, out, inputs.held_out, results
            )

    with timed(seconds, "report"):
        collect_for_report(session, config, out, inputs.held_out, results)
    if inputs.held_out:
        results.goals = compare_arms(out, arms, inputs.held_out)
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

    rows: StoredRows  # to train on
    held_out: Rows | None  # None without --eval-data
    validator: Validator | None  # None without --val-every


# ---- the stages


def load_inputs(session: Session, config: Config) -> Inputs:
    """Read every file; ValueError for a fault in any of them, before hours of work."""
    rows = config.data.stored(check=can_be_asked(session.chat, config.distill))
    held_out = held_out_rows(session, config, rows)
    check_arms(session, config, parse_arms(config.job.arms), held_out or [])
    examples = encode_rows(session, config, rows, "reference")
    config.train.highest_rate(len(examples))  # ValueError where the rate stays 0
    validator = None
    if config.validate is not None and config.validate.val_every:
        validator = Validator(config.validate, config.data, session)
    return Inputs(rows, held_out, validator)


def distil_rows(session: Session, config: Config, out: Path, rows: StoredRows) -> DistillReport:
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
    session: Session, config: Config, out: Path, rows: StoredRows, results: Results
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
    settings = (
        session.settings
        | {"adapters": results.hashes}
        | {
            "data": held_out.sha256,
            "rows": len(held_out),
            "verify": verify,
            "max_new": max_new,
        }
    )
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
    settings = session.settings | {"adapters": results.hashes} | limit
    return retention(session.model, answers, results.arms, out / "retention.jsonl", settings)


def measure_task_retention(
    session: Session, config: Config, out: Path, held_out: Rows, results: Results
) -> dict[str, dict[str, Any]]:
    """Drift of both adapters over the seed's answers to the held-out rows.

    In OUT/retention_task.jsonl; the answers are those in OUT/evaluation.jsonl.
    """
    settings = {
        "data": held_out.sha256,
        "rows": len(held_out),
        "max_new": config.job.retention_max_new,
        "eval_max_new": config.job.eval_max_new,
    }
    file = out / "retention_task.jsonl"
    answers = row_answers(
        _general_generator(session, config),
        held_out,
        file,
        session.settings | settings,
        judged=out / "evaluation.jsonl",
    )
    settings = session.settings | {"adapters": results.hashes} | settings
    return task_retention(session.model, answers, results.arms, file, settings)


def measure_norms(session: Session, arms: Arms) -> dict[str, dict[str, Any]]:
    """The norms of every adapter's update."""
    return {arm: update_norms(session.model, lora) for arm, lora in tuned(arms).items()}


def collect_for_report(
    session: Session, config: Config, out: Path, held_out: Rows | None, results: Results
) -> None:
    """Write OUT/tokens.jsonl and OUT/answers.jsonl."""
    settings = session.settings | {"adapters": results.hashes}
    tokenizer = session.chat.tokenizer
    references = _examples(session, config, "sft", results)
    rewrites = _examples(session, config, "sdft", results)
    sft, sdft = same_turns(references, rewrites, config.job.report_rows)
    token_nll(session.model, tokenizer, sft, sdft, out / "tokens.jsonl", settings)
    tuned_answers(
        _general_generator(session, config),
        results.arms,
        out,
        held_out or [],
        config.job.report_answers,
        settings | {"max_new": config.job.retention_max_new},
    )


def same_turns(
    references: Sequence[Example], rewrites: Sequence[Example], count: int
) -> tuple[list[Example], list[Example]]:
    """`count` evenly spaced references that have a rewrite, and their rewrites.

    Under --drop-rejected SDFT is trained on fewer rows.
    """
    with contextlib.closing(TextsById()) as places:  # of the rewrites, by id
        for place, name in enumerate(names(rewrites)):
            places.add(name, str(place))
        of_references = TemporaryNumbers()  # places of those that have a rewrite
        of_rewrites = TemporaryNumbers()
        for place, name in enumerate(names(references)):
            found = places.get(name)
            if found is not None:
                of_references.append(place)
                of_rewrites.append(int(found))
    chosen = evenly_spaced(range(len(of_references)), count)
    sft = [references[of_references[number]] for number in chosen]
    sdft = [rewrites[of_rewrites[number]] for number in chosen]
    return sft, sdft


def _examples(session: Session, config: Config, arm: str, results: Results) -> Sequence[Example]:
    """The examples of "sft" or "sdft", also where that arm is not trained."""
    if arm in results.trained:
        return results.trained[arm].examples
    return examples_of(session, config, Arm.parse(arm), results.material)


def compare_arms(out: Path, arms: Sequence[Arm], held_out: Rows) -> list[Goal]:
    """The arms compared at equal target, from the files of measurements in OUT."""
    names = [arm.name for arm in arms]
    runs = held_out_runs(out / "evaluation.jsonl", ["seed", *names], [row.id for row in held_out])
    for name, drift in drift_lines(out / "retention.jsonl", names).items():
        runs[name].drift = drift
    points = [ArmResults("", name, [runs[name]]) for name in names]
    return compare(ArmResults("", "seed", [runs["seed"]]), points)


def adapters_of(out: Path, arms: Sequence[Arm]) -> dict[str, str]:
    """The hashes of the trained adapters, with those that OUT's files have measured before."""
    files = [out / name for name in MEASUREMENTS]
    directories = [str(out / arm.directory) for arm in trainings(arms)]
    return admit_arms([*files, nll_file(files[0])], adapter_hashes(directories))


def _general_generator(session: Session, config: Config) -> ChatGenerator:
    """Greedy answers to general prompts, of --retention-max-new tokens at most for every arm."""
    greedy = config.sampling.greedy(config.job.retention_max_new)
    return ChatGenerator(session.model, session.chat, greedy)
