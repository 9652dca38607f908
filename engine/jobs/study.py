"""A study: arms under identical settings, over rates, ranks, mixes, row counts, scales and seeds

    OUT/distilled.jsonl                        the rewrites, made once for all runs (engine/distill)
    OUT/unguided.jsonl, OUT/replay.jsonl, OUT/seed-nll-*.jsonl
                                               what further arms need, made once (arm_training.py)
    OUT/seed/                                  the seed's answers: held-out rows, general prompts
    OUT/<setting>/seed<n>/<arm>/               a run directory (engine/train), and the measurements:
        evaluation.jsonl, evaluation.jsonl.nll.jsonl, retention.jsonl, retention_task.jsonl,
        update_norms.json, tasks/TASK.jsonl
    OUT/table.txt, OUT/study.json, OUT/pareto.png      the findings (study_findings.py)
    OUT/costs.json                             seconds of what was made once

One list is varied at a time while the others stay at their first value; with --grid every
combination is trained. Arms without rewrites (SFT) know no mix: settings that differ only in the
mix share their runs. The rewrites are the same for all training seeds. A training is measured at
every scale and checkpoint that is asked for. Every result is written as soon as it exists and is
never computed again: after a kill the same command continues, also in a copy of OUT from which the
adapters were deleted. Training seeds are the outer loop, and the findings so far are written after
each seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.data.row_store import StoredRows
from engine.data.rows import Row, Rows
from engine.data.subset import FirstItems
from engine.distill.distill import can_be_asked, distill_job, distill_settings
from engine.distill.distill_report import DistillReport
from engine.distill.seed_likelihoods import LikelihoodSums, score
from engine.evaluate.arm_grammar import Arm, parse_arms
from engine.jobs.arm_training import (
    Material,
    TrainedArm,
    arm_cost,
    check_arms,
    finished_arm,
    make_material,
    train_arm,
)
from engine.jobs.costs import Cost, StageSeconds, cost_table
from engine.jobs.job_config import JobConfig
from engine.jobs.measured import ArmResults, MeasuredRun
from engine.jobs.stages import encode_rows, held_out_rows
from engine.jobs.study_config import Plan, Point, Setting, StudyConfig, config_of, settings_of
from engine.jobs.study_findings import findings
from engine.jobs.study_measure import Measure, weights_deleted
from engine.jobs.study_plot import draw
from engine.measure.seed_answers import SeedAnswer, seed_answers
from engine.runtime.files import read_jsonl, write_json, write_text
from engine.runtime.run_record import environment
from engine.runtime.terminal import table
from engine.sampling.chat_generator import ChatGenerator
from engine.session import Session
from engine.train.checkpoint import METRICS, checkpoint_dir
from model.lora import Lora
from model.peft_format import load_lora

# keys of a training's summary that the findings repeat
BUDGET = ("examples", "steps", "tokens", "response_tokens", "first_loss", "last_loss")

Config = JobConfig[StudyConfig]


def study_job(config: Config) -> dict[str, Any]:
    """Load the model and run the study under the lock of its directory."""
    return config.run_locked(study)


def study(session: Session, config: Config, out: Path) -> dict[str, Any]:
    """Train and measure all runs, and write the findings after each training seed.

    Returns the content of study.json.
    """
    session.require_one_process("a study")
    config.check()
    config = config.as_published()
    rows = _rows(config, can_be_asked(session.chat, config.distill))
    settings = settings_of(config.job, len(rows))
    arms = parse_arms(config.job.arms)
    held_out = check_inputs(session, config, rows, settings, arms)

    # 1. once for all runs: the rewrites, their likelihoods, the seed's answers
    stages = StageSeconds(out / "costs.json")
    report, likelihood = _distil(session, config, rows, out / "distilled.jsonl", stages)
    facts = _facts(session, config, report, likelihood)
    material = make_material(session, config, rows, report, arms, out, stages)
    measure = Measure(session, config, held_out, general_answers(session, config, out))
    seed_model = ArmResults("", "seed", [measure.seed(out / "seed")])
    measure = dataclasses.replace(measure, task_answers=measure.seed_to_rows(out / "seed"))

    # 2. every training seed, setting and arm
    plan = Plan(settings, arms, config.job, _steps_of(session, config, material, rows, settings))
    measured: dict[Point, list[MeasuredRun]] = {}  # one for every seed so far
    costs: dict[str, Cost] = {}  # of every way
    runs = plan.runs()
    count = config.job.seeds * len(runs)
    number = 0
    first_seed = config.train.seed
    for seed in range(first_seed, first_seed + config.job.seeds):
        for run in runs:
            number += 1
            setting, arm = run
            print(f"run {number} of {count}: {setting.name}, seed {seed}, {arm.name}")
            place = out / setting.name / f"seed{seed}" / arm.directory
            of_run = plan.config_of(config, setting, seed)
            of_rows = material.of_rows(FirstItems(rows, setting.rows))
            train = finished_arm if weights_deleted(place) else train_arm
            trained = train(session, of_run, arm, of_rows, place, stages)
            figures = training_figures(place, trained.summary)
            costs.setdefault(arm.way, arm_cost(arm, of_rows, trained, figures["seconds"], stages))
            points = plan.points(run)
            results = _measure_points(measure, place, trained, points)
            for point in points:
                result = results[point.name]
                result.training = figures
                measured.setdefault(point, []).append(result)

        # 3. the findings so far
        groups = plan.groups(measured)
        found, text = findings(seed_model, groups, config.distill.verify, costs)
        write_json(out / "study.json", facts | found)
        write_text(out / "table.txt", text + "\n")
        drawing = draw(seed_model, groups, out / "pareto.png")

    print(f"\n{text}")
    print(f"\nwhat each arm costs alone, in one training:\n{table(cost_table(costs))}")
    print(drawing)
    print(f"all figures: {out}/study.json; adapters: {out}/<setting>/seed<n>/<arm>")
    return facts | found


def _distil(
    session: Session, config: Config, rows: StoredRows, file: Path, stages: StageSeconds
) -> tuple[DistillReport, LikelihoodSums]:
    """The rewrites in `file`, and the seed's likelihoods of them and of the references."""
    report, _ = distill_job(
        session, rows, file, config.distill, config.sampling, scoring=False, resume=True
    )
    stages.add_distillation("distill", report)
    settings = distill_settings(session, rows, config.distill, config.sampling)
    scores = file.with_name(file.name + ".scores.jsonl")
    likelihood = score(session.model, session.chat, report.lines, scores, settings)
    print(likelihood.text())
    return report, likelihood


def _measure_points(
    measure: Measure, place: Path, trained: TrainedArm, points: Sequence[Point]
) -> dict[str, MeasuredRun]:
    """The measurements of a training at its points, by name; only read where its weights are gone.

    ValueError where a checkpoint, or a measurement without weights, is missing.
    """
    if trained.lora is None:
        return measure.without_weights(place, [point.name for point in points])
    adapters = {}
    for point in points:
        adapters[point.name] = _adapter_of(measure.session, place, trained.lora, point)
    return measure.adapters(place, adapters)


def _adapter_of(session: Session, place: Path, finished: Lora, point: Point) -> Lora:
    """The adapter of a point of a training; ValueError where its checkpoint is gone."""
    if point.step is None:
        return finished.scaled(point.scale)
    saved = checkpoint_dir(place, point.step)
    if not saved.exists():
        raise ValueError(
            f"{saved} is not there, but --checkpoints asks for it; expected a training of this "
            f"study (delete {place}, and the same command trains it again)"
        )
    lora = load_lora(saved)
    session.model.bind(lora)
    return lora


def _steps_of(
    session: Session,
    config: Config,
    material: Material,
    rows: StoredRows,
    settings: Sequence[Setting],
) -> dict[int, int]:
    """Optimizer steps by count of rows, the same for all arms; {} without --checkpoints."""
    steps: dict[int, int] = {}
    if not config.job.checkpoints:
        return steps
    for setting in settings:
        if setting.rows not in steps:
            lines = material.of_rows(FirstItems(rows, setting.rows)).lines
            steps[setting.rows] = config.train.steps(
                len(encode_rows(session, config, lines, "reference"))
            )
    return steps


def general_answers(session: Session, config: Config, out: Path) -> list[SeedAnswer]:
    """The seed's greedy answers to the general prompts, in OUT/seed/answers.jsonl."""
    max_new = config.job.retention_max_new
    generator = ChatGenerator(session.model, session.chat, config.sampling.greedy(max_new))
    settings = session.settings | {"max_new": max_new}
    return seed_answers(generator, out / "seed" / "answers.jsonl", settings)


def check_inputs(
    session: Session,
    config: Config,
    rows: StoredRows,
    settings: Sequence[Setting],
    arms: Sequence[Arm],
) -> Rows:
    """The held-out rows; ValueError for settings or files with faults, before hours of work."""
    for setting in settings:
        of_run = config_of(config, setting, config.train.seed)
        for part in (of_run.encode, of_run.train, of_run.lora):
            part.check()
    held_out = held_out_rows(session, config, rows)
    assert held_out is not None, "a study has held-out rows"
    check_arms(session, config, arms, held_out)
    row_counts = dict.fromkeys(setting.rows for setting in settings)  # each once, in order
    for count in row_counts:
        examples = encode_rows(session, config, FirstItems(rows, count), "reference")
        config.train.highest_rate(len(examples))
    return held_out


def _rows(config: Config, check: Callable[[Row], None]) -> StoredRows:
    """As many rows as the largest count of --rows-list, or all.

    check    refuses an unusable row by ValueError (`DataConfig.stored`)

    ValueError where the file has fewer rows.
    """
    job, data = config.job, config.data
    if job.rows_list is None:
        return data.stored(check=check)
    counts = job.numbers("rows_list", int)
    if data.limit is not None or min(counts) < 1:
        raise ValueError(
            f"rows_list {job.rows_list!r}, limit {data.limit}: expected counts of at least 1, and "
            "no --limit beside them"
        )
    most = max(counts)
    rows = dataclasses.replace(data, limit=most).stored(check=check)
    if len(rows) < most:
        raise ValueError(f"rows_list {job.rows_list!r}: {data.data} has {len(rows)} rows")
    return rows


def _facts(
    session: Session, config: Config, report: DistillReport, likelihood: LikelihoodSums
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
