"""Packing: examples become micro-batches, their tokens laid end to end without padding

    batches = pack([len(e.ids) for e in examples], micro_tokens)        # lists of indices
    batch = MicroBatch.build([examples[i] for i in batches[0]], step, device)

A forward and backward takes one micro-batch; `batch.packed` says which token belongs to which row.
"""

# T = tokens of a micro-batch, N = response tokens of a micro-batch

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data.encode import Example
from kernels.packed import Packed, upload
from kernels.philox import MASK32, mix

MIN_SHARED = 8  # a shorter common beginning of the prompts is computed in every row


def pack(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Micro-batches of at most micro_tokens tokens, as indices into `lengths`.

    First fit, longest first, equal lengths in their order: the same input gives the same batches.
    No example is split; one longer than micro_tokens is a batch of its own. The first batch holds
    the longest example, so a shortage of memory shows at once. Indices inside a batch ascend.
    """
    if micro_tokens < 1:
        raise ValueError(f"micro_tokens={micro_tokens}; expected at least 1")
    batches: list[list[int]] = []
    free = _FreeTokens()
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for index in longest_first:
        number = free.first_with(lengths[index])
        if number is None:
            number = len(batches)
            batches.append([])
            free.add(micro_tokens)
        batches[number].append(index)
        free.take(number, lengths[index])
    return [sorted(batch) for batch in batches]


class _FreeTokens:
    """The tokens that each batch can still take; the first with room is found in log(batches).

    A binary tree in one list: node i has the children 2 i and 2 i + 1, and holds the most of any
    batch below it. The batches are the leaves, from node `_leaves` on; NO_BATCH where there is none
    yet.
    """

    NO_BATCH = -1

    def __init__(self) -> None:
        self._count = 0  # batches
        self._leaves = 1
        self._most = [self.NO_BATCH, self.NO_BATCH]

    def add(self, free: int) -> None:
        """Add a batch."""
        if self._count == self._leaves:
            self._double()
        self._set(self._count, free)
        self._count += 1

    def take(self, number: int, tokens: int) -> None:
        """A batch can take so many tokens less; below 0 for an example that is longer than it."""
        free = self._most[self._leaves + number]
        self._set(number, free - tokens)

    def first_with(self, length: int) -> int | None:
        """The first batch that can still take `length` tokens."""
        if self._most[1] < length:
            return None
        node = 1
        while node < self._leaves:
            node = 2 * node
            if self._most[node] < length:
                node += 1
        return node - self._leaves

    def _set(self, number: int, free: int) -> None:
        node = self._leaves + number
        self._most[node] = free
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])

    def _double(self) -> None:
        """Make room for twice as many batches."""
        free = self._most[self._leaves :]
        self._leaves *= 2
        self._most = [self.NO_BATCH] * (2 * self._leaves)
        for number, of_batch in enumerate(free):
            self._set(number, of_batch)


def shared_prompt_prefix(examples: Sequence[Example]) -> int:
    """Number of leading tokens that all prompts share, 0 if fewer than MIN_SHARED.

    The last prompt token is never shared: it predicts the first token of the response.
    """
    if len(examples) < 2:
        return 0
    prompts = [example.ids[: example.n_prompt - 1] for example in examples]
    length = 0
    for tokens_at_length in zip(*prompts, strict=False):  # ends with the shortest prompt
        is_shared = len(set(tokens_at_length)) == 1
        if not is_shared:
            break
        length += 1
    if length < MIN_SHARED:
        return 0
    return length


@dataclass
class MicroBatch:
    """Packed examples, and the positions that carry loss."""

    tokens: Tensor  # (T,)
    packed: Packed
    select: Tensor  # (N,) positions whose next token is a response token
    targets: Tensor  # (N,) that next token
    owners: list[str]  # (N,) example id of each, to name a row that went wrong

    @classmethod
    def build(
        cls, examples: Sequence[Example], step: int, device: torch.device, share: bool = False
    ) -> MicroBatch:
        """Lay the examples end to end; the last token of each is only ever a target.

        With `share` the tokens that all prompts begin with (a system message, a template) are
        stored once, in the first row (`shared_prompt_prefix`). `step` numbers the dropout masks.
        """
        prefix = shared_prompt_prefix(examples) if share else 0
        tokens: list[int] = []
        select: list[int] = []
        targets: list[int] = []
        owners: list[str] = []
        row_lengths: list[int] = []
        for number, example in enumerate(examples):
            skipped = 0 if number == 0 else prefix  # tokens that the first row holds already
            row_start = len(tokens) - skipped  # index that this example's token 0 has, or would
            tokens += example.ids[skipped:-1]
            row_lengths.append(len(example.ids) - 1 - skipped)
            for position in range(example.n_prompt, len(example.ids)):
                select.append(row_start + position - 1)
                targets.append(example.ids[position])
                owners.append(example.id)
        row_keys = [mix("row", example.id) & MASK32 for example in examples]
        return cls(
            tokens=upload(tokens, torch.int64, device),
            packed=Packed.from_lengths(row_lengths, device, row_keys, step, prefix),
            select=upload(select, torch.int64, device),
            targets=upload(targets, torch.int64, device),
            owners=owners,
        )

    @classmethod
    def idle(cls, step: int, device: torch.device) -> MicroBatch:
        """One token without loss, for a rank that has no rows left.

        Under sharded weights every rank must take part in every gathering of a layer.
        """
        token = torch.zeros(1, dtype=torch.int64, device=device)
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(
            tokens=token,
            packed=Packed.from_lengths([1], device, [0], step),
            select=nothing,
            targets=nothing,
            owners=[],
        )
