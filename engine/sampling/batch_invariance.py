"""The check behind `--batch-invariant`: do the bits of a text depend on the batch on this device?

The kernels are made so that they do not (kernels/lora_linear/batch_invariant.py,
kernels/cached_attention/); how the hardware adds up is beyond them. So before the first sequence a
few of random tokens are computed together and apart, prompts whole and in pieces, draft tokens at
once and one after the other. Logits, tokens and log-probabilities must be equal to the last bit.
"""

# n = tokens whose logits are computed, V = vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.sampling.speculation import MAX_DRAFT
from kernels.cached import Cached
from kernels.integers import cdiv
from kernels.sampling.sample_rows import SampleRows
from model.kv_cache import KVCache
from model.llama import Llama
from model.lora import Lora

PROMPT_LENGTHS = (1, 21, 83, 150)  # less than a tile, several tiles, a page and more
DECODED = 1 + MAX_DRAFT  # tokens of the widest step


class Results(NamedTuple):
    """The outputs for n tokens of one sequence or of several, laid end to end."""

    logits: Tensor  # (n, V)
    tokens: Tensor  # (n,) int64, sampled
    logprobs: Tensor  # (n,)

    @classmethod
    def cat(cls, parts: Sequence[Results]) -> Results:
        return cls(
            torch.cat([part.logits for part in parts]),
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.logprobs for part in parts]),
        )

    def split(self, counts: Sequence[int]) -> list[Results]:
        """Parts of so many tokens each."""
        logits = self.logits.split(counts)
        tokens = self.tokens.split(counts)
        logprobs = self.logprobs.split(counts)
        return [Results(*part) for part in zip(logits, tokens, logprobs, strict=True)]

    def equals(self, other: Results) -> bool:
        """Whether every bit is the same."""
        return (
            torch.equal(self.logits, other.logits)
            and torch.equal(self.tokens, other.tokens)
            and torch.equal(self.logprobs, other.logprobs)
        )


class Probe:
    """Sequences of a random prompt and random decoded tokens, computed in any division."""

    def __init__(
        self,
        model: Llama,
        lora: Lora | None,
        page_size: int,
        prompt_lengths: Sequence[int],
        decoded: int,
    ) -> None:
        self.model = model
        self.lora = lora
        self.page_size = page_size
        self.decoded = decoded
        generator = torch.Generator().manual_seed(0)
        vocab = model.config.vocab_size
        room = model.config.max_position - decoded
        self.prompt_lengths = [min(length, room) for length in prompt_lengths]
        self.token_ids = [
            torch.randint(vocab, (length + decoded,), generator=generator)
            for length in self.prompt_lengths
        ]

    def run(
        self, seqs: Sequence[int], pages_per_forward: int | None, decoded_per_forward: int
    ) -> dict[int, Results]:
        """Sequence -> results at the end of its prompt and at every decoded token.

        seqs: the numbers of the sequences computed together. pages_per_forward: prompts are cut
        into pieces of so many pages, None: not at all.
        """
        model = self.model
        longest = max(self.prompt_lengths) + self.decoded
        pages = cdiv(longest, self.page_size)
        cache = KVCache(model.config, pages * len(seqs), self.page_size, model.device, model.dtype)
        block_tables = {i: cache.take(pages) for i in seqs}
        piece = max(self.prompt_lengths)
        if pages_per_forward is not None:
            piece = pages_per_forward * self.page_size
        parts = self._prefill(cache, block_tables, piece)
        for start in range(0, self.decoded, decoded_per_forward):
            stop = min(start + decoded_per_forward, self.decoded)
            spans = {}
            for i in seqs:
                prompt_length = self.prompt_lengths[i]
                spans[i] = range(prompt_length + start, prompt_length + stop)
            results = self._forward(cache, block_tables, spans, decode=True)
            for i in seqs:
                parts[i].append(results[i])
        return {i: Results.cat(parts[i]) for i in seqs}

    def _prefill(
        self, cache: KVCache, block_tables: dict[int, list[int]], piece: int
    ) -> dict[int, list[Results]]:
        """Compute prompts in pieces of so many tokens: sequence -> [results at its prompt's end]"""
        at_end: dict[int, list[Results]] = {i: [] for i in block_tables}
        longest = max(self.prompt_lengths[i] for i in block_tables)
        for start in range(0, longest, piece):
            spans = {}
            for i in block_tables:
                stop = min(start + piece, self.prompt_lengths[i])
                if start < stop:
                    spans[i] = range(start, stop)
            results = self._forward(cache, block_tables, spans, decode=False)
            for i, span in spans.items():
                if span.stop == self.prompt_lengths[i]:
                    at_end[i].append(results[i])
        return at_end

    def _forward(
        self,
        cache: KVCache,
        block_tables: dict[int, list[int]],
        spans: dict[int, range],  # sequence -> positions of its new tokens
        decode: bool,
    ) -> dict[int, Results]:
        """Sequence -> results of its new tokens; of a prompt's piece only of the last one."""
        device = self.model.device
        new_lens = [len(span) for span in spans.values()]
        context_lens = [span.start for span in spans.values()]
        tables = [block_tables[i] for i in spans]
        cached = Cached.build(new_lens, context_lens, tables, self.page_size, device, decode=decode)
        tokens = [self.token_ids[i][span.start : span.stop] for i, span in spans.items()]
        logits_indices = None if decode else cached.last
        hidden = self.model.forward(
            torch.cat(tokens).to(device),
            cached,
            lora=self.lora,
            cache=cache,
            logits_indices=logits_indices,
        )
        logits = self.model.head(hidden)  # (n, V)
        positions = cached.positions if decode else cached.positions[logits_indices]  # (n,)
        rows = SampleRows(
            positions=positions,
            samples=torch.zeros_like(positions),
            row_keys=positions,
            seed=0,
            temperature=1.0,
            top_p=0.9,
        )
        sampled, logprobs = self.model.ops.sample(logits, rows)  # (n,) both
        counts = new_lens if decode else [1] * len(new_lens)
        by_seq = Results(logits, sampled, logprobs).split(counts)
        return dict(zip(spans, by_seq, strict=True))


def batch_dependences(
    model: Llama,
    lora: Lora | None,
    page_size: int,
    prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
    decoded: int = DECODED,
) -> list[str]:
    """The circumstances that change the bits of a text here; [] if none that is tried does."""
    probe = Probe(model, lora, page_size, prompt_lengths, decoded)
    last = len(prompt_lengths) - 1
    everything = list(range(len(prompt_lengths)))
    reversed_order = everything[::-1]
    together = probe.run(everything, None, decoded)
    found = []

    def compare(circumstance: str, results: dict[int, Results]) -> None:
        if not all(results[i].equals(together[i]) for i in results):
            found.append(circumstance)

    compare("their order", probe.run(reversed_order, None, decoded))
    compare("the number of draft tokens", probe.run(everything, None, decoded // 2))
    for i in (0, last):
        circumstance = f"the sequences beside one of {probe.prompt_lengths[i]} tokens"
        compare(circumstance, probe.run([i], None, 1))
    compare("where a prompt is cut", probe.run([last], 1, decoded))
    return found


def check_batch_invariance(model: Llama, lora: Lora | None, page_size: int) -> None:
    """Print that texts do not depend on the batch; RuntimeError if they do on this GPU."""
    if not isinstance(model.weights["head"], Tensor):  # packed: kernels/cpu/prepack.py
        print("batch-invariant: on a CPU in float32 texts are so, with and without the flag")
        return
    found = []
    if model.device.type == "cuda":
        found = batch_dependences(model, lora, page_size)
    if found:
        raise RuntimeError(
            f"batch-invariant: on {torch.cuda.get_device_name(model.device)} the bits of a text "
            f"depend on {', on '.join(found)}; leave --batch-invariant out, and texts may depend "
            "on --rows"
        )
    print(f"batch-invariant: texts do not depend on the batch; ops {model.ops.name}")
