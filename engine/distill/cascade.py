"""The cascade: the attempts that a turn gets before its reference is taken

    unguided:2,guided:2,cooler:1

    unguided   the plain prompt and no forced beginning: the model does not see the reference
    guided     the template shows the reference (the paper's only way)
    cooler     guided, at half the temperature

(Mind the Gap, 2509.15157: own answers first, then guided ones, then the expert's; here with the
paper's rules of selection.) A stage is asked only when all attempts of the stage before were
rejected. The attempts of a stage are samples of one request, and their random numbers are named by
(seed, turn, stage, sample, position): they do not depend on the other requests. Of several accepted
attempts the winner is the one that the seed model finds likeliest under the plain prompt, end token
included, or the first.

    Stage           one part of `--cascade`
    AssistantTurn   a turn to be rewritten: its row, its context
    Attempt         one response, judged
    TurnAttempts    a turn with its attempts so far: which stage is asked, who wins
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.data.rows import Row
from engine.measure.likelihood import Scorer, ScoringRequest
from model.chat import Chat

TEMPERATURE_SHARE = {"unguided": 1.0, "guided": 1.0, "cooler": 0.5}  # of --temperature, by stage
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
        """The temperature of its attempts; base: that of the run."""
        return base * TEMPERATURE_SHARE[self.name]

    def request_id(self, turn_id: str) -> str:
        """The id that names its random numbers; that of a guided request is the turn's own."""
        return turn_id if self.name == "guided" else f"{turn_id}#{self.name}"


def parse_cascade(text: str) -> tuple[Stage, ...]:
    """`unguided:2,guided:2` as stages; ValueError names the part that cannot be read."""
    stages: list[Stage] = []
    for part in text.split(","):
        name, _, count = (piece.strip() for piece in part.partition(":"))
        valid = name in TEMPERATURE_SHARE and count.isdecimal() and 1 <= int(count) <= MAX_TRIES
        repeated = name in [stage.name for stage in stages]
        if not valid or repeated:
            raise ValueError(
                f"cascade {text!r}: cannot read {part.strip()!r}; expected STAGE:TRIES, each stage "
                f"once, stages being {', '.join(TEMPERATURE_SHARE)}, 1 to {MAX_TRIES} tries"
            )
        stages.append(Stage(name, int(count)))
    return tuple(stages)


def check_temperature(stages: Sequence[Stage], temperature: float) -> None:
    """ValueError where two attempts would be the same text."""
    guided = sum(stage.tries for stage in stages if stage.guided)
    if not temperature and (guided > 1 or any(stage.tries > 1 for stage in stages)):
        raise ValueError(
            "temperature 0 writes the same text in every guided and in every unguided try; use "
            "one of each (--cascade unguided:1,guided:1), or a temperature above 0"
        )


@dataclass
class AssistantTurn:
    """An assistant turn of a row, to be rewritten."""

    row: Row
    number: int  # among the row's assistant turns, from 0
    context: list[dict[str, str]]  # the messages before it, earlier answers replaced by targets

    @classmethod
    def first(cls, row: Row) -> AssistantTurn:
        """A row's first assistant turn."""
        return cls(row, 0, list(row.messages[: row.turns[0]]))

    @property
    def id(self) -> str:
        return f"{self.row.id}/{self.number}"

    @property
    def reference(self) -> str:
        return self.row.messages[self.row.turns[self.number]]["content"]

    @property
    def is_last(self) -> bool:
        """Whether the row ends with it."""
        return self.number + 1 == len(self.row.turns)

    @property
    def tests(self) -> str:
        """The row's tests, which belong to its last answer."""
        return self.row.tests if self.is_last else ""

    def following(self, target: str) -> AssistantTurn | None:
        """The row's next turn, in whose context `target` is this turn's answer."""
        if self.is_last:
            return None
        here, there = self.row.turns[self.number : self.number + 2]
        answer = {"role": "assistant", "content": target}
        between = self.row.messages[here + 1 : there]
        return AssistantTurn(self.row, self.number + 1, [*self.context, answer, *between])


@dataclass
class Attempt:
    """One response of the seed model, judged."""

    sample: int
    ids: list[int]  # without the end token
    text: str
    status: str
    finish: str
    prompt_tokens: int
    kept: bool  # whether the status accepts it


@dataclass
class TurnAttempts:
    """A turn and its attempts so far."""

    turn: AssistantTurn
    stages: Sequence[Stage]
    stage_number: int = 0  # the stage that is asked
    attempts: list[Attempt] = field(default_factory=list)  # of this stage
    tries: dict[str, list[str]] = field(default_factory=dict)  # stage -> statuses by sample

    @property
    def stage(self) -> Stage:
        return self.stages[self.stage_number]

    def add(self, attempt: Attempt) -> bool:
        """Add an attempt; whether it was the stage's last."""
        self.attempts.append(attempt)
        if len(self.attempts) < self.stage.tries:
            return False
        self.attempts.sort(key=lambda attempt: attempt.sample)
        self.tries[self.stage.name] = [attempt.status for attempt in self.attempts]
        return True

    def next_stage(self) -> bool:
        """Move to the next stage; whether there is one."""
        if self.stage_number + 1 == len(self.stages):
            return False
        self.stage_number += 1
        self.attempts = []
        return True

    def winner(self, chat: Chat, scorer: Scorer | None) -> Attempt | None:
        """The accepted attempt that becomes the target, None where all were rejected.

        Of several the likeliest under the plain prompt, in nats per token with the end token;
        without a scorer the first.
        """
        kept = [attempt for attempt in self.attempts if attempt.kept]
        if len(kept) < 2 or scorer is None:
            return kept[0] if kept else None
        prompt = chat.prompt_ids(self.turn.context)
        room = scorer.owner.config.max_position - len(prompt)
        answers = []
        for attempt in kept:
            answer = [*attempt.ids, chat.end_id]
            answers.append(answer if len(answer) <= room else [])  # too long to be scored
        (losses,) = scorer.losses([ScoringRequest(self.turn.id, prompt, answers)])
        means = [math.fsum(nats) / len(nats) if nats else math.inf for nats in losses]
        return kept[means.index(min(means))]  # the first of equals
