"""Seed likelihoods: how foreign are the references, and the rewrites, to the model itself?

For every distilled line, the mean negative log-likelihood in nats per token, end token included, of
the reference and of the response, both under the plain prompt (no reference shown). The prompt is
computed once for both, and a number does not depend on its neighbours. FILE.scores.jsonl grows
line by line and is resumed like the distilled file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sampling.page_pool import common_prefix, shared_tokens
from kernels.cached import Cached
from kernels.dtypes import accumulate_dtype
from kernels.packed import Packed
from model.kv_cache import KVCache
from model.llama import Llama
from model.lora import Lora
from model.sampling_weights import for_sampling, restore_weights

TOKENS = 1024  # of prompts and answers in a batch
HEAD_ROWS = 128  # rows of logits at a time: a large vocabulary takes 0.2 to 0.5 MB each


def nll(
    model: Llama, prompt: Sequence[int], answer: Sequence[int], lora: Lora | None = None
) -> torch.Tensor:
    """Negative log-likelihood of every answer token, (len(answer),) in nats."""
    ids = torch.tensor([*prompt, *answer], device=model.device)
    hidden = model.forward(ids, Packed.from_lengths([len(ids)], model.device), lora=lora)
    start = len(prompt)
    return model.nll(hidden[start - 1 : -1], ids[start:], need_grad=False)[0]


@dataclass
class Asked:
    """A prompt and the answers whose likelihood is asked for."""

    id: str
    prompt: list[int]
    answers: list[list[int]]  # one of no token is not scored: empty, or too long for the model
    skip: tuple[int, ...] = ()  # by answer, tokens at its beginning that are of its own prompt


def batches(asked: Sequence[Asked]) -> Iterator[list[Asked]]:
    """Lines to score together: up to TOKENS tokens, never a part of a line."""
    batch: list[Asked] = []
    total = 0
    for one in asked:
        n = len(one.prompt) + sum(map(len, one.answers))
        if batch and total + n > TOKENS:
            yield batch
            batch, total = [], 0
        batch.append(one)
        total += n
    if batch:
        yield batch


class PackedScorer:
    """Likelihoods without a cache, each answer behind a prompt of its own: for sharded weights.

    An empty batch is one token that nobody asked for, so that no process is missed.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model

    def __enter__(self) -> PackedScorer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def losses(self, batch: Sequence[Asked]) -> list[list[list[float]]]:
        """Nats of every token of every answer."""
        rows = [(asked.prompt, a) for asked in batch for a in asked.answers if a] or [([0], [])]
        lengths = [len(prompt) + len(answer) for prompt, answer in rows]
        places = []
        for (_, answer), end in zip(rows, itertools.accumulate(lengths), strict=True):
            places += range(end - len(answer) - 1, end - 1)
        ids = [token for prompt, answer in rows for token in (*prompt, *answer)]
        targets = [token for _, answer in rows for token in answer]
        device = self.model.device
        tokens, places, targets = (
            torch.tensor(v, dtype=torch.int64, device=device) for v in (ids, places, targets)
        )
        hidden = self.model.forward(tokens, Packed.from_lengths(lengths, device))
        nats = iter(self.model.nll(hidden[places], targets, need_grad=False)[0].tolist())
        return [[[next(nats) for _ in answer] for answer in asked.answers] for asked in batch]


class Scorer:
    """Likelihoods of several answers to each of many prompts, every prompt computed once.

    It is the sampler's prefill: a prompt and its first answer are one row of the paged cache, whose
    prompt pages are then copied for the other answers; what all prompts begin with is copied too.
    In fp32 on a CPU an answer's numbers are the same bits in any company
    (engine/sampling/sampler.py says why). The model lends its matrices inside `with`.
    """

    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],
        page_size: int = 64,
        lora: Lora | None = None,
    ) -> None:
        self.owner, self.page_size, self.adapter = model, page_size, lora
        self.prefix = common_prefix(prompts)

    def __enter__(self) -> Scorer:
        self.model, self.lora = for_sampling(self.owner, self.adapter, release=True)
        m = self.model
        self.cache = KVCache(m.config, 1, self.page_size, m.device, m.dtype)
        self.shared: list[int] = []  # pages of the prefix
        if self.prefix:
            (self.shared,) = self._pages([len(self.prefix)])
            self._forward([self.prefix], [0], [self.shared], [len(self.prefix) - 1])
        return self

    def __exit__(self, *_: object) -> None:
        del self.model, self.cache
        restore_weights(self.owner)

    def losses(self, batch: Sequence[Asked]) -> list[list[list[float]]]:
        """Nats of every token of every answer."""
        judged = self.judged(batch)
        return [[[nats for nats, _ in answer] for answer in answers] for answers in judged]

    def judged(self, batch: Sequence[Asked]) -> list[list[list[tuple[float, bool]]]]:
        """Of every token of every answer its nats, and whether it is the likeliest of all."""
        # 1. prompts, each with its first answer behind it; the last token predicts nothing
        known = [shared_tokens(self.prefix, asked.prompt) for asked in batch]
        rows = [[*asked.prompt, *asked.answers[0][:-1]] for asked in batch]
        tables = self._pages([len(row) for row in rows])
        for n, pages in zip(known, tables, strict=True):
            whole = self.cache.pages_for(n)
            self.cache.copy(self.shared[:whole], pages[:whole])
        new = [row[n:] for row, n in zip(rows, known, strict=True)]
        skip = [len(asked.prompt) - 1 - n for asked, n in zip(batch, known, strict=True)]
        hidden = self._forward(new, known, tables, skip)

        # 2. the other answers behind copies of the prompts
        others = [(i, a) for i, asked in enumerate(batch) for a in asked.answers[1:]]
        longer = [(i, a[:-1]) for i, a in others if len(a) > 1]
        prompts = [len(batch[i].prompt) for i, _ in longer]
        copies = self._pages([n + len(a) for n, (_, a) in zip(prompts, longer, strict=True)])
        for n, (i, _), pages in zip(prompts, longer, copies, strict=True):
            whole = self.cache.pages_for(n)
            self.cache.copy(tables[i][:whole], pages[:whole])
        answers = [a for _, a in longer]
        more = iter(self._forward(answers, prompts, copies, [0] * len(answers)) if answers else [])

        # 3. the product with the head, for answer tokens alone
        states, targets = [], []
        for asked, h in zip(batch, hidden, strict=True):
            for n, answer in enumerate(asked.answers):
                if answer:
                    own = h[1:] if n == 0 else next(more) if len(answer) > 1 else h[:0]
                    states += [h[:1], own[: len(answer) - 1]]
                    targets += answer
        found = iter(self._judge(torch.cat(states), targets) if targets else [])
        for pages in (*tables, *copies):
            self.cache.give_back(pages)
        return [[[next(found) for _ in answer] for answer in asked.answers] for asked in batch]

    def _pages(self, tokens: Sequence[int]) -> list[list[int]]:
        """Pages for rows of so many tokens."""
        need = [self.cache.pages_for(n) for n in tokens]
        self.cache.grow(self.cache.pages - len(self.cache.free) + sum(need))
        return [self.cache.take(count) for count in need]

    def _forward(
        self,
        new: Sequence[Sequence[int]],
        contexts: Sequence[int],
        tables: Sequence[Sequence[int]],
        skip: Sequence[int],
    ) -> list[Tensor]:
        """For every row the hidden states of its new tokens, less the first `skip`."""
        m, lengths = self.model, [len(row) for row in new]
        cached = Cached.build(lengths, contexts, tables, self.page_size, m.device, alone=False)
        starts = [0, *itertools.accumulate(lengths)]
        wanted = [range(starts[i] + skip[i], starts[i + 1]) for i in range(len(new))]
        index = torch.tensor([t for span in wanted for t in span], device=m.device)
        tokens = torch.tensor([t for row in new for t in row], device=m.device)
        hidden = m.forward(tokens, cached, lora=self.lora, cache=self.cache, logits_indices=index)
        return list(hidden.split([len(span) for span in wanted]))

    def _judge(self, hidden: Tensor, targets: Sequence[int]) -> list[tuple[float, bool]]:
        """-log p of every target and whether it is on top, HEAD_ROWS rows of logits at a time."""
        nats: list[float] = []
        top: list[bool] = []
        wanted = torch.tensor(targets, device=hidden.device)[:, None]
        for h, t in zip(hidden.split(HEAD_ROWS), wanted.split(HEAD_ROWS), strict=True):
            logits = self.model.head(h)
            logprobs = torch.log_softmax(logits.to(accumulate_dtype(logits.dtype)), dim=-1)
            nats += logprobs.gather(1, t)[:, 0].neg().double().tolist()
            top += (logits.argmax(-1) == t[:, 0]).tolist()
        return list(zip(nats, top, strict=True))
