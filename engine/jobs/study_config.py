"""What a study varies: its settings, the runs that they need, the points that are measured."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from engine.evaluate.arm_grammar import DEFAULT_ARMS, STEP, Arm, parse_arm_scales, parse_arms
from engine.jobs.job_config import JobConfig
from engine.jobs.measured import ArmResults, MeasuredRun
from engine.runtime.limits import MOST, check_numbers

WITHOUT_REWRITES = ("sft", "replay")  # methods to which no mix applies
KEEP_ALL = 10**6  # checkpoints, where earlier ones are measured
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
    arms: str = DEFAULT_ARMS  # ways of training to compare: METHOD[+LOSS][@SCALE][%RATE] joined by
    #   commas; methods: sft (references), sdft (accepted rewrites), self (the model's own answers),
    #   rft (accepted rewrites only), replay:0.2 (references and own answers to general prompts);
    #   losses, alone or behind a +: those of train.py --loss, as in stm:2.5,dft,sdft+dft
    scales: str | None = None  # strengths at which every adapter is measured, beside those of
    #   --arms, as in 0.25,0.5,0.75,1: a whole curve from one training [default: only those]
    checkpoints: int = 0  # earlier points of every training that are measured too, evenly spaced;
    #   replaces --save-every and --keep
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
        check_numbers(self, seeds=(1, 10**4), eval_limit=(1, MOST), checkpoints=(0, 1000))
        parse_arms(self.arms)
        self.all_scales()

    def all_scales(self) -> list[float]:
        """The scales of --scales; [] without that flag."""
        return [] if self.scales is None else parse_arm_scales(self.scales)


@dataclass(frozen=True)
class Setting:
    """The varied values of the runs of all arms."""

    lr: float
    rank: int
    mix: float  # share of the accepted rewrites that are replaced by their references
    rows: int  # training rows

    @property
    def name(self) -> str:
        """The name of its directory."""
        name = f"lr{self.lr:g}-r{self.rank}-rows{self.rows}"
        return f"{name}-mix{self.mix:g}" if self.mix else name

    def of_arm(self, arm: Arm) -> Setting:
        """The setting of that arm's run: without rewrites there is no mix, and % names a rate."""
        setting = self
        if arm.method in WITHOUT_REWRITES:
            setting = dataclasses.replace(setting, mix=0.0)
        if arm.rate is not None:
            setting = dataclasses.replace(setting, lr=arm.rate)
        return setting


class Run(NamedTuple):
    """A run, but for its training seed."""

    setting: Setting  # of the arm (`Setting.of_arm`)
    arm: Arm  # at scale 1; its rate is the setting's


class Point(NamedTuple):
    """One measurement of every run of an arm."""

    run: Run
    scale: float
    step: int | None = None  # of an earlier checkpoint; None: the finished adapter

    @property
    def name(self) -> str:
        """Its name in the files of the run: `sft`, `stm:2.5@0.5`, `sft step 40`."""
        name = self.run.arm.at(self.scale).name
        return name if self.step is None else f"{name}{STEP}{self.step}"


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


def run_of(setting: Setting, arm: Arm) -> Run:
    """The run of an arm under a setting. Scales, and settings that name its rate, share it."""
    without_rate = dataclasses.replace(arm.trained(), rate=None)
    return Run(setting.of_arm(arm), without_rate)


def config_of(
    config: JobConfig[StudyConfig], setting: Setting, seed: int
) -> JobConfig[StudyConfig]:
    """The settings of the stages for a run."""
    alpha = config.job.alpha or 2.0 * setting.rank
    return dataclasses.replace(
        config,
        encode=dataclasses.replace(config.encode, mix=setting.mix),
        train=dataclasses.replace(config.train, lr=setting.lr, seed=seed),
        lora=dataclasses.replace(config.lora, rank=setting.rank, alpha=alpha),
    )


@dataclass(frozen=True)
class Plan:
    """The runs of a study, and the points at which each is measured."""

    settings: Sequence[Setting]
    arms: Sequence[Arm]
    job: StudyConfig
    steps: Mapping[int, int]  # of a training, by count of rows; {} without --checkpoints

    def runs(self) -> list[Run]:
        """The runs of all settings, each once: settings that differ in the mix share their SFT."""
        runs = []
        for setting in self.settings:
            runs += [run_of(setting, arm) for arm in self.arms]
        return list(dict.fromkeys(runs))

    def points(self, run: Run) -> list[Point]:
        """The points of a run, each once: of every arm that shares it its own scale and those of
        --scales, then the earlier checkpoints."""
        points = []
        for setting in self.settings:
            for arm in self.arms:
                if run_of(setting, arm) == run:
                    scales = (arm.scale, *self.job.all_scales())
                    points += [Point(run, scale) for scale in scales]
        every = self.save_every(run.setting)
        steps = [every * number for number in range(1, self.job.checkpoints + 1)]
        points += [Point(run, 1.0, step) for step in steps if step < self.steps[run.setting.rows]]
        return list(dict.fromkeys(points))

    def save_every(self, setting: Setting) -> int:
        """Steps between the checkpoints that are measured."""
        if not self.job.checkpoints:
            return 0
        return max(1, self.steps[setting.rows] // (self.job.checkpoints + 1))

    def config_of(
        self, config: JobConfig[StudyConfig], setting: Setting, seed: int
    ) -> JobConfig[StudyConfig]:
        """The settings of the stages for a run, which keeps the checkpoints to be measured."""
        config = config_of(config, setting, seed)
        every = self.save_every(setting)
        if not every:
            return config
        train = dataclasses.replace(config.train, save_every=every, keep=KEEP_ALL)
        return dataclasses.replace(config, train=train)

    def groups(self, measured: Mapping[Point, Sequence[MeasuredRun]]) -> list[list[ArmResults]]:
        """The points of every setting, those of an arm together, the first arm's own first."""
        groups = []
        for setting in self.settings:
            own = {Point(run_of(setting, arm), arm.scale) for arm in self.arms}
            points: list[Point] = []
            for arm in self.arms:
                run = run_of(setting, arm)
                points += [Point(run, arm.scale), *self.points(run)]
            group = []
            for point in dict.fromkeys(points):
                name = point.run.setting.name
                runs = list(measured[point])
                group.append(ArmResults(name, point.name, runs, listed=point in own))
            groups.append(group)
        return groups
