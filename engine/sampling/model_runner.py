"""Forwards of the model for running sequences: prefill, decode, verification of draft tokens

Every forward takes the tokens of all sequences laid end to end and a `Cached` that says who attends
to whom. Which sequences run is decided in scheduler.py; tokens are appended in sampler.py.
"""

# T = tokens of a forward, B = sequences, n = tokens to be sampled, D = hidden size,
# L = length of the longest history, V = vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.sampling.launched import Launched, LaunchQueue
from engine.sampling.page_pool import PagePool
from engine.sampling.requests import SamplerConfig
from engine.sampling.scheduler import PromptPiece
from engine.sampling.sequence import RunningSequence, SampledTokens
from kernels.cached import Cached
from kernels.dtypes import accumulate_dtype
from kernels.upload import upload
from model.llama import Llama
from model.lora import Lora


def num_accepted(draft: Sequence[int], sampled: Sequence[int]) -> int:
    """Draft tokens, from the first on, that equal the tokens sampled in their place."""
    accepted = 0
    while accepted < len(draft) and draft[accepted] == sampled[accepted]:
        accepted += 1
    return accepted


class ModelRunner:
    """One prepared model and adapter over the sampler's pages."""

    def __init__(
        self, model: Llama, lora: Lora | None, pool: PagePool, config: SamplerConfig
    ) -> None:
        self.model = model
        self.lora = lora
        self.pool = pool
        self.config = config
        self.penalised = config.repetition_penalty != 1  # only then are histories needed
        # whole pages, so that a block of queries is never computed twice
        pages = max(1, config.prefill_tokens // config.page_size)
        self.max_prefill_tokens = pages * config.page_size

    def halve_prefill_tokens(self) -> None:
        """Compute prompts in forwards of half as many tokens, in whole pages, at least one."""
        page_size = self.config.page_size
        pages = max(1, self.max_prefill_tokens // page_size // 2)
        self.max_prefill_tokens = pages * page_size

    # ---- prefill

    def prefill_prefix(self, tokens: list[int]) -> list[int]:
        """The pages of a prefix, filled with its keys and values."""
        pages = self.pool.cache.take(self.pool.pages_for(len(tokens)))
        for start in range(0, len(tokens), self.max_prefill_tokens):
            piece = tokens[start : start + self.max_prefill_tokens]
            cached = self._cached([len(piece)], [start], [pages], decode=False)
            self._forward(self._ids(piece), cached, logits_indices=cached.last)
        return pages

    def prefill(self, pieces: Sequence[PromptPiece], queue: LaunchQueue) -> Launched:
        """Launch pieces of prompts; one token for each piece that completes its prompt."""
        new_lens = [piece.end - piece.start for piece in pieces]
        context_lens = [piece.start for piece in pieces]
        block_tables = [piece.seq.block_table for piece in pieces]
        cached = self._cached(new_lens, context_lens, block_tables, decode=False)
        prompt_tokens: list[int] = []
        for piece in pieces:
            prompt_tokens += piece.seq.prompt[piece.start : piece.end]
        complete = [i for i, piece in enumerate(pieces) if piece.completes_prompt]
        seqs = [pieces[i].seq for i in complete]
        launched = Launched(seqs, steps=1)
        input_tokens = self._ids(prompt_tokens)  # (T,)
        last_of_complete = cached.last[self._ids(complete)]  # (n,) the last token of each prompt
        history = None
        if self.penalised and seqs:
            history = self._padded([seq.prompt for seq in seqs])

        def run() -> None:
            hidden = self._forward(input_tokens, cached, last_of_complete)  # (n, D)
            if seqs:
                positions = cached.positions[last_of_complete]  # (n,)
                tokens, logprobs = self._sample(hidden, seqs, positions, history)  # (n,) both
                sampled = torch.stack((tokens.double(), logprobs.double()))  # (2, n)
                launched.finish(tokens, sampled[None])

        queue.launch(run)
        for piece in pieces:
            piece.seq.prefilled = piece.end
        for seq in seqs:
            seq.in_flight += 1
        return launched

    # ---- decode

    def decode(self, seqs: Sequence[RunningSequence], steps: int) -> SampledTokens:
        """`steps` tokens for every sequence, launched one step at a time.

        The host is not synchronised before the last step. Pages for `steps` tokens are held.
        """
        ahead = steps - 1
        cached = self._cached_decode(seqs, [1] * len(seqs), ahead)
        history = None
        if self.penalised:
            seen = [[*seq.prompt, *seq.token_ids] for seq in seqs]
            history = self._padded(seen, ahead)
        tokens = self._ids([seq.token_ids[-1] for seq in seqs])  # (B,)
        all_tokens, all_logprobs = [], []
        for step in range(steps):
            if step > 0:
                cached = cached.advance()
                if history is not None:
                    # `tokens` stand at the position of this forward
                    history.scatter_(1, cached.positions[:, None], tokens[:, None])
            hidden = self._forward(tokens, cached)  # (B, D)
            tokens, logprobs = self._sample(hidden, seqs, cached.positions, history)  # (B,) both
            all_tokens.append(tokens)
            all_logprobs.append(logprobs)
        tokens_by_seq = torch.stack(all_tokens, dim=1)  # (B, steps)
        logprobs_by_seq = torch.stack(all_logprobs, dim=1)  # (B, steps)
        return SampledTokens(tokens_by_seq.tolist(), logprobs_by_seq.tolist())

    def verify(self, seqs: Sequence[RunningSequence], drafts: Sequence[list[int]]) -> SampledTokens:
        """Every sequence's accepted draft tokens and the token sampled after the last of them.

        One forward over each sequence's last token and its draft tokens. A draft token is accepted
        if it is the one that the model samples in its place, and so were those before it.
        """
        cached = self._cached_decode(seqs, [1 + len(draft) for draft in drafts])
        input_tokens: list[int] = []
        owners: list[RunningSequence] = []  # of each input token
        for seq, draft in zip(seqs, drafts, strict=True):
            input_tokens.append(seq.token_ids[-1])
            input_tokens += draft
            owners += [seq] * (1 + len(draft))
        history = None
        if self.penalised:
            seen = []  # up to and with each input token
            for seq, draft in zip(seqs, drafts, strict=True):
                before = [*seq.prompt, *seq.token_ids]
                seen += [before + draft[:n] for n in range(1 + len(draft))]
            history = self._padded(seen)
        hidden = self._forward(self._ids(input_tokens), cached)  # (T, D)
        tokens, logprobs = self._sample(hidden, owners, cached.positions, history)  # (T,) both
        return _accepted(drafts, tokens.tolist(), logprobs.tolist())

    # ---- shared by all

    def _cached(
        self,
        new_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        decode: bool,
        ahead: int = 0,
    ) -> Cached:
        """Describe a forward; `ahead`: how often it may be advanced by a token."""
        return Cached.build(
            new_lens,
            context_lens,
            block_tables,
            self.config.page_size,
            self.model.device,
            decode=decode,
            ahead=ahead,
        )

    def _cached_decode(
        self, seqs: Sequence[RunningSequence], new_lens: Sequence[int], ahead: int = 0
    ) -> Cached:
        """Describe a forward over the last tokens of running sequences and what follows them."""
        context_lens = [seq.context_len for seq in seqs]
        block_tables = [seq.block_table for seq in seqs]
        return self._cached(new_lens, context_lens, block_tables, decode=True, ahead=ahead)

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        """Token ids or indices as an int64 tensor on the device."""
        return upload(tokens, torch.int64, self.model.device)

    def _forward(
        self, tokens: Tensor, cached: Cached, logits_indices: Tensor | None = None
    ) -> Tensor:
        """Hidden states (n, D) of the tokens (T,) at `logits_indices` (n,), or of all (T, D)."""
        return self.model.forward(
            tokens,
            cached,
            lora=self.lora,
            cache=self.pool.cache,
            logits_indices=logits_indices,
        )

    def _padded(self, seen: Sequence[Sequence[int]], ahead: int = 0) -> Tensor:
        """(n, L) int64: the token ids seen so far, padded with -1, for a repetition penalty.

        `ahead` columns are left for tokens to come.
        """
        longest = max(len(ids) for ids in seen) + ahead
        rows = []
        for ids in seen:
            padding = [-1] * (longest - len(ids))
            rows.append([*ids, *padding])
        return self._ids(rows)

    def _sample(
        self,
        hidden: Tensor,  # (n, D)
        seqs: Sequence[RunningSequence],  # n; a sequence may stand several times
        positions: Tensor,  # (n,) of the tokens that the hidden states belong to
        history: Tensor | None,  # (n, L)
    ) -> tuple[Tensor, Tensor]:
        """The token (n,) int64 that follows each hidden state and its log-probability (n,)."""
        default = self.config.temperature
        temperatures = [seq.temperature(default) for seq in seqs]
        if len(set(temperatures)) == 1:
            return self._sample_at(temperatures[0], hidden, seqs, positions, history)
        by_temperature: dict[float, list[int]] = {}
        for i, temperature in enumerate(temperatures):
            by_temperature.setdefault(temperature, []).append(i)
        dtype = accumulate_dtype(hidden.dtype)
        tokens = torch.empty(len(seqs), dtype=torch.int64, device=hidden.device)
        logprobs = torch.empty(len(seqs), dtype=dtype, device=hidden.device)
        for temperature, indices in by_temperature.items():
            index = self._ids(indices)
            some_seqs = [seqs[i] for i in indices]
            some_history = None if history is None else history[index]
            tokens[index], logprobs[index] = self._sample_at(
                temperature, hidden[index], some_seqs, positions[index], some_history
            )
        return tokens, logprobs

    def _sample_at(
        self,
        temperature: float,
        hidden: Tensor,
        seqs: Sequence[RunningSequence],
        positions: Tensor,
        history: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`_sample` for sequences of one temperature."""
        samples = self._ids([seq.request.sample for seq in seqs])
        row_keys = self._ids([seq.key for seq in seqs])
        rows = self.config.sample_rows(positions + 1, samples, row_keys, temperature, history)
        logits = self.model.head(hidden)  # (n, V)
        return self.model.ops.sample(logits, rows)


def _accepted(
    drafts: Sequence[list[int]], tokens: Sequence[int], logprobs: Sequence[float]
) -> SampledTokens:
    """Of what was sampled after every input token of `verify`, laid end to end, the part to keep.

    A sequence with n draft tokens has n + 1: those that equal its draft, and one more.
    """
    kept_tokens: list[list[int]] = []
    kept_logprobs: list[list[float]] = []
    start = 0
    for draft in drafts:
        accepted = num_accepted(draft, tokens[start : start + len(draft)])
        end = start + accepted + 1
        kept_tokens.append(tokens[start:end])
        kept_logprobs.append(logprobs[start:end])
        start += len(draft) + 1
    return SampledTokens(kept_tokens, kept_logprobs)
