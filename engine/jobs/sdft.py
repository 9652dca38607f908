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

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.encode import Example
from engine.data.rows import Rows
from engine.data.subset import evenly_spaced
from engine.distill.distill import can_be_asked, distill, distill_settings
from engine.distill.distill_report import DistillReport
from engine.distill.seed_likelihoods import LikelihoodSums, score
from engine.evaluate.arm_grammar import Arm, parse_arms, trainings, way_of
from engine.evaluate.arms import Arms, adapter_hashes, tuned
from engine.evaluate.further_measures import further_measures
from engine.evaluate.retention import retention
from engine.evaluate.target_task import Score, evaluate, summary
from engine.evaluate.task_retention import row_answers, task_retention
from engine.evaluate.tasks.run import run_tasks, tasks_table
from engine.evaluate.tasks.scores import Scores
from engine.jobs.arm_training import (
    Material,
    TrainedArm,
    arm_cost,
    check_arms,
    examples_of,
    make_material,
    train_arm,
)
from engine.jobs.comparison import Goal, compare, comparison_record, comparison_text
from engine.jobs.costs import Cost, StageSeconds, cost_table
from engine.jobs.job_config import JobConfig
from engine.jobs.measured import ArmResults, drift_lines, held_out_runs
from engine.jobs.stages import encode_rows, held_out_rows, timed
from engine.measure.seed_answers import seed_answers
from engine.measure.update_norms import update_norms
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

DEFAULT_ARMS = "sft,sdft"


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
        parse_arms(self.arms)


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
    stages = StageSeconds(out / "costs.json")
    stages.add_distillation("distill", results.distilled)

    if not config.job.no_score:
        with timed(seconds, "score"):
            results.likelihood = score_lines(session, config, out, inputs.rows, results)
        print(results.likelihood.text())

    arms = parse_arms(config.job.arms)
    results.material = make_material(
        session, config, inputs.rows, results.distilled, arms, out, stages
    )
    for arm in trainings(arms):
        with timed(seconds, f"train {arm.name}"):
            results.train(session, config, arm, out, stages, inputs.validator)
    results.measure(arms)

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

    rows: Rows  # to train on
    held_out: Rows | None  # None without --eval-data
    validator: Validator | None  # None without --val-every


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
        config: Config,
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
            "equal_target": comparison_record(self.goals, self.costs_of_ways()),
            "seconds": self.seconds,
        }


# ---- the stages


def load_inputs(session: Session, config: Config) -> Inputs:
    """Read every file; ValueError for a fault in any of them, before hours of work."""
    check_arms(session, config, parse_arms(config.job.arms))
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
    return score(session.model, session.chat, results.distilled.lines, file, settings)


def answer_held_out(
    session: Session, config: Config, out: Path, held_out: Rows, results: Results
) -> dict[str, Score]:
    """Greedy answers of all arms to the held-out rows, judged, in OUT/evaluation.jsonl."""
    max_new = config.job.eval_max_new
    verify = config.distill.verify
    settings = _arm_settings(session, config, out) | {
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
    settings = _arm_settings(session, config, out) | limit
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
    settings = _arm_settings(session, config, out) | settings
    return task_retention(session.model, answers, results.arms, file, settings)


def measure_norms(session: Session, arms: Arms) -> dict[str, dict[str, Any]]:
    """The norms of every adapter's update."""
    return {arm: update_norms(session.model, lora) for arm, lora in tuned(arms).items()}


def collect_for_report(
    session: Session, config: Config, out: Path, held_out: Rows | None, results: Results
) -> None:
    """Write OUT/tokens.jsonl and OUT/answers.jsonl."""
    settings = _arm_settings(session, config, out)
    tokenizer = session.chat.tokenizer
    references = _examples(session, config, "sft", results)
    rewrites = {one.id: one for one in _examples(session, config, "sdft", results)}
    # under --drop-rejected SDFT is trained on fewer rows
    both = [example for example in references if example.id in rewrites]
    sft = evenly_spaced(both, config.job.report_rows)
    sdft = [rewrites[example.id] for example in sft]
    token_nll(session.model, tokenizer, sft, sdft, out / "tokens.jsonl", settings)
    tuned_answers(
        _general_generator(session, config),
        results.arms,
        out,
        held_out or [],
        config.job.report_answers,
        settings | {"max_new": config.job.retention_max_new},
    )


def _examples(session: Session, config: Config, arm: str, results: Results) -> list[Example]:
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


def _arm_settings(session: Session, config: Config, out: Path) -> dict[str, Any]:
    """The settings of a file whose content depends on the trained adapters."""
    arms = trainings(parse_arms(config.job.arms))
    directories = [str(out / arm.directory) for arm in arms]
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
    if config.job.arms != DEFAULT_ARMS:
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
