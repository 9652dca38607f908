"""The types of a task: items to answer, and a rule that judges an answer."""

from __future__ import annotations

import dataclasses
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
    record: dict[str, Any] = field(default_factory=dict)  # further fields for its scorer


# (item, answer) -> right or wrong by each scorer, and the reason (may be empty)
Judge = Callable[[Item, str], tuple[dict[str, bool], str]]


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    scorers: tuple[str, ...]  # names that `judge` gives; "paper" is the published rule
    # (file, paper) -> items, and the data's hash; the file is None for a task that brings its items
    load: Callable[[Path | None, bool], tuple[list[Item], str]]
    judge: Judge
    file: str | None = None  # its name in --tasks-dir; None: it brings its items itself
    export: Callable[..., Path] | None = None  # writes an arm's answers for another program
    paper_format: str = "alpaca"  # chat format of the paper's evaluation (paper.md 1.2)
    paper_judge: Judge | None = None  # judges answers to the paper's prompt; None: `judge`
    paper_greedy: bool = False  # one greedy answer in the paper, instead of sampled ones
    paper_stop: tuple[str, ...] = ()  # texts that end an answer in the paper's evaluation


def rows_of(
    file: Path | None, *, columns: dict[str, str] | None = None, answers: bool = True
) -> tuple[list[Item], str]:
    """The rows of a data file as items; ValueError as `load_rows` raises it."""
    assert file is not None, "a task with a file was given none"
    rows = load_rows(file, columns=columns, need_reference=answers, skip_bad=None)
    if answers:
        items = [Item(row.id, row.messages[:-1], row.reference) for row in rows]
    else:
        items = [Item(row.id, row.messages) for row in rows]
    return items, rows.sha256


def with_system(items: Sequence[Item], system: str) -> list[Item]:
    """The items with a system message before the others."""
    message = {"role": "system", "content": system}
    return [dataclasses.replace(item, messages=(message, *item.messages)) for item in items]
