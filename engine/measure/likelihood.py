"""Likelihoods of given answers under a model: the negative log-likelihood of every token, in nats

    nll            one prompt and one answer, a packed forward
    Scorer         many prompts with several answers each, over a paged cache: a prompt is computed
                   once for all of its answers
    PackedScorer   the same without a cache, for weights that are sharded over processes

The hidden state of a token predicts the token after it. So the first token of an answer is
predicted by the last token of the prompt, and the last token of an answer predicts nothing.
"""

# T = tokens of a forward, A = answer tokens, D = hidden size, V = vocabulary
# C = rows of logits computed at a time, at most HEAD_ROWS

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from engine.measure.scoring_parts import Piece, ScoringRequest, halves, pieces_of, tokens_of
from engine.runtime.distributed import World
from engine.runtime.short_memory import attempt, tried_twice
from engine.sampling.page_pool import common_prefix, shared_tokens
from kernels.cached import Cached
from kernels.dtypes import accumulate_dtype
from kernels.packed import Packed
from model.kv_cache import KVCache
from model.llama import Llama
from model.lora import Lora
from model.sampling_weights import for_sampling, restore_weights

# tokens of prompts and answers scored together, by type of device
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
HEAD_ROWS = 128  # rows of logits at a time: a large vocabulary takes 0.2 to 0.5 MB each

Value = TypeVar("Value")


def nll(
    model: Llama, prompt: Sequence[int], answer: Sequence[int], lora: Lora | None = None
) -> Tensor:
    """Negative log-likelihood of every answer token behind the prompt: (A,) in nats."""
    ids = torch.tensor([*prompt, *answer], device=model.device)  # (T,)
    packed = Packed.from_lengths([len(ids)], model.device)
    hidden = model.forward(ids, packed, lora=lora)  # (T, D)
    start = len(prompt)
    predicting = hidden[start - 1 : -1]  # (A, D)
    nats, _ = model.nll(predicting, ids[start:], need_grad=False)  # (A,)
    return nats


class TokenScore(NamedTuple):
    """The score of one answer token."""

    nats: float  # negative log-likelihood
    greedy: bool  # whether no token of the vocabulary is likelier


def scoring_batches(
    requests: Iterable[ScoringRequest], most_tokens: int
) -> Iterator[list[ScoringRequest]]:
    """Groups of whole requests to score together, of up to `most_tokens` tokens.

    A request of more tokens is a group of its own.
    """
    batch: list[ScoringRequest] = []
    total = 0
    for request in requests:
        if batch and total + request.tokens > most_tokens:
            yield batch
            batch = []
            total = 0
        batch.append(request)
        total += request.tokens
    if batch:
        yield batch


def collective_rounds(model: Llama, world: World, rounds: int) -> int:
    """The number of forwards that this process has to make when it has work for `rounds`.

    Sharded weights are gathered by all processes together: each makes as many forwards as the one
    with the most work, with a dummy token where it has no work left.
    """
    if model.is_sharded:
        return world.max_over_ranks(rounds)
    return rounds


def scorer_for(
    model: Llama, prompts: Sequence[Sequence[int]], invariant: bool = False
) -> Scorer | PackedScorer:
    """The scorer that fits the model's weights, to be used in a `with` block."""
    if model.is_sharded:
        return PackedScorer(model)
    return Scorer(model, prompts, invariant=invariant)


def by_answer(values: Sequence[Value], batch: Sequence[ScoringRequest]) -> list[list[list[Value]]]:
    """Values of all answer tokens of a batch, in order (A,), as [request][answer][token]."""
    by_request = []
    start = 0
    for request in batch:
        of_request = []
        for answer in request.answers:
            end = start + len(answer)
            of_request.append(list(values[start:end]))
            start = end
        by_request.append(of_request)
    return by_request


class PackedScorer:
    """Likelihoods without a cache, each answer behind its own copy of the prompt.

    For weights that are sharded over processes. Used in a `with` block, as `Scorer` is.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model

    def __enter__(self) -> PackedScorer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def losses(self, batch: Sequence[ScoringRequest]) -> list[list[list[float]]]:
        """Negative log-likelihood in nats of every token of every answer: [request][answer][token].

        It makes one forward, also for an empty batch: then of one dummy token, so that this rank
        joins the collectives of the others.
        """
        rows: list[tuple[list[int], list[int]]] = []  # (prompt, answer)
        for request in batch:
            for answer in request.answers:
                if answer:
                    rows.append((request.prompt, answer))
        if not rows:
            rows.append(([0], []))
        tokens: list[int] = []  # (T,)
        lengths: list[int] = []  # by row
        logits_indices: list[int] = []  # (A,) indices of the tokens that predict the answers
        targets: list[int] = []  # (A,)
        for prompt, answer in rows:
            last_of_prompt = len(tokens) + len(prompt) - 1
            tokens += [*prompt, *answer]
            lengths.append(len(prompt) + len(answer))
            logits_indices += range(last_of_prompt, last_of_prompt + len(answer))
            targets += answer
        device = self.model.device
        token_ids = torch.tensor(tokens, dtype=torch.int64, device=device)  # (T,)
        index = torch.tensor(logits_indices, dtype=torch.int64, device=device)  # (A,)
        target_ids = torch.tensor(targets, dtype=torch.int64, device=device)  # (A,)
        hidden = self.model.forward(token_ids, Packed.from_lengths(lengths, device))  # (T, D)
        nats, _ = self.model.nll(hidden[index], target_ids, need_grad=False)  # (A,)
        return by_answer(nats.tolist(), batch)


class CachedRow(NamedTuple):
    """A row of a forward over the paged cache."""

    tokens: list[int]  # its new tokens
    context: int  # number of tokens before them, which the cache holds already
    pages: list[int]  # its block table
    first: int  # index of the first new token whose hidden state is returned


class Scorer:
    """Likelihoods of several answers to each of many prompts, every prompt computed once.

    It works as the sampler's prefill does: a prompt and its first answer are one row of the paged
    cache, and the prompt's pages are copied for the other answers. A prefix that many `prompts`
    share is computed once and copied too. In fp32 on a CPU a score does not depend on the batch
    that it is in (engine/sampling/sampler.py says why), with `invariant` on a GPU neither. Inside
    `with` the model's matrices are packed for sampling (`for_sampling`).
    """

    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],  # all that will be scored: for the prefix they share
        page_size: int = 64,
        lora: Lora | None = None,
        invariant: bool = False,  # as the sampler's setting: on a GPU too
    ) -> None:
        self.owner = model
        self.page_size = page_size
        self.adapter = lora
        self.invariant = invariant
        self.prefix = common_prefix(prompts)
        # frees memory that other parts of the job hold; called before a last attempt
        self.make_room: Callable[[], None] | None = None
        self.most_tokens: float = math.inf  # scored together; less where memory was short
        self.cache: KVCache | None = None  # None: its pages, and the prefix, have to be made
        self.prefix_pages: list[int] = []

    def __enter__(self) -> Scorer:
        try:
            tried_twice("packing the weights", self.owner.device, self._pack)
        except BaseException:
            restore_weights(self.owner)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        del self.model, self.cache
        tried_twice("unpacking the weights", self.owner.device, restore_weights, self.owner)

    def _pack(self) -> None:
        self.model, self.lora = for_sampling(
            self.owner, self.adapter, release=True, invariant=self.invariant
        )

    def _open_cache(self) -> None:
        """Make the cache, and compute the prefix that many prompts share."""
        model = self.model
        self.cache = KVCache(model.config, 1, self.page_size, model.device, model.dtype)
        self.prefix_pages = []
        if self.prefix:
            self.prefix_pages = self._take_pages([len(self.prefix)])[0]
            last = len(self.prefix) - 1  # its states are not used; a forward returns one at least
            self._forward([CachedRow(self.prefix, 0, self.prefix_pages, last)])

    def losses(self, batch: Sequence[ScoringRequest]) -> list[list[list[float]]]:
        """Negative log-likelihood in nats of every token of every answer: [request][answer][token].

        It makes one or two forwards, whatever the batch; more where memory is short.
        """
        losses = []
        for answers in self.token_scores(batch):
            losses.append([[score.nats for score in answer] for answer in answers])
        return losses

    def token_scores(self, batch: Sequence[ScoringRequest]) -> list[list[list[TokenScore]]]:
        """The score of every token of every answer: [request][answer][token].

        Where memory is short, the batch is scored in parts, and so are those that follow it.
        torch.OutOfMemoryError where one answer alone does not fit.
        """
        scores: list[list[list[TokenScore]]] = [[] for _ in batch]
        waiting = [pieces_of(batch)] if batch else []  # parts, the next one last
        while waiting:
            part = waiting.pop()
            smaller = halves(part)
            found = None
            if not smaller or tokens_of(part) <= self.most_tokens:
                found = self._attempt(part, alone=not smaller)
            if found is None:
                waiting += reversed(smaller)
                continue
            for piece, answers in zip(part, found, strict=True):
                scores[piece.place] += answers[piece.again :]
        return scores

    def _attempt(self, part: Sequence[Piece], alone: bool) -> list[list[list[TokenScore]]] | None:
        """The scores of a part; None where memory was short for it.

        alone: it cannot be made smaller, and is tried twice.
        """
        requests = [piece.request for piece in part]
        device = self.model.device
        if alone:
            return tried_twice(
                "scoring", device, self._score_together, requests, make_room=self.make_room
            )
        found, failure = attempt(device, self._score_together, requests)
        if failure is not None:
            tokens = tokens_of(part)
            self.most_tokens = tokens // 2
            print(
                f"\nscoring: out of memory with {tokens} tokens together; continuing with up to "
                f"{self.most_tokens} ({failure})"
            )
        return found

    def _score_together(self, batch: Sequence[ScoringRequest]) -> list[list[list[TokenScore]]]:
        """The scores of requests that are computed together."""
        try:
            if self.cache is None:
                self._open_cache()
            return self._scores(batch)
        except BaseException:
            self.cache = None  # with the pages of all rows
            raise

    def _scores(self, batch: Sequence[ScoringRequest]) -> list[list[list[TokenScore]]]:
        # 1. prompts, each with its first answer behind it
        prompt_tables, prompt_states = self._prefill(batch)
        # 2. the other answers, behind copies of the prompts
        copied_tables, answer_states = self._extend(batch, prompt_tables)
        for i, states in enumerate(prompt_states):
            answer_states[i, 0] = states[1:]
        # 3. the product with the head, for the states that predict answer tokens
        predicting: list[Tensor] = []  # together (A, D)
        targets: list[int] = []  # (A,)
        for i, request in enumerate(batch):
            for number, answer in enumerate(request.answers):
                if answer:
                    predicting.append(prompt_states[i][:1])  # predicts the first token
                if len(answer) > 1:
                    predicting.append(answer_states[i, number])  # predict the others
                targets += answer
        scores: list[TokenScore] = []
        if targets:
            scores = self._score(torch.cat(predicting), targets)
        for pages in (*prompt_tables, *copied_tables):
            self.cache.give_back(pages)
        return by_answer(scores, batch)

    def _prefill(self, batch: Sequence[ScoringRequest]) -> tuple[list[list[int]], list[Tensor]]:
        """Compute every prompt with its first answer behind it.

        Returns by request the block table, and the hidden states (n, D) of the prompt's last token
        and of the answer's tokens but its last.
        """
        token_rows = [[*request.prompt, *request.answers[0][:-1]] for request in batch]
        tables = self._take_pages([len(tokens) for tokens in token_rows])
        rows = []
        for request, tokens, pages in zip(batch, token_rows, tables, strict=True):
            context = shared_tokens(self.prefix, request.prompt)
            self._copy_pages(self.prefix_pages, pages, context)
            last_of_prompt = len(request.prompt) - 1 - context  # index among the new tokens
            rows.append(CachedRow(tokens[context:], context, pages, last_of_prompt))
        return tables, self._forward(rows)

    def _extend(
        self, batch: Sequence[ScoringRequest], prompt_tables: Sequence[list[int]]
    ) -> tuple[list[list[int]], dict[tuple[int, int], Tensor]]:
        """Compute the other answers of every prompt, behind copies of the prompt's pages.

        Returns their block tables, and by (request, answer number) the hidden states (n, D) of the
        answer's tokens but its last. An answer of one token needs none.
        """
        keys: list[tuple[int, int]] = []  # (request, answer number)
        token_rows: list[list[int]] = []
        lengths: list[int] = []  # of the prompt and the new tokens
        for i, request in enumerate(batch):
            for number, answer in enumerate(request.answers):
                if number > 0 and len(answer) > 1:
                    tokens = answer[:-1]
                    keys.append((i, number))
                    token_rows.append(tokens)
                    lengths.append(len(request.prompt) + len(tokens))
        if not keys:
            return [], {}
        tables = self._take_pages(lengths)
        rows = []
        for (i, _), tokens, pages in zip(keys, token_rows, tables, strict=True):
            context = len(batch[i].prompt)
            self._copy_pages(prompt_tables[i], pages, context)
            rows.append(CachedRow(tokens, context, pages, first=0))
        states = self._forward(rows)
        return tables, dict(zip(keys, states, strict=True))

    def _take_pages(self, lengths: Sequence[int]) -> list[list[int]]:
        """Block tables for rows of these lengths, in tokens. The cache grows once for all."""
        counts = [self.cache.pages_for(length) for length in lengths]
        in_use = self.cache.pages - len(self.cache.free)
        self.cache.grow(in_use + sum(counts))
        return [self.cache.take(count) for count in counts]

    def _copy_pages(self, source: Sequence[int], target: Sequence[int], tokens: int) -> None:
        """Copy the pages with the first `tokens` tokens of one block table to another's."""
        count = self.cache.pages_for(tokens)
        self.cache.copy(source[:count], target[:count])

    def _forward(self, rows: Sequence[CachedRow]) -> list[Tensor]:
        """By row, the hidden states (n, D) of its new tokens from `first` on.

        The keys and values of all new tokens are in the cache afterwards.
        """
        model = self.model
        tokens: list[int] = []  # (T,)
        logits_indices: list[int] = []  # of the tokens whose states are returned
        counts: list[int] = []  # by row: number of these tokens
        for row in rows:
            start = len(tokens)
            tokens += row.tokens
            logits_indices += range(start + row.first, len(tokens))
            counts.append(len(row.tokens) - row.first)
        lengths = [len(row.tokens) for row in rows]
        contexts = [row.context for row in rows]
        tables = [row.pages for row in rows]
        cached = Cached.build(lengths, contexts, tables, self.page_size, model.device, decode=False)
        hidden = model.forward(
            torch.tensor(tokens, device=model.device),
            cached,
            lora=self.lora,
            cache=self.cache,
            logits_indices=torch.tensor(logits_indices, device=model.device),
        )
        return list(hidden.split(counts))

    def _score(self, hidden: Tensor, targets: Sequence[int]) -> list[TokenScore]:
        """The scores of A targets at hidden states (A, D), HEAD_ROWS rows of logits at a time."""
        nats: list[float] = []
        greedy: list[bool] = []
        target_ids = torch.tensor(targets, device=hidden.device)[:, None]  # (A, 1)
        chunks = zip(hidden.split(HEAD_ROWS), target_ids.split(HEAD_ROWS), strict=True)
        for states, ids in chunks:  # (C, D), (C, 1)
            logits = self.model.head(states)  # (C, V)
            logprobs = torch.log_softmax(logits.to(accumulate_dtype(logits.dtype)), dim=-1)
            target_logprobs = logprobs.gather(1, ids)[:, 0]  # (C,)
            nats += target_logprobs.neg().double().tolist()
            is_greedy = logits.argmax(-1) == ids[:, 0]  # (C,)
            greedy += is_greedy.tolist()
        return [TokenScore(n, g) for n, g in zip(nats, greedy, strict=True)]
