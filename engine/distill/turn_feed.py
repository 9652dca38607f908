"""Which turns are left to rewrite, and when they are given to the sampler

The rows may be more than memory holds: they are read one after the other, and only TURNS_AT_ONCE
turns are held. As many as that are started at first, then one for every turn that is decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from engine.data.rows import Row
from engine.distill.cascade import AssistantTurn
from engine.distill.writer import DistilledWriter
from engine.runtime.distributed import World
from engine.runtime.resumable import Line
from engine.runtime.stopping import Stopping

TURNS_AT_ONCE = 4096  # turns that wait for the sampler or are being sampled


class TurnIds:
    """The ids of all assistant turns, in the order of the data; may be iterated several times."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[str]:
        for row in self.rows:
            for number in range(len(row.turns)):
                yield f"{row.id}/{number}"


class Share:
    """The rows that a process rewrites, by their place; may be iterated several times."""

    def __init__(self, rows: Sequence[Row], world: World) -> None:
        self.rows = rows
        self.world = world

    def __iter__(self) -> Iterator[Row]:
        for number in range(self.world.rank, len(self.rows), self.world.size):
            yield self.rows[number]


def unfinished_turns(rows: Iterable[Row], finished: Mapping[str, Line]) -> Iterator[AssistantTurn]:
    """The first turn without a line of every row that has such a turn."""
    for row in rows:
        turn: AssistantTurn | None = AssistantTurn.first(row)
        while turn is not None and turn.id in finished:
            target = "" if turn.is_last else finished[turn.id]["target"]
            turn = turn.following(target)
        if turn is not None:
            yield turn


@dataclass
class TurnFeed:
    """Starts turns while fewer than TURNS_AT_ONCE are being sampled or wait for it.

    Of data with fewer turns all are started before the first token is sampled. A text does not
    depend on it where it does not depend on the batch (sampling/README.md).
    """

    turns: Iterator[AssistantTurn]
    writer: DistilledWriter
    stop: Stopping
    started: int = 0  # turns
    no_room: int = 0  # of them, those whose prompt fills the model's context
    has_ended: bool = False  # all turns were started

    def fill(self) -> None:
        """Start turns up to the limit; none after a signal."""
        writer = self.writer
        most = max(TURNS_AT_ONCE, 2 * writer.sampler.config.rows)
        while len(writer.sampling) < most and not self.has_ended and not self.stop.asked:
            turn = next(self.turns, None)
            if turn is None:
                self.has_ended = True
                self._print_no_room()
                return
            before = writer.no_room
            writer.start(turn)
            self.started += 1
            self.no_room += writer.no_room - before

    def _print_no_room(self) -> None:
        """Print how many prompts fill the model's context."""
        if self.no_room:
            print(
                f"NOTE: of {self.started} requests {self.no_room} leave no room for an answer in "
                f"the model's {self.writer.context_tokens} tokens: their references stay "
                "(prompt_too_long)"
            )
