"""What a task is: items to answer and a rule that judges an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.rows import load_rows

Message = dict[str, str]


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str
    messages: tuple[Message, ...]  # the last is the user's
    reference: str = ""
    record: dict[str, Any] = field(default_factory=dict)  # what else its scorer needs


# (the item, the answer) -> right or wrong by each scorer, and why where that is worth a word
Judge = Callable[[Item, str], tuple[dict[str, bool], str]]


@dataclass(frozen=True)
class Task:
    """A benchmark. `load(file, paper)` gives its items; `file` is None for those of our own."""

    name: str
    scorers: tuple[str, ...]  # names that `judge` gives; "paper" is the published rule
    load: Callable[[Path | None, bool], tuple[list[Item], str]]  # items, and the data's hash
    judge: Judge
    file: str | None = None  # its name in --tasks-dir; None: it brings its items itself
    export: Callable[..., Path] | None = None  # writes an arm's answers for another program
    paper_format: str = "alpaca"  # chat format of the paper's evaluation (paper.md 1.2)
    paper_judge: Judge | None = None  # where the paper's prompt also needs another reading
    paper_greedy: bool = False
    paper_stop: tuple[str, ...] = ()  # texts that end an answer there


def rows_of(
    file: Path | None, *, columns: dict[str, str] | None = None, answers: bool = True
) -> tuple[list[Item], str]:
    """The rows of a data file as items; ValueError as `load_rows` says it."""
    assert file is not None, "a task with a file was given none"
    rows = load_rows(file, columns=columns, need_reference=answers, skip_bad=None)
    items = [
        Item(row.id, row.messages[:-1], row.reference) if answers else Item(row.id, row.messages)
        for row in rows
    ]
    return items, rows.sha256


def with_system(items: Sequence[Item], system: str) -> list[Item]:
    """Items told `system` first."""
    told = {"role": "system", "content": system}
    return [Item(i.id, (told, *i.messages), i.reference, i.record) for i in items]
