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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.cascade import (
    REFERENCE,
    Asking,
    Candidate,
    Stage,
    Turn,
    check_temperature,
    parse_cascade,
)
from engine.data import (
    CONTEXT,
    KEPT,
    MAX_LENGTH,
    Distilled,
    Row,
    Rows,
    prompts_of,
    template_takes,
)
from engine.distributed import World
from engine.locking import lock_file
from engine.log import progress
from engine.process import SAMPLE_LESS, memory_for
from engine.resumed import ResumedLines
from engine.rows import listing
from engine.sampler import Completion, Request, Sampler, SamplerConfig, SamplerStats
from engine.score import Means, Scorer, score
from engine.selection import OURS, PAPER, Rules, judge
from engine.session import DataConfig, Session
from engine.stopping import Stopping
from engine.templates import TEMPLATES, prompt
from engine.verifiers import PUBLISHED, get_verifier
from model.chat import Chat
from model.llama import Llama

PAPER_SAMPLING = {"temperature": 0.95, "top_p": 0.7, "top_k": 50}  # LLaMA-Factory's defaults
FIELDS = tuple(part.name for part in dataclasses.fields(Distilled))
WANTED = dict.fromkeys(set(FIELDS) - {"tries"}, str) | {
    **{"messages": list, "response_ids": list},
    **{"prompt_tokens": int, "response_tokens": int},
}  # what a line of the file must have; older ones have no tries
LOW_SHARE = 0.2  # under this share of differing targets SFT and SDFT are nearly the same run


@dataclass(frozen=True)
class DistillConfig:
    """What is asked of the seed model and what is accepted."""

    template: str = "using"  # using | refer | gsm8k: how the reference is shown
    verify: str = "none"  # what a rewrite must keep: none | number | call | code | ... (README)
    cascade: str = "guided:1"  # tries, as unguided:2,guided:2,cooler:1; the reference comes last
    choose: str = "likelihood"  # likelihood | first: which of several fit tries is taken
    max_new_tokens: str = "auto"  # new tokens per answer; auto: 64 + 3 x the reference's, from 128
    paper_exact: bool = False  # also the published code's defects that change results

    @property
    def stages(self) -> tuple[Stage, ...]:
        return parse_cascade(self.cascade)

    @property
    def rules(self) -> Rules:
        return PAPER if self.paper_exact else OURS

    @property
    def verifier(self) -> str:
        """The verifier's name: the published one of the same purpose under paper_exact."""
        return PUBLISHED.get(self.verify, self.verify) if self.paper_exact else self.verify

    def check(self) -> None:
        """ValueError for names and numbers that are not known."""
        if self.template not in TEMPLATES:
            raise ValueError(f"template {self.template!r}: one of {', '.join(TEMPLATES)} is wanted")
        get_verifier(self.verify)
        if self.choose not in ("likelihood", "first"):
            raise ValueError(f"choose {self.choose!r}: likelihood or first is wanted")
        stages = self.stages
        if self.paper_exact and stages != parse_cascade("guided:1"):
            raise ValueError(
                f"paper_exact with cascade {self.cascade!r}: the published code asks once, shown "
                "the reference; leave out one of the two"
            )
        if self.max_new_tokens != "auto" and not (
            self.max_new_tokens.isdecimal() and int(self.max_new_tokens) > 0
        ):
            raise ValueError(f"max_new_tokens {self.max_new_tokens!r}: a number or auto is wanted")

    def limit(self, reference_tokens: int) -> int:
        """New tokens for a reference of that length."""
        if self.max_new_tokens != "auto":
            return int(self.max_new_tokens)
        return max(128, 64 + 3 * reference_tokens)


@dataclass
class DistillReport:
    """What is in the file, and what this process did."""

    lines: list[Distilled]
    stats: SamplerStats
    seconds: float  # of generation in this process
    written: int  # lines written in this process
    before: int = 0  # lines that an earlier start had written
    cut_at: int = 0  # tokens at which prompts lost their end (Rules.cut_prompts)

    @property
    def counts(self) -> Counter[str]:
        return Counter(line.status for line in self.lines)

    @property
    def targets(self) -> list[Distilled]:
        """The lines that are trained on: all but those that are context only."""
        return [line for line in self.lines if line.status != CONTEXT]

    @property
    def differ(self) -> float:
        """Share of targets that are not the reference."""
        targets = self.targets
        return sum(line.target != line.reference for line in targets) / max(1, len(targets))

    def stages(self) -> Iterator[str]:
        """What every stage of a cascade was asked and gave; nothing for one try a turn."""
        names = dict.fromkeys(name for line in self.lines for name in line.tries)
        if all(sum(map(len, line.tries.values())) <= 1 for line in self.lines):
            return
        for name in names:
            asked = [line.tries[name] for line in self.lines if name in line.tries]
            counts = Counter(status for tries in asked for status in tries).most_common()
            won = sum(line.stage == name for line in self.lines)
            yield (
                f"{name}: {won} of {len(asked)} turns decided by {sum(n for _, n in counts)} tries "
                f"({', '.join(f'{status} {n}' for status, n in counts)})"
            )
        left = sum(line.stage == REFERENCE for line in self.lines)
        yield f"{REFERENCE}: {left} turns"

    def text(self) -> str:
        """Counts and shares by status, speed, a warning where the two arms will be nearly one."""
        n = len(self.targets)
        counts = self.counts
        silent = counts.pop(CONTEXT, 0)
        parts = [f"{k} {v} ({v / n:.0%})" for k, v in counts.most_common()]
        text = f"{n} turns: " + ", ".join(parts)
        text += f"; {silent} further turns are context only" if silent else ""
        text += "".join(f"\n{line}" for line in self.stages())
        text += f"\ntargets that differ from the reference: {self.differ:.1%}"
        if self.cut_at:
            cut = sum(line.prompt_tokens >= self.cut_at for line in self.lines)
            text += f"\nprompts cut at {self.cut_at} tokens (or just as long): {cut}"
        if self.differ < LOW_SHARE:
            text += (
                f"\nWARNING: under {LOW_SHARE:.0%} of the targets are the model's own words, so "
                "SFT and SDFT will nearly be the same run"
            )
        if self.written:
            rows, tokens = self.written / self.seconds, self.stats.new_tokens / self.seconds
            since = f"since the last start {self.written} turns were " if self.before else ""
            prefill, decode = self.stats.prefill_seconds, self.stats.decode_seconds
            text += (
                f"\n{since}generated in {self.seconds:.1f} s (prefill {prefill:.1f}, "
                f"decoding {decode:.1f}): {rows:.2f} rows/s, "
                f"{tokens:.0f} new tokens/s; {self.stats.text()}"
            )
        return text


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
        if world.any(stop.asked):
            left = sum(name not in file.done for name in order)
            there = f"{len(order) - left} of {len(order)} turns are in {out}"
            if world.size > 1:
                there = f"what was finished is in {out} and its parts"
            stop.end(there)
        stop.kept = f"all {len(order)} turns are in {out}"
        lines = [distilled_line(record) for record in file.finish(order)]
    return DistillReport(lines, stats, seconds, written, len(done), config.rules.cut_prompts)


def distilled_line(record: dict[str, Any]) -> Distilled:
    """A line of the file, which has what is WANTED."""
    return Distilled(**{name: record[name] for name in FIELDS if name in record})


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
        progress(total=asked, desc="distill", unit="row", disable=not file.world.first) as bar,
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
                f"{rate:.0f} tokens/s, {len(sampler.flying)} in flight", refresh=False
            )
            bar.update(writer.written - bar.n)
        return sampler.stats, time.perf_counter() - started, writer.written


@dataclass
class Writer:
    """Asks for turns, judges what comes back, asks again or writes the line."""

    chat: Chat
    config: DistillConfig
    sampler: Sampler
    scorer: Scorer | None  # where the likeliest of several tries is taken
    file: ResumedLines
    flying: dict[str, Asking] = field(default_factory=dict)  # by the request's id
    written: int = 0
    no_room: int = 0  # requests whose prompt fills the model's context

    @property
    def most(self) -> int:
        """Tokens of the model's context."""
        return self.sampler.owner.config.max_position

    def begin(self, turn: Turn | None) -> None:
        """Ask for a turn; those that stay as they are given are written at once."""
        while turn is not None and (status := self._stays(turn)):
            turn = self._write(turn, _untouched(turn, status))
        if turn is not None:
            self._ask(Asking(turn, self.config.stages))

    def _stays(self, turn: Turn) -> str:
        """The status of a turn that is not asked for, "" of all others."""
        if turn.number in turn.row.context_only:
            return CONTEXT
        return "" if turn.last or self.config.rules.every_turn else "not_asked"

    def _ask(self, asking: Asking) -> None:
        """Submit all tries of the turn's stage."""
        turn, stage, config = asking.turn, asking.stage, self.config
        template = TEMPLATES[config.template]
        try:
            if stage.guided:
                messages = prompt(self.chat, template, turn.context, turn.reference)
                ids = self.chat.prompt_ids(messages, template.prefix)
            else:
                ids = self.chat.prompt_ids(turn.context)
        except ValueError as error:  # the chat template refuses this conversation
            raise ValueError(f"row {turn.id}: {error}; leave the row out") from None
        ids = ids[: config.rules.cut_prompts or None]
        self.no_room += len(ids) >= self.most
        reference = self.chat.response_ids(turn.reference)
        limit = config.limit(len(reference))
        name = stage.request(turn.id)
        self.flying[name] = asking
        # rewrites are about twice as long as what they rewrite (2.4 times in the paper's Alpaca)
        expected = min(limit, 16 + 2 * len(reference))
        heat = stage.temperature(self.sampler.config.temperature)
        for sample in range(stage.tries):
            self.sampler.submit(
                Request(
                    name, ids, limit, sample, temperature=heat, expected=expected, draft=reference
                )
            )

    def take(self, completion: Completion) -> None:
        """Judge a try; with a stage's last one the turn is decided or goes on to the next stage."""
        asking = self.flying[completion.id]
        if not asking.add(_candidate(self.chat, self.config, asking, completion)):
            return
        del self.flying[completion.id]
        won = asking.winner(self.chat, self.scorer)
        if won is None and asking.further():
            self._ask(asking)
            return
        self.begin(self._write(asking.turn, _line(asking, won)))

    def _write(self, turn: Turn, line: Distilled) -> Turn | None:
        """Keep a line; the turn that follows it."""
        self.file.write(dataclasses.asdict(line))
        self.written += 1
        return turn.next(line.target)


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


def _candidate(
    chat: Chat, config: DistillConfig, asking: Asking, completion: Completion
) -> Candidate:
    """What was sampled, judged. A forced beginning belongs to it, but in the published code."""
    ids, turn, rules = completion.ids, asking.turn, config.rules
    prefix = TEMPLATES[config.template].prefix
    if ids and asking.stage.guided and rules.prefix_in_target:
        ids = [*chat.prefix_ids(prefix), *ids]
    text, verifier = chat.tokenizer.decode(ids).strip(), get_verifier(config.verifier)
    status = judge(
        turn.context,
        turn.reference,
        text,
        completion.finish,
        verifier,
        rules=rules,
        tests=turn.tests,
    )
    return Candidate(
        completion.sample,
        list(ids),
        text,
        status,
        completion.finish,
        completion.prompt_tokens,
        kept=status in KEPT,
    )


def _line(asking: Asking, won: Candidate | None) -> Distilled:
    """A decided turn as a line of the file; where all tries failed, with the last stage's first."""
    turn, shown = asking.turn, won or asking.candidates[0]
    return Distilled(
        id=turn.id,
        messages=turn.context,
        reference=turn.reference,
        response=shown.text,
        response_ids=shown.ids,
        target=turn.reference if won is None else won.text,
        status=shown.status,
        stage=REFERENCE if won is None else asking.stage.name,
        finish=shown.finish,
        prompt_tokens=shown.prompt_tokens,
        response_tokens=len(shown.ids),
        tries=asking.tries,
    )


def _untouched(turn: Turn, status: str) -> Distilled:
    """The line of a turn that is not asked for."""
    return Distilled(
        id=turn.id,
        messages=turn.context,
        reference=turn.reference,
        response="",
        response_ids=[],
        target=turn.reference,
        status=status,
        stage=REFERENCE,
        finish="stop",
        prompt_tokens=0,
        response_tokens=0,
    )
