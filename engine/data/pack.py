"""Examples are packed into micro-batches: tokens end to end, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
import torch
from torch import Tensor

from engine.data.encode import Example
from kernels.packed import Packed, upload
from kernels.philox import MASK32, mix


def pack(examples: Sequence[Example] | Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Micro-batches of at most micro_tokens tokens, as indices into `examples` (or lengths).

    First fit, longest first, equals in their order: the same input gives the same batches. No
    example is split; one longer than micro_tokens goes alone. The first batch holds the longest
    example, so what does not fit the memory shows at once. Indices inside a batch ascend.
    """
    if micro_tokens < 1:
        raise ValueError(f"micro_tokens={micro_tokens}; wanted at least 1")
    lengths = [x if isinstance(x, int) else len(x.ids) for x in examples]
    batches: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (b for b, room in enumerate(rooms) if lengths[index] <= room)
        batch = next(fits, len(batches))
        if batch == len(batches):
            batches.append([])
            rooms.append(micro_tokens)
        batches[batch].append(index)
        rooms[batch] -= lengths[index]
    return [sorted(batch) for batch in batches]


SHARED = 8  # tokens from which on a common prefix is computed once


@dataclass
class MicroBatch:
    """Packed examples and where their loss is."""

    tokens: Tensor  # (T,)
    packed: Packed
    select: Tensor  # (N,) positions whose next token is a response token
    targets: Tensor  # (N,) that token
    owners: list[str]  # (N,) example id of each, to name a row that went wrong

    @classmethod
    def build(
        cls, examples: Sequence[Example], step: int, device: torch.device, share: bool = False
    ) -> MicroBatch:
        """Lay the examples end to end; their last tokens are targets only.

        With `share` the tokens that all prompts begin with (a system message, a template) stand
        there once, in the first example.
        """
        prefix = common_prefix(examples) if share else 0
        tokens, select, targets, owners = [], [], [], []
        for i, example in enumerate(examples):
            known = prefix * (i > 0)
            start = len(tokens) - known
            tokens += example.ids[known:-1]
            for at in range(example.n_prompt, len(example.ids)):
                select.append(start + at - 1)
                targets.append(example.ids[at])
                owners.append(example.id)
        lengths = [len(e.ids) - 1 - prefix * (i > 0) for i, e in enumerate(examples)]
        keys = [mix("row", e.id) & MASK32 for e in examples]
        packed = Packed.from_lengths(lengths, device, keys, step, prefix)
        ids, places, wanted = (upload(v, torch.int64, device) for v in (tokens, select, targets))
        return cls(ids, packed, places, wanted, owners)

    @classmethod
    def idle(cls, step: int, device: torch.device) -> MicroBatch:
        """A token without loss: a process takes part in what the others gather, and weighs zero."""
        tokens, nothing = (torch.zeros(n, dtype=torch.int64, device=device) for n in (1, 0))
        return cls(tokens, Packed.from_lengths([1], device, [0], step), nothing, nothing, [])


def common_prefix(examples: Sequence[Example]) -> int:
    """Tokens that all prompts begin with, 0 where they are too few to matter.

    Every prompt keeps a token of its own: the last one predicts the first of the response.
    """
    first, last = (f(e.ids[: e.n_prompt - 1] for e in examples) for f in (min, max))
    pairs = zip(first, last, strict=False)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))
    return common if common >= SHARED and len(examples) > 1 else 0
