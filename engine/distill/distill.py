"""Distillation: the seed model rewrites every reference answer in its own words

    prompt = template(instruction, reference)       shown in the model's own chat format
    response ~ seed model                           status = select.judge(response)
    target = response where accepted, else the reference

One such try for every turn, or a cascade of them (cascade.py). One line per assistant turn goes to
FILE as soon as it is decided (resumed.py); a killed run is resumed from there. In a conversation
the next turn is asked for with the earlier targets as context. When all turns are there the file is
put into the order of the data, so that it does not tell how many rows or processes ran together or
how often the run was killed.

    FILE             data.Distilled, one JSON object per line; texts without the space around them
    FILE.meta.json   settings, hashes of model and data
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from engine.data.config import DataConfig
from engine.data.distilled import Distilled
from engine.data.encode import MAX_LENGTH, prompts_of, template_takes
from engine.data.rows import Row, Rows, listing
from engine.distill.cascade import (
    Turn,
    check_temperature,
)
from engine.distill.config import DistillConfig
from engine.distill.distill_report import DistillReport
from engine.distill.rewrite_prompts import TEMPLATES, prompt
from engine.distill.seed_likelihoods import Means, score
from engine.distill.writer import WANTED, Writer, distilled_line
from engine.measure.likelihood import Scorer
from engine.runtime.distributed import World
from engine.runtime.locking import lock_file
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable_lines import ResumedLines
from engine.runtime.stopping import Stopping
from engine.runtime.terminal import progress
from engine.sampling.requests import SamplerConfig, SamplerStats
from engine.sampling.sampler import Sampler
from engine.session import Session
from model.chat import Chat
from model.llama import Llama


@memory_for("distilling", SAMPLE_LESS)
def distill(
    model: Llama,
    chat: Chat,
    rows: Sequence[Row],
    out: Path,
    config: DistillConfig,
    sampling: SamplerConfig,
    *,
    settings: dict[str, Any],
    resume: bool = False,
    world: World | None = None,
) -> DistillReport:
    """Write the distilled data of `rows` to `out`. `settings` is what makes the run this run.

    The first Ctrl-C or SIGTERM lets the tries in flight end and begins no other (a row that lacks
    tries is asked anew), then raises `Stopped` in every process of the job; the second stops at
    once. Raises ValueError when `out` exists without resume, or with it under other settings.
    """
    config.check()
    check_temperature(config.stages, sampling.temperature)
    world = world or World()
    seconds, written, stats = 0.0, 0, SamplerStats()
    with (
        lock_file(out),
        ResumedLines(out, settings, resume=resume, wanted=WANTED, world=world) as file,
        Stopping("the rows in flight are finished and kept") as stop,
    ):
        done = {name: distilled_line(record) for name, record in file.done.items()}
        order = [f"{row.id}/{k}" for row in rows for k in range(len(row.turns))]
        turns = list(_pending(file.mine(list(rows)), done))
        if turns:
            stats, seconds, written = _write(model, chat, turns, config, sampling, file, stop)
        world.barrier()  # another process may have hours of rows left
        if world.any_rank(stop.asked):
            left = sum(name not in file.done for name in order)
            there = f"{len(order) - left} of {len(order)} turns are in {out}"
            if world.size > 1:
                there = f"what was finished is in {out} and its parts"
            stop.end(there)
        stop.kept = f"all {len(order)} turns are in {out}"
        lines = [distilled_line(record) for record in file.finish(order)]
    return DistillReport(lines, stats, seconds, written, len(done), config.rules.cut_prompts)


def can_be_asked(chat: Chat, config: DistillConfig) -> Callable[[Row], None]:
    """A check for `load_rows`: ValueError for a row whose plain prompts, or whose prompts that ask
    for a rewrite, the chat template refuses."""
    plain, template = template_takes(chat), TEMPLATES[config.template]
    guided = any(stage.guided for stage in config.stages)

    def check(row: Row) -> None:
        plain(row)
        for messages in prompts_of(row) if guided else ():
            reference = row.messages[len(messages)]["content"]
            asked = prompt(chat, template, messages, reference)
            try:
                chat.render(asked, add_generation_prompt=True)
            except ValueError as error:
                raise ValueError(
                    f"as the request for a rewrite (--template {config.template}): {error}"
                ) from None

    return check


def _say_what_is_long(session: Session, rows: Sequence[Row]) -> None:
    """Before the first row is asked for: turns that training will not take as they are."""
    most = session.model.config.max_position
    prompts = [messages for row in rows for messages in prompts_of(row)]
    lengths = [len(session.chat.prompt_ids(messages)) for messages in prompts]
    if long := sum(length >= min(MAX_LENGTH, most) for length in lengths):
        never = sum(length >= most for length in lengths)
        higher = "a higher --max-length, " if most > MAX_LENGTH else ""
        print(
            f"NOTE: {long} of {len(lengths)} turns have prompts of {min(MAX_LENGTH, most)} tokens "
            f"or more ({never} of them fill the model's {most}): scripts/train.py stops at them, "
            f"but under {higher}--drop-long (which --preset yang2024-* sets) or --cut-in-proportion"
        )


def _write(
    model: Llama,
    chat: Chat,
    turns: Sequence[Turn],
    config: DistillConfig,
    sampling: SamplerConfig,
    file: ResumedLines,
    stop: Stopping,
) -> tuple[SamplerStats, float, int]:
    """Ask for these turns and those that follow them: what was done, in seconds, and lines."""
    asked = sum(len(turn.row.turns) - turn.number for turn in turns)
    scored = config.choose == "likelihood" and any(stage.tries > 1 for stage in config.stages)
    with (
        Sampler(model, chat.tokenizer.decode, chat.end_ids, sampling) as sampler,
        Scorer(model, []) if scored else nullcontext() as scorer,
        progress(total=asked, desc="distill", unit="row", disable=not file.world.is_rank0) as bar,
    ):
        stop.finish = sampler.drain
        writer = Writer(chat, config, sampler, scorer, file)
        for turn in turns:
            writer.begin(turn)
        if writer.no_room:
            print(
                f"NOTE: of {len(turns)} requests {writer.no_room} leave no room for an answer in "
                f"the model's {writer.most} tokens: their references stay (prompt_too_long)"
            )
        started = time.perf_counter()
        for completion in sampler.run():
            writer.take(completion)
            rate = sampler.stats.new_tokens / (time.perf_counter() - started)
            bar.set_postfix_str(
                f"{rate:.0f} tokens/s, {len(sampler.scheduler.running)} running", refresh=False
            )
            bar.update(writer.written - bar.n)
        return sampler.stats, time.perf_counter() - started, writer.written


def check_rows(chat: Chat, rows: Rows) -> None:
    """ValueError naming the rows that cannot be encoded: before the first is asked, not behind
    hours of work."""
    faults = []
    for row in rows:
        for number, at in enumerate(row.turns):
            try:
                chat.target(row.messages[:at], row.messages[at]["content"])
            except ValueError as error:
                faults.append(f"{row.id}/{number}: {error}")
    if faults:
        what = f"{len(faults)} turns cannot be asked of this model"
        raise ValueError(listing(what, faults, "remove or change them"))


def distill_settings(
    session: Session, rows: Rows, config: DistillConfig, sampling: SamplerConfig
) -> dict[str, Any]:
    """What makes a distillation this one."""
    data = {"sha256": rows.sha256, "rows": len(rows), "first": rows[0].id, "last": rows[-1].id}
    return session.settings | {
        "data": data,
        "distill": dataclasses.asdict(config),
        "sampling": sampling.settings(),
    }


def distill_file(
    session: Session,
    data: DataConfig,
    out: Path,
    config: DistillConfig,
    sampling: SamplerConfig,
    *,
    scoring: bool,
    resume: bool,
) -> None:
    """Distil the rows of a file; what is wrong with any of them is said before the first one."""
    config.check()
    rows = data.load(check=can_be_asked(session.chat, config))
    _say_what_is_long(session, rows)
    distill_job(session, rows, out, config, sampling, scoring=scoring, resume=resume)


def distill_job(
    session: Session,
    rows: Rows,
    out: Path,
    config: DistillConfig,
    sampling: SamplerConfig,
    *,
    scoring: bool,
    resume: bool,
) -> tuple[DistillReport, Means | None]:
    """Distil, score and say what came out."""
    settings, world = distill_settings(session, rows, config, sampling), session.world
    check_rows(session.chat, rows)
    model, chat = session.model, session.chat
    report = distill(
        model, chat, rows, out, config, sampling, settings=settings, resume=resume, world=world
    )
    print(report.text())
    means = None
    if scoring:
        scores = out.with_name(out.name + ".scores.jsonl")
        means = score(model, chat, report.lines, scores, settings, world)
        print(means.text())
    print(f"written: {out}")
    return report, means


def _pending(rows: Sequence[Row], done: dict[str, Distilled]) -> Iterator[Turn]:
    """The first turn of every row that is not there yet."""
    for row in rows:
        turn: Turn | None = Turn.first(row)
        while turn is not None and turn.id in done:
            turn = turn.next(done[turn.id].target)
        if turn is not None:
            yield turn
