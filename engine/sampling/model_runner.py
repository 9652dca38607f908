"""Forwards of the model for running sequences: prefill, decode, verification of draft tokens

Every forward takes the tokens of all sequences laid end to end and a `Cached` that says who attends
to whom. Nothing here decides what runs (scheduler.py) or keeps a token (sampler.py).
"""

# T = tokens of a forward, B = sequences, n = tokens to be sampled, D = hidden size,
# L = length of the longest history

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from engine.sampling.page_pool import PagePool
from engine.sampling.requests import SamplerConfig
from engine.sampling.scheduler import PromptPiece
from engine.sampling.sequence import RunningSequence
from kernels.cached import Cached
from kernels.dtypes import accumulate_dtype
from model.llama import Llama
from model.lora import Lora


def split(values: list, lengths: Sequence[int]) -> list[list]:
    """The values in parts of these lengths."""
    parts, start = [], 0
    for length in lengths:
        parts.append(values[start : start + length])
        start += length
    return parts


class ModelRunner:
    """One prepared model and adapter over the sampler's pages."""

    def __init__(
        self, model: Llama, lora: Lora | None, pool: PagePool, config: SamplerConfig
    ) -> None:
        self.model, self.lora, self.pool, self.config = model, lora, pool, config
        # whole pages, so that a block of queries is never computed twice
        pages = max(1, config.prefill_tokens // config.page_size)
        self.max_prefill_tokens = pages * config.page_size

    # ---- prefill

    def prefill_prefix(self, tokens: list[int]) -> list[int]:
        """The pages of a prefix, filled with its keys and values."""
        pages = self.pool.cache.take(self.pool.pages_for(len(tokens)))
        for start in range(0, len(tokens), self.max_prefill_tokens):
            piece = tokens[start : start + self.max_prefill_tokens]
            cached = self._cached([len(piece)], [start], [pages], decode=False)
            self._forward(piece, cached, logits_indices=cached.last)
        return pages

    def prefill(
        self, pieces: Sequence[PromptPiece]
    ) -> tuple[list[RunningSequence], list[int], list[float]]:
        """Compute pieces of prompts; the first token of each sequence whose prompt is complete.

        Returns those sequences, their tokens and the log-probabilities in nats.
        """
        new_lens = [end - start for _, start, end in pieces]
        context_lens = [start for _, start, _ in pieces]
        block_tables = [seq.block_table for seq, _, _ in pieces]
        cached = self._cached(new_lens, context_lens, block_tables, decode=False)
        tokens = [token for seq, start, end in pieces for token in seq.prompt[start:end]]
        complete = [i for i, (seq, _, end) in enumerate(pieces) if end == len(seq.prompt)]
        index = torch.tensor(complete, dtype=torch.int64, device=self.model.device)
        logits_indices = cached.last[index]  # (n,) the last token of each complete prompt
        hidden = self._forward(tokens, cached, logits_indices)  # (n, D)
        for seq, _, end in pieces:
            seq.prefilled = end
        if not complete:
            return [], [], []
        seqs = [pieces[i].seq for i in complete]
        history = self._history(seq.prompt for seq in seqs)
        sampled, logprobs = self._sample(hidden, seqs, cached.positions[logits_indices], history)
        return seqs, sampled.tolist(), logprobs.tolist()

    # ---- decode

    def decode(
        self, seqs: Sequence[RunningSequence], steps: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """`steps` tokens for every sequence, launched one step at a time: (steps, B) both.

        The device is not synchronised before the last step. Pages for `steps` tokens are held.
        """
        block_tables = [seq.block_table for seq in seqs]
        lens = [seq.context_len for seq in seqs]
        ahead = steps - 1
        cached = self._cached([1] * len(seqs), lens, block_tables, decode=True, ahead=ahead)
        history = self._history(((*seq.prompt, *seq.token_ids) for seq in seqs), ahead)
        tokens: Sequence[int] | Tensor = [seq.token_ids[-1] for seq in seqs]
        all_tokens, all_logprobs = [], []
        for step in range(steps):
            if step:
                cached = cached.advance()
                if history is not None:
                    # `tokens` stand at the position of this forward
                    history.scatter_(1, cached.positions[:, None], tokens[:, None])
            hidden = self._forward(tokens, cached)  # (B, D)
            tokens, logprobs = self._sample(hidden, seqs, cached.positions, history)
            all_tokens.append(tokens)
            all_logprobs.append(logprobs)
        return torch.stack(all_tokens).tolist(), torch.stack(all_logprobs).tolist()

    def verify(
        self, seqs: Sequence[RunningSequence], drafts: Sequence[list[int]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Sample behind each sequence's last token and behind each of its draft tokens.

        One forward; for every sequence 1 + len(draft) tokens and log-probabilities. Those behind
        a draft token count only if that one is what was sampled.
        """
        new_lens = [1 + len(draft) for draft in drafts]
        context_lens = [seq.context_len for seq in seqs]
        block_tables = [seq.block_table for seq in seqs]
        cached = self._cached(new_lens, context_lens, block_tables, decode=True)
        tokens: list[int] = []
        owners: list[RunningSequence] = []  # of each token
        for seq, draft in zip(seqs, drafts, strict=True):
            tokens += [seq.token_ids[-1], *draft]
            owners += [seq] * (1 + len(draft))
        history = self._history(
            (*seq.prompt, *seq.token_ids, *draft[:n])
            for seq, draft in zip(seqs, drafts, strict=True)
            for n in range(1 + len(draft))
        )
        hidden = self._forward(tokens, cached)  # (T, D)
        sampled, logprobs = self._sample(hidden, owners, cached.positions, history)
        return split(sampled.tolist(), new_lens), split(logprobs.tolist(), new_lens)

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

    def _forward(
        self, tokens: Sequence[int] | Tensor, cached: Cached, logits_indices: Tensor | None = None
    ) -> Tensor:
        """Hidden states (n, D) of the tokens at `logits_indices` (n,), or of all (T, D)."""
        ids = torch.as_tensor(tokens, dtype=torch.int64, device=self.model.device)
        cache = self.pool.cache
        return self.model.forward(
            ids, cached, lora=self.lora, cache=cache, logits_indices=logits_indices
        )

    def _history(self, seen: Iterable[Sequence[int]], ahead: int = 0) -> Tensor | None:
        """(n, L) int64: token ids so far, padded with -1; None without a repetition penalty.

        `ahead` columns are left for tokens to come.
        """
        if self.config.repetition_penalty == 1:
            return None
        seen = list(seen)
        longest = max(len(ids) for ids in seen) + ahead
        padded = [[*ids, *[-1] * (longest - len(ids))] for ids in seen]
        return torch.tensor(padded, dtype=torch.int64, device=self.model.device)

    def _sample(
        self,
        hidden: Tensor,  # (n, D)
        seqs: Sequence[RunningSequence],  # n; a sequence may stand several times
        positions: Tensor,  # (n,) of the tokens that the hidden states belong to
        history: Tensor | None,  # (n, L)
    ) -> tuple[Tensor, Tensor]:
        """The token (n,) int64 that follows each hidden state and its log-probability (n,)."""
        default, device = self.config.temperature, hidden.device
        temperatures = [seq.temperature(default) for seq in seqs]
        if len(set(temperatures)) == 1:
            return self._sample_at(temperatures[0], hidden, seqs, positions, history)
        by_temperature: dict[float, list[int]] = {}
        for i, temperature in enumerate(temperatures):
            by_temperature.setdefault(temperature, []).append(i)
        tokens = torch.empty(len(seqs), dtype=torch.int64, device=device)
        logprobs = torch.empty(len(seqs), dtype=accumulate_dtype(hidden.dtype), device=device)
        for temperature, indices in by_temperature.items():
            index = torch.tensor(indices, device=device)
            tokens[index], logprobs[index] = self._sample_at(
                temperature,
                hidden[index],
                [seqs[i] for i in indices],
                positions[index],
                None if history is None else history[index],
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
        device = self.model.device
        samples = torch.tensor([seq.request.sample for seq in seqs], device=device)
        row_keys = torch.tensor([seq.key for seq in seqs], device=device)
        rows = self.config.sample_rows(positions + 1, samples, row_keys, temperature, history)
        return self.model.ops.sample(self.model.head(hidden), rows)
