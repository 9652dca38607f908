"""Distillation: the seed model rewrites every reference answer in its own words

    prompt = template(instruction, reference)       shown in the model's own chat format
    response ~ seed model                           status = selection.judge(response)
    target = response where accepted, else the reference

    distill_file    read the rows, check all of them, distill_job
    distill_job     distill, score (seed_likelihoods.py), print the report
    distill         one line per assistant turn, into a file that any kill leaves whole
    _rewrite        requests -> sampler -> judged attempts -> lines (writer.py)

A turn gets one attempt, or the attempts of a cascade (cascade.py). Its line goes to FILE as soon as
the turn is decided; a killed run is resumed from there. In a conversation the next turn is asked
for with the earlier targets as context. When all turns are there the file is put into the order of
the data: it does not depend on how many sequences or processes ran together, or on kills.

    FILE             data.Distilled, one JSON object per line; texts without the space around them
    FILE.meta.json   settings, hashes of model and data
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.config import DataConfig
from engine.data.distilled import Distilled
from engine.data.encode import MAX_LENGTH, prompts_of, template_takes
from engine.data.rows import Row, Rows, listing
from engine.distill.cascade import AssistantTurn, check_temperature
from engine.distill.config import DistillConfig
from engine.distill.distill_report import DistillReport
from engine.distill.rewrite_prompts import TEMPLATES, prompt
from engine.distill.seed_likelihoods import LikelihoodSums, score
from engine.distill.writer import LINE_FIELDS, DistilledWriter, distilled_line
from engine.measure.likelihood import Scorer
from engine.runtime.distributed import World
from engine.runtime.locking import lock_file
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines
from engine.runtime.stopping import Stopping
from engine.runtime.terminal import progress
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import SamplerConfig, SamplerStats
from engine.session import Session
from model.chat import Chat
from model.llama import Llama


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
    """Distil the rows of a file; unusable rows are reported before the first one is rewritten."""
    config.check()
    rows = data.load(check=can_be_asked(session.chat, config))
    _print_long_prompts(session, rows)
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
) -> tuple[DistillReport, LikelihoodSums | None]:
    """Distil and score the rows, and print both results. scoring: whether to score."""
    settings, world = distill_settings(session, rows, config, sampling), session.world
    check_rows(session.chat, rows)
    model, chat = session.model, session.chat
    report = distill(
        model, chat, rows, out, config, sampling, settings=settings, resume=resume, world=world
    )
    print(report.text())
    likelihoods = None
    if scoring:
        scores = out.with_name(out.name + ".scores.jsonl")
        likelihoods = score(model, chat, report.lines, scores, settings, world)
        print(likelihoods.text())
    print(f"written: {out}")
    return report, likelihoods


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
    """Write the distilled data of `rows` to `out`. settings: a run is resumed under equal ones.

    The first Ctrl-C or SIGTERM lets the running sequences end and starts no other (a turn whose
    stage lacks attempts is asked again when resumed), then raises `Stopped` in every process of the
    job; the second stops at once. ValueError where `out` exists without resume, or with it under
    other settings.
    """
    config.check()
    check_temperature(config.stages, sampling.temperature)
    world = world or World()
    work = Work(SamplerStats(), seconds=0.0, written=0)
    with (
        lock_file(out),
        ResumedLines(out, settings, resume=resume, wanted=LINE_FIELDS, world=world) as file,
        Stopping("the running rows are finished and kept") as stop,
    ):
        finished = {id: distilled_line(record) for id, record in file.done.items()}
        order = [f"{row.id}/{k}" for row in rows for k in range(len(row.turns))]
        turns = list(_unfinished_turns(file.mine(list(rows)), finished))
        if turns:
            work = _rewrite(model, chat, turns, config, sampling, file, stop)
        world.barrier()  # another process may have hours of rows left
        if world.any_rank(stop.asked):
            stop.end(_kept_text(out, order, file))
        stop.kept = f"all {len(order)} turns are in {out}"
        lines = [distilled_line(record) for record in file.finish(order)]
    return DistillReport(
        lines, work.stats, work.seconds, work.written, len(finished), config.rules.cut_prompts
    )


def _unfinished_turns(
    rows: Sequence[Row], finished: dict[str, Distilled]
) -> Iterator[AssistantTurn]:
    """Of every row the first turn that has no line yet; none where all have one."""
    for row in rows:
        turn: AssistantTurn | None = AssistantTurn.first(row)
        while turn is not None and turn.id in finished:
            turn = turn.following(finished[turn.id].target)
        if turn is not None:
            yield turn


class Work(NamedTuple):
    """The work of this process in this start."""

    stats: SamplerStats
    seconds: float  # of sampling
    written: int  # lines


def _rewrite(
    model: Llama,
    chat: Chat,
    turns: Sequence[AssistantTurn],
    config: DistillConfig,
    sampling: SamplerConfig,
    file: ResumedLines,
    stop: Stopping,
) -> Work:
    """Rewrite these turns and those that follow them in their rows."""
    total = sum(len(turn.row.turns) - turn.number for turn in turns)
    several = any(stage.tries > 1 for stage in config.stages)
    needs_scorer = config.choose == "likelihood" and several
    with (
        ChatGenerator(model, chat, sampling).sampler() as sampler,
        Scorer(model, []) if needs_scorer else nullcontext() as scorer,
        progress(total=total, desc="distill", unit="turn", disable=not file.world.is_rank0) as bar,
    ):
        stop.finish = sampler.drain
        writer = DistilledWriter(chat, config, sampler, scorer, file)
        # 1. submit the first stage of every turn
        for turn in turns:
            writer.start(turn)
        if writer.no_room:
            print(
                f"NOTE: of {len(turns)} requests {writer.no_room} leave no room for an answer in "
                f"the model's {writer.context_tokens} tokens: their references stay "
                "(prompt_too_long)"
            )
        # 2. sample; verify, select and write what is finished; submit what follows from it
        started = time.perf_counter()
        for completion in sampler.run():
            writer.take(completion)
            tokens_s = sampler.stats.new_tokens / (time.perf_counter() - started)
            bar.set_postfix_str(
                f"{tokens_s:.0f} tokens/s, {len(sampler.scheduler.running)} running", refresh=False
            )
            bar.update(writer.written - bar.n)
        return Work(sampler.stats, time.perf_counter() - started, writer.written)


def _kept_text(out: Path, order: Sequence[str], file: ResumedLines) -> str:
    """The message of a run that was stopped: how many turns are in the file."""
    if file.world.size > 1:
        return f"what was finished is in {out} and its parts"
    finished = sum(name in file.done for name in order)
    return f"{finished} of {len(order)} turns are in {out}"


def distill_settings(
    session: Session, rows: Rows, config: DistillConfig, sampling: SamplerConfig
) -> dict[str, Any]:
    """The settings of a distillation in FILE.meta.json."""
    data = {"sha256": rows.sha256, "rows": len(rows), "first": rows[0].id, "last": rows[-1].id}
    return session.settings | {
        "data": data,
        "distill": dataclasses.asdict(config),
        "sampling": sampling.settings(),
    }


# ---- checks before the first row is rewritten


def can_be_asked(chat: Chat, config: DistillConfig) -> Callable[[Row], None]:
    """A check for `load_rows`: ValueError for a row where the chat template refuses a plain prompt,
    or a prompt that asks for a rewrite."""
    check_plain, template = template_takes(chat), TEMPLATES[config.template]
    guided = any(stage.guided for stage in config.stages)

    def check(row: Row) -> None:
        check_plain(row)
        if not guided:
            return
        for messages in prompts_of(row):
            reference = row.messages[len(messages)]["content"]
            request = prompt(chat, template, messages, reference)
            try:
                chat.render(request, add_generation_prompt=True)
            except ValueError as error:
                raise ValueError(
                    f"as the request for a rewrite (--template {config.template}): {error}"
                ) from None

    return check


def check_rows(chat: Chat, rows: Rows) -> None:
    """ValueError naming the turns that cannot be encoded as training examples."""
    faults = []
    for row in rows:
        for number, at in enumerate(row.turns):
            try:
                chat.target(row.messages[:at], row.messages[at]["content"])
            except ValueError as error:
                faults.append(f"{row.id}/{number}: {error}")
    if faults:
        fault = f"{len(faults)} turns cannot be asked of this model"
        raise ValueError(listing(fault, faults, "remove or change them"))


def _print_long_prompts(session: Session, rows: Sequence[Row]) -> None:
    """Print how many turns training will refuse for the length of their prompts."""
    context = session.model.config.max_position
    limit = min(MAX_LENGTH, context)
    prompts = [messages for row in rows for messages in prompts_of(row)]
    lengths = [len(session.chat.prompt_ids(messages)) for messages in prompts]
    too_long = sum(length >= limit for length in lengths)
    if not too_long:
        return
    fill_context = sum(length >= context for length in lengths)
    higher = "a higher --max-length, " if context > MAX_LENGTH else ""
    print(
        f"NOTE: {too_long} of {len(lengths)} turns have prompts of {limit} tokens or more "
        f"({fill_context} of them fill the model's {context}): scripts/train.py stops at them, but "
        f"under {higher}--drop-long (which --preset yang2024-* sets) or --cut-in-proportion"
    )
