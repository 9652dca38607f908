"""What is scored together, and its halves where memory is short."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass
class ScoringRequest:
    """A prompt and the answers to score behind it, all token ids."""

    id: str
    prompt: list[int]
    answers: list[list[int]]  # one or more; an empty one is not scored
    skip: tuple[int, ...] = ()  # by answer: tokens at its beginning that belong to its prompt

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and all answers."""
        return len(self.prompt) + sum(len(answer) for answer in self.answers)


class Piece(NamedTuple):
    """A request, or some of its answers, in a part of a batch."""

    place: int  # of the request in the batch
    request: ScoringRequest
    again: int = 0  # answers at its beginning that another piece has: their scores are dropped


def pieces_of(batch: Sequence[ScoringRequest]) -> list[Piece]:
    """A whole batch as one part."""
    return [Piece(place, request) for place, request in enumerate(batch)]


def tokens_of(part: Sequence[Piece]) -> int:
    """Tokens of all its requests."""
    return sum(piece.request.tokens for piece in part)


def halves(part: list[Piece]) -> list[list[Piece]]:
    """Two parts with the requests of this one; of a single request, with half of its answers each.

    The order is kept. The first answer of a request stays in both: it is computed together with the
    prompt, and every score then has the same bits as in the whole. [] for a part that cannot be
    divided: one request with one or two answers.
    """
    if len(part) > 1:
        middle = len(part) // 2
        return [part[:middle], part[middle:]]
    ((place, request, again),) = part
    first, *others = request.answers
    middle = len(others) // 2
    if middle == 0:
        return []
    less = dataclasses.replace(request, answers=[first, *others[:middle]])
    rest = dataclasses.replace(request, answers=[first, *others[middle:]])
    return [[Piece(place, less, again)], [Piece(place, rest, again=1)]]
