"""Distillation: the seed model rewrites every reference answer in its own words

    prompt = template(instruction, reference)       shown in the model's own chat format
    response ~ seed model                           status = select.judge(response)
    target = response where accepted, else the reference

One line per assistant turn goes to FILE as soon as it is written (resumed.py); a killed run is
resumed from there. In a conversation the next turn is asked for with the earlier targets as
context. When all turns are there the file is put into the order of the data, so that it does not
tell how many rows or processes ran together or how often the run was killed.

    FILE             data.Distilled, one JSON object per line; texts without the space around them
    FILE.meta.json   settings, hashes of model and data
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data import KEPT, Distilled, Row, Rows
from engine.distributed import World
from engine.log import progress
from engine.process import Interruption
from engine.resumed import ResumedLines
from engine.sampler import Completion, Request, Sampler, SamplerConfig, SamplerStats
from engine.score import Means, score
from engine.select import get_verifier, judge
from engine.session import Session
from model.chat import Chat
from model.llama import Llama

PAPER_SAMPLING = {"temperature": 0.95, "top_p": 0.7, "top_k": 50}  # LLaMA-Factory's defaults
LOW_SHARE = 0.2  # under this share of differing targets SFT and SDFT are nearly the same run


@dataclass(frozen=True)
class Template:
    """How a reference is shown to the model (paper.md 1.2)."""

    system: str  # the sentence that says what to do
    between: str  # what stands between the user's text and the reference
    prefix: str = ""  # the beginning of the assistant's answer; it becomes part of the target
    inline: bool = False  # the sentence stands in the user's message, under Alpaca headers


_USING = (
    "Below are an instruction that describes a task along with a reference answer. Using the "
    "reference answer as a guide, write your own response."
)
_REFER = _USING.replace(
    "Using the reference answer as a guide,", "Refer to the reference answer and"
)
_GSM8K = (
    "You are an expert in math. Below are a math question and its reference answer. Refer to the "
    "reference answer and write a response that appropriately answers the question."
)
TEMPLATES = {
    "using": Template(_USING, "\n\n### Reference Answer:\n", inline=True),
    "refer": Template(_REFER, "\n\n### Reference Answer:\n", inline=True),
    "gsm8k": Template(_GSM8K, "\n\n", "Great! Let's think step by step. "),
}


@dataclass(frozen=True)
class DistillConfig:
    """What is asked of the seed model and what is accepted."""

    template: str = "using"  # using | refer | gsm8k: how the reference is shown
    verify: str = "none"  # none | number | call: what a rewrite must have kept
    max_new_tokens: str = "auto"  # new tokens per answer; auto: 64 + 3 x the reference's, from 128

    def check(self) -> None:
        """ValueError for names and numbers that are not known."""
        if self.template not in TEMPLATES:
            raise ValueError(f"template {self.template!r}: one of {', '.join(TEMPLATES)} is wanted")
        get_verifier(self.verify)
        if self.max_new_tokens != "auto" and not (
            self.max_new_tokens.isdecimal() and int(self.max_new_tokens) > 0
        ):
            raise ValueError(f"max_new_tokens {self.max_new_tokens!r}: a number or auto is wanted")

    def limit(self, reference_tokens: int) -> int:
        """New tokens for a reference of that length."""
        if self.max_new_tokens != "auto":
            return int(self.max_new_tokens)
        return max(128, 64 + 3 * reference_tokens)


def prompt(
    chat: Chat, template: Template, context: Sequence[dict[str, str]], reference: str
) -> list[dict[str, str]]:
    """The conversation that asks for a rewrite: `context` ends with the user's message.

    In the `alpaca` chat format the template's sentence replaces the format's own, which gives the
    paper's raw form; elsewhere that form is what the user says.
    """
    *earlier, last = context
    user = last["content"] + template.between + reference
    system = [m["content"] for m in earlier if m["role"] == "system"]
    earlier = [m for m in earlier if m["role"] != "system"]
    if template.inline and chat.name != "alpaca":
        user = f"{template.system}\n\n### Instruction:\n{user}\n\n### Response:\n"
    else:
        system = [*system, template.system]
    head = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return [*head, *earlier, {"role": "user", "content": user}]


@dataclass
class Turn:
    """One assistant turn on its way."""

    row: Row
    number: int  # which of the row's assistant turns
    context: list[dict[str, str]]  # earlier answers replaced by their targets

    @property
    def id(self) -> str:
        return f"{self.row.id}/{self.number}"

    @property
    def reference(self) -> str:
        return self.row.messages[self.row.turns[self.number]]["content"]

    def next(self, target: str) -> Turn | None:
        """The row's next turn, once this one's target is known."""
        if self.number + 1 == len(self.row.turns):
            return None
        here, there = self.row.turns[self.number : self.number + 2]
        answer = {"role": "assistant", "content": target}
        between = self.row.messages[here + 1 : there]
        return Turn(self.row, self.number + 1, [*self.context, answer, *between])

    @classmethod
    def first(cls, row: Row) -> Turn:
        """A row's first assistant turn."""
        return cls(row, 0, list(row.messages[: row.turns[0]]))


@dataclass
class DistillReport:
    """What is in the file, and what this process did."""

    lines: list[Distilled]
    stats: SamplerStats
    seconds: float  # of generation in this process
    written: int  # lines written in this process

    @property
    def counts(self) -> Counter[str]:
        return Counter(line.status for line in self.lines)

    @property
    def differ(self) -> float:
        """Share of targets that are not the reference."""
        return sum(line.target != line.reference for line in self.lines) / max(1, len(self.lines))

    def text(self) -> str:
        """Counts and shares by status, speed, a warning where the two arms will be nearly one."""
        n = len(self.lines)
        parts = [f"{k} {v} ({v / n:.0%})" for k, v in self.counts.most_common()]
        text = f"{n} turns: " + ", ".join(parts)
        text += f"\ntargets that differ from the reference: {self.differ:.1%}"
        if self.differ < LOW_SHARE:
            text += (
                f"\nWARNING: under {LOW_SHARE:.0%} of the targets are the model's own words, so "
                "SFT and SDFT will nearly be the same run"
            )
        if self.written:
            rows, tokens = self.written / self.seconds, self.stats.new_tokens / self.seconds
            text += (
                f"\ngenerated in {self.seconds:.1f} s (prefill {self.stats.prefill_seconds:.1f}, "
                f"decoding {self.stats.decode_seconds:.1f}): {rows:.2f} rows/s, "
                f"{tokens:.0f} new tokens/s; {self.stats.text()}"
            )
        return text


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

    The first Ctrl-C lets the rows in flight end and begins no other, then raises
    KeyboardInterrupt; the second stops at once. Raises ValueError when `out` exists without
    resume, or with it under other settings.
    """
    config.check()
    world = world or World()
    seconds, written, stats = 0.0, 0, SamplerStats()
    with ResumedLines(out, settings, resume=resume, world=world) as file:
        done = {name: Distilled(**record) for name, record in file.done.items()}
        turns = list(_pending(file.mine(list(rows)), done))
        if turns:
            stats, seconds, written = _write(model, chat, turns, config, sampling, file)
        order = [f"{row.id}/{k}" for row in rows for k in range(len(row.turns))]
        lines = [Distilled(**record) for record in file.finish(order)]
    return DistillReport(lines, stats, seconds, written)


def _write(
    model: Llama,
    chat: Chat,
    turns: Sequence[Turn],
    config: DistillConfig,
    sampling: SamplerConfig,
    file: ResumedLines,
) -> tuple[SamplerStats, float, int]:
    """Ask for these turns and those that follow them: what was done, in seconds, and lines."""
    template, written = TEMPLATES[config.template], 0
    asked = sum(len(turn.row.turns) - turn.number for turn in turns)
    first = file.world.first
    with (
        Sampler(model, chat.tokenizer.decode, chat.end_ids, sampling) as sampler,
        progress(total=asked, desc="distill", unit="row", disable=not first) as bar,
        Interruption(sampler.drain, "the rows in flight are finished and kept"),
    ):
        flying: dict[str, Turn] = {}
        for turn in turns:
            _ask(sampler, chat, template, config, turn, flying)
        started = time.perf_counter()
        for completion in sampler.run():
            turn = flying.pop(completion.id)
            line = _line(chat, template, config, turn, completion)
            file.write(dataclasses.asdict(line))
            written += 1
            if following := turn.next(line.target):
                _ask(sampler, chat, template, config, following, flying)
            rate = sampler.stats.new_tokens / (time.perf_counter() - started)
            bar.set_postfix_str(
                f"{rate:.0f} tokens/s, {len(sampler.flying)} in flight", refresh=False
            )
            bar.update()
        if flying:
            raise KeyboardInterrupt(
                f"{written} turns were written, {len(flying)} rows are left; the same command "
                f"with --resume goes on with {file.out}"
            )
        return sampler.stats, time.perf_counter() - started, written


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


def _ask(
    sampler: Sampler,
    chat: Chat,
    template: Template,
    config: DistillConfig,
    turn: Turn,
    flying: dict[str, Turn],
) -> None:
    messages = prompt(chat, template, turn.context, turn.reference)
    try:
        ids = chat.prompt_ids(messages, template.prefix)
    except ValueError as error:  # the chat template refuses this conversation
        raise ValueError(f"row {turn.id}: {error}; leave the row out") from None
    reference = chat.response_ids(turn.reference)
    limit = config.limit(len(reference))
    flying[turn.id] = turn
    # rewrites are about twice as long as what they rewrite (2.4 times in the paper's Alpaca)
    expected = min(limit, 16 + 2 * len(reference))
    sampler.submit(Request(turn.id, ids, limit, expected=expected, draft=reference))


def _line(
    chat: Chat,
    template: Template,
    config: DistillConfig,
    turn: Turn,
    completion: Completion,
) -> Distilled:
    """What was sampled, judged, as a line of the file."""
    ids = completion.ids and [*chat.prefix_ids(template.prefix), *completion.ids]
    text = chat.tokenizer.decode(ids).strip()
    verifier = get_verifier(config.verify)
    status = judge(turn.context, turn.reference, text, completion.finish, verifier)
    return Distilled(
        id=turn.id,
        messages=turn.context,
        reference=turn.reference,
        response=text,
        response_ids=list(ids),
        target=text if status in KEPT else turn.reference,
        status=status,
        stage="guided",
        finish=completion.finish,
        prompt_tokens=completion.prompt_tokens,
        response_tokens=len(ids),
    )
