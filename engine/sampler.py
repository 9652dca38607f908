"""KV-cached continuous sampling over the no-batch forward

Up to `rows` rows are in flight. Waiting prompts are prefilled packed, then every row in flight
gets one token per step; a finished row is handed out at once and a waiting one takes its place.

Why a row's text does not depend on its neighbours (fp32 on a CPU: bitwise):
    products    one prepacked form for the whole run, in which a row is a row (lora_linear.py)
    attention   a prompt is prefilled whole and alone; decoding splits the context by page and joins
                in page order (cached_attention.py)
    sampling    one uniform per token, named by (seed, row id, sample, position) (philox.py)
"""

# B = rows in flight

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.context import Cached
from kernels.philox import mix
from kernels.sampling import SampleRows
from model.kv_cache import KVCache
from model.llama import Llama
from model.lora import Lora


@dataclass(frozen=True)
class SamplerConfig:
    """How tokens are chosen and how many rows run together."""

    rows: int = 32  # rows in flight; changes speed and memory, never text (fp32 on a CPU)
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens up to this probability
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest; 0 drops none
    repetition_penalty: float = 1.0  # above 1 weakens tokens of the prompt and the answer so far
    max_new_tokens: int = 512  # where a request names no limit of its own
    seed: int = 0  # with row id, sample and position it names every random number
    stop: tuple[str, ...] = ()  # text that ends a row; it is cut off
    prefill_tokens: int = 512  # prompt tokens per forward; a longer prompt goes alone
    page_size: int = 64  # tokens per page of the cache, and the split of a decoded context

    def settings(self) -> dict[str, Any]:
        """What names a run of it: rows in flight change its speed only."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "rows"}

    def check(self) -> None:
        """ValueError for settings that cannot sample."""
        problems = [
            (self.rows < 1, f"rows {self.rows}: at least 1 is wanted"),
            (self.temperature < 0, f"temperature {self.temperature}: 0 (greedy) or more is wanted"),
            (self.top_k < 0, f"top_k {self.top_k}: 0 (all) or more is wanted"),
            (not 0 < self.top_p <= 1, f"top_p {self.top_p}: 0 < top_p <= 1 is wanted"),
            (not 0 <= self.min_p <= 1, f"min_p {self.min_p}: 0 to 1 is wanted"),
            (
                not 0 < self.repetition_penalty < float("inf"),
                f"repetition_penalty {self.repetition_penalty}: above 0 is wanted, 1 for none",
            ),
            (self.max_new_tokens < 1, f"max_new_tokens {self.max_new_tokens}: at least 1"),
            ("" in self.stop, "an empty stop string would end every row at once"),
        ]
        for wrong, message in problems:
            if wrong:
                raise ValueError(message)


@dataclass(frozen=True)
class Request:
    """One text to write."""

    id: str  # stable: the row's random numbers are named by it
    prompt: Sequence[int]  # token ids
    max_new: int | None = None  # new tokens at most; None: the sampler's default
    sample: int = 0  # which of several samples of this row


@dataclass(frozen=True)
class Completion:
    """What was written for a request."""

    id: str
    sample: int
    ids: list[int]  # the sampled tokens, without the end token
    text: str  # decoded; with a stop string, what stands before it
    finish: str  # stop | stop_string | length | prompt_too_long
    logprobs: list[float]  # of each of `ids` under the model's plain distribution
    prompt_tokens: int


@dataclass
class _Row:
    """A row in flight."""

    request: Request
    limit: int
    key: int  # signed 64-bit hash of the id
    pages: list[int]
    length: int = 0  # tokens in the cache
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class SamplerStats:
    """What a run did, for the summary."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Sampler:
    """Writes texts with one model (and one adapter). Usable from `with`: memory goes at its end."""

    def __init__(
        self,
        model: Llama,
        decode: Callable[[Sequence[int]], str],
        end_ids: Sequence[int],
        config: SamplerConfig,
        lora: Lora | None = None,
    ) -> None:
        config.check()
        self.config, self.decode, self.end_ids = config, decode, frozenset(end_ids)
        self.model, self.lora = model.for_sampling(lora)
        self.waiting: deque[Request] = deque()
        self.flying: list[_Row] = []
        self.cache: KVCache | None = None
        self.stats = SamplerStats()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        del self.model, self.lora, self.cache

    def submit(self, request: Request) -> None:
        """Queue a request; allowed at any time, also while `run` is handing rows out."""
        self.waiting.append(request)

    def run(self, requests: Iterable[Request] = ()) -> Iterator[Completion]:
        """Hand out completions as rows finish, until nothing waits or flies."""
        for request in requests:
            self.submit(request)
        while self.waiting or self.flying:
            admitted, refused = self._admit()
            yield from refused
            for chunk in self._chunks(admitted):
                started = time.perf_counter()
                self._forward(chunk, [list(row.request.prompt) for row in chunk])
                self.stats.prefill_seconds += time.perf_counter() - started
            self.flying += admitted
            yield from self._finished()
            if self.flying:
                started = time.perf_counter()
                self._forward(self.flying, [[row.ids[-1]] for row in self.flying])
                self.stats.decode_seconds += time.perf_counter() - started
                self.stats.steps += 1
                yield from self._finished()

    # ---- admission

    def _limit(self, request: Request) -> int:
        """New tokens this request may have: its own limit, within the model's context."""
        wanted = request.max_new or self.config.max_new_tokens
        return min(wanted, self.model.config.max_position - len(request.prompt))

    def _admit(self) -> tuple[list[_Row], list[Completion]]:
        """Move waiting requests into flight while rows and pages last."""
        admitted: list[_Row] = []
        refused: list[Completion] = []
        while self.waiting and len(self.flying) + len(admitted) < self.config.rows:
            request = self.waiting[0]
            limit = self._limit(request)
            assert len(request.prompt) > 0, f"request {request.id} has an empty prompt"
            if limit < 1:
                n = len(request.prompt)
                gone = Completion(request.id, request.sample, [], "", "prompt_too_long", [], n)
                refused.append(gone)
                self.waiting.popleft()
                continue
            need = self._make_room(len(request.prompt) + limit)
            if need > len(self.cache.free):
                break
            self.waiting.popleft()
            key = mix("row", request.id)
            signed = key - 2**64 if key >= 2**63 else key
            admitted.append(_Row(request, limit, signed, self.cache.take(need)))
        return admitted, refused

    def _make_room(self, tokens: int) -> int:
        """Pages a row of so many tokens needs; the cache is made, or grown while nobody waits on
        anybody, so that `rows` rows of the longest request fit."""
        size = self.config.page_size
        need = -(-tokens // size)
        if self.cache is None:
            known = [len(r.prompt) + self._limit(r) for r in self.waiting]
            longest = sorted((-(-n // size) for n in known), reverse=True)[: self.config.rows]
            self.cache = KVCache(
                self.model.config, sum(longest), size, self.model.device, self.model.dtype
            )
        elif need > self.cache.pages:
            self.cache.grow(need)
        return need

    def _chunks(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Prompts to prefill together: up to prefill_tokens, never a part of a prompt."""
        chunk: list[_Row] = []
        total = 0
        for row in rows:
            n = len(row.request.prompt)
            if chunk and total + n > self.config.prefill_tokens:
                yield chunk
                chunk, total = [], 0
            chunk.append(row)
            total += n
        if chunk:
            yield chunk

    # ---- one forward

    def _forward(self, rows: list[_Row], new: list[list[int]]) -> None:
        """Run the new tokens of the rows and append one sampled token to each."""
        device = self.model.device
        cached = Cached.build(
            [len(tokens) for tokens in new],
            [row.length for row in rows],
            [row.pages for row in rows],
            self.config.page_size,
            device,
        )
        tokens = torch.tensor([t for row in new for t in row], dtype=torch.int64, device=device)
        hidden = self.model.forward(tokens, cached, lora=self.lora, cache=self.cache)
        logits = self.model.head(hidden[cached.last])
        chosen, logprobs = self.model.ops.sample(logits, self._sample_rows(rows, new, device))
        triples = zip(rows, new, chosen.tolist(), logprobs.tolist(), strict=True)
        for row, row_tokens, token, logprob in triples:
            row.length += len(row_tokens)
            row.ids.append(token)
            row.logprobs.append(logprob)
        prefill = sum(len(row_tokens) for row_tokens in new if len(row_tokens) > 1)
        self.stats.prompt_tokens += prefill
        self.stats.new_tokens += len(rows)

    def _sample_rows(
        self, rows: list[_Row], new: list[list[int]], device: torch.device
    ) -> SampleRows:
        def column(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        c = self.config
        return SampleRows(
            positions=column(r.length + len(t) for r, t in zip(rows, new, strict=True)),
            samples=column(row.request.sample for row in rows),
            row_keys=column(row.key for row in rows),
            seed=c.seed,
            temperature=c.temperature,
            top_k=c.top_k,
            top_p=c.top_p,
            min_p=c.min_p,
            repetition_penalty=c.repetition_penalty,
            history=None if c.repetition_penalty == 1 else self._history(rows, device),
        )

    def _history(self, rows: list[_Row], device: torch.device) -> Tensor:
        """(B, L): each row's prompt and answer so far, padded with -1."""
        seen = [[*row.request.prompt, *row.ids] for row in rows]
        longest = max(map(len, seen))
        padded = [ids + [-1] * (longest - len(ids)) for ids in seen]
        return torch.tensor(padded, dtype=torch.int64, device=device)

    # ---- the ends of rows

    def _finished(self) -> Iterator[Completion]:
        """Take finished rows out of flight and hand them out."""
        still: list[_Row] = []
        done: list[Completion] = []
        for row in self.flying:
            completion = self._end(row)
            if completion is None:
                still.append(row)
            else:
                self.cache.give_back(row.pages)
                done.append(completion)
        self.flying = still
        yield from done

    def _end(self, row: _Row) -> Completion | None:
        """The completion of a row whose last token ended it, else None."""
        ids, request = row.ids, row.request
        if ids[-1] in self.end_ids:
            finish, keep, text = "stop", len(ids) - 1, None
        elif (cut := self._stop_string(ids)) is not None:
            finish, (keep, text) = "stop_string", cut
        elif len(ids) >= row.limit:
            finish, keep, text = "length", len(ids), None
        else:
            return None
        kept = ids[:keep]
        text = self.decode(kept) if text is None else text
        logprobs = row.logprobs[:keep]
        return Completion(
            request.id, request.sample, kept, text, finish, logprobs, len(request.prompt)
        )

    def _stop_string(self, ids: list[int]) -> tuple[int, str] | None:
        """(tokens that lie wholly before the stop string, the text before it), if one is there."""
        if not self.config.stop:
            return None
        # a token is at least one byte of text, so a stop string that the last token completed
        # lies within its own length in bytes, plus the tokens of a character cut in two
        window = 4 + max(len(s.encode()) for s in self.config.stop)
        if not any(s in self.decode(ids[-window:]) for s in self.config.stop):
            return None
        text = self.decode(ids)
        ends = [text.find(s) for s in self.config.stop if s in text]
        if not ends:
            return None
        text = text[: min(ends)]
        keep = len(ids)
        while keep and not text.startswith(self.decode(ids[:keep])):
            keep -= 1
        return keep, text
