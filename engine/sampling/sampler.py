"""The sampler: continuous batching over a paged KV cache, without a batch dimension

Every step of the loop (`Sampler._step`) is
    schedule      waiting requests are admitted while sequences and pages last (scheduler.py)
    run           their prompts are prefilled, then every running sequence gets tokens: one, or as
                  many as its draft tokens are accepted (speculation.py), or several decode steps
                  in a row (model_runner.py; on a GPU replayed CUDA graphs, cuda_graphs.py)
    postprocess   tokens are appended, stopping conditions checked (sequence.py), completions handed
                  out at once and their pages freed (page_pool.py)

With CUDA graphs, and while no draft tokens are wanted, the host is one visit behind the card
(`_step_ahead`; a visit is what lies between two host synchronisations):
    launch        the next visit of all running sequences, whose last tokens the host has not seen:
                  a step finds them on the device
    postprocess   the visit before, and the prompts launched after it, are read while the card
                  computes the next one
    schedule      the prompts of new sequences are launched behind it, and not waited for
So a sequence that has ended rides on for one visit more, whose tokens are dropped, and a new one
enters a visit later. Its pages are free as soon as its end is read: whatever uses them next is
launched later than the visit that still writes into them, and one stream runs what is launched in
order. Texts do not change, for a token depends on nothing that runs beside it and on no time.

Why a text does not depend on what else runs (fp32 on a CPU: bitwise):
    products    one packed form for the whole run, in which rows do not influence each other
                (kernels/cpu/panels.py, kernels/cpu/prepack.py)
    attention   in C every query is computed as if alone. In torch a prompt is computed in blocks of
                one page of queries, wherever it was cut into chunks; a decoded or draft token is a
                query of its own that splits its context by page and joins in page order
                (kernels/cached_attention/)
    sampling    one uniform per token, named by (seed, id, sample, position) (kernels/philox.py)
With `invariant` the same holds on a GPU: products have fixed tiles
(kernels/lora_linear/batch_invariant.py), and Triton's attention gives a token the same bits
wherever its prompt was cut and whatever draft tokens came with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from engine.runtime.process_memory import give_back_freed_memory
from engine.runtime.short_memory import attempt, tried_twice
from engine.sampling.batch_invariance import check_batch_invariance
from engine.sampling.cuda_graphs import DecodeGraphs
from engine.sampling.launched import Launched, LaunchQueue
from engine.sampling.model_runner import ModelRunner
from engine.sampling.page_pool import PagePool
from engine.sampling.requests import Completion, Request, SamplerConfig, SamplerStats
from engine.sampling.scheduler import Scheduler, prefill_chunks
from engine.sampling.sequence import RunningSequence, SampledTokens, StopConditions
from engine.sampling.speculation import DraftController
from model.llama import Llama
from model.lora import Lora
from model.sampling_weights import for_sampling, restore_weights

__all__ = ["Completion", "Request", "Sampler", "SamplerConfig", "SamplerStats"]


class DecodeBatch(NamedTuple):
    """The running sequences, and what is computed before the next host synchronisation."""

    seqs: list[RunningSequence]
    drafts: list[list[int]]  # draft tokens of each sequence, verified in one forward
    steps: int  # forwards: 1 if there are draft tokens

    @property
    def has_drafts(self) -> bool:
        return any(self.drafts)


class Sampler:
    """Samples texts with one model and, if given, one adapter.

    In a `with` block the model lends its matrices to the sampler, which packs them, and has them
    back at the end; outside of one they are copied.
    """

    def __init__(
        self,
        model: Llama,
        decode: Callable[[Sequence[int]], str],  # token ids -> text
        end_ids: Sequence[int],
        config: SamplerConfig,
        lora: Lora | None = None,
    ) -> None:
        config.check()
        self.config = config.for_device(model.device.type)
        ends = frozenset() if config.ignore_eos else frozenset(end_ids)
        self.stop_conditions = StopConditions(ends, config.stop, decode)
        self.owner = model  # whose matrices are packed and given back
        self.adapter = lora
        self.stats = SamplerStats()
        self.pool = PagePool(model, config.page_size, config.kv_memory)
        max_position = model.config.max_position
        self.scheduler = Scheduler(self.config, max_position, self.pool, self.stats)
        self.controller = DraftController()
        self.pool_is_open = False  # made for the requests of this run
        self.failed_alone = False  # the last step ran out of memory with one sequence
        self.queue = LaunchQueue()
        self.unread: list[Launched] = []  # in the order of launching
        self.last_arrival: float | None = None  # when results arrived that the host waited for
        # set by _prepare
        self.model: Llama | None = None  # the owner, or a copy with packed weights
        self.runner: ModelRunner | None = None
        self.graphs: DecodeGraphs | None = None

    def __enter__(self) -> Sampler:
        try:
            tried_twice("packing the weights", self.owner.device, self._prepare, True)
        except BaseException:
            restore_weights(self.owner)
            raise
        give_back_freed_memory(self.owner.device)
        return self

    def __exit__(self, *_: object) -> None:
        self.unread.clear()
        self.pool.cache = None  # first: only memory without a reference can be given back
        self.graphs.clear()
        self.model = self.runner = self.graphs = None
        give_back_freed_memory(self.owner.device)  # before the matrices grow again
        tried_twice("unpacking the weights", self.owner.device, restore_weights, self.owner)
        give_back_freed_memory(self.owner.device)

    def _prepare(self, release: bool) -> None:
        """Pack the weights; release: the owner's own matrices are given up meanwhile."""
        invariant = self.config.invariant
        self.model, lora = for_sampling(
            self.owner, self.adapter, release=release, invariant=invariant
        )
        if invariant:
            check_batch_invariance(self.model, lora, self.config.page_size)
        self.runner = ModelRunner(self.model, lora, self.pool, self.config)
        self.graphs = DecodeGraphs(self.model, lora, self.pool, self.config, self.stats)
        self.scheduler.max_steps = self.graphs.max_steps

    def submit(self, request: Request) -> None:
        """Queue a request; allowed at any time, also while `run` hands completions out."""
        self.scheduler.submit(request)

    def begin_again(self) -> None:
        """Give up all pages, for other work that lacks the memory; allowed while `run` hands
        completions out. The running sequences begin again from their prompts."""
        self._restart()
        give_back_freed_memory(self.owner.device)

    def drain(self) -> None:
        """Admit no further request: `run` ends when the running sequences have."""
        self.scheduler.draining = True

    def run(self, requests: Iterable[Request] = ()) -> Iterator[Completion]:
        """Yield completions as sequences end, until none is waiting or running.

        Where memory is short, fewer sequences run together; torch.OutOfMemoryError where one alone
        does not fit.
        """
        if self.runner is None:
            tried_twice("packing the weights", self.owner.device, self._prepare, False)
        for request in requests:
            self.submit(request)
        if not self.scheduler.running:
            self.pool_is_open = False  # it may be smaller than these requests need
        while self.scheduler.has_work:
            failure = attempt(self.owner.device, self._step).failure
            if failure is None:
                self.failed_alone = False
            else:
                self._take_on_less(failure)
            yield from self.scheduler.hand_out()
        self.unread.clear()  # of sequences that have ended
        self.pool.close()

    def _step(self) -> None:
        """Admit requests and compute their prompts, then decode all running sequences.

        Completions are left in `scheduler.ended`. After an exception (memory may be short) either
        the sampler is given up, or `_restart` has to come before the next step.
        """
        self.controller.count_visit()
        if self._may_run_ahead() and self._step_ahead():
            return
        self._read_unread()
        self.scheduler.take_finished()
        if self.scheduler.waiting and not self.pool_is_open:
            self._open_pool()
        schedule = self.scheduler.schedule()
        if schedule.pool_too_small:
            self._reopen_pool()
        if schedule.admitted:
            self._prefill(schedule.admitted)
            self.scheduler.take_finished()
        if self.scheduler.running:
            self._decode()
            self.scheduler.take_finished()

    def _restart(self) -> None:
        """After an exception in `_step`: all running sequences go back to the queue.

        Graphs and pages are freed. Nothing is lost: sequences that have ended are still handed out,
        and the others begin again from their prompts, which gives the same tokens.
        """
        self.unread.clear()
        self.last_arrival = None
        self.scheduler.put_all_back()
        self.graphs.clear()
        self.pool.discard()
        self.pool_is_open = False

    def _take_on_less(self, failure: str) -> None:
        """After a step that ran out of memory: begin again with half as much at once.

        Half the sequences; where one was alone already, half the prompt tokens of a forward. The
        smallest step is tried twice; torch.OutOfMemoryError where it fails again.
        """
        at_once = len(self.scheduler.running)
        if at_once == 0:  # the pool was being made
            at_once = min(self.scheduler.rows, len(self.scheduler.waiting))
        prompt_tokens = self.runner.max_prefill_tokens
        self._restart()
        give_back_freed_memory(self.owner.device)
        if at_once > 1:
            self.scheduler.rows = at_once // 2
            change = f"{at_once} sequences at a time; continuing with {self.scheduler.rows}"
        elif prompt_tokens > self.config.page_size:
            self.runner.halve_prefill_tokens()
            fewer = self.runner.max_prefill_tokens
            change = f"{prompt_tokens} prompt tokens in a forward; continuing with {fewer}"
        elif not self.failed_alone:
            self.failed_alone = True
            change = "one sequence; trying again"
        else:
            raise torch.OutOfMemoryError(failure)
        print(f"\nsampling: out of memory with {change} ({failure})")

    def _open_pool(self) -> None:
        """Make a pool for the waiting requests and compute the prefix that many begin with."""
        prefix = self.scheduler.open_pool()
        if prefix:
            self.pool.prefix_pages = self.runner.prefill_prefix(prefix)
            self.pool.prefix_tokens = prefix
        self.pool_is_open = True

    def _reopen_pool(self) -> None:
        """Replace the pool, which no sequence uses, by one for the requests that wait now."""
        self.graphs.clear()  # they hold addresses in the pool
        self.pool.discard()
        self._open_pool()

    # ---- one visit ahead

    def _may_run_ahead(self) -> bool:
        """Whether the next tokens may be launched before the last ones are read.

        Not where draft tokens might pay off, since those follow from the last tokens.
        """
        running = len(self.scheduler.running)
        if not (running and self.config.overlap and self.graphs.enabled):
            return False
        if self.config.draft == "auto":
            return not self.controller.pays_off(running)
        return self.config.draft == "off"

    def _step_ahead(self) -> bool:
        """Launch the next decode steps, then do what the last ones and the queue ask of the host.

        Returns whether it did. False, and nothing is done, where the host has to read first: pages
        are short, or the sequences' temperatures differ.
        """
        # the others are known to end with what is in flight
        going_on = [seq for seq in self.scheduler.running if seq.remaining_tokens > 0]
        if not going_on and not self.unread:
            return False
        before = len(self.unread)
        if going_on:
            started = time.perf_counter()
            launched = self._launch_ahead(going_on)
            if launched is None:
                return False
            self.unread.append(launched)
            self.stats.decode_seconds += time.perf_counter() - started
        self._read_unread(before)
        self.scheduler.take_finished()
        schedule = self.scheduler.schedule()
        if schedule.admitted:
            started = time.perf_counter()
            self._launch_prefill(schedule.admitted)
            self.stats.prefill_seconds += time.perf_counter() - started
        return True

    def _launch_ahead(self, seqs: list[RunningSequence]) -> Launched | None:
        """Launch the next decode steps of these sequences; None where that is not possible."""
        steps = self._num_steps(seqs)
        if not self.scheduler.reserve_free(seqs, [steps] * len(seqs)):
            return None
        capture_seconds_before = self.stats.capture_seconds
        step = self.graphs.step_for(seqs, steps)
        self.stats.decode_seconds -= self.stats.capture_seconds - capture_seconds_before
        if step is None:
            return None
        launched = self.graphs.launch(step, seqs, steps, self.unread, self.queue)
        if any(seq.in_flight > steps for seq in seqs):
            self.stats.launched_ahead += steps
        self.stats.steps += steps
        self.stats.sequence_steps += steps * len(seqs)
        return launched

    def _read_unread(self, count: int | None = None) -> None:
        """Read the first `count` of what was launched, or all of it, and append its tokens."""
        started = time.perf_counter()
        if count is None:
            count = len(self.unread)
        for _ in range(count):
            self._read(self.unread.pop(0))
        self.stats.decode_seconds += time.perf_counter() - started

    def _read(self, launched: Launched) -> None:
        """Wait for what was launched and append its tokens.

        Its time is known, and told to the controller, if the host had to wait both for it and for
        what was launched before it.
        """
        waits = not self.queue.has_run(launched)
        sampled = self.queue.read(launched)
        arrival = time.perf_counter() if waits else None
        if launched.step is not None and arrival is not None and self.last_arrival is not None:
            seconds = (arrival - self.last_arrival) / launched.steps
            sequences = len(launched.seqs)
            self.controller.record_step(sequences, sequences, seconds, replayed=True)
        self.last_arrival = arrival
        self._append(launched.seqs, sampled)

    # ---- prefill

    def _prefill(self, admitted: Sequence[RunningSequence]) -> None:
        """Compute prompts and sample the first token of every sequence."""
        started = time.perf_counter()
        self._launch_prefill(admitted)
        for launched in self.unread:
            self._append(launched.seqs, self.queue.read(launched))
        self.unread.clear()
        self.stats.prefill_seconds += time.perf_counter() - started

    def _launch_prefill(self, admitted: Sequence[RunningSequence]) -> None:
        """Launch the forwards over these prompts, which sample every sequence's first token."""
        max_tokens = self.runner.max_prefill_tokens
        for pieces in prefill_chunks(admitted, self.config.page_size, max_tokens):
            self.unread.append(self.runner.prefill(pieces, self.queue))

    # ---- decode

    def _decode(self) -> None:
        """Schedule, run and postprocess what lies before the next host synchronisation."""
        started = time.perf_counter()
        capture_seconds_before = self.stats.capture_seconds
        running_before = len(self.scheduler.running)

        batch = self._schedule_decode()
        replayed = False
        if batch.has_drafts:
            self._verify(batch)
        else:
            replayed = self._decode_steps(batch)

        capture_seconds = self.stats.capture_seconds - capture_seconds_before
        seconds = time.perf_counter() - started - capture_seconds
        self.stats.decode_seconds += seconds
        self.stats.steps += batch.steps
        self.stats.sequence_steps += batch.steps * len(batch.seqs)
        # a time that includes preemption says nothing about the cost of a step
        if running_before == len(batch.seqs):
            self._record_step(batch, seconds / batch.steps, replayed)

    def _schedule_decode(self) -> DecodeBatch:
        """Choose draft tokens or the number of steps, and reserve the pages that they need."""
        drafts = self._propose()
        steps = 1 if any(drafts) else self._num_steps(self.scheduler.running)
        new_tokens = [max(steps, 1 + len(draft)) for draft in drafts]
        self.scheduler.reserve(new_tokens)
        seqs = list(self.scheduler.running)  # the youngest may have been preempted
        self.pool.compact([seq.block_table for seq in seqs])
        return DecodeBatch(seqs, drafts[: len(seqs)], steps)

    def _propose(self) -> list[list[int]]:
        """Draft tokens of each running sequence; [] where none is worth its computation."""
        running = self.scheduler.running
        none = [[] for _ in running]
        if self.config.draft == "off":
            return none
        is_auto = self.config.draft == "auto"
        if is_auto and self.controller.is_paused(len(running)):
            return none
        offers = []
        for seq in running:
            seq.drafter.catch_up(seq.token_ids)
            # a step samples one token more than there are draft tokens
            offers.append(seq.drafter.propose(seq.remaining_tokens - 1))
        if not is_auto or not any(offers):
            return offers
        matches = [seq.drafter.match for seq in running]
        lengths = [len(offer) for offer in offers]
        counts = self.controller.choose(matches, lengths, self.graphs.enabled)
        return [offer[:count] for offer, count in zip(offers, counts, strict=True)]

    def _num_steps(self, seqs: Sequence[RunningSequence]) -> int:
        """Decode steps until the next host synchronisation, if no sequence has draft tokens."""
        longest_context = max(seq.context_len for seq in seqs)
        until_last_position = self.owner.config.max_position - longest_context
        until_last_limit = max(seq.remaining_tokens for seq in seqs)
        steps = self.graphs.steps_per_sync(len(seqs), self.controller)
        return min(steps, until_last_position, until_last_limit)

    def _decode_steps(self, batch: DecodeBatch) -> bool:
        """Append a token per step to every sequence; returns whether CUDA graphs were replayed."""
        step = self.graphs.step_for(batch.seqs, batch.steps)
        if step is None:
            sampled = self.runner.decode(batch.seqs, batch.steps)
        else:
            launched = self.graphs.launch(step, batch.seqs, batch.steps, (), self.queue)
            sampled = self.queue.read(launched)
        self._append(batch.seqs, sampled)
        return step is not None

    def _verify(self, batch: DecodeBatch) -> None:
        """Append each sequence's accepted draft tokens and the token sampled after them."""
        matches = [seq.drafter.match for seq in batch.seqs]  # before the new tokens move them
        sampled = self.runner.verify(batch.seqs, batch.drafts)
        appended = self._append(batch.seqs, sampled)
        for i, seq in enumerate(batch.seqs):
            drafted = len(batch.drafts[i])
            accepted = appended[i] - 1
            self.stats.draft_tokens += drafted
            self.stats.accepted_tokens += accepted
            # where a sequence ended it is not known how many would have been accepted
            if drafted and seq.completion is None:
                self.controller.record_acceptance(matches[i], drafted, accepted)

    def _record_step(self, batch: DecodeBatch, seconds: float, replayed: bool) -> None:
        """Tell the controller what a step of this batch cost."""
        lengths = [len(draft) for draft in batch.drafts]
        tokens = len(batch.seqs) + sum(lengths)
        area = len(batch.seqs) * (1 + max(lengths))
        self.controller.record_step(tokens, area, seconds, replayed)

    # ---- postprocess

    def _append(self, seqs: Sequence[RunningSequence], sampled: SampledTokens) -> list[int]:
        """Append sampled tokens until their sequence ends; returns how many each one took.

        Tokens after an end are dropped: the steps of one synchronisation go on beyond it, and so
        may those of the next one, which were launched before the end was read.
        """
        appended = []
        for seq, tokens, logprobs in zip(seqs, sampled.tokens, sampled.logprobs, strict=True):
            count = 0
            if seq.completion is None:
                count = self.stop_conditions.append(seq, tokens, logprobs)
            self.stats.new_tokens += count
            appended.append(count)
        return appended
