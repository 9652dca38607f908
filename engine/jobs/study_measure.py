"""The measurements of a study: held-out rows, further tasks and drift, item by item, on disk.

The files of a training lie in its run directory and hold all of its points: the adapter at every
scale, and earlier checkpoints of it. They stand for themselves: once all points are measured, the
adapter (megabytes) may be deleted, and a copy of the study without weights goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from engine.data.rows import Rows
from engine.evaluate.arm_grammar import STEP, way_of
from engine.evaluate.arms import Arms, adapter_hashes
from engine.evaluate.retention import retention
from engine.evaluate.target_task import evaluate, nll_file
from engine.evaluate.task_retention import TASK_DRIFT, RowAnswer, row_answers, task_retention
from engine.evaluate.tasks.run import TASKS, run_tasks
from engine.jobs.job_config import JobConfig
from engine.jobs.measured import MeasuredRun, drift_lines, held_out_runs
from engine.measure.seed_answers import SeedAnswer
from engine.measure.update_norms import update_norms
from engine.runtime.files import read_jsonl, write_json
from engine.runtime.published_adapter import WEIGHTS
from engine.runtime.resumable import ResumedLines
from engine.sampling.chat_generator import ChatGenerator
from engine.session import Session
from model.config import read_json
from model.lora import Lora

NORMS = "update_norms.json"  # of every point of a training, by the point's name


@dataclass(frozen=True)
class Measure:
    """Measures the seed model and the adapters on held-out rows, tasks and drift, item by item."""

    session: Session
    config: JobConfig[Any]  # of a study
    held_out: Rows
    answers: Sequence[SeedAnswer]  # the seed's, to general prompts
    task_answers: Sequence[RowAnswer] = ()  # the seed's, to the held-out rows

    def seed(self, place: Path) -> MeasuredRun:
        """Held-out rows and tasks of the seed model; it has no drift."""
        arms: Arms = {"seed": None}
        run = self.held_out_rows(place, arms)["seed"]
        run.tasks = self.tasks(place, "seed", None)
        return run

    def adapters(self, place: Path, adapters: Mapping[str, Lora]) -> dict[str, MeasuredRun]:
        """Held-out rows, tasks and drift of the points of one training, in its run directory.

        adapters    by the name of the point
        """
        arms: Arms = dict(adapters)
        runs = self.held_out_rows(place, arms)
        drift = self.drift(place, arms)
        task_drift = self.task_drift(place, arms)
        norms = {}
        for name, lora in adapters.items():
            norms[name] = update_norms(self.session.model, lora)
            runs[name].tasks = self.tasks(place, name, lora)
            runs[name].drift = drift[name]
            runs[name].task_drift = task_drift[name]
            runs[name].norms = norms[name]
        write_json(place / NORMS, norms)
        return runs

    def without_weights(self, place: Path, names: Sequence[str]) -> dict[str, MeasuredRun]:
        """The same of a training whose adapter was deleted, read from its files alone.

        names    of the points

        ValueError where a point is not measured, or was measured under other settings.
        """
        if self.config.tasks is not None and self.config.tasks.task:
            raise ValueError(f"{place}: its adapter was deleted; expected no --task beside that")
        norms = read_json(place / NORMS) if (place / NORMS).exists() else {}
        without_norm = [name for name in names if name not in norms]
        if without_norm:
            raise ValueError(_not_measured(place / NORMS, f"no norm of {without_norm[0]}"))
        rows = [row.id for row in self.held_out]
        of_task = [answer.id for answer in self.task_answers]
        prompts = [answer.prompt for answer in self.answers]
        evaluation = place / "evaluation.jsonl"
        retained = place / "retention.jsonl"
        retained_task = place / "retention_task.jsonl"
        held_out = self._held_out_settings(place, is_seed=False)
        _require_all(nll_file(evaluation), held_out, names, "id", rows)
        if self.config.distill.verify != "none":
            _require_all(evaluation, held_out, names, "id", rows)
        _require_all(retained, self._drift_settings(place), names, "prompt", prompts)
        _require_all(retained_task, self._task_drift_settings(place), names, "id", of_task)

        runs = held_out_runs(evaluation, names, rows)
        drift = drift_lines(retained, names)
        task_drift = self._task_drift_lines(retained_task, names)
        for name in names:
            runs[name].drift = drift[name]
            runs[name].task_drift = task_drift[name]
            runs[name].norms = norms[name]
        return runs

    def held_out_rows(self, place: Path, arms: Arms) -> dict[str, MeasuredRun]:
        """Answers to the held-out rows, judged, and the likelihood of the references, by arm."""
        session = self.session
        verify = self.config.distill.verify
        max_new = self.config.job.eval_max_new
        file = place / "evaluation.jsonl"
        settings = self._held_out_settings(place, is_seed=None in arms.values())
        generator = ChatGenerator(session.model, session.chat, self.config.sampling.greedy(max_new))
        evaluate(generator, self.held_out, verify, arms, file, settings)
        return held_out_runs(file, arms, [row.id for row in self.held_out])

    def tasks(self, place: Path, arm: str, lora: Lora | None) -> dict[str, list[bool]]:
        """Verdicts on the items of the --task tasks, by "task scorer"; one greedy answer each.

        Every point has its own folder, since the settings of a task's file name its adapter.
        """
        config = self.config
        if config.tasks is None or not config.tasks.task:
            return {}
        folder = place / f"tasks{_suffix(arm)}"
        greedy = config.sampling.greedy(config.job.eval_max_new)
        scores = run_tasks(self.session, config.tasks, {arm: lora}, folder, greedy)
        verdicts = {}
        for task in scores:
            lines = read_jsonl(folder / f"{task}.jsonl", {"id": str, "scores": dict})
            lines.sort(key=itemgetter("id"))  # the same order for every arm
            for scorer in TASKS[task].scorers:
                verdicts[f"{task} {scorer}"] = [line["scores"][scorer] for line in lines]
        return verdicts

    def drift(self, place: Path, adapters: Arms) -> dict[str, list[dict[str, Any]]]:
        """Drift over the seed's answers, by point: a line per general prompt in their order."""
        file = place / "retention.jsonl"
        settings = self._drift_settings(place)
        retention(self.session.model, self.answers, adapters, file, settings)
        return drift_lines(file, adapters)

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

    def task_drift(self, place: Path, adapters: Arms) -> dict[str, list[dict[str, Any]]]:
        """Drift over the seed's answers to the held-out rows, a line per row in their order."""
        file = place / "retention_task.jsonl"
        settings = self._task_drift_settings(place)
        task_retention(self.session.model, self.task_answers, adapters, file, settings)
        return self._task_drift_lines(file, adapters)

    def _task_drift_lines(self, file: Path, arms: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """The lines of a complete file of drift over the held-out rows, by arm."""
        lines = {(line["arm"], line["id"]): line for line in read_jsonl(file, TASK_DRIFT)}
        rows = [answer.id for answer in self.task_answers]
        return {arm: [lines[arm, row] for row in rows] for arm in arms}

    # ---- the settings of the files

    def _held_out_settings(self, place: Path, *, is_seed: bool) -> dict[str, Any]:
        return self._settings(place, is_seed=is_seed) | {
            "data": self.held_out.sha256,
            "rows": len(self.held_out),
            "verify": self.config.distill.verify,
            "max_new": self.config.job.eval_max_new,
        }

    def _drift_settings(self, place: Path) -> dict[str, Any]:
        settings = self._settings(place, is_seed=False)
        return settings | {"max_new": self.config.job.retention_max_new}

    def _task_drift_settings(self, place: Path) -> dict[str, Any]:
        return self._settings(place, is_seed=False) | self._task_settings()

    def _task_settings(self) -> dict[str, Any]:
        """The settings that drift over the held-out rows depends on, beside model and adapter."""
        return {
            "data": self.held_out.sha256,
            "rows": len(self.held_out),
            "max_new": self.config.job.retention_max_new,
            "eval_max_new": self.config.job.eval_max_new,
        }

    def _settings(self, place: Path, *, is_seed: bool) -> dict[str, Any]:
        """The settings of a file of measurements in `place`."""
        if is_seed:
            return dict(self.session.settings)
        if weights_deleted(place):
            hashes = {place.name: read_json(place / "meta.json")["published"][WEIGHTS]}
        else:
            hashes = adapter_hashes([str(place)])
        return self.session.settings | {"adapters": hashes}


def _require_all(
    file: Path, settings: dict[str, Any], names: Sequence[str], field: str, items: Sequence[str]
) -> None:
    """ValueError unless a file, under these settings, has a line for every point and item.

    field    of a line that names its item
    """
    with ResumedLines(file, settings, key=itemgetter("arm", field)) as lines:
        for name in names:
            missing = [item for item in items if (name, item) not in lines.done]
            if missing:
                problem = f"no measurement of {name} on {len(missing)} of {len(items)} items"
                raise ValueError(_not_measured(file, problem))


def _not_measured(file: Path, problem: str) -> str:
    """The message of a training without weights that is not whole."""
    return (
        f"{file}: {problem}, and the adapter was deleted; expected a training that is measured at "
        f"every point asked for (delete {file.parent}, and the same command trains it again)"
    )


def weights_deleted(place: Path) -> bool:
    """Whether a finished training has neither its adapter nor a checkpoint of it any more."""
    has_weights = any(place.glob(f"**/{WEIGHTS}"))
    meta = place / "meta.json"
    return not has_weights and meta.exists() and bool(read_json(meta).get("published"))


def _suffix(arm: str) -> str:
    """What tells a point from the others of its training: "", "@0.5", "-step-40"."""
    if arm == "seed":
        return ""
    return arm.removeprefix(way_of(arm)).replace(STEP, "-step-")
