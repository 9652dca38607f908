"""Likelihoods of given answers under a model: nats per token, with the prompt computed once

`nll`            one prompt and one answer, a packed forward
`Scorer`         many prompts with several answers each, over a paged cache
`PackedScorer`   the same without a cache, for weights that are sharded over processes
"""

# T = tokens of a forward, A = answer tokens, D = hidden size

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from engine.runtime.distributed import World
from engine.sampling.page_pool import common_prefix, shared_tokens
from kernels.cached import Cached
from kernels.dtypes import accumulate_dtype
from kernels.packed import Packed
from model.kv_cache import KVCache
from model.llama import Llama
from model.lora import Lora
from model.sampling_weights import for_sampling, restore_weights

BATCH_TOKENS = 1024  # tokens of prompts and answers scored together
HEAD_ROWS = 128  # rows of logits at a time: a large vocabulary takes 0.2 to 0.5 MB each

T = TypeVar("T")


def nll(
    model: Llama, prompt: Sequence[int], answer: Sequence[int], lora: Lora | None = None
) -> Tensor:
    """Negative log-likelihood of every answer token: (len(answer),) in nats."""
    ids = torch.tensor([*prompt, *answer], device=model.device)
    hidden = model.forward(ids, Packed.from_lengths([len(ids)], model.device), lora=lora)
    start = len(prompt)
    return model.nll(hidden[start - 1 : -1], ids[start:], need_grad=False)[0]


@dataclass
class ScoringRequest:
    """A prompt and the answers whose likelihoods are wanted, all token ids."""

    id: str
    prompt: list[int]
    answers: list[list[int]]  # an empty one is not scored
    skip: tuple[int, ...] = ()  # by answer: tokens at its beginning that belong to its prompt


class TokenScore(NamedTuple):
    """The score of one answer token."""

    nats: float  # negative log-likelihood
    greedy: bool  # whether it is the likeliest of the vocabulary


def scoring_batches(requests: Sequence[ScoringRequest]) -> Iterator[list[ScoringRequest]]:
    """Requests to score together: up to BATCH_TOKENS tokens, never a part of a request."""
    batch: list[ScoringRequest] = []
    total = 0
    for request in requests:
        tokens = len(request.prompt) + sum(len(answer) for answer in request.answers)
        if batch and total + tokens > BATCH_TOKENS:
            yield batch
            batch, total = [], 0
        batch.append(request)
        total += tokens
    if batch:
        yield batch


def collective_rounds(model: Llama, world: World, rounds: int) -> int:
    """Forwards this process has to make when it has `rounds` of its own to do.

    Sharded weights are gathered by all processes together: each makes as many forwards as the one
    that has most (with dummy tokens where its own are done).
    """
    return world.max_over_ranks(rounds) if model.is_sharded else rounds


def scorer_for(model: Llama, prompts: Sequence[Sequence[int]]) -> Scorer | PackedScorer:
    """The scorer that fits the model's weights, to be used in a `with` block."""
    return PackedScorer(model) if model.is_sharded else Scorer(model, prompts)


def by_answer(values: Sequence[T], batch: Sequence[ScoringRequest]) -> list[list[list[T]]]:
    """Values of all answer tokens, one behind the other -> [request][answer][token]."""
    found, start = [], 0
    for request in batch:
        of_request = []
        for answer in request.answers:
            of_request.append(list(values[start : start + len(answer)]))
            start += len(answer)
        found.append(of_request)
    return found


class PackedScorer:
    """Likelihoods without a cache, each answer behind a prompt of its own: for sharded weights.

    Used in a `with` block, as `Scorer` is.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model

    def __enter__(self) -> PackedScorer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def losses(self, batch: Sequence[ScoringRequest]) -> list[list[list[float]]]:
        """Negative log-likelihood in nats of every token of every answer: [request][answer][token].

        One forward. An empty batch is a dummy token, so that all ranks join the collective.
        """
        rows = [
            (request.prompt, answer) for request in batch for answer in request.answers if answer
        ]
        rows = rows or [([0], [])]
        tokens: list[int] = []
        logits_indices: list[int] = []  # (A,) the tokens before those of the answers
        targets: list[int] = []  # (A,)
        for prompt, answer in rows:
            first = len(tokens) + len(prompt) - 1
            tokens += [*prompt, *answer]
            logits_indices += range(first, first + len(answer))
            targets += answer
        lengths = [len(prompt) + len(answer) for prompt, answer in rows]
        device = self.model.device
        hidden = self.model.forward(
            torch.tensor(tokens, dtype=torch.int64, device=device),
            Packed.from_lengths(lengths, device),
        )  # (T, D)
        index = torch.tensor(logits_indices, dtype=torch.int64, device=device)
        target_ids = torch.tensor(targets, dtype=torch.int64, device=device)
        nats, _ = self.model.nll(hidden[index], target_ids, need_grad=False)  # (A,)
        return by_answer(nats.tolist(), batch)


class Scorer:
    """Likelihoods of several answers to each of many prompts, every prompt computed once.

    It is the sampler's prefill: a prompt and its first answer are one row of the paged cache, and
    the prompt's pages are copied for the other answers. The prefix that all `prompts` share is
    computed once and copied too. In fp32 on a CPU a score does not depend on what is scored with it
    (engine/sampling/sampler.py says why). Inside `with` the model lends its matrices.
    """

    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],  # those to come, for the prefix they share
        page_size: int = 64,
        lora: Lora | None = None,
    ) -> None:
        self.owner, self.page_size, self.adapter = model, page_size, lora
        self.prefix = common_prefix(prompts)

    def __enter__(self) -> Scorer:
        self.model, self.lora = for_sampling(self.owner, self.adapter, release=True)
        m = self.model
        self.cache = KVCache(m.config, 1, self.page_size, m.device, m.dtype)
        self.prefix_pages: list[int] = []
        if self.prefix:
            (self.prefix_pages,) = self._take_pages([len(self.prefix)])
            last = len(self.prefix) - 1
            self._forward([self.prefix], [0], [self.prefix_pages], [last])
        return self

    def __exit__(self, *_: object) -> None:
        del self.model, self.cache
        restore_weights(self.owner)

    def losses(self, batch: Sequence[ScoringRequest]) -> list[list[list[float]]]:
        """Negative log-likelihood in nats of every token of every answer: [request][answer][token].

        The number of forwards is one or two, whatever the batch.
        """
        scores = self.token_scores(batch)
        return [[[score.nats for score in answer] for answer in answers] for answers in scores]

    def token_scores(self, batch: Sequence[ScoringRequest]) -> list[list[list[TokenScore]]]:
        """The score of every token of every answer: [request][answer][token]."""
        # 1. prompts, each with its first answer behind it
        prompt_tables, prompt_states = self._prefill(batch)
        # 2. the other answers, behind copies of the prompts
        copied_tables, answer_states = self._extend(batch, prompt_tables)
        for i, states in enumerate(prompt_states):
            answer_states[i, 0] = states[1:]
        # 3. the product with the head, for answer tokens alone
        states: list[Tensor] = []
        targets: list[int] = []
        for i, request in enumerate(batch):
            for number, answer in enumerate(request.answers):
                if answer:
                    states.append(prompt_states[i][:1])  # predicts the first token
                if len(answer) > 1:
                    states.append(answer_states[i, number])  # predict the others
                targets += answer
        scores = self._score(torch.cat(states), targets) if targets else []
        for pages in (*prompt_tables, *copied_tables):
            self.cache.give_back(pages)
        return by_answer(scores, batch)

    def _prefill(self, batch: Sequence[ScoringRequest]) -> tuple[list[list[int]], list[Tensor]]:
        """Every prompt with its first answer: block tables, and hidden states (1 + n, D) of the
        prompt's last token and of the answer's n tokens but its last, which predicts nothing."""
        rows = [[*request.prompt, *request.answers[0][:-1]] for request in batch]
        tables = self._take_pages([len(row) for row in rows])
        known = [shared_tokens(self.prefix, request.prompt) for request in batch]
        for n, pages in zip(known, tables, strict=True):
            copied = self.cache.pages_for(n)
            self.cache.copy(self.prefix_pages[:copied], pages[:copied])
        new = [row[n:] for row, n in zip(rows, known, strict=True)]
        first = [len(request.prompt) - 1 - n for request, n in zip(batch, known, strict=True)]
        return tables, self._forward(new, known, tables, first)

    def _extend(
        self, batch: Sequence[ScoringRequest], prompt_tables: Sequence[list[int]]
    ) -> tuple[list[list[int]], dict[tuple[int, int], Tensor]]:
        """The answers behind the first of each prompt: block tables, and by (request, answer
        number) the hidden states (n, D) of the answer's n tokens but its last."""
        keys: list[tuple[int, int]] = []
        new: list[list[int]] = []
        for i, request in enumerate(batch):
            for number, answer in enumerate(request.answers):
                if number > 0 and len(answer) > 1:
                    keys.append((i, number))
                    new.append(answer[:-1])
        if not keys:
            return [], {}
        contexts = [len(batch[i].prompt) for i, _ in keys]
        tables = self._take_pages([n + len(ids) for n, ids in zip(contexts, new, strict=True)])
        for (i, _), n, pages in zip(keys, contexts, tables, strict=True):
            copied = self.cache.pages_for(n)
            self.cache.copy(prompt_tables[i][:copied], pages[:copied])
        states = self._forward(new, contexts, tables, [0] * len(new))
        return tables, dict(zip(keys, states, strict=True))

    def _take_pages(self, tokens: Sequence[int]) -> list[list[int]]:
        """Block tables for rows of so many tokens."""
        counts = [self.cache.pages_for(n) for n in tokens]
        self.cache.grow(self.cache.pages - len(self.cache.free) + sum(counts))
        return [self.cache.take(count) for count in counts]

    def _forward(
        self,
        new: Sequence[Sequence[int]],  # the new tokens of each row
        contexts: Sequence[int],  # tokens of each row that the cache holds
        tables: Sequence[Sequence[int]],
        first: Sequence[int],  # of each row's new tokens: the first whose hidden state is returned
    ) -> list[Tensor]:
        """For every row the hidden states (n, D) of its new tokens from `first` on."""
        model = self.model
        lengths = [len(row) for row in new]
        cached = Cached.build(lengths, contexts, tables, self.page_size, model.device, decode=False)
        row_starts = [0, *itertools.accumulate(lengths)]
        logits_indices: list[int] = []
        for i, length in enumerate(lengths):
            logits_indices += range(row_starts[i] + first[i], row_starts[i] + length)
        hidden = model.forward(
            torch.tensor([token for row in new for token in row], device=model.device),
            cached,
            lora=self.lora,
            cache=self.cache,
            logits_indices=torch.tensor(logits_indices, device=model.device),
        )
        counts = [length - skipped for length, skipped in zip(lengths, first, strict=True)]
        return list(hidden.split(counts))

    def _score(self, hidden: Tensor, targets: Sequence[int]) -> list[TokenScore]:
        """The scores of A targets at hidden states (A, D), HEAD_ROWS rows of logits at a time."""
        nats: list[float] = []
        greedy: list[bool] = []
        target_ids = torch.tensor(targets, device=hidden.device)[:, None]  # (A, 1)
        parts = zip(hidden.split(HEAD_ROWS), target_ids.split(HEAD_ROWS), strict=True)
        for h, t in parts:
            logits = self.model.head(h)
            logprobs = torch.log_softmax(logits.to(accumulate_dtype(logits.dtype)), dim=-1)
            nats += logprobs.gather(1, t)[:, 0].neg().double().tolist()
            greedy += (logits.argmax(-1) == t[:, 0]).tolist()
        return [TokenScore(n, g) for n, g in zip(nats, greedy, strict=True)]
