"""Distilled lines as they are decided: the turns of a conversation in order, their tries, the
choice."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from engine.data.distilled import CONTEXT, KEPT, Distilled
from engine.distill.cascade import (
    REFERENCE,
    Asking,
    Candidate,
    Turn,
)
from engine.distill.config import DistillConfig
from engine.distill.rewrite_prompts import TEMPLATES, prompt
from engine.distill.selection import judge
from engine.measure.likelihood import Scorer
from engine.runtime.resumable_lines import ResumedLines
from engine.sampling.requests import Completion, Request
from engine.sampling.sampler import Sampler
from engine.verify.verifiers import get_verifier
from model.chat import Chat

FIELDS = tuple(part.name for part in dataclasses.fields(Distilled))
WANTED = dict.fromkeys(set(FIELDS) - {"tries"}, str) | {
    **{"messages": list, "response_ids": list},
    **{"prompt_tokens": int, "response_tokens": int},
}  # what a line of the file must have; older ones have no tries


def distilled_line(record: dict[str, Any]) -> Distilled:
    """A line of the file, which has what is WANTED."""
    return Distilled(**{name: record[name] for name in FIELDS if name in record})


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
                    name,
                    ids,
                    limit,
                    sample,
                    temperature=heat,
                    expected_tokens=expected,
                    draft_source=reference,
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
