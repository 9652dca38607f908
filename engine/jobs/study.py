"""A study: SFT and SDFT under identical settings, over rates, ranks, mixes, row counts and seeds

    OUT/distilled.jsonl                        the rewrites, made once for all runs (engine/distill)
    OUT/seed/                                  the seed's answers: held-out rows, general prompts
    OUT/<setting>/seed<n>/<arm>/               a run directory (engine/train), and the measurements:
        evaluation.jsonl, evaluation.jsonl.nll.jsonl, retention.jsonl, retention_task.jsonl,
        tasks/TASK.jsonl
    OUT/table.txt, OUT/study.json, OUT/pareto.png      the findings (study_findings.py)

One list is varied at a time while the others stay at their first value; with --grid every
combination is trained. SFT trains on the references alone, so the mix does not apply to it:
settings that differ only in the mix share one SFT run. The rewrites are the same for all training
seeds. Every result is written as soon as it exists and is never computed again: after a kill the
same command continues. Training seeds are the outer loop, and the findings so far are written
after each seed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from engine.data.distilled import Distilled
from engine.data.rows import Row, Rows
from engine.distill.distill import can_be_asked, distill_job
from engine.distill.distill_report import DistillReport
from engine.distill.seed_likelihoods import LikelihoodSums
from engine.evaluate.arms import TUNED, adapter_hashes
from engine.evaluate.retention import retention
from engine.evaluate.target_task import ANSWER, NATS, evaluate, nll_file
from engine.evaluate.task_retention import TASK_DRIFT, RowAnswer, row_answers, task_retention
from engine.evaluate.tasks.run import TASKS, run_tasks
from engine.jobs.job_config import JobConfig
from engine.jobs.stages import encode_rows, held_out_rows, prompts_for_replay, train_arm
from engine.jobs.study_findings import ArmResults, MeasuredRun, Pairs, all_arms, findings
from engine.jobs.study_plot import draw
from engine.measure.seed_answers import SeedAnswer, seed_answers
from engine.measure.update_norms import update_norms
from engine.runtime.files import read_jsonl, write_json, write_text
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.locking import lock_directory
from engine.runtime.run_record import environment
from engine.sampling.chat_generator import ChatGenerator
from engine.session import Session
from engine.train.checkpoint import METRICS
from model.lora import Lora

_NUMBER = (float, int)
# fields of a line of retention.jsonl
DRIFT = {"prompt": str, "kl": _NUMBER, "reverse_kl": _NUMBER, "agree": int, "tokens": int}
# keys of a training's summary that the findings repeat
BUDGET = ("examples", "steps", "tokens", "response_tokens", "first_loss", "last_loss")
N = TypeVar("N", int, float)


@dataclass(frozen=True)
class StudyConfig:
    """What is varied, and how it is measured. A list is numbers joined by commas."""

    out: str  # directory of the study; the same command resumes there
    eval_data: str  # held-out rows that every adapter answers, checked with --verify
    eval_limit: int | None = None  # use only the first N held-out rows [default: all]
    eval_max_new: int = 256  # most new tokens in an answer to a held-out row
    retention_max_new: int = 96  # most new tokens in an answer to a general prompt
    seeds: int = 1  # training seeds per setting: --seed and those that follow it
    lr: str = "1e-4"  # peak learning rates to compare, as in 1e-4,1e-3
    rank: str = "8"  # LoRA ranks to compare, as in 8,64
    alpha: float = 0.0  # strength of the adapter, the same at every rank
    #   [default: auto (twice the rank)]
    mix: str = "0"  # shares (0 to 1) of accepted rewrites replaced by their references, as in 0,0.3
    rows_list: str | None = None  # numbers of training rows to compare, as in 200,500,1000
    #   [default: all rows]
    grid: bool = False  # train every combination, instead of varying one list at a time

    def numbers(self, name: str, kind: Callable[[str], N]) -> list[N]:
        """The values of the list in field `name`.

        ValueError where a value is no number or occurs twice.
        """
        text = getattr(self, name)
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or len(set(values)) < len(values):
            raise ValueError(
                f"{name} {text!r}: expected numbers joined by commas, each once, as in 1,2"
            )
        return values

    def check(self) -> None:
        """ValueError for a number that is out of its bounds."""
        limits = (self.seeds, self.eval_max_new, self.retention_max_new)
        if min(limits) < 1 or self.alpha < 0:
            raise ValueError(
                f"seeds {self.seeds}, eval_max_new {self.eval_max_new}, retention_max_new "
                f"{self.retention_max_new}, alpha {self.alpha}: expected at least 1, and "
                "alpha >= 0"
            )
        check_numbers(self, seeds=(1, 10**4), eval_limit=(1, MOST))


@dataclass(frozen=True)
class Setting:
    """The varied values of an SFT run and of the SDFT run beside it."""

    lr: float
    rank: int
    mix: float  # share of the accepted rewrites that are replaced by their references
    rows: int  # training rows

    @property
    def name(self) -> str:
        """The name of its directory."""
        name = f"lr{self.lr:g}-r{self.rank}-rows{self.rows}"
        return f"{name}-mix{self.mix:g}" if self.mix else name

    def of_arm(self, arm: str) -> Setting:
        """The setting of that arm's run: SFT has no rewrites to mix."""
        if arm == "sft":
            return dataclasses.replace(self, mix=0.0)
        return self


Config = JobConfig[StudyConfig]


class Run(NamedTuple):
    """A run, but for its training seed."""

    setting: Setting  # of the arm (`Setting.of_arm`)
    arm: str  # sft or sdft


def settings_of(job: StudyConfig, rows: int) -> list[Setting]:
    """The settings to compare, the first one first. rows: the count where --rows-list is absent."""
    lists: dict[str, list[Any]] = {
        "lr": job.numbers("lr", float),
        "rank": job.numbers("rank", int),
        "mix": job.numbers("mix", float),
        "rows": [rows] if job.rows_list is None else job.numbers("rows_list", int),
    }
    if job.grid:
        return [Setting(*values) for values in itertools.product(*lists.values())]

    first = Setting(**{name: values[0] for name, values in lists.items()})
    settings = [first]
    for name, values in lists.items():
        for value in values[1:]:
            settings.append(dataclasses.replace(first, **{name: value}))
    return settings


def runs_of(settings: Sequence[Setting]) -> list[Run]:
    """The runs of all settings, each once: settings that differ in the mix share their SFT run."""
    runs = []
    for setting in settings:
        for arm in TUNED:
            runs.append(Run(setting.of_arm(arm), arm))
    return list(dict.fromkeys(runs))


def config_of(config: Config, setting: Setting, seed: int) -> Config:
    """The settings of the stages for a run."""
    alpha = config.job.alpha or 2.0 * setting.rank
    return dataclasses.replace(
        config,
        encode=dataclasses.replace(config.encode, mix=setting.mix),
        train=dataclasses.replace(config.train, lr=setting.lr, seed=seed),
        lora=dataclasses.replace(config.lora, rank=setting.rank, alpha=alpha),
    )


def study_job(config: Config) -> dict[str, Any]:
    """Load the model and run the study under the lock of its directory."""
    out = Path(config.job.out)
    with lock_directory(out):
        config = config.as_begun(out / "distilled.jsonl")
        return study(Session.open(config.model), config, out)


def study(session: Session, config: Config, out: Path) -> dict[str, Any]:
    """Train and measure all runs, and write the findings after each training seed.

    Returns the content of study.json.
    """
    session.require_one_process("a study")
    config.check()
    config = config.as_published()
    rows = _rows(config, can_be_asked(session.chat, config.distill))
    settings = settings_of(config.job, len(rows))
    held_out = check_inputs(session, config, rows, settings)

    # 1. once for all runs: the rewrites, their likelihoods, the seed's answers
    report, likelihood = distill_job(
        session,
        rows,
        out / "distilled.jsonl",
        config.distill,
        config.sampling,
        scoring=True,
        resume=True,
    )
    facts = _facts(session, config, report, likelihood)
    lines: dict[int, list[Distilled]] = {}  # by count of training rows
    for setting in settings:
        lines[setting.rows] = _turns_of(report.lines, rows[: setting.rows])
    measure = Measure(session, config, held_out, general_answers(session, config, out))
    seed_model = ArmResults("", "seed", [measure.seed(out / "seed")])
    measure = dataclasses.replace(measure, task_answers=measure.seed_to_rows(out / "seed"))

    # 2. every training seed, setting and arm
    runs = runs_of(settings)
    measured: dict[Run, list[MeasuredRun]] = {run: [] for run in runs}  # one for every seed so far
    count = config.job.seeds * len(runs)
    number = 0
    first_seed = config.train.seed
    for seed in range(first_seed, first_seed + config.job.seeds):
        for run in runs:
            number += 1
            setting, arm = run
            print(f"run {number} of {count}: {setting.name}, seed {seed}, {arm}")
            place = out / setting.name / f"seed{seed}" / arm
            of_run = config_of(config, setting, seed)
            trained = train_arm(session, of_run, arm, lines[setting.rows], place)
            result = measure.adapter(place, arm, trained.lora)
            result.training = training_figures(place, trained.summary)
            measured[run].append(result)

        # 3. the findings so far
        pairs = pairs_of(settings, measured)
        found, text = findings(seed_model, pairs, config.distill.verify)
        write_json(out / "study.json", facts | found)
        write_text(out / "table.txt", text + "\n")
        drawing = draw(seed_model, pairs, out / "pareto.png")

    print(f"\n{text}")
    print(f"seconds of training, mean over seeds: {_seconds_text(seed_model, pairs)}")
    print(drawing)
    print(f"all figures: {out}/study.json; adapters: {out}/<setting>/seed<n>/<arm>")
    return facts | found


def _seconds_text(seed_model: ArmResults, pairs: Pairs) -> str:
    """Setting, arm and seconds of training of every adapter, as text."""
    trained = all_arms(seed_model, pairs)[1:]  # the seed model is the first
    return ", ".join(f"{arm.name} {arm.arm} {arm.seconds:.0f}" for arm in trained)


def general_answers(session: Session, config: Config, out: Path) -> list[SeedAnswer]:
    """The seed's greedy answers to the general prompts, in OUT/seed/answers.jsonl."""
    max_new = config.job.retention_max_new
    generator = ChatGenerator(session.model, session.chat, config.sampling.greedy(max_new))
    settings = session.settings | {"max_new": max_new}
    return seed_answers(generator, out / "seed" / "answers.jsonl", settings)


def pairs_of(
    settings: Sequence[Setting], measured: dict[Run, list[MeasuredRun]]
) -> list[list[ArmResults]]:
    """(SFT, SDFT) of every setting."""
    pairs = []
    for setting in settings:
        pair = []
        for arm in TUNED:
            run = Run(setting.of_arm(arm), arm)
            pair.append(ArmResults(run.setting.name, arm, measured[run]))
        pairs.append(pair)
    return pairs


def check_inputs(session: Session, config: Config, rows: Rows, settings: Sequence[Setting]) -> Rows:
    """The held-out rows; ValueError for settings or files with faults, before hours of work."""
    for setting in settings:
        of_run = config_of(config, setting, config.train.seed)
        for part in (of_run.encode, of_run.train, of_run.lora):
            part.check()
    held_out = held_out_rows(session, config, rows)
    prompts_for_replay(session, config)  # ValueError for a fault in their file
    assert held_out is not None, "a study has held-out rows"
    row_counts = dict.fromkeys(setting.rows for setting in settings)  # each once, in order
    for count in row_counts:
        examples = encode_rows(session, config, rows[:count], "reference")
        config.train.highest_rate(len(examples))
    return held_out


def _rows(config: Config, check: Callable[[Row], None]) -> Rows:
    """As many rows as the largest count of --rows-list, or all.

    check    refuses an unusable row by ValueError (`DataConfig.load`)

    ValueError where the file has fewer rows.
    """
    job, data = config.job, config.data
    if job.rows_list is None:
        return data.load(check=check)
    counts = job.numbers("rows_list", int)
    if data.limit is not None or min(counts) < 1:
        raise ValueError(
            f"rows_list {job.rows_list!r}, limit {data.limit}: expected counts of at least 1, and "
            "no --limit beside them"
        )
    most = max(counts)
    rows = dataclasses.replace(data, limit=most).load(check=check)
    if len(rows) < most:
        raise ValueError(f"rows_list {job.rows_list!r}: {data.data} has {len(rows)} rows")
    return rows


def _turns_of(lines: Sequence[Distilled], rows: Sequence[Row]) -> list[Distilled]:
    """The distilled turns of those rows; a line's id is "row/turn"."""
    names = {row.id for row in rows}
    return [line for line in lines if line.id.rpartition("/")[0] in names]


def _facts(
    session: Session, config: Config, report: DistillReport, likelihood: LikelihoodSums | None
) -> dict[str, Any]:
    """The content of study.json, except the findings."""
    return {
        "settings": config.settings(),
        "environment": environment(),
        "model": session.facts(),
        "distilled": {"counts": dict(report.counts), "differ": report.differ},
        "likelihood": dataclasses.asdict(likelihood),
    }


def training_figures(place: Path, summary: dict[str, Any]) -> dict[str, float]:
    """The budget and losses of a training, and its seconds, those before a kill included."""
    steps = read_jsonl(place / "metrics.jsonl", METRICS | {"tokens_s": float})
    seconds = sum(line["tokens"] / line["tokens_s"] for line in steps)
    return {name: summary[name] for name in BUDGET} | {"seconds": seconds}


@dataclass(frozen=True)
class Measure:
    """Measures the seed model and the adapters on held-out rows, tasks and drift, item by item."""

    session: Session
    config: Config
    held_out: Rows
    answers: Sequence[SeedAnswer]  # the seed's, to general prompts
    task_answers: Sequence[RowAnswer] = ()  # the seed's, to the held-out rows

    def seed(self, place: Path) -> MeasuredRun:
        """Held-out rows and tasks of the seed model; it has no drift."""
        run = self.held_out_rows(place, "seed", None)
        run.tasks = self.tasks(place, "seed", None)
        return run

    def adapter(self, place: Path, arm: str, lora: Lora) -> MeasuredRun:
        """Held-out rows, tasks and drift of an adapter, in its run directory `place`."""
        run = self.held_out_rows(place, arm, lora)
        run.tasks = self.tasks(place, arm, lora)
        run.drift = self.drift(place, arm, lora)
        run.task_drift = self.task_drift(place, arm, lora)
        run.norms = update_norms(self.session.model, lora)
        return run

    def held_out_rows(self, place: Path, arm: str, lora: Lora | None) -> MeasuredRun:
        """Answers to the held-out rows, judged, and the likelihood of the references."""
        session = self.session
        verify = self.config.distill.verify
        max_new = self.config.job.eval_max_new
        file = place / "evaluation.jsonl"
        settings = self._settings(place, lora) | {
            "data": self.held_out.sha256,
            "rows": len(self.held_out),
            "verify": verify,
            "max_new": max_new,
        }
        generator = ChatGenerator(session.model, session.chat, self.config.sampling.greedy(max_new))
        evaluate(generator, self.held_out, verify, {arm: lora}, file, settings)

        answers = {line["id"]: line for line in read_jsonl(file, ANSWER)}
        likelihoods = {line["id"]: line for line in read_jsonl(nll_file(file), NATS)}
        ids = [row.id for row in self.held_out]
        right = None
        if answers:  # --verify none judges no answers
            right = [answers[row_id]["ok"] for row_id in ids]
        return MeasuredRun(
            ids=ids,
            right=right,
            nll=[likelihoods[row_id]["nll"] for row_id in ids],
            tokens=[likelihoods[row_id]["tokens"] for row_id in ids],
        )

    def tasks(self, place: Path, arm: str, lora: Lora | None) -> dict[str, list[bool]]:
        """Verdicts on the items of the --task tasks, by "task scorer"; one greedy answer each."""
        config = self.config
        if config.tasks is None or not config.tasks.task:
            return {}
        greedy = config.sampling.greedy(config.job.eval_max_new)
        scores = run_tasks(self.session, config.tasks, {arm: lora}, place / "tasks", greedy)
        verdicts = {}
        for task in scores:
            lines = read_jsonl(place / "tasks" / f"{task}.jsonl", {"id": str, "scores": dict})
            lines.sort(key=itemgetter("id"))  # the same order for every arm
            for scorer in TASKS[task].scorers:
                verdicts[f"{task} {scorer}"] = [line["scores"][scorer] for line in lines]
        return verdicts

    def drift(self, place: Path, arm: str, lora: Lora) -> list[dict[str, Any]]:
        """Drift over the seed's answers, a line per general prompt in their order."""
        settings = self._settings(place, lora) | {"max_new": self.config.job.retention_max_new}
        file = place / "retention.jsonl"
        retention(self.session.model, self.answers, {arm: lora}, file, settings)
        by_prompt = {line["prompt"]: line for line in read_jsonl(file, DRIFT)}
        return [by_prompt[answer.prompt] for answer in self.answers]

    def seed_to_rows(self, place: Path) -> list[RowAnswer]:
        """The seed's answers to the held-out rows; `place` holds its evaluation.jsonl."""
        session = self.session
        max_new = self.config.job.retention_max_new
        return row_answers(
            ChatGenerator(session.model, session.chat, self.config.sampling.greedy(max_new)),
            self.held_out,
            place / "retention_task.jsonl",
            session.settings | self._task_settings(),
            judged=place / "evaluation.jsonl",
        )

    def task_drift(self, place: Path, arm: str, lora: Lora) -> list[dict[str, Any]]:
        """Drift over the seed's answers to the held-out rows, a line per row in their order."""
        settings = self._settings(place, lora) | self._task_settings()
        file = place / "retention_task.jsonl"
        task_retention(self.session.model, self.task_answers, {arm: lora}, file, settings)
        by_id = {line["id"]: line for line in read_jsonl(file, TASK_DRIFT)}
        return [by_id[answer.id] for answer in self.task_answers]

    def _task_settings(self) -> dict[str, Any]:
        """The settings that drift over the held-out rows depends on, beside model and adapter."""
        return {
            "data": self.held_out.sha256,
            "rows": len(self.held_out),
            "max_new": self.config.job.retention_max_new,
            "eval_max_new": self.config.job.eval_max_new,
        }

    def _settings(self, place: Path, lora: Lora | None) -> dict[str, Any]:
        """The settings of a file of measurements in `place`."""
        if lora is None:
            return dict(self.session.settings)
        return self.session.settings | {"adapters": adapter_hashes([str(place)])}
