"""All settings of a job in one object."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from engine.data.config import DataConfig
from engine.distill.config import DistillConfig
from engine.evaluate.tasks.run import TaskConfig
from engine.runtime.locking import lock_directory
from engine.runtime.resumable import meta_file
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig, Session, as_begun
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.replay import ReplayConfig
from engine.train.validate import ValidateConfig
from engine.verify.verifiers import get_verifier
from model.lora import LoraConfig

J = TypeVar("J")  # SdftConfig, StudyConfig or PreflightConfig
T = TypeVar("T")  # what a job returns


@dataclass(frozen=True)
class JobConfig(Generic[J]):
    """The settings of every stage, and those of the job itself.

    A job that has no tasks, no validation or no replay has None there.
    """

    model: ModelConfig
    data: DataConfig
    job: J
    distill: DistillConfig
    sampling: SamplerConfig
    encode: EncodeConfig
    train: TrainConfig
    lora: LoraConfig
    tasks: TaskConfig | None = None
    validate: ValidateConfig | None = None
    replay: ReplayConfig | None = None

    def parts(self) -> list[Any]:
        """The settings objects, in the order of the fields, without those that are None."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return [value for value in values if value is not None]

    def check(self) -> None:
        """ValueError for settings that cannot run."""
        for part in self.parts():
            part.check()
        get_verifier(self.distill.verify)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Class name -> field -> value, as summary.json and study.json hold them."""
        return {type(part).__name__: dataclasses.asdict(part) for part in self.parts()}

    def run_locked(self, run: Callable[[Session, JobConfig[J], Path], T]) -> T:
        """Load the model and run the job under the lock of its directory.

        A job that continues has the date and dtype that it was started with.
        """
        out = Path(self.job.out)
        with lock_directory(out):
            model = as_begun(self.model, meta_file(out / "distilled.jsonl"))
            return run(Session.open(model), dataclasses.replace(self, model=model), out)

    def as_published(self) -> JobConfig[J]:
        """A copy in which --paper-exact cuts long examples as the published code does."""
        if not self.distill.paper_exact:
            return self
        encode = dataclasses.replace(self.encode, cut_in_proportion=True)
        return dataclasses.replace(self, encode=encode)
