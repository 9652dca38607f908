"""Which sequences run and which pages they hold: waiting requests, admission, preemption

Requests wait, the longest expected first, and are admitted while sequences and pages last. A
sequence is promised the pages for its expected length; when the pool runs short after all, the
youngest is preempted and begins again from its prompt later (its tokens are then the same).
"""

from __future__ import annotations

import dataclasses
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from engine.runtime.process_memory import total_memory
from engine.runtime.terminal import print_once
from engine.sampling.page_pool import PagePool, common_prefix
from engine.sampling.requests import Completion, Request, SamplerConfig, SamplerStats
from engine.sampling.rows_plan import planned_pages, planned_rows
from engine.sampling.sequence import RunningSequence
from engine.sampling.speculation import Drafter
from kernels.philox import mix, signed64


class PromptPiece(NamedTuple):
    """Tokens start to end of a sequence's prompt, computed in one forward."""

    seq: RunningSequence
    start: int
    end: int

    @property
    def completes_prompt(self) -> bool:
        return self.end == len(self.seq.prompt)


class Schedule(NamedTuple):
    """The requests that were taken from the queue."""

    admitted: list[RunningSequence]  # they hold pages; their prompts are to be computed
    pool_too_small: bool  # for the next request, although nothing runs


def prefill_chunks(
    seqs: Sequence[RunningSequence], page_size: int, max_tokens: int
) -> Iterator[list[PromptPiece]]:
    """The prompts in forwards of up to `max_tokens` tokens (a multiple of page_size).

    Prompts are cut at page borders only, so that attention computes the same blocks of queries
    wherever a prompt is cut.
    """
    chunk: list[PromptPiece] = []
    room = max_tokens  # of this chunk
    for seq in seqs:
        start = seq.prefilled
        prompt_end = len(seq.prompt)
        while start < prompt_end:
            if prompt_end - start <= room:
                end = prompt_end
            else:
                whole_pages = (start + room) // page_size
                end = whole_pages * page_size
            if end > start:
                chunk.append(PromptPiece(seq, start, end))
                room -= end - start
                start = end
            chunk_is_full = start < prompt_end or room < page_size
            if chunk_is_full:
                yield chunk
                chunk = []
                room = max_tokens
    if chunk:
        yield chunk


def random_key(request: Request) -> int:
    """The signed 64-bit hash of the id, and of the request's own seed, that names its random
    numbers."""
    if request.seed is None:
        key = mix("row", request.id)
    else:
        key = mix("row", request.id, request.seed)
    return signed64(key)


class Scheduler:
    """Waiting requests, running sequences and the pages between them."""

    def __init__(
        self, config: SamplerConfig, max_position: int, pool: PagePool, stats: SamplerStats
    ) -> None:
        self.config = config
        self.max_position = max_position
        self.pool = pool
        self.stats = stats
        # sequences decoded together, at most; 0: planned when the pool is opened (rows_plan.py)
        self.rows = config.rows
        self.max_steps = 1  # decode steps per host synchronisation, at most
        self.waiting: list[Request] = []  # the next one first
        self.waiting_prompts: Counter[tuple[int, ...]] = Counter()  # of `waiting`
        self.running: list[RunningSequence] = []  # the oldest first
        self.ended: list[Completion] = []  # to be handed out
        self.draining = False  # admit no further request

    @property
    def has_work(self) -> bool:
        """Whether a sequence runs or may be admitted, or a completion waits to be handed out."""
        return bool(self.running) or bool(self.ended) or self._may_admit

    @property
    def _may_admit(self) -> bool:
        return bool(self.waiting) and not self.draining

    def submit(self, request: Request) -> None:
        """Queue a request."""
        assert len(request.prompt) > 0, f"request {request.id} has an empty prompt"
        insort(self.waiting, request, key=self._place_in_queue)
        self.waiting_prompts[tuple(request.prompt)] += 1

    # ---- lengths

    def _max_new_tokens(self, request: Request) -> int:
        """The request's own limit, within the model's context; below 1 for too long a prompt."""
        limit = request.max_new_tokens or self.config.max_new_tokens
        return min(limit, self.max_position - len(request.prompt))

    def _expected_tokens(self, request: Request) -> int:
        """New tokens the request will likely have."""
        limit = self._max_new_tokens(request)
        expected = request.expected_tokens
        return limit if expected is None else min(limit, expected)

    def _place_in_queue(self, request: Request) -> int:
        """The key that `waiting` is sorted by: the longest expected request comes first."""
        return -self._expected_tokens(request)

    def _max_pages(self, request: Request) -> int:
        """Pages the request may come to need; several steps per synchronisation overshoot."""
        overshoot = self.max_steps - 1
        tokens = len(request.prompt) + self._max_new_tokens(request) + overshoot
        return self.pool.pages_for(min(tokens, self.max_position))

    def _promised_pages(self, seq: RunningSequence) -> int:
        """Pages that a sequence will likely still ask for."""
        pages = self.pool.pages_for(len(seq.prompt) + seq.expected_tokens)
        return max(0, pages - len(seq.block_table))

    # ---- admission

    def open_pool(self) -> list[int]:
        """Size the pool for the waiting requests; returns the prefix to compute once, or [].

        Enough for the longest `rows` requests at full length, their common prefix, and the
        prompts kept for duplicates; as far as memory allows, at least for the longest request.
        """
        rows = self._set_rows()
        prefix = common_prefix([request.prompt for request in self.waiting])
        prefix_pages = self.pool.pages_for(len(prefix))
        most_pages = sorted((self._max_pages(r) for r in self.waiting), reverse=True)
        longest = most_pages[:rows]
        duplicated = [p for p, count in self.waiting_prompts.items() if count > 1]
        duplicated_pages = sorted((self.pool.pages_for(len(p)) for p in duplicated), reverse=True)
        kept = duplicated_pages[:rows]
        wanted = prefix_pages + sum(longest) + sum(kept)
        least = prefix_pages + longest[0]
        self.pool.ensure_pages(wanted, least)

        cache = self.pool.cache
        room = cache.pages - len(self.pool.padding_pages) - prefix_pages
        self.stats.fitting_sequences = _count_fitting(longest, room)
        self.stats.cache_bytes = cache.k.nbytes + cache.v.nbytes
        return prefix

    def _set_rows(self) -> int:
        """How many sequences run together; planned for the waiting requests on a GPU without a
        number of the user's."""
        if self.rows == 0:
            model = self.pool.model
            pages = planned_pages(
                model.config,
                model.dtype,
                self.pool.page_size,
                total_memory(model.device),
                self.config.kv_memory,
            )
            expected = [len(r.prompt) + self._expected_tokens(r) for r in self.waiting]
            self.rows = planned_rows(pages, [self.pool.pages_for(tokens) for tokens in expected])
            print_once(
                f"sampling: up to {self.rows} sequences at a time, prompts in pieces of "
                f"{self.config.prefill_tokens} tokens (automatic; --rows, --prefill-tokens)"
            )
        return self.rows

    def schedule(self) -> Schedule:
        """Admit waiting requests, in the order of the queue, while sequences and pages last.

        Prompts that leave no room for a new token are refused (`ended`). If `pool_too_small`, the
        caller has to discard the pool and open it anew. An exception loses no request: each is in
        the queue, running or ended at any time.
        """
        admitted: list[RunningSequence] = []
        new_prompts: set[tuple[int, ...]] = set()  # of `admitted`
        place = 0  # in the queue; before it are duplicates of new prompts, which come next time
        while self._may_admit and place < len(self.waiting):
            if len(self.running) >= self.rows:
                break
            request = self.waiting[place]
            prompt = tuple(request.prompt)
            if self._max_new_tokens(request) < 1:
                self.ended.append(_too_long(request))
                self._leave_queue(place)
            elif prompt in new_prompts:
                place += 1
            elif self._has_room(request):
                seq = self._start(request, prompt)
                self._leave_queue(place)
                self.running.append(seq)
                admitted.append(seq)
                new_prompts.add(prompt)
            else:
                break
        # a pool without sequences has room for any request that it is large enough for
        pool_too_small = self._may_admit and not self.running
        return Schedule(admitted, pool_too_small)

    def _leave_queue(self, place: int) -> None:
        """Remove the request at this place from the queue."""
        prompt = tuple(self.waiting.pop(place).prompt)
        self.waiting_prompts[prompt] -= 1
        if not self.waiting_prompts[prompt]:
            del self.waiting_prompts[prompt]

    def _has_room(self, request: Request) -> bool:
        """Whether the expected pages of a request are free beside those promised to others."""
        least = self._max_pages(request) + len(self.pool.prefix_pages)
        if not self.pool.ensure_pages(least, least):
            return False  # the others end first
        promised = sum(self._promised_pages(seq) for seq in self.running)
        needed = self.pool.pages_for(len(request.prompt) + self._expected_tokens(request))
        if self.pool.num_free - promised >= needed:
            return True
        if self.running:
            return False
        self.pool.drop_prompt_pages()  # in an empty pool every sequence fits
        return True

    def _start(self, request: Request, prompt: tuple[int, ...]) -> RunningSequence:
        """A sequence with its pages; what is known of its prompt is copied into them.

        The request is still in the queue.
        """
        duplicate = self._running_duplicate(prompt)
        duplicates_wait = self.waiting_prompts[prompt] > 1
        block_table, known = self.pool.allocate(prompt, duplicate, duplicates_wait)
        self.stats.prompt_tokens += len(prompt)
        self.stats.shared_tokens += known
        drafter = None
        if self.config.draft != "off":
            drafter = Drafter(request.draft_source)
        return RunningSequence(
            request=request,
            prompt=prompt,
            max_new_tokens=self._max_new_tokens(request),
            expected_tokens=self._expected_tokens(request),
            key=random_key(request),
            block_table=block_table,
            prefilled=known,
            drafter=drafter,
        )

    def _running_duplicate(self, prompt: tuple[int, ...]) -> list[int] | None:
        """The block table of a running sequence with the same prompt, None if there is none."""
        for seq in self.running:
            if seq.prompt == prompt:
                return seq.block_table
        return None

    # ---- running sequences

    def reserve(self, new_tokens: Sequence[int]) -> None:
        """Give each running sequence pages for so many new tokens, the oldest first.

        Where none is free the youngest is preempted: `running` may be shorter afterwards.
        """
        assert len(new_tokens) == len(self.running), "one entry per running sequence"
        if self.reserve_free(self.running, new_tokens):
            return
        for i, new in enumerate(new_tokens):
            if i == len(self.running):
                return  # this sequence was preempted, as were all younger ones
            seq = self.running[i]
            missing = self.pool.pages_for(seq.context_len + new) - len(seq.block_table)
            while missing > self.pool.num_free:
                if self.pool.prompt_pages:
                    self.pool.drop_prompt_pages()
                elif self._preempt_youngest() is seq:
                    return
            seq.block_table += self.pool.cache.take(max(0, missing))

    def reserve_free(self, seqs: Sequence[RunningSequence], new_tokens: Sequence[int]) -> bool:
        """Give each of these sequences pages for so many new tokens, or none if too few are free.

        Returns whether it did.
        """
        missing = []
        for seq, new in zip(seqs, new_tokens, strict=True):
            pages = self.pool.pages_for(seq.context_len + new)
            missing.append(max(0, pages - len(seq.block_table)))
        if sum(missing) > self.pool.num_free:
            return False
        taken = self.pool.cache.take(sum(missing))
        for seq, count in zip(seqs, missing, strict=True):
            seq.block_table += taken[:count]
            del taken[:count]
        return True

    def _preempt_youngest(self) -> RunningSequence:
        """Put the youngest sequence back to the head of the queue."""
        assert len(self.running) > 1, "the pool is too small for one sequence"
        seq = self.running.pop()
        self.pool.cache.give_back(seq.block_table)
        self._put_back(seq)
        return seq

    def _put_back(self, seq: RunningSequence) -> None:
        """Its request becomes the head of the queue again; its tokens become the draft."""
        draft_source = seq.token_ids or seq.request.draft_source
        request = dataclasses.replace(seq.request, draft_source=draft_source)
        self.waiting.insert(0, request)
        self.waiting_prompts[seq.prompt] += 1
        self.stats.preempted += 1

    def put_all_back(self) -> None:
        """Preempt every running sequence that has not ended; the caller discards the pool."""
        while self.running:
            seq = self.running.pop()
            if seq.completion is None:
                self._put_back(seq)
            else:
                self.ended.append(seq.completion)

    def take_finished(self) -> None:
        """Move the sequences that have ended from `running` to `ended` and free their pages."""
        finished = [seq for seq in self.running if seq.completion is not None]
        self.running = [seq for seq in self.running if seq.completion is None]
        self.ended += [seq.completion for seq in finished]
        for seq in finished:
            duplicates_wait = seq.prompt in self.waiting_prompts
            self.pool.release(seq.prompt, seq.block_table, duplicates_wait)

    def hand_out(self) -> Iterator[Completion]:
        """The completions of the sequences that have ended, each once."""
        while self.ended:
            yield self.ended.pop(0)


def _count_fitting(page_counts: Sequence[int], room: int) -> int:
    """How many sequences, from the first on, fit together into `room` pages."""
    used = 0
    for count, pages in enumerate(page_counts):
        used += pages
        if used > room:
            return count
    return len(page_counts)


def _too_long(request: Request) -> Completion:
    """The completion of a request whose prompt leaves no room for a new token."""
    return Completion(
        id=request.id,
        sample=request.sample,
        ids=[],
        text="",
        finish="prompt_too_long",
        logprobs=[],
        prompt_tokens=len(request.prompt),
    )
