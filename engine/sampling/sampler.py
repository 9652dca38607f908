"""KV-cached continuous sampling over the no-batch forward

    schedule      waiting requests are admitted while sequences and pages last (scheduler.py)
    run           their prompts are prefilled, then every running sequence gets tokens: one, or as
                  many as its draft tokens are accepted (speculation.py), or several decode steps
                  in a row (model_runner.py; on a GPU replayed CUDA graphs, cuda_graphs.py)
    postprocess   tokens are appended, stopping conditions checked (sequence.py), completions handed
                  out at once and their pages freed (page_pool.py)

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

from engine.runtime.process_memory import give_back_freed_memory
from engine.sampling.batch_invariance import check_batch_invariance
from engine.sampling.cuda_graphs import DecodeGraphs
from engine.sampling.model_runner import ModelRunner
from engine.sampling.page_pool import PagePool
from engine.sampling.requests import Completion, Request, SamplerConfig, SamplerStats
from engine.sampling.scheduler import Scheduler, prefill_chunks
from engine.sampling.sequence import RunningSequence, check_stop
from engine.sampling.speculation import DraftController
from model.llama import Llama
from model.lora import Lora
from model.sampling_weights import for_sampling, restore_weights

__all__ = ["Completion", "Request", "Sampler", "SamplerConfig", "SamplerStats"]


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
        self.decode = decode
        self.end_ids = frozenset(() if config.ignore_eos else end_ids)
        self.owner, self.adapter = model, lora
        self.stats = SamplerStats()
        self.pool = PagePool(model, config.page_size, config.kv_memory)
        max_position = model.config.max_position
        self.scheduler = Scheduler(self.config, max_position, self.pool, self.stats)
        self.controller = DraftController()
        # set by _prepare
        self.model: Llama | None = None  # the owner, or a copy with packed weights
        self.runner: ModelRunner | None = None
        self.graphs: DecodeGraphs | None = None

    def __enter__(self) -> Sampler:
        self._prepare(release=True)
        give_back_freed_memory(self.owner.device)
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.cache = None  # first: only memory without a reference can be given back
        self.graphs.clear()
        self.model = self.runner = self.graphs = None
        give_back_freed_memory(self.owner.device)  # before the matrices grow again
        restore_weights(self.owner)
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

    def drain(self) -> None:
        """Admit no further request: `run` ends when the running sequences have."""
        self.scheduler.draining = True

    def run(self, requests: Iterable[Request] = ()) -> Iterator[Completion]:
        """Yield completions as sequences end, until none is waiting or running."""
        if self.runner is None:
            self._prepare(release=False)
        for request in requests:
            self.submit(request)
        if self.scheduler.waiting and not self.scheduler.running:
            self._open_pool()
        while self.scheduler.has_work:
            yield from self._step()
        self.pool.close()

    def _step(self) -> Iterator[Completion]:
        """Schedule, run, postprocess."""
        admitted, refused = self.scheduler.schedule()
        if self.scheduler.pool_too_small:
            self.graphs.clear()  # they hold addresses in the pool
            self.pool.discard()
            self._open_pool()
        yield from refused
        self._prefill(admitted)
        yield from self.scheduler.take_finished()
        if self.scheduler.running:
            self._decode()
            yield from self.scheduler.take_finished()

    def _open_pool(self) -> None:
        """Make a pool for the waiting requests and compute the prefix that many begin with."""
        prefix = self.scheduler.open_pool()
        if prefix:
            self.pool.prefix_pages = self.runner.prefill_prefix(prefix)
            self.pool.prefix_tokens = prefix

    def _prefill(self, admitted: Sequence[RunningSequence]) -> None:
        """Compute prompts and sample the first token of every sequence."""
        started = time.perf_counter()
        page_size, max_tokens = self.config.page_size, self.runner.max_prefill_tokens
        for pieces in prefill_chunks(admitted, page_size, max_tokens):
            self._append(*self.runner.prefill(pieces))
        self.stats.prefill_seconds += time.perf_counter() - started

    # ---- decode

    def _decode(self) -> None:
        """Up to one host synchronisation: a step with draft tokens, or several steps without."""
        started = time.perf_counter()
        captured_before = self.stats.capture_seconds
        running_before = len(self.scheduler.running)
        drafts = self._propose()
        steps = 1 if any(drafts) else self._num_steps()
        self.scheduler.reserve([max(steps, 1 + len(draft)) for draft in drafts])
        seqs = list(self.scheduler.running)
        drafts = drafts[: len(seqs)]  # the youngest may have been preempted
        self.pool.compact([seq.block_table for seq in seqs])
        replayed = False
        if any(drafts):
            self._verify(seqs, drafts)
        else:
            replayed = self._decode_steps(seqs, steps)
        capturing = self.stats.capture_seconds - captured_before
        seconds = time.perf_counter() - started - capturing
        self.stats.decode_seconds += seconds
        self.stats.steps += steps
        self.stats.sequence_steps += steps * len(seqs)
        if running_before == len(seqs):
            widest = 1 + max(len(draft) for draft in drafts)
            tokens = len(seqs) + sum(len(draft) for draft in drafts)
            area = widest * len(seqs)
            self.controller.record_step(tokens, area, seconds / steps, replayed)

    def _num_steps(self) -> int:
        """Decode steps until the next host synchronisation, if no sequence has draft tokens."""
        running = self.scheduler.running
        until_last_position = self.owner.config.max_position - max(s.context_len for s in running)
        until_last_limit = max(seq.remaining_tokens for seq in running)
        steps = self.graphs.steps_per_sync(len(running), self.controller)
        return min(steps, until_last_position, until_last_limit)

    def _propose(self) -> list[list[int]]:
        """Draft tokens of each running sequence; [] where none is worth its computation."""
        running = self.scheduler.running
        if self.config.draft == "off":
            return [[] for _ in running]
        # a step samples one token more than there are draft tokens
        offers = [seq.drafter.propose(seq.remaining_tokens - 1) for seq in running]
        if self.config.draft == "always" or not any(offers):
            return offers
        matches = [seq.drafter.match for seq in running]
        lengths = [len(offer) for offer in offers]
        counts = self.controller.choose(matches, lengths, self.graphs.enabled)
        return [offer[:count] for offer, count in zip(offers, counts, strict=True)]

    def _decode_steps(self, seqs: Sequence[RunningSequence], steps: int) -> bool:
        """`steps` tokens for every sequence; returns whether CUDA graphs were replayed."""
        sampled = self.graphs.run(seqs, steps)
        replayed = sampled is not None
        if sampled is None:
            sampled = self.runner.decode(seqs, steps)
        for tokens, logprobs in zip(*sampled, strict=True):
            self._append(seqs, tokens, logprobs)
        return replayed

    def _verify(self, seqs: Sequence[RunningSequence], drafts: Sequence[list[int]]) -> None:
        """One forward over every sequence's last token and its draft tokens.

        A draft token is accepted if it is the one that the model samples in its place; the first
        token sampled behind the accepted ones is kept as well.
        """
        sampled = self.runner.verify(seqs, drafts)
        for seq, draft, tokens, logprobs in zip(seqs, drafts, *sampled, strict=True):
            match = seq.drafter.match  # before the new tokens move it
            accepted = 0
            for i, token in enumerate(tokens):
                self._append([seq], [token], [logprobs[i]])
                if seq.completion is not None or i == len(draft) or token != draft[i]:
                    break
                accepted += 1
            self.stats.draft_tokens += len(draft)
            self.stats.accepted_tokens += accepted
            if draft and seq.completion is None:
                self.controller.record_acceptance(match, len(draft), accepted)

    # ---- postprocess

    def _append(
        self, seqs: Sequence[RunningSequence], tokens: Sequence[int], logprobs: Sequence[float]
    ) -> None:
        """Append a sampled token to every sequence that has not ended, and check whether it ends.

        Of several steps in a row, those behind the end of a sequence are dropped here.
        """
        for seq, token, logprob in zip(seqs, tokens, logprobs, strict=True):
            if seq.completion is not None:
                continue
            seq.token_ids.append(token)
            seq.logprobs.append(logprob)
            seq.completion = check_stop(seq, self.end_ids, self.config.stop, self.decode)
            self.stats.new_tokens += 1
            if seq.drafter is not None:
                seq.drafter.extend(token)
