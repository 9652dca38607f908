"""The types of a task: its items, and the rule that judges an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.rows import Row, load_rows

Message = dict[str, str]  # role, content


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str
    messages: tuple[Message, ...]  # the last is the user's
    reference: str = ""
    record: dict[str, Any] = field(default_factory=dict)  # further fields for its scorer

    def row_with_reference(self) -> Row:
        """The item as a row of data whose last message is the reference, as verifiers take it."""
        answer = {"role": "assistant", "content": self.reference}
        return Row(self.id, (*self.messages, answer))


# scorer -> right or wrong, and the reason (may be empty)
Verdict = tuple[dict[str, bool], str]
# judges an answer to an item
Judge = Callable[[Item, str], Verdict]


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    scorers: tuple[str, ...]  # names in the verdicts of `judge`; "paper" is the published rule
    # (file, whether to use the paper's prompts) -> items, and the sha256 of the data. The file is
    # None for a task that brings its items.
    load: Callable[[Path | None, bool], tuple[list[Item], str]]
    judge: Judge
    file: str | None = None  # its data's name in --tasks-dir; None: the task brings its items
    # writes an arm's answers for another program: (items, lines by item id, arm, directory) -> file
    export: Callable[[list[Item], dict[str, dict[str, Any]], str, Path], Path] | None = None
    max_new_tokens: int | None = None  # most new tokens of an answer, where the job allows more
    paper_format: str = "alpaca"  # chat format of the paper's evaluation scripts
    paper_judge: Judge | None = None  # judges answers to the paper's prompt; None: `judge`
    paper_greedy: bool = False  # one greedy answer in the paper, instead of sampled ones
    paper_stop: tuple[str, ...] = ()  # texts that end an answer in the paper's evaluation


def rows_of(
    file: Path | None, *, columns: dict[str, str] | None = None, answers: bool = True
) -> tuple[list[Item], str]:
    """The rows of a data file as items, and the file's sha256; ValueError as from `load_rows`.

    columns    {role: field of the file}, as `load_rows` takes them
    answers    whether the rows hold references
    """
    assert file is not None, "a task that needs a file was loaded without one"
    rows = load_rows(file, columns=columns, need_reference=answers, skip_bad=None)
    if answers:
        items = [Item(row.id, row.messages[:-1], row.reference) for row in rows]
    else:
        items = [Item(row.id, row.messages) for row in rows]
    return items, rows.sha256


def with_system(items: Sequence[Item], system: str) -> list[Item]:
    """The items with a system message before their other messages."""
    message = {"role": "system", "content": system}
    prefixed = []
    for item in items:
        messages = (message, *item.messages)
        prefixed.append(dataclasses.replace(item, messages=messages))
    return prefixed
