"""The assistant turns to train on: of every turn its context, its answer, and how the answer ends

Rows have one answer per turn, the reference. A line of distilled data has two: the reference, and
the response that the seed model wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.data.distilled import CONTEXT, KEPT, TARGETS, Distilled
from engine.data.rows import Row
from engine.data.tool_calls import calls_as_text
from kernels import philox
from model.messages import calls_of


@dataclass(frozen=True)
class TrainedTurn:
    """One assistant turn with the answer that is trained on."""

    id: str
    messages: Sequence[dict[str, Any]]  # the context; the user's message or a tool's comes last
    text: str  # of the answer
    sampled_ids: list[int] | None = None  # of the answer as sampled; None: encode the text
    ends: bool = True  # trained to end with the end token
    end_added: bool = False  # the sampler's limit cut it, and it is trained to end there
    mixed: bool = False  # the reference of a kept rewrite, taken as `mix` asks
    calling: dict[str, Any] | None = None  # the reference as a message, where it calls tools

    @property
    def answer(self) -> dict[str, Any]:
        """The answer as the assistant's message."""
        return self.calling or {"role": "assistant", "content": self.text}


class References(Protocol):
    """The references of distilled lines: a dict, or a table on disk (disk_tables.py)."""

    def get(self, name: str, /) -> str | None:
        """The reference of the line with this id, None where there is no such line."""


def check_target(target: str, mix: float, are_plain: bool) -> None:
    """ValueError for a target that is not known, and for a mix that the rows cannot give.

    are_plain: whether they are plain rows, and not lines of distilled data.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}; expected one of {', '.join(TARGETS)}")
    can_mix = not mix or (target == "target" and not are_plain)
    if not 0 <= mix <= 1 or not can_mix:
        raise ValueError(
            f"mix={mix} with target={target!r}: expected a share from 0 to 1 of the rewrites in "
            "distilled data, with target='target'"
        )


def turns_to_train_on(
    row: Row | Distilled, target: str, mix: float, seed: int, references: References
) -> Iterator[TrainedTurn]:
    """The turns of a row, or the one of a line, but for those that are context only.

    target, mix and seed as in `encode` (encode.py). references: of every line, by its id.
    ValueError where a plain row is asked for a response, which it does not have.
    """
    if isinstance(row, Row):
        row.require_reference()
        if target == "response":
            raise ValueError(
                f"row {row.id} has no response, only its reference: target='response' needs "
                "distilled data (scripts/distill.py makes it)"
            )
        yield from _turns_of_row(row)
    elif row.status != CONTEXT:
        yield _turn_of_line(row, target, mix, seed, references)


def _turns_of_row(row: Row) -> Iterator[TrainedTurn]:
    """The assistant turns of a plain row, but for those that are context only."""
    for number, index in enumerate(row.turns):
        if number not in row.context_only:
            answer = row.messages[index]
            yield TrainedTurn(
                f"{row.id}/{number}",
                row.messages[:index],
                calls_as_text(answer),
                calling=answer if calls_of(answer) else None,
            )


def _turn_of_line(
    line: Distilled, target: str, mix: float, seed: int, references: References
) -> TrainedTurn:
    """The turn of a distilled line, with the answer that `target` and `mix` ask for.

    references: of every line, by its id.
    """
    kept = line.status in KEPT
    calling = line.answer or None
    if target == "reference":
        context = _with_references(line, references)
        return TrainedTurn(line.id, context, line.reference, calling=calling)
    if target == "target" and not kept:
        return TrainedTurn(line.id, line.messages, line.reference, calling=calling)
    if target == "target" and _uniform(line.id, seed) < mix:
        return TrainedTurn(line.id, line.messages, line.reference, mixed=True, calling=calling)
    cut = line.finish == "length" and line.status != "identical"
    end_added = cut and kept  # selection keeps cut rewrites under --paper-exact only
    return TrainedTurn(
        line.id,
        line.messages,
        line.response,
        sampled_ids=line.response_ids,
        ends=end_added or not cut,
        end_added=end_added,
        calling=calling,
    )


def _uniform(row_id: str, seed: int) -> float:
    """A number in [0, 1) that depends on the row and the seed alone."""
    return philox.mix("mix", seed, row_id) / 2**64


def _with_references(line: Distilled, references: References) -> list[dict[str, Any]]:
    """The line's context as the data file had it: earlier answers are references again.

    Those that call tools always are.
    """
    row = line.id.rpartition("/")[0]
    messages: list[dict[str, Any]] = []
    turn = 0
    for message in line.messages:
        if message["role"] == "assistant":
            earlier = f"{row}/{turn}"
            reference = references.get(earlier)
            if reference is None:
                raise ValueError(f"{line.id}: the line of its earlier turn {earlier} is absent")
            if not calls_of(message):
                message = {"role": "assistant", "content": reference}
            turn += 1
        messages.append(message)
    return messages
