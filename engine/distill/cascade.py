"""The cascade: the attempts that a turn gets before its reference is taken as the target

    --cascade unguided:2,guided:2,cooler:1      (stage:tries, in this order)
    --cascade unguided                          (one try: "unguided self-output", no rewriting)

    unguided   the plain prompt without a forced beginning: the model does not see the reference
    guided     the prompt shows the reference (the paper's only way)
    cooler     guided, at half the temperature

A stage is asked only when all attempts of the stage before it were rejected. (Mind the Gap,
2509.15157: own answers first, then guided ones, then the expert's; here with the paper's rules of
selection.) The attempts of a stage are samples of one request. Their random numbers depend on
(seed, turn, stage, sample, position) and on no other request. Of several accepted attempts the
winner is the one that the seed model finds likeliest under the plain prompt, end token included,
or the first.

    Stage           one part of `--cascade`
    AssistantTurn   a turn to be rewritten: its row, its context
    Attempt         one response with its status
    TurnAttempts    a turn with its attempts so far: the current stage, the winner
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.data.rows import Row
from engine.data.thinking import thinks, without_thoughts
from engine.measure.likelihood import Scorer, ScoringRequest
from model.chat import Chat
from model.messages import calls_of

# The temperature of a stage as a share of --temperature.
TEMPERATURE_SHARE = {"unguided": 1.0, "guided": 1.0, "cooler": 0.5}
MAX_TRIES = 64  # of a stage
REFERENCE = "reference"  # the stage of a line whose attempts were all rejected


@dataclass(frozen=True)
class Stage:
    """A number of attempts of one kind."""

    name: str  # a key of TEMPERATURE_SHARE
    tries: int

    @property
    def guided(self) -> bool:
        """Whether the model is shown the reference."""
        return self.name != "unguided"

    def temperature(self, base: float) -> float:
        """The temperature of its attempts; base: the temperature of the run."""
        return base * TEMPERATURE_SHARE[self.name]

    def request_id(self, turn_id: str) -> str:
        """The id of its requests, from which their random numbers are derived.

        A guided request has the id of its turn: the stages before it do not change its text.
        """
        return turn_id if self.name == "guided" else f"{turn_id}#{self.name}"


def parse_cascade(text: str) -> tuple[Stage, ...]:
    """`unguided:2,guided:2` as stages; a name alone is one try.

    ValueError names the part that cannot be read.
    """
    stages: list[Stage] = []
    for part in text.split(","):
        name, colon, tries = part.partition(":")
        name = name.strip()
        tries = tries.strip() if colon else "1"
        is_stage = name in TEMPERATURE_SHARE
        is_repeated = name in [stage.name for stage in stages]
        is_count = tries.isdecimal() and 1 <= int(tries) <= MAX_TRIES
        if not is_stage or is_repeated or not is_count:
            raise ValueError(
                f"cascade {text!r}: cannot read {part.strip()!r}; expected STAGE:TRIES, each stage "
                f"once, stages being {', '.join(TEMPERATURE_SHARE)}, 1 to {MAX_TRIES} tries"
            )
        stages.append(Stage(name, int(tries)))
    return tuple(stages)


def check_temperature(stages: Sequence[Stage], temperature: float) -> None:
    """ValueError where two attempts would be the same text: greedy samples of one prompt."""
    if temperature != 0:
        return
    guided_tries = sum(stage.tries for stage in stages if stage.guided)
    unguided_tries = sum(stage.tries for stage in stages if not stage.guided)
    if guided_tries > 1 or unguided_tries > 1:
        raise ValueError(
            "temperature 0 writes the same text in every guided and in every unguided try; use "
            "one of each (--cascade unguided:1,guided:1), or a temperature above 0"
        )


@dataclass
class AssistantTurn:
    """An assistant turn of a row, to be rewritten."""

    row: Row
    number: int  # its place among the row's assistant turns, from 0
    context: list[dict[str, Any]]  # the messages before it, earlier answers replaced by targets

    @classmethod
    def first(cls, row: Row) -> AssistantTurn:
        """A row's first assistant turn."""
        position = row.turns[0]
        return cls(row, 0, list(row.messages[:position]))

    @property
    def id(self) -> str:
        """`row/turn`, the id of its line in the distilled file."""
        return f"{self.row.id}/{self.number}"

    @property
    def reference(self) -> str:
        """The text of the data's answer, without its calls."""
        return self.answer["content"]

    @property
    def answer(self) -> dict[str, Any]:
        """The answer of the data, as a message."""
        return self.row.messages[self.row.turns[self.number]]

    def shown_reference(self, chat: Chat) -> str:
        """The answer of the data as text, its calls as the chat template writes them.

        An empty thought that the template puts before calls is left out.
        """
        if not calls_of(self.answer):
            return self.reference
        text = chat.text_of_calls(self.context, self.answer)
        return text if thinks(text) else without_thoughts(text)

    @property
    def is_last(self) -> bool:
        """Whether the row ends with it."""
        return self.number + 1 == len(self.row.turns)

    @property
    def tests(self) -> str:
        """The row's tests, which belong to its last answer."""
        return self.row.tests if self.is_last else ""

    def following(self, target: str) -> AssistantTurn | None:
        """The row's next turn, with `target` as this turn's answer in its context.

        An answer that calls tools stays as the data has it: the results that follow belong to its
        calls. None where the row ends with this turn.
        """
        if self.is_last:
            return None
        position = self.row.turns[self.number]
        next_position = self.row.turns[self.number + 1]
        answer = {"role": "assistant", "content": target}
        if calls_of(self.answer):
            answer = self.answer
        between = self.row.messages[position + 1 : next_position]
        context = [*self.context, answer, *between]
        return AssistantTurn(self.row, self.number + 1, context)


@dataclass
class Attempt:
    """One response of the seed model, with its status."""

    sample: int  # its number among the samples of its request
    ids: list[int]  # without the end token
    text: str
    status: str  # of selection.judge
    finish: str  # of the sampler
    prompt_tokens: int
    kept: bool  # whether the status is one of data.KEPT


@dataclass
class TurnAttempts:
    """A turn and its attempts so far."""

    turn: AssistantTurn
    stages: Sequence[Stage]
    stage_number: int = 0  # of the current stage
    attempts: list[Attempt] = field(default_factory=list)  # of the current stage
    tries: dict[str, list[str]] = field(default_factory=dict)  # stage -> statuses by sample

    @property
    def stage(self) -> Stage:
        """The current stage: the one whose attempts are being sampled."""
        return self.stages[self.stage_number]

    @property
    def stage_is_complete(self) -> bool:
        """Whether all attempts of the current stage are there."""
        return len(self.attempts) == self.stage.tries

    @property
    def has_next_stage(self) -> bool:
        return self.stage_number + 1 < len(self.stages)

    def add(self, attempt: Attempt) -> None:
        """Add an attempt of the current stage. They arrive in any order."""
        self.attempts.append(attempt)
        if self.stage_is_complete:
            self.attempts.sort(key=lambda attempt: attempt.sample)
            self.tries[self.stage.name] = [attempt.status for attempt in self.attempts]

    def start_next_stage(self) -> None:
        """Make the next stage the current one, without attempts."""
        self.stage_number += 1
        self.attempts = []

    def winner(self, chat: Chat, scorer: Scorer | None) -> Attempt | None:
        """The accepted attempt that becomes the target, None where all were rejected.

        Of several accepted ones, the likeliest; without a scorer, the first.
        """
        kept = [attempt for attempt in self.attempts if attempt.kept]
        if not kept:
            return None
        if len(kept) == 1 or scorer is None:
            return kept[0]
        return self._likeliest(kept, chat, scorer)

    def _likeliest(self, kept: Sequence[Attempt], chat: Chat, scorer: Scorer) -> Attempt:
        """The attempt with the fewest nats per token under the plain prompt, end token included.

        The first of equals. An attempt that does not fit behind the plain prompt comes last.
        """
        prompt = chat.prompt_ids(self.turn.context)
        end_id = chat.end_id_of(self.turn.answer)
        room = scorer.owner.config.max_position - len(prompt)
        answers: list[list[int]] = []
        for attempt in kept:
            answer = [*attempt.ids, end_id]
            answers.append(answer if len(answer) <= room else [])  # an empty one is not scored
        request = ScoringRequest(self.turn.id, prompt, answers)
        losses = scorer.losses([request])[0]  # [answer][token], nats
        means = []
        for nats in losses:
            means.append(math.fsum(nats) / len(nats) if nats else math.inf)
        return kept[means.index(min(means))]
