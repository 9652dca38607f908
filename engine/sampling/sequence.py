"""A sequence that is being decoded, the tokens sampled for it, and its stopping conditions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.sampling.requests import Completion, Request
from engine.sampling.speculation import Drafter

Decode = Callable[[Sequence[int]], str]  # token ids -> text
DIVIDED = "\N{REPLACEMENT CHARACTER}"  # in a text, for bytes that are not a whole character


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
    in_flight: int = 0  # further tokens that are launched and not read yet (launched.py)
    completion: Completion | None = None  # set by the token that ends it

    @property
    def context_len(self) -> int:
        """Tokens in the cache: all but the one sampled last, whose forward comes next.

        Those in flight count: what is launched next finds them there.
        """
        return self.prefilled + max(0, len(self.token_ids) + self.in_flight - 1)

    @property
    def remaining_tokens(self) -> int:
        """New tokens until the limit, behind those in flight."""
        return self.max_new_tokens - len(self.token_ids) - self.in_flight

    def temperature(self, default: float) -> float:
        """The request's own temperature, else the sampler's."""
        own = self.request.temperature
        return default if own is None else own


class SampledTokens(NamedTuple):
    """What one host synchronisation brings back: a list for each sequence, in their order."""

    tokens: list[list[int]]
    logprobs: list[list[float]]  # nats, one per token


class StopConditions:
    """Appends sampled tokens to sequences until one of them ends it.

    In this order: an end token (cut off), a stop string (cut off), the limit of new tokens.

    Stop strings are searched after every token that may have completed one: whose own text holds
    the last character of one, or a part of a character. After any other token `find_stop_string`
    would find none, if the text of some tokens begins and ends with that of fewer of them but for
    characters that the cut divides. Tokenizers decode so (model/tokenizer_base.py).
    """

    def __init__(self, end_ids: Collection[int], stop: Sequence[str], decode: Decode) -> None:
        self.end_ids = end_ids
        self.stop = stop
        self.decode = decode
        self.last_characters = {s[-1] for s in stop}
        self.any_token = any(DIVIDED in s for s in stop)  # may complete a stop string
        self.may_complete: dict[int, bool] = {}  # what is known of tokens

    def append(self, seq: RunningSequence, tokens: Sequence[int], logprobs: Sequence[float]) -> int:
        """Append tokens up to the one that ends the sequence, and set its completion then.

        Returns how many were appended; those behind an end are dropped.
        """
        ids = seq.token_ids
        known = len(ids)
        count = min(len(tokens), seq.max_new_tokens - known)
        finish = "length" if known + count == seq.max_new_tokens else None
        searched = count  # tokens after which stop strings count
        for i in range(count):
            if tokens[i] in self.end_ids:
                finish = "stop"
                searched = i
                count = i + 1
                break
        ids += tokens[:count]
        seq.logprobs += logprobs[:count]
        for end in range(known + 1, known + searched + 1):
            if self.stop and self._may_complete(ids[end - 1]):
                stopped = find_stop_string(ids[:end], self.stop, self.decode)
                if stopped is not None:
                    del ids[end:]
                    del seq.logprobs[end:]
                    kept = ids[: stopped.kept_tokens]
                    seq.completion = _completion(seq, kept, stopped.text, "stop_string")
                    return end - known
        if finish is not None:
            kept = ids[:-1] if finish == "stop" else ids[:]
            seq.completion = _completion(seq, kept, self.decode(kept), finish)
        return count

    def _may_complete(self, token: int) -> bool:
        """Whether a stop string can end within the text of this token."""
        known = self.may_complete.get(token)
        if known is None:
            text = self.decode([token, token])  # twice: a space may be taken off in front
            known = self.any_token or DIVIDED in text
            known = known or any(character in text for character in self.last_characters)
            self.may_complete[token] = known
        return known


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

    Only the end of the text is searched: there was none before the last token.
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
