"""Distillation: the seed model rewrites every reference answer in its own words

    prompt = template(instruction, reference)       shown in the model's own chat format
    response ~ seed model                           status = selection.judge(response)
    target = response where it is accepted, else the reference

    distill_file    read the rows, check all of them, call distill_job
    distill_job     distill, score (seed_likelihoods.py), print the report
    distill         write one line per assistant turn; a kill loses no finished line
    _rewrite        requests -> sampler -> judged attempts -> lines (writer.py)

A turn gets one attempt, or the attempts of a cascade (cascade.py). Its line is appended to FILE as
soon as the turn is decided; a killed run is resumed from there. In a conversation the next turn is
sampled with the earlier targets as its context. When all turns are there, the file is put into the
order of the data: it does not depend on how many sequences or processes ran together, or on kills.

    FILE             data.Distilled, one JSON object per line; texts are stripped of outer space
    FILE.meta.json   settings, hashes of model and data
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.config import DataConfig
from engine.data.encode import MAX_LENGTH, prompts_of, template_takes
from engine.data.row_store import StoredRows
from engine.data.rows import FirstFaults, Row, Rows
from engine.distill.cascade import AssistantTurn, check_temperature
from engine.distill.config import DistillConfig
from engine.distill.distill_report import DistillReport
from engine.distill.rewrite_prompts import prompt
from engine.distill.seed_likelihoods import LikelihoodSums, score
from engine.distill.turn_feed import Share, TurnFeed, TurnIds, unfinished_turns
from engine.distill.writer import LINE_FIELDS, DistilledWriter, distilled_line
from engine.measure.likelihood import Scorer
from engine.runtime.distributed import World
from engine.runtime.locking import lock_file
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.stopping import Stopping
from engine.runtime.stored_lines import ResumedOnDisk
from engine.runtime.terminal import progress
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import SamplerConfig, SamplerStats
from engine.session import Session
from model.chat import Chat
from model.messages import calls_of

SHOW_AFTER = 2  # seconds after which a check of all rows shows its progress


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
    """Distil the rows of a file into `out`. ValueError for unusable rows, before any is rewritten.

    scoring: whether to score the lines too. resume: whether to continue `out` where it exists.
    """
    config.check()
    rows = data.stored(check=can_be_asked(session.chat, config))
    _print_long_prompts(session, rows)
    distill_job(session, rows, out, config, sampling, scoring=scoring, resume=resume)


def distill_job(
    session: Session,
    rows: Rows | StoredRows,
    out: Path,
    config: DistillConfig,
    sampling: SamplerConfig,
    *,
    scoring: bool,
    resume: bool,
) -> tuple[DistillReport, LikelihoodSums | None]:
    """Distil the rows, score them where `scoring`, and print both results.

    The second result is None where nothing was scored.
    """
    model, chat = session.model, session.chat
    world = session.world
    settings = distill_settings(session, rows, config, sampling)
    check_rows(chat, rows, not world.is_rank0)
    generator = ChatGenerator(model, chat, sampling)
    report = distill(generator, rows, out, config, settings=settings, resume=resume, world=world)
    print(report.text())
    likelihoods = None
    if scoring:
        scores_file = out.with_name(out.name + ".scores.jsonl")
        likelihoods = score(
            model, chat, report.lines, scores_file, settings, world, sampling.invariant
        )
        print(likelihoods.text())
    print(f"written: {out}")
    return report, likelihoods


@memory_for("distilling", SAMPLE_LESS)
def distill(
    generator: ChatGenerator,
    rows: Sequence[Row],
    out: Path,
    config: DistillConfig,
    *,
    settings: dict[str, Any],
    resume: bool = False,
    world: World | None = None,
) -> DistillReport:
    """Rewrite the references of `rows` and write one line per assistant turn to `out`.

    generator   the seed model, its chat format and the sampling settings
    settings    kept in FILE.meta.json; `out` is resumed only under equal settings
    resume      continue `out` where it exists
    world       the processes of the job; each rewrites its share of the rows

    The first Ctrl-C or SIGTERM lets the running sequences end and starts no other, then raises
    `Stopped` in every process of the job; the second stops at once. A turn that then lacks attempts
    of a stage is sampled again when the run is resumed. ValueError for settings that contradict
    each other, where `out` exists and `resume` is False, and where `out` was begun under other
    settings.
    """
    config.check()
    check_temperature(config.stages, generator.sampling.temperature)
    world = world or World()
    work = SamplingWork(SamplerStats(), seconds=0.0, written=0)
    turn_ids = TurnIds(rows)
    with (
        lock_file(out),
        ResumedOnDisk(out, settings, resume=resume, wanted=LINE_FIELDS, world=world) as file,
        Stopping("the running rows are finished and kept") as stop,
    ):
        before = len(file.done)
        own_rows = Share(rows, world)
        unfinished = sum(name not in file.done for name in TurnIds(own_rows))
        if unfinished:
            turns = unfinished_turns(own_rows, file.done)
            work = _rewrite(generator, turns, unfinished, config, file, stop)
        world.barrier()  # another process may have hours of rows left
        if world.any_rank(stop.asked):
            stop.end(_kept_text(out, turn_ids, file))
        stop.kept = f"all turns are in {out}"
        file.put_in_order(turn_ids)
        count = sum(1 for _ in turn_ids)
        lines = file.lines(count, distilled_line)
    return DistillReport(
        lines,
        stats=work.stats,
        seconds=work.seconds,
        written=work.written,
        before=before,
        cut_at=config.rules.cut_prompts,
    )


class SamplingWork(NamedTuple):
    """The sampling that this process has done since it started."""

    stats: SamplerStats
    seconds: float
    written: int  # lines


def _rewrite(
    generator: ChatGenerator,
    turns: Iterator[AssistantTurn],
    unfinished: int,
    config: DistillConfig,
    file: ResumedOnDisk,
    stop: Stopping,
) -> SamplingWork:
    """Rewrite these turns and those that follow them in their rows, and write their lines.

    turns: taken as the sampler gets room for them. unfinished: turns without a line, for the bar.
    """
    has_choice = any(stage.tries > 1 for stage in config.stages)
    needs_scorer = config.choose == "likelihood" and has_choice
    invariant = generator.sampling.invariant
    is_quiet = not file.world.is_rank0
    candidate_scorer: Scorer | nullcontext[None] = nullcontext()
    if needs_scorer:
        candidate_scorer = Scorer(generator.model, [], invariant=invariant)
    with (
        generator.sampler() as sampler,
        candidate_scorer as scorer,
        progress(total=unfinished, desc="distill", unit="turn", disable=is_quiet) as bar,
    ):
        if scorer is not None:
            scorer.make_room = sampler.begin_again
        stop.finish = sampler.drain  # called at the first Ctrl-C or SIGTERM
        writer = DistilledWriter(generator.chat, config, sampler, scorer, file)
        # 1. submit the first stage of as many turns as are held at a time
        feed = TurnFeed(turns, writer, stop)
        feed.fill()
        # 2. sample; judge every finished attempt, write decided lines, submit what follows them,
        #    and the first stage of further turns
        started = time.perf_counter()
        for completion in sampler.run():
            writer.take(completion)
            feed.fill()
            tokens_per_second = sampler.stats.new_tokens / (time.perf_counter() - started)
            running = len(sampler.scheduler.running)
            speed = f"{tokens_per_second:.0f} tokens/s, {running} running"
            bar.set_postfix_str(speed, refresh=False)
            bar.update(writer.written - bar.n)
        seconds = time.perf_counter() - started
        return SamplingWork(sampler.stats, seconds, writer.written)


def _kept_text(out: Path, turn_ids: Iterable[str], file: ResumedOnDisk) -> str:
    """The message of a run that was stopped: how many turns are in the file."""
    if file.world.size > 1:
        return f"the finished turns are in {out} and its parts"
    total = 0
    finished = 0
    for name in turn_ids:
        total += 1
        if name in file.done:
            finished += 1
    return f"{finished} of {total} turns are in {out}"


def distill_settings(
    session: Session, rows: Rows | StoredRows, config: DistillConfig, sampling: SamplerConfig
) -> dict[str, Any]:
    """The content of FILE.meta.json: the settings and data on which the distilled file depends."""
    data = {
        "sha256": rows.sha256,
        "rows": len(rows),
        "first": rows[0].id,
        "last": rows[-1].id,
    }
    return session.settings | {
        "data": data,
        "distill": config.settings(),
        "sampling": sampling.settings(),
    }


# ---- checks before the first row is rewritten


def can_be_asked(chat: Chat, config: DistillConfig) -> Callable[[Row], None]:
    """A check for `load_rows`, to be called with every row.

    It raises ValueError for a row where the chat template refuses the plain prompt of a turn, or
    the prompt that asks for its rewrite.
    """
    check_plain_prompts = template_takes(chat)
    template = config.shown_template
    shows_reference = any(stage.guided for stage in config.stages)

    def check(row: Row) -> None:
        check_plain_prompts(row)
        if not shows_reference:
            return
        for messages in prompts_of(row):
            answer = row.messages[len(messages)]
            reference = answer["content"]
            if calls_of(answer):
                reference = chat.text_of_calls(messages, answer)
            request = prompt(chat, template, messages, reference)
            try:
                chat.render(request, add_generation_prompt=True)
            except ValueError as error:
                raise ValueError(
                    f"as the request for a rewrite (--template {config.template}): {error}"
                ) from None

    return check


def check_rows(chat: Chat, rows: Iterable[Row], quiet: bool = False) -> None:
    """ValueError naming the turns that cannot be encoded as training examples.

    quiet: show no progress.
    """
    faults = FirstFaults()
    for row in _shown(rows, "check", quiet):
        for number, position in enumerate(row.turns):
            try:
                chat.target(row.messages[:position], row.messages[position])
            except ValueError as error:
                faults.add(f"{row.id}/{number}: {error}")
    if faults.count:
        fault = f"{faults.count} turns cannot be encoded for this model"
        raise ValueError(faults.listing(fault, "remove or change them"))


def _shown(rows: Iterable[Row], what: str, quiet: bool) -> Iterable[Row]:
    """The rows, with a progress bar where reading them takes long."""
    return progress(rows, desc=what, unit="row", leave=False, delay=SHOW_AFTER, disable=quiet)


def _print_long_prompts(session: Session, rows: Iterable[Row]) -> None:
    """Print how many turns training will refuse for the length of their prompts."""
    context_tokens = session.model.config.max_position
    limit = min(MAX_LENGTH, context_tokens)
    turns = 0
    too_long = 0
    filling = 0
    for row in _shown(rows, "measure", not session.world.is_rank0):
        for messages in prompts_of(row):
            length = len(session.chat.prompt_ids(messages))
            turns += 1
            if length >= limit:
                too_long += 1
            if length >= context_tokens:
                filling += 1
    if not too_long:
        return
    longer = "a higher --max-length, " if context_tokens > MAX_LENGTH else ""
    print(
        f"NOTE: {too_long} of {turns} turns have prompts of {limit} tokens or more "
        f"({filling} of them fill the model's {context_tokens}): scripts/train.py stops at "
        f"them, except under {longer}--drop-long (which --preset yang2024-* sets) or "
        "--cut-in-proportion"
    )
