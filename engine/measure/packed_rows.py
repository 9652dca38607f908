"""Many short rows in one forward: the hidden states that each alone would have, and their drift

Alone, a row of 60 tokens takes nearly twice as long per token as rows of 500 tokens together, and
each computes the system message of the chat template again. On a CPU rows are laid end to end, and
the tokens that all prompts of a group begin with are computed once (`Packed.prefix`).

The states are those of the row alone, bit for bit: whether the products of this machine allow that
is tried first (row_invariance.py), and where they do not, every row is a group of its own; so it is
on other devices. A prefix is shared by rows of up to ONE_BLOCK tokens only: a longer one is
computed in blocks of queries (kernels/attention/torch_form.py), which would begin at other tokens.
"""

# N = answer tokens of a row, D = hidden size

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from engine.data.pack import shared_prompt_prefix
from engine.measure.divergence import Drift, compare_all
from engine.measure.row_invariance import LEAST_TOKENS, rows_keep_their_bits
from engine.runtime.short_memory import attempt, tried_twice
from kernels.packed import Packed
from model.llama import Llama
from model.lora import Lora

GROUP_TOKENS = 512  # of a forward on a CPU; a longer row is a group of its own
ONE_BLOCK = 128  # longest rows that share a prefix


@dataclass(kw_only=True)
class AnsweredRow:
    """A prompt with an answer behind it."""

    ids: list[int]  # prompt and answer, the end token included where the answer ended
    n_prompt: int  # tokens of the prompt


@dataclass(kw_only=True)
class SeedRow(AnsweredRow):
    """The same, where the answer is compared with the seed model's distributions."""

    states: Tensor | None = None  # the seed's (N, D), in host memory, where they are kept


Row = TypeVar("Row", bound=AnsweredRow)


def groups(rows: Sequence[Row], model: Llama, loras: Iterable[Lora | None]) -> Iterator[list[Row]]:
    """Neighbouring rows whose states are computed together.

    loras    of the forwards that will be made; None stands for the seed model
    """
    most_tokens = 0
    if model.device.type == "cpu" and not model.is_sharded:
        trial = "trying the products of rows"
        if tried_twice(trial, model.device, rows_keep_their_bits, model, list(loras)):
            most_tokens = GROUP_TOKENS
    group: list[Row] = []
    total = 0
    for row in rows:
        is_short = len(row.ids) < LEAST_TOKENS or total < LEAST_TOKENS
        if group and (is_short or total + len(row.ids) > most_tokens):
            yield group
            group = []
            total = 0
        group.append(row)
        total += len(row.ids)
    if group:
        yield group


def states_of(model: Llama, rows: Sequence[AnsweredRow], lora: Lora | None) -> list[Tensor]:
    """By row, the hidden states (N, D) from which the tokens of its answer are predicted."""
    prefix = 0
    are_short = all(len(row.ids) <= ONE_BLOCK for row in rows)
    if are_short and model.device.type in model.ops.shares_prefix:
        shortest = min(len(row.ids) for row in rows)
        prefix = max(0, min(shared_prompt_prefix(rows), shortest - LEAST_TOKENS))
    tokens: list[int] = []
    lengths: list[int] = []
    places: list[slice] = []  # by row, of its states
    for row in rows:
        own = row.ids[prefix:] if tokens else row.ids  # the first row has the prefix
        tokens += own
        lengths.append(len(own))
        n_answer = len(row.ids) - row.n_prompt
        places.append(slice(len(tokens) - n_answer - 1, len(tokens) - 1))
    packed = Packed.from_lengths(lengths, model.device, prefix=prefix)
    hidden = model.forward(torch.tensor(tokens, device=model.device), packed, lora=lora)  # (T, D)
    return [hidden[place].clone() for place in places]


def states_in_memory(
    doing: str,
    model: Llama,
    rows: Sequence[AnsweredRow],
    lora: Lora | None,
    make_room: Callable[[], None] | None = None,
) -> list[Tensor]:
    """`states_of`, where memory is short at a second attempt, and then by halves.

    doing        names the work in a message
    make_room    frees more than what is cached, before the second attempt (`tried_twice`)

    torch.OutOfMemoryError where one row alone does not fit.
    """
    if len(rows) == 1:
        return tried_twice(doing, model.device, states_of, model, rows, lora, make_room=make_room)
    states, failure = attempt(model.device, states_of, model, rows, lora)
    if failure is None:
        return states
    print(f"\n{doing}: out of memory with {len(rows)} rows ({failure}); trying again")
    if make_room is not None:
        make_room()
    states, failure = attempt(model.device, states_of, model, rows, lora)
    if failure is None:
        return states
    print(f"\n{doing}: out of memory again; continuing with half of the rows at a time")
    middle = len(rows) // 2
    first = states_in_memory(doing, model, rows[:middle], lora, make_room)
    return first + states_in_memory(doing, model, rows[middle:], lora, make_room)


def drift_of_rows(
    doing: str,
    model: Llama,
    rows: Sequence[SeedRow],
    adapters: Mapping[str, Lora | None],
    keep: bool = True,
    make_room: Callable[[], None] | None = None,
) -> list[dict[str, Drift]]:
    """By row and arm, the drift from the seed over the row's answer; rows of one group.

    keep    store the seed's states with the rows, for the arms of later calls

    doing and make_room as in `states_in_memory`.
    """
    if any(row.states is None for row in rows):
        before = states_in_memory(doing, model, rows, None, make_room)
        if keep:
            for row, states in zip(rows, before, strict=True):
                row.states = states.cpu()
    else:
        before = [row.states.to(model.device) for row in rows]
    after = {}
    for arm, lora in adapters.items():
        after[arm] = states_in_memory(doing, model, rows, lora, make_room)
    drifts = []
    for place, row in enumerate(rows):
        tuned = [states[place] for states in after.values()]
        answer = row.ids[row.n_prompt :]
        of_row = tried_twice(
            doing,
            model.device,
            compare_all,
            model,
            before[place],
            tuned,
            answer,
            make_room=make_room,
        )
        drifts.append(dict(zip(adapters, of_row, strict=True)))
    return drifts
