"""A row in flight, and what ends it: an end token, a stop string, its limit"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from engine.sampling.requests import Completion, Request
from engine.sampling.speculation import Drafter

Decode = Callable[[Sequence[int]], str]


@dataclass
class FlyingRow:
    """A row in flight."""

    request: Request
    prompt: tuple[int, ...]
    limit: int  # new tokens at most
    expected: int  # new tokens that memory is set aside for
    key: int  # signed 64-bit hash of the id
    pages: list[int]
    filled: int  # prompt tokens that the cache holds
    drafter: Drafter | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: Completion | None = None

    @property
    def length(self) -> int:
        """Tokens in the cache: all but the one drawn last."""
        return self.filled + max(0, len(self.ids) - 1)

    def heat(self, default: float) -> float:
        """Its temperature."""
        own = self.request.temperature
        return default if own is None else own


def ending(
    row: FlyingRow, end_ids: Collection[int], stop: Sequence[str], decode: Decode
) -> Completion | None:
    """The completion of a row whose last token ended it, else None."""
    ids, request = row.ids, row.request
    if ids[-1] in end_ids:
        finish, keep, text = "stop", len(ids) - 1, None
    elif (cut := stop_string(ids, stop, decode)) is not None:
        finish, (keep, text) = "stop_string", cut
    elif len(ids) >= row.limit:
        finish, keep, text = "length", len(ids), None
    else:
        return None
    kept = ids[:keep]
    text = decode(kept) if text is None else text
    logprobs = row.logprobs[:keep]
    return Completion(request.id, request.sample, kept, text, finish, logprobs, len(row.prompt))


def stop_string(ids: list[int], stop: Sequence[str], decode: Decode) -> tuple[int, str] | None:
    """(tokens that lie wholly before the stop string, the text before it), if one is there."""
    if not stop:
        return None
    # a token is at least one byte of text, so a stop string that the last token completed
    # lies within its own length in bytes, plus the tokens of a character cut in two
    window = 4 + max(len(s.encode()) for s in stop)
    if not any(s in decode(ids[-window:]) for s in stop):
        return None
    text = decode(ids)
    ends = [text.find(s) for s in stop if s in text]
    if not ends:
        return None
    text = text[: min(ends)]
    keep = len(ids)
    while keep and not text.startswith(decode(ids[:keep])):
        keep -= 1
    return keep, text
