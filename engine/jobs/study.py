"""The study: SFT and SDFT under identical settings, over rates, ranks, mixes, row counts and seeds

    OUT/distilled.jsonl                        the rewrites, made once for all (distill.py)
    OUT/seed/                                  the seed's answers: held-out rows, general prompts
    OUT/<setting>/seed<n>/<arm>/               a run directory (train.py) and what was measured:
        evaluation.jsonl, evaluation.jsonl.nll.jsonl, retention.jsonl, tasks/TASK.jsonl
    OUT/table.txt, OUT/study.json, OUT/pareto.png      what came out (pareto.py)

One list is varied at a time, the others staying at their first value; `grid` takes every
combination. SFT knows no rewrites, so no mix: its run is shared by the settings that differ in the
mix only. The rewrites are the same for all training seeds. Everything is kept as it is made and
never made again: the same command goes on after a kill. Training seeds are the outer loop, and what
came out so far is written after each.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine.data.config import DataConfig
from engine.data.distilled import Distilled
from engine.data.encode import Example
from engine.data.rows import Row, Rows
from engine.distill.config import DistillConfig
from engine.distill.distill import can_be_asked, distill_job
from engine.evaluate.retention import retention
from engine.evaluate.target_task import ANSWER, NATS, adapter_hashes, evaluate, nll_file
from engine.evaluate.tasks.run import TASKS, TaskConfig
from engine.jobs.sdft import as_published, encode_rows, held_out_rows
from engine.jobs.study_findings import Measured, Point, draw, every, findings
from engine.measure.seed_answers import SeedAnswer, seed_answers
from engine.runtime.files import read_jsonl, write_json, write_text
from engine.runtime.limits import MOST, check_numbers
from engine.runtime.run_record import environment
from engine.sampling.requests import SamplerConfig
from engine.session import Session, resolved
from engine.train.checkpoint import METRICS
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.train import train
from model.lora import LoraConfig
from model.trained_chat import TrainedChat, common_system

TARGETS = {"sft": "reference", "sdft": "target"}  # arm -> what is trained on
_N = (float, int)
DRIFT = {"prompt": str, "kl": _N, "reverse_kl": _N, "agree": int, "tokens": int}
NO_TASKS = TaskConfig()
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
        """A list's values; ValueError where one is no number or stands there twice."""
        text = getattr(self, name)
        try:
            found = [kind(part) for part in text.split(",")]
        except ValueError:
            found = []
        if not found or len(set(found)) < len(found):
            raise ValueError(
                f"{name} {text!r}: numbers joined by commas, each once, are wanted, as in 1,2"
            )
        return found

    def check(self) -> None:
        """ValueError for numbers that make no study."""
        limits = (self.seeds, self.eval_max_new, self.retention_max_new)
        if min(limits) < 1 or self.alpha < 0:
            raise ValueError(
                f"seeds {self.seeds}, eval_max_new {self.eval_max_new}, retention_max_new "
                f"{self.retention_max_new}, alpha {self.alpha}: expected at least 1 and "
                "alpha >= 0"
            )
        check_numbers(self, seeds=(1, 10**4), eval_limit=(1, MOST))


@dataclass(frozen=True)
class Setting:
    """What both arms share; with the training seed it names a pair of runs."""

    lr: float
    rank: int
    mix: float
    rows: int

    @property
    def name(self) -> str:
        mix = f"-mix{self.mix:g}" if self.mix else ""
        return f"lr{self.lr:g}-r{self.rank}-rows{self.rows}{mix}"

    def of(self, arm: str) -> Setting:
        """The setting of that arm's run."""
        return dataclasses.replace(self, mix=0.0) if arm == "sft" else self


def settings_of(job: StudyConfig, rows: int) -> list[Setting]:
    """The settings in order; `rows` is the count where none are listed."""
    lists: list[list[Any]] = [job.numbers("lr", float), job.numbers("rank", int)]
    lists += [job.numbers("mix", float)]
    lists += [[rows] if job.rows_list is None else job.numbers("rows_list", int)]
    if job.grid:
        return [Setting(*values) for values in itertools.product(*lists)]
    first = [values[0] for values in lists]
    found = [Setting(*first)]
    for i, values in enumerate(lists):
        found += [Setting(*first[:i], value, *first[i + 1 :]) for value in values[1:]]
    return found


def study(
    session: Session,
    data: DataConfig,
    job: StudyConfig,
    distilling: DistillConfig,
    sampling: SamplerConfig,
    encoding: EncodeConfig,
    training: TrainConfig,
    lora: LoraConfig,
    tasks: TaskConfig = NO_TASKS,
) -> dict[str, Any]:
    """Do all of it, print the table; returns what study.json holds."""
    session.alone("a study")
    for config in (data, job, distilling, sampling, tasks):
        config.check()
    out = Path(job.out)
    encoding = as_published(encoding, distilling)
    rows = _rows(job, data, can_be_asked(session.chat, distilling))
    settings = settings_of(job, len(rows))
    runs = Runs(session, data, job, sampling, distilling, encoding, training, lora, tasks, out)
    for setting in settings:
        runs.check(setting)
    # what is wrong with any file stops here, not behind hours of work
    runs.held_out = held_out_rows(session, data, rows, job.eval_data, job.eval_limit)
    for count in dict.fromkeys(setting.rows for setting in settings):
        trained = encode_rows(rows[:count], session, data, encoding, "reference")
        training.highest_rate(len(trained))

    # 1. once for all: the rewrites, their likelihoods, what the seed answers
    distilled = out / "distilled.jsonl"
    report, likelihood = distill_job(
        session, rows, distilled, distilling, sampling, scoring=True, resume=True
    )
    runs.lines = {s.rows: _of(report.lines, {row.id for row in rows[: s.rows]}) for s in settings}
    asked = session.settings | {"max_new": job.retention_max_new}
    runs.said = seed_answers(
        session.model,
        session.chat,
        out / "seed" / "answers.jsonl",
        sampling.greedy(job.retention_max_new),
        asked,
    )
    answers = runs.evaluated(out / "seed", "seed", None, {})
    answers.tasks = runs.answered(out / "seed", "seed", None)
    seed = Point("", "seed", [answers])

    # 2. every training seed, setting and arm
    measured: dict[tuple[Setting, str], list[Measured]] = {}
    todo = list(dict.fromkeys((s.of(arm), arm) for s in settings for arm in TARGETS))
    facts = {
        "settings": resolved(session.config, data, job, distilling, sampling, encoding, training,
                             lora, tasks),
        "environment": environment(),
        "model": session.facts(),
        "distilled": {"counts": dict(report.counts), "differ": report.differ},
        "likelihood": dataclasses.asdict(likelihood),
    }  # fmt: skip
    for k in range(job.seeds):
        number = training.seed + k
        for i, (setting, arm) in enumerate(todo):
            print(f"run {k * len(todo) + i + 1} of {job.seeds * len(todo)}: {setting.name}, "
                  f"seed {number}, {arm}")  # fmt: skip
            measured.setdefault((setting, arm), []).append(runs.run(setting, number, arm))

        # 3. what came out so far
        pairs = [
            [Point(s.of(arm).name, arm, measured[s.of(arm), arm]) for arm in TARGETS]
            for s in settings
        ]
        found, text = findings(seed, pairs, distilling.verify)
        write_json(out / "study.json", facts | found)
        write_text(out / "table.txt", text + "\n")
        drawn = draw(seed, pairs, out / "pareto.png")
    spent = [f"{p.name} {p.arm} {p.seconds:.0f}" for p in every(seed, pairs)[1:]]
    print(f"\n{text}\nseconds of training, mean over seeds: {', '.join(spent)}\n{drawn}")
    print(f"all figures: {out}/study.json; adapters: {out}/<setting>/seed<n>/<arm>")
    return facts | found


def _rows(job: StudyConfig, data: DataConfig, check: Callable[[Row], None]) -> Rows:
    """The rows of the largest count; ValueError where the file has fewer, or what `check` says."""
    if job.rows_list is None:
        return data.load(check=check)
    counts = job.numbers("rows_list", int)
    if data.limit is not None or min(counts) < 1:
        raise ValueError(
            f"rows_list {job.rows_list!r}, limit {data.limit}: counts of at least 1 are wanted, "
            "and no --limit beside them"
        )
    rows = dataclasses.replace(data, limit=max(counts)).load(check=check)
    if len(rows) < max(counts):
        raise ValueError(f"rows_list {job.rows_list!r}: {data.data} has {len(rows)} rows")
    return rows


def _of(lines: Sequence[Distilled], rows: set[str]) -> list[Distilled]:
    """The turns of those rows."""
    return [line for line in lines if line.id.rpartition("/")[0] in rows]


@dataclass
class Runs:
    """Trains and measures one run at a time; everything is kept in its directory."""

    session: Session
    data: DataConfig
    job: StudyConfig
    sampling: SamplerConfig
    distilling: DistillConfig
    encoding: EncodeConfig
    training: TrainConfig
    lora: LoraConfig
    tasks: TaskConfig
    out: Path
    held_out: Rows | None = None
    said: Sequence[SeedAnswer] = ()
    lines: dict[int, list[Distilled]] = dataclasses.field(default_factory=dict)  # by row count

    def configs(self, setting: Setting) -> tuple[EncodeConfig, TrainConfig, LoraConfig]:
        """The stages' settings."""
        alpha = self.job.alpha or 2.0 * setting.rank
        return (
            dataclasses.replace(self.encoding, mix=setting.mix),
            dataclasses.replace(self.training, lr=setting.lr),
            dataclasses.replace(self.lora, rank=setting.rank, alpha=alpha),
        )

    def check(self, setting: Setting) -> None:
        """ValueError for a setting that cannot train."""
        for config in self.configs(setting):
            config.check()

    def run(self, setting: Setting, seed: int, arm: str) -> Measured:
        """Train an adapter, or load it, and measure it on everything."""
        encoding, training, lora_config = self.configs(setting)
        training = dataclasses.replace(training, seed=seed)
        place = self.out / setting.name / f"seed{seed}" / arm
        examples: list[Example] = encode_rows(
            self.lines[setting.rows], self.session, self.data, encoding, TARGETS[arm], seed
        )
        lora, summary = train(
            self.session.model,
            examples,
            lora_config,
            training,
            place,
            base=self.session.config.model,
            model_hash=self.session.fingerprint,
            resume=place.exists(),
            world=self.session.world,
            date=self.session.settings.get("date"),
            chat=TrainedChat.of(
                self.session.chat, common_system([x.messages for x in self.lines[setting.rows]])
            ),
        )
        hashes = {"adapters": adapter_hashes([str(place)])}
        found = self.evaluated(place, arm, lora, hashes)
        found.tasks = self.answered(place, arm, lora)
        asked = self.session.settings | hashes | {"max_new": self.job.retention_max_new}
        file = place / "retention.jsonl"
        retention(self.session.model, self.said, {arm: lora}, file, asked)
        by_prompt = {line["prompt"]: line for line in read_jsonl(file, DRIFT)}
        found.drift = [by_prompt[said.prompt] for said in self.said]
        steps = read_jsonl(place / "metrics.jsonl", METRICS | {"tokens_s": float})
        seconds = sum(line["tokens"] / line["tokens_s"] for line in steps)  # kills not lost
        budget = ("examples", "steps", "tokens", "response_tokens", "first_loss", "last_loss")
        found.training = {name: summary[name] for name in budget} | {"seconds": seconds}
        return found

    def evaluated(self, place: Path, arm: str, lora: Any, hashes: dict[str, Any]) -> Measured:
        """The held-out rows: answers judged, likelihood of the references."""
        job, file = self.job, place / "evaluation.jsonl"
        assert self.held_out is not None
        asked = self.session.settings | hashes
        asked |= {"data": self.held_out.sha256, "rows": len(self.held_out)}
        asked |= {"verify": self.distilling.verify, "max_new": job.eval_max_new}
        evaluate(
            self.session.model,
            self.session.chat,
            self.held_out,
            self.distilling.verify,
            {arm: lora},
            file,
            self.sampling.greedy(job.eval_max_new),
            asked,
        )
        judged = {line["id"]: line for line in read_jsonl(file, ANSWER)}
        nats = {line["id"]: line for line in read_jsonl(nll_file(file), NATS)}
        return Measured(
            ids=[row.id for row in self.held_out],
            right=[judged[row.id]["ok"] for row in self.held_out] if judged else None,
            nll=[nats[row.id]["nll"] for row in self.held_out],
            tokens=[nats[row.id]["tokens"] for row in self.held_out],
        )

    def answered(self, place: Path, arm: str, lora: Any) -> dict[str, list[bool]]:
        """Further tasks, one greedy answer an item: verdicts by "task scorer"."""
        greedy = self.sampling.greedy(self.job.eval_max_new)
        self.tasks.run(self.session, {arm: lora}, place / "tasks", greedy)
        found = {}
        for task in dict.fromkeys(self.tasks.task):
            file = place / "tasks" / f"{task}.jsonl"
            lines = sorted(read_jsonl(file, {"id": str, "scores": dict}), key=lambda x: x["id"])
            for scorer in TASKS[task].scorers:
                found[f"{task} {scorer}"] = [line["scores"][scorer] for line in lines]
        return found
