"""The selection cascade: the tries that a turn gets before its reference is taken

    unguided:2,guided:2,cooler:1

    unguided   the plain prompt and no forced beginning: the model has not seen the reference
    guided     the template shows it the reference (the paper's one way)
    cooler     guided, at half the temperature

(Mind the Gap, 2509.15157: own answers first, then guided ones, then the expert's; here with
the paper's rules of selection.) The next stage is asked only when all tries of the one before were
rejected. The tries of a stage go together, as samples of one request, whose random numbers are
named by (seed, turn, stage, sample, position): they do not depend on what else was asked. Of
several fit tries the one is taken that the seed model itself finds likeliest under the plain
prompt, end token included, or the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.data.rows import Row
from engine.measure.likelihood import Scorer, ScoringRequest
from model.chat import Chat

COOLER = 0.5  # of the temperature
STAGES = {"unguided": 1.0, "guided": 1.0, "cooler": COOLER}  # the share of the temperature
MOST_TRIES = 64  # of a stage
REFERENCE = "reference"  # the stage of a turn whose tries were all rejected


@dataclass(frozen=True)
class Stage:
    """So many tries of one kind."""

    name: str  # a key of STAGES
    tries: int

    @property
    def guided(self) -> bool:
        """Whether the reference is shown."""
        return self.name != "unguided"

    def temperature(self, base: float) -> float:
        """Of its tries."""
        return base * STAGES[self.name]

    def request(self, turn: str) -> str:
        """The id that names its random numbers; a guided one's is the turn's own."""
        return turn if self.name == "guided" else f"{turn}#{self.name}"


def parse_cascade(text: str) -> tuple[Stage, ...]:
    """`unguided:2,guided:2` as stages; ValueError says what is wrong with it."""
    stages: list[Stage] = []
    for part in text.split(","):
        name, _, count = (piece.strip() for piece in part.partition(":"))
        good = name in STAGES and count.isdecimal() and 1 <= int(count) <= MOST_TRIES
        if not good or name in [stage.name for stage in stages]:
            raise ValueError(
                f"cascade {text!r}: cannot read {part.strip()!r}; wanted STAGE:TRIES, each stage "
                f"once, stages being {', '.join(STAGES)}, 1 to {MOST_TRIES} tries"
            )
        stages.append(Stage(name, int(count)))
    return tuple(stages)


def check_temperature(stages: Sequence[Stage], temperature: float) -> None:
    """ValueError where two tries would be the same text."""
    guided = sum(stage.tries for stage in stages if stage.guided)
    if not temperature and (guided > 1 or any(stage.tries > 1 for stage in stages)):
        raise ValueError(
            "temperature 0 writes the same text in every guided and in every unguided try; wanted "
            "one of each (--cascade unguided:1,guided:1), or a temperature above 0"
        )


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
    def last(self) -> bool:
        """Whether the row ends with it."""
        return self.number + 1 == len(self.row.turns)

    @property
    def tests(self) -> str:
        """A row's tests are of its last answer."""
        return self.row.tests if self.last else ""

    @property
    def reference(self) -> str:
        return self.row.messages[self.row.turns[self.number]]["content"]

    def next(self, target: str) -> Turn | None:
        """The row's next turn, once this one's target is known."""
        if self.last:
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
class Candidate:
    """What one try wrote."""

    sample: int
    ids: list[int]  # without the end token
    text: str
    status: str
    finish: str
    prompt_tokens: int
    kept: bool


@dataclass
class Asking:
    """A turn and its tries so far."""

    turn: Turn
    stages: Sequence[Stage]
    at: int = 0  # the stage that is asked
    candidates: list[Candidate] = field(default_factory=list)  # of this stage
    tries: dict[str, list[str]] = field(default_factory=dict)  # statuses by stage, in sample order

    @property
    def stage(self) -> Stage:
        return self.stages[self.at]

    def add(self, candidate: Candidate) -> bool:
        """Note a try; whether the stage has all of its own."""
        self.candidates.append(candidate)
        if len(self.candidates) < self.stage.tries:
            return False
        self.candidates.sort(key=lambda c: c.sample)
        self.tries[self.stage.name] = [c.status for c in self.candidates]
        return True

    def further(self) -> bool:
        """Go on to the next stage, if there is one."""
        if self.at + 1 == len(self.stages):
            return False
        self.at, self.candidates = self.at + 1, []
        return True

    def winner(self, chat: Chat, scorer: Scorer | None) -> Candidate | None:
        """The fit candidate that is to be the target; without a scorer the first."""
        kept = [c for c in self.candidates if c.kept]
        if len(kept) < 2 or scorer is None:
            return kept[0] if kept else None
        prompt = chat.prompt_ids(self.turn.context)
        room = scorer.owner.config.max_position - len(prompt)
        answers = [[*c.ids, chat.end_id] for c in kept]
        answers = [answer if len(answer) <= room else [] for answer in answers]
        (losses,) = scorer.losses([ScoringRequest(self.turn.id, prompt, answers)])
        nats = [math.fsum(values) / len(values) if values else math.inf for values in losses]
        return kept[nats.index(min(nats))]  # the first of equals
