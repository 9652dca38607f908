"""A sequence that is being decoded, the tokens sampled for it, and its stopping conditions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.sampling.requests import Completion, Request
from engine.sampling.speculation import Drafter

Decode = Callable[[Sequence[int]], str]  # token ids -> text


@dataclass(eq=False)
class RunningSequence:
    """A prompt and the tokens sampled so far; its keys and values lie in pages of the cache."""

    request: Request
    prompt: tuple[int, ...]
    max_new_tokens: int  # the request's limit within the model's context
    expected_tokens: int  # new tokens that pages are set aside for
    key: int  # signed 64-bit hash of the request's id (and own seed): names its random numbers
    block_table: list[int]  # pages of the cache in the order of the tokens
    prefilled: int  # prompt tokens whose keys and values are in the cache
    drafter: Drafter | None  # None: no speculation
    token_ids: list[int] = field(default_factory=list)  # sampled
    logprobs: list[float] = field(default_factory=list)  # nats, one per sampled token
    completion: Completion | None = None  # set by the token that ends it

    @property
    def context_len(self) -> int:
        """Tokens in the cache: all but the one sampled last, whose forward comes next."""
        return self.prefilled + max(0, len(self.token_ids) - 1)

    @property
    def remaining_tokens(self) -> int:
        """New tokens until the limit."""
        return self.max_new_tokens - len(self.token_ids)

    def temperature(self, default: float) -> float:
        """The request's own temperature, else the sampler's."""
        own = self.request.temperature
        return default if own is None else own


class SampledTokens(NamedTuple):
    """What one host synchronisation brings back: a list for each sequence, in their order."""

    tokens: list[list[int]]
    logprobs: list[list[float]]  # nats, one per token


def check_stop(
    seq: RunningSequence, end_ids: Collection[int], stop: Sequence[str], decode: Decode
) -> Completion | None:
    """The completion if the last token ended the sequence, else None.

    In this order: an end token (cut off), a stop string (cut off), the limit of new tokens.
    """
    ids = seq.token_ids
    if ids[-1] in end_ids:
        kept = ids[:-1]
        return _completion(seq, kept, decode(kept), "stop")
    stopped = find_stop_string(ids, stop, decode)
    if stopped is not None:
        kept = ids[: stopped.kept_tokens]
        return _completion(seq, kept, stopped.text, "stop_string")
    if len(ids) >= seq.max_new_tokens:
        return _completion(seq, ids[:], decode(ids), "length")
    return None


def _completion(seq: RunningSequence, ids: list[int], text: str, finish: str) -> Completion:
    return Completion(
        id=seq.request.id,
        sample=seq.request.sample,
        ids=ids,
        text=text,
        finish=finish,
        logprobs=seq.logprobs[: len(ids)],
        prompt_tokens=len(seq.prompt),
    )


class StopString(NamedTuple):
    """The part of a text before its first stop string."""

    kept_tokens: int  # tokens that lie wholly within that part
    text: str


def find_stop_string(ids: list[int], stop: Sequence[str], decode: Decode) -> StopString | None:
    """Where the first of the stop strings begins in the text of these tokens; None without one.

    To be called after every token: only the end of the text is searched.
    """
    if not stop:
        return None
    # A token is at least one byte of text, so a stop string that the last token completed lies
    # within as many tokens as it has bytes, and the 4 of a character that the cut may fall into.
    longest = max(len(s.encode()) for s in stop)
    tail = decode(ids[-(longest + 4) :])
    if not any(s in tail for s in stop):
        return None
    text = decode(ids)
    starts = [text.find(s) for s in stop if s in text]
    if not starts:
        return None
    text = text[: min(starts)]
    kept_tokens = len(ids)
    while kept_tokens > 0 and not text.startswith(decode(ids[:kept_tokens])):
        kept_tokens -= 1
    return StopString(kept_tokens, text)
