"""KV-cached continuous sampling over the no-batch forward

Up to `rows` rows are in flight, the longest expected first. Waiting prompts are prefilled packed,
in chunks; then every row in flight gets one token per step, or as many as its draft guessed right
(drafting.py). A finished row is handed out at once and a waiting one takes its place. What prompts
have in common (the template, or all of it for several samples of a row) is computed once and
copied. When memory runs short the youngest row is put back and starts again from its prompt later.

Why a row's text does not depend on its neighbours (fp32 on a CPU: bitwise):
    products    one packed form for the whole run, in which a row is a row (panels.py, prepack.py)
    attention   in C every query is computed as if alone. In torch a prompt is computed in blocks
                of one page of queries, wherever it was cut into chunks; a decoded or drafted token
                is a query of its own that splits its context by page and joins in page order
                (cached_attention.py)
    sampling    one uniform per token, named by (seed, row id, sample, position) (philox.py)
On a GPU decode steps are captured and replayed, several between two visits of the host (graphs.py).
With `invariant` products there have fixed tiles (linear_invariant.py), and Triton's attention
gives a token the same bits wherever it was cut off and whatever was drafted with it.
"""

# B = rows in flight

from __future__ import annotations

import dataclasses
import itertools
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from engine.runtime.process_memory import give_back_freed_memory
from engine.sampling.batch_invariance import prove
from engine.sampling.cuda_graphs import Graphs
from engine.sampling.page_pool import Pages, common_prefix, prefill_chunks
from engine.sampling.requests import Completion, Request, SamplerConfig, SamplerStats
from engine.sampling.sequence import FlyingRow, ending
from engine.sampling.speculation import Controller, Drafter
from kernels.cached import Cached
from kernels.philox import mix
from model.llama import Llama
from model.lora import Lora
from model.sampling_weights import for_sampling, restore_weights

__all__ = ["Completion", "Request", "Sampler", "SamplerConfig", "SamplerStats"]


class Sampler:
    """Writes texts with one model (and one adapter).

    In a `with` block the model gives its matrices to the sampler and has them back at the end;
    outside of one they are copied.
    """

    def __init__(
        self,
        model: Llama,
        decode: Callable[[Sequence[int]], str],
        end_ids: Sequence[int],
        config: SamplerConfig,
        lora: Lora | None = None,
    ) -> None:
        config.check()
        self.config, self.decode = config.on(model.device.type), decode
        self.end_ids = frozenset(() if config.ignore_eos else end_ids)
        self.owner, self.adapter = model, lora
        self.model: Llama | None = None
        self.graphs: Graphs | None = None
        self.waiting: list[Request] = []
        self.flying: list[FlyingRow] = []
        self.draining = False
        self.pages = Pages(model, config.page_size, config.kv_memory)
        self.twins: Counter[tuple[int, ...]] = Counter()  # waiting requests by prompt
        self.controller = Controller()
        self.stats = SamplerStats()

    def __enter__(self) -> Sampler:
        self._prepare(release=True)
        give_back_freed_memory(self.owner.device)
        return self

    def __exit__(self, *_: object) -> None:
        self.pages.cache = None  # first: only what nobody holds can be given back
        self.graphs.clear()
        self.model = self.graphs = None
        give_back_freed_memory(self.owner.device)  # before the matrices grow again
        restore_weights(self.owner)
        give_back_freed_memory(self.owner.device)

    def _prepare(self, release: bool) -> None:
        invariant = self.config.invariant
        self.model, self.lora = for_sampling(
            self.owner, self.adapter, release=release, invariant=invariant
        )
        if invariant:
            prove(self.model, self.lora, self.config.page_size)
        self.graphs = Graphs(self.model, self.lora, self.pages, self.config, self.stats)

    def submit(self, request: Request) -> None:
        """Queue a request; allowed at any time, also while `run` is handing rows out."""
        assert len(request.prompt) > 0, f"request {request.id} has an empty prompt"
        insort(self.waiting, request, key=lambda r: -self._expected(r))
        self.twins[tuple(request.prompt)] += 1

    def drain(self) -> None:
        """Begin no further row: `run` ends when those in flight have."""
        self.draining = True

    def run(self, requests: Iterable[Request] = ()) -> Iterator[Completion]:
        """Hand out completions as rows finish, until nothing waits or flies."""
        if self.model is None:
            self._prepare(release=False)
        for request in requests:
            self.submit(request)
        if self.waiting and not self.flying:
            self._open()
        while self.flying or (self.waiting and not self.draining):
            admitted, refused = self._admit()
            yield from refused
            self.flying += admitted
            self._prefill(admitted)
            yield from self._finished()
            if self.flying:
                self._decode()
                yield from self._finished()
        self.pages.close()

    # ---- admission and memory

    def _limit(self, request: Request) -> int:
        """New tokens this request may have: its own limit, within the model's context."""
        wanted = request.max_new or self.config.max_new_tokens
        return min(wanted, self.owner.config.max_position - len(request.prompt))

    def _expected(self, request: Request) -> int:
        """New tokens it will likely have."""
        limit = self._limit(request)
        return limit if request.expected is None else min(limit, request.expected)

    def _most_pages(self, request: Request) -> int:
        """Pages it may come to need; a visit of several steps runs on behind a row's end."""
        tokens = len(request.prompt) + self._limit(request) + self.graphs.most_steps - 1
        return self.pages.count(min(tokens, self.owner.config.max_position))

    def _admit(self) -> tuple[list[FlyingRow], list[Completion]]:
        """Move waiting requests into flight while rows and pages last."""
        admitted: list[FlyingRow] = []
        refused: list[Completion] = []
        later: list[Request] = []
        fresh: set[tuple[int, ...]] = set()  # prompts of `admitted`, which are not computed yet
        while self.waiting and not self.draining:
            if len(self.flying) + len(admitted) == self.config.rows:
                break
            request = self.waiting[0]
            prompt, limit = tuple(request.prompt), self._limit(request)
            if limit < 1:
                gone = (request.id, request.sample, [], "", "prompt_too_long", [], len(prompt))
                refused.append(Completion(*gone))
                self._taken()
                continue
            if prompt in fresh:  # its twin is computed first
                later.append(self.waiting.pop(0))
                continue
            expected = self._expected(request)
            least = self._most_pages(request) + len(self.pages.prefix[1])
            if not self.pages.make_room(least, least):
                if self.flying or admitted:
                    break  # they end first
                self.graphs.clear()
                self.pages.discard()
                self._open()
                continue
            promised = sum(self._missing(row) for row in (*self.flying, *admitted))
            need = self.pages.count(len(prompt) + expected)
            if self.pages.free - promised < need:
                if self.flying or admitted:
                    break
                self.pages.drop_kept()  # alone, every row fits
            self._taken()
            row = self._begin(request, prompt, limit, expected)
            admitted.append(row)
            fresh.add(prompt)
        self.waiting[:0] = later
        return admitted, refused

    def _taken(self) -> None:
        """The first request leaves the queue."""
        prompt = tuple(self.waiting.pop(0).prompt)
        self.twins[prompt] -= 1
        if not self.twins[prompt]:
            del self.twins[prompt]

    def _missing(self, row: FlyingRow) -> int:
        """Pages that a row will likely still ask for."""
        return max(0, self.pages.count(len(row.prompt) + row.expected) - len(row.pages))

    def _open(self) -> None:
        """A cache for what is known to come, and in it what many prompts begin with."""
        shared = common_prefix([r.prompt for r in self.waiting])
        head = self.pages.count(len(shared))
        rows = sorted((self._most_pages(r) for r in self.waiting), reverse=True)
        kept = sorted(
            (self.pages.count(len(p)) for p, n in self.twins.items() if n > 1), reverse=True
        )
        most = self.config.rows
        self.pages.make_room(head + sum(rows[:most]) + sum(kept[:most]), head + rows[0])
        cache = self.pages.cache
        room = cache.pages - len(self.pages.idle) - head
        self.stats.fitting = sum(pages <= room for pages in itertools.accumulate(rows[:most]))
        self.stats.cache_bytes = cache.k.nbytes + cache.v.nbytes
        if shared:
            self._compute_prefix(shared)

    def _compute_prefix(self, tokens: list[int]) -> None:
        """Fill pages with what many prompts begin with."""
        pages = self.pages.cache.take(self.pages.count(len(tokens)))
        for start in range(0, len(tokens), self._chunk()):
            piece = tokens[start : start + self._chunk()]
            cached = self._describe([len(piece)], [start], [pages], alone=False)
            self._hidden(piece, cached, wanted=cached.last)
        self.pages.prefix = tokens, pages

    def _begin(
        self, request: Request, prompt: tuple[int, ...], limit: int, expected: int
    ) -> FlyingRow:
        """A row with its pages; what is known of its prompt is copied into them."""
        twin = next((row.pages for row in self.flying if row.prompt == prompt), None)
        pages, known = self.pages.begin(prompt, twin, prompt in self.twins)
        self.stats.prompt_tokens += len(prompt)
        self.stats.shared_tokens += known
        key = (
            mix("row", request.id) if request.seed is None else mix("row", request.id, request.seed)
        )
        signed = key - 2**64 if key >= 2**63 else key
        drafter = None if self.config.draft == "off" else Drafter(request.draft)
        return FlyingRow(request, prompt, limit, expected, signed, pages, known, drafter)

    def _reserve(self, ahead: Sequence[int]) -> None:
        """Pages for so many new tokens of each row, the oldest first; the youngest gives way."""
        for row, new in zip(list(self.flying), ahead, strict=True):
            need = self.pages.count(row.length + new) - len(row.pages)
            while need > self.pages.free and row in self.flying:
                if self.pages.kept:
                    self.pages.drop_kept()
                    continue
                assert len(self.flying) > 1, "the pool is too small for one row"
                self._put_back(self.flying.pop())
            if row not in self.flying:
                break  # as are all behind it
            row.pages += self.pages.cache.take(max(0, need))

    def _put_back(self, row: FlyingRow) -> None:
        """Out of flight and to the head of the queue; drawn again, its tokens are the same."""
        self.pages.cache.give_back(row.pages)
        again = dataclasses.replace(row.request, draft=row.ids or row.request.draft)
        self.waiting.insert(0, again)
        self.twins[row.prompt] += 1
        self.stats.put_back += 1

    # ---- forwards

    def _describe(
        self,
        new: Sequence[int],
        context: Sequence[int],
        tables: Sequence[Sequence[int]],
        alone: bool,
        ahead: int = 0,
    ) -> Cached:
        size, device = self.config.page_size, self.model.device
        return Cached.build(new, context, tables, size, device, alone=alone, ahead=ahead)

    def _hidden(
        self, tokens: Sequence[int] | Tensor, cached: Cached, wanted: Tensor | None = None
    ) -> Tensor:
        ids = torch.as_tensor(tokens, dtype=torch.int64, device=self.model.device)
        return self.model.forward(
            ids, cached, lora=self.lora, cache=self.pages.cache, logits_indices=wanted
        )

    def _draw(
        self, hidden: Tensor, rows: Sequence[FlyingRow], positions: Tensor, history: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One token (n,) and its log-probability (n,) for each hidden state (n, D)."""
        c, device = self.config, self.model.device
        heats = [row.heat(c.temperature) for row in rows]
        if len(set(heats)) > 1:  # those of one temperature at a time
            order = sorted(range(len(rows)), key=heats.__getitem__)
            drawn = []
            for _, group in itertools.groupby(order, heats.__getitem__):
                at = torch.tensor(group := list(group), device=device)
                seen = None if history is None else history[at]
                part = [rows[i] for i in group]
                drawn.append(self._draw(hidden[at], part, positions[at], seen))
            back = torch.tensor(order, device=device).argsort()
            return tuple(torch.cat(values)[back] for values in zip(*drawn, strict=True))
        samples = torch.tensor([row.request.sample for row in rows], device=device)
        row_keys = torch.tensor([row.key for row in rows], device=device)
        keys = c.keys(positions + 1, samples, row_keys, heats[0], history)
        return self.model.ops.sample(self.model.head(hidden), keys)

    def _history(self, seen: Sequence[Sequence[int]], ahead: int = 0) -> Tensor | None:
        """(n, L): each row's prompt and answer so far, padded with -1; None where nobody asks."""
        if self.config.repetition_penalty == 1:
            return None
        longest = max(map(len, seen)) + ahead
        padded = [[*ids, *[-1] * (longest - len(ids))] for ids in seen]
        return torch.tensor(padded, dtype=torch.int64, device=self.model.device)

    def _chunk(self) -> int:
        """Prompt tokens per forward: whole pages, so that a block is never computed twice."""
        size = self.config.page_size
        return max(size, self.config.prefill_tokens // size * size)

    def _prefill(self, rows: list[FlyingRow]) -> None:
        """Compute prompts and draw every row's first token."""
        started = time.perf_counter()
        for chunk in prefill_chunks(rows, self.config.page_size, self._chunk()):
            context = [start for _, start, _ in chunk]
            new = [end - start for _, start, end in chunk]
            cached = self._describe(new, context, [row.pages for row, _, _ in chunk], alone=False)
            tokens = [t for row, start, end in chunk for t in row.prompt[start:end]]
            ready = [i for i, (row, _, end) in enumerate(chunk) if end == len(row.prompt)]
            wanted = cached.last[torch.tensor(ready, dtype=torch.int64, device=cached.last.device)]
            hidden = self._hidden(tokens, cached, wanted)
            for row, _, end in chunk:
                row.filled = end
            if ready:
                drawn = [chunk[i][0] for i in ready]
                history = self._history([row.prompt for row in drawn])
                chosen = self._draw(hidden, drawn, cached.positions[wanted], history)
                self._take(drawn, *(values.tolist() for values in chosen))
        self.stats.prefill_seconds += time.perf_counter() - started

    def _decode(self) -> None:
        """One visit: a step with guesses, or `steps` steps without."""
        started = time.perf_counter() - self.stats.capture_seconds
        guesses, before = self._guesses(), len(self.flying)
        furthest = self.model.config.max_position - max(row.length for row in self.flying)
        wanted = max(row.limit - len(row.ids) for row in self.flying)
        steps, replayed = 1, False
        if not any(guesses):
            steps = min(self.graphs.steps(before, self.controller), furthest, wanted)
        self._reserve([max(steps, 1 + len(guess)) for guess in guesses])
        guesses = guesses[: len(self.flying)]
        self.pages.compact([row.pages for row in self.flying])
        rows = list(self.flying)
        if any(guesses):
            self._verify(rows, guesses)
        else:
            replayed = self._step(rows, steps)
        seconds = time.perf_counter() - started - self.stats.capture_seconds
        self.stats.decode_seconds += seconds
        self.stats.steps += steps
        self.stats.row_steps += steps * len(rows)
        if before == len(rows):
            widest = 1 + max(map(len, guesses))
            tokens = len(rows) + sum(map(len, guesses))
            self.controller.measured(tokens, widest * len(rows), seconds / steps, replayed)

    def _guesses(self) -> list[list[int]]:
        """What each row carries along, empty where nothing is worth its computation."""
        if self.config.draft == "off":
            return [[] for _ in self.flying]
        offers = [row.drafter.guess(row.limit - len(row.ids) - 1) for row in self.flying]
        if self.config.draft == "always" or not any(offers):
            return offers
        matches = [row.drafter.match for row in self.flying]
        taken = self.controller.choose(matches, list(map(len, offers)), self.graphs.usable)
        return [offer[:n] for offer, n in zip(offers, taken, strict=True)]

    def _step(self, rows: list[FlyingRow], steps: int) -> bool:
        """`steps` tokens for every row, nothing asked of the device before the last; replayed?"""
        drawn = self.graphs.run(rows, steps)
        for tokens, logprobs in zip(*(drawn or self._eager(rows, steps)), strict=True):
            self._take(rows, tokens, logprobs)
        return drawn is not None

    def _eager(self, rows: list[FlyingRow], steps: int) -> tuple[list[list], list[list]]:
        """Tokens and log-probabilities of `steps` steps that the host launches one by one."""
        tables = [row.pages for row in rows]
        cached = self._describe(
            [1] * len(rows), [row.length for row in rows], tables, alone=True, ahead=steps - 1
        )
        history = self._history([(*row.prompt, *row.ids) for row in rows], ahead=steps - 1)
        last: Sequence[int] | Tensor = [row.ids[-1] for row in rows]
        drawn = []
        for step in range(steps):
            if step:
                cached = cached.advance()
                if history is not None:
                    seen = torch.tensor([len(r.prompt) + len(r.ids) for r in rows]) + step - 1
                    history.scatter_(1, seen[:, None].to(history.device), last[:, None])
            hidden = self._hidden(last, cached)
            drawn.append(self._draw(hidden, rows, cached.positions, history))
            last = drawn[-1][0]
        return tuple(torch.stack(values).tolist() for values in zip(*drawn, strict=True))

    def _verify(self, rows: list[FlyingRow], guesses: list[list[int]]) -> None:
        """One forward over every row's last token and its guesses; what is drawn is what counts."""
        new = [1 + len(guess) for guess in guesses]
        lengths = [row.length for row in rows]
        cached = self._describe(new, lengths, [row.pages for row in rows], alone=True)
        pairs = list(zip(rows, guesses, strict=True))
        hidden = self._hidden([t for row, g in pairs for t in (row.ids[-1], *g)], cached)
        each = [row for row, g in pairs for _ in range(1 + len(g))]
        seen = [(*row.prompt, *row.ids, *g[:n]) for row, g in pairs for n in range(1 + len(g))]
        drawn = self._draw(hidden, each, cached.positions, self._history(seen))
        tokens, logprobs = (values.tolist() for values in drawn)
        start = 0
        for row, guess in pairs:
            match, held = row.drafter.match, 0
            for i in range(1 + len(guess)):
                self._take([row], [tokens[start + i]], [logprobs[start + i]])
                if i == len(guess) or row.done or tokens[start + i] != guess[i]:
                    break
                held += 1
            start += 1 + len(guess)
            self.stats.drafted += len(guess)
            self.stats.held += held
            if guess and not row.done:
                self.controller.judged(match, len(guess), held)

    # ---- the ends of rows

    def _take(self, rows: list[FlyingRow], tokens: list[int], logprobs: list[float]) -> None:
        """Append a drawn token to every row that has not ended."""
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            if row.done is not None:
                continue
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.done = ending(row, self.end_ids, self.config.stop, self.decode)
            self.stats.new_tokens += 1
            if row.drafter is not None:
                row.drafter.extend(token)

    def _finished(self) -> Iterator[Completion]:
        """Take finished rows out of flight and hand them out."""
        done = [row for row in self.flying if row.done is not None]
        self.flying = [row for row in self.flying if row.done is None]
        for row in done:
            self.pages.end(row.prompt, row.pages, row.prompt in self.twins)
        for row in done:
            yield row.done
