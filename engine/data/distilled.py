"""Distilled data: one JSON line per assistant turn, with its reference and the seed model's
rewrite. engine/data/README.md has an example of a line.

Written by engine/distill; read here with every rule of the format checked, so that what is trained
on is what was written.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.data.conversation import check_turns
from engine.data.data_file import DataFile, lines
from engine.data.disk_tables import SeenIds
from engine.data.fields import kind, message
from engine.data.json_records import json_lines
from engine.data.rows import FirstFaults, Rows
from engine.data.sources import Place
from engine.data.thinking import thinks
from model.messages import ROLES, calls_of, check_messages

KEPT = ("accepted", "identical")  # the statuses whose target is the response, not the reference
CONTEXT = "context_only"  # the status of a turn that its row marks as not to be trained on
NOT_ASKED = "not_asked"  # the status of a turn that the published code does not rewrite
FINISHES = ("stop", "length", "stop_string", "prompt_too_long")  # the sampler's
MESSAGE_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "tools"}
OPTIONAL = ("tries", "answer")  # fields that a line may lack
TARGETS = ("target", "response", "reference")  # the answers that a line offers to training


@dataclass(frozen=True)
class Distilled:
    """One line of distilled data: an assistant turn, its reference, the seed model's response."""

    id: str  # "row/turn"; turn counts the assistant's turns from 0
    messages: list[dict[str, Any]]  # the context, earlier answers already replaced by targets
    reference: str
    response: str
    response_ids: list[int]  # as sampled, without the end token
    target: str  # the response where `status` is in KEPT, else the reference
    status: str  # one of KEPT, or why the response was rejected
    stage: str  # stage of the cascade that wrote the target; "reference" where none did
    finish: str  # one of FINISHES
    prompt_tokens: int  # of the prompt that was sampled from
    response_tokens: int  # == len(response_ids)
    tries: dict[str, list[str]] = field(default_factory=dict)  # stage -> status of each attempt
    # the reference as a message, where it calls tools (`reference` is then the text that the chat
    # template writes); {} and absent from the line where it is text alone
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def is_rejected(self) -> bool:
        """Whether every rewrite of the turn was rejected, so that its target is the reference.

        A turn for which no rewrite was asked is not.
        """
        return self.status not in (*KEPT, CONTEXT, NOT_ASKED)


def is_distilled(path: str | Path | DataFile) -> bool:
    """Whether the file's first line has the field names of a distilled one.

    A file that is open already stays open, and is still read from its beginning.
    """
    if not isinstance(path, DataFile):
        with DataFile(path) as file:
            return is_distilled(file)
    if not path.head().lstrip().startswith("{") or path.suffix == ".csv":
        return False
    line = path.first_line()
    return '"response_ids"' in line and '"target"' in line and '"status"' in line


def load_distilled(path: str | Path | DataFile, limit: int | None = None) -> Rows:
    """The lines of a distilled file as Distilled; ValueError names those that break its rules.

    The result's `sha256` is that of the whole file. limit: stop after so many lines; the rest is
    not checked. A torn last line breaks the rules: `distill.py --resume` completes a killed run.
    """
    stream = DistilledStream(DataFile.of(path), limit)
    loaded = list(stream)
    return Rows(loaded, stream.file.path, stream.sha256)


class DistilledStream:
    """The lines of an open distilled file, one after the other: none is kept in memory.

    To be iterated once. ValueError, as `load_distilled` raises it, at the end of the file. From
    then on `count` is the number of lines and `sha256` the hash of the whole file.
    """

    def __init__(self, file: DataFile, limit: int | None = None) -> None:
        self.file = file
        self.limit = limit
        self.count = 0
        self.sha256 = ""

    def __iter__(self) -> Iterator[Distilled]:
        bad = FirstFaults()
        with self.file as file, contextlib.closing(SeenIds()) as seen:
            for number, record in json_lines(lines(file)):
                try:
                    line = _distilled(record)
                    taken_by = seen.place_of(line.id)
                    if taken_by is not None:
                        raise ValueError(f"id {line.id!r} is taken by line {taken_by.line}")
                except ValueError as error:
                    bad.add(f"{file.path}:{number}: {error}")
                    continue
                seen.add(line.id, Place(file.path, number))
                self.count += 1
                yield line
                if self.count == self.limit:
                    break
            self.sha256 = file.sha256()
        if bad.count:
            fault = f"{file.path}: {bad.count} lines are no distilled data"
            raise ValueError(bad.listing(fault, "a killed run is completed by distill.py --resume"))
        if not self.count:
            raise ValueError(
                f"{file.path} holds no line; expected distilled data (scripts/distill.py)"
            )


def check_without_thoughts(line: Distilled, path: Path) -> None:
    """ValueError where an answer in a line of `path` has thoughts, which cannot be removed now."""
    answers = [line.reference, line.target]
    for entry in line.messages:
        if entry["role"] == "assistant":
            answers.append(entry["content"])
    if any(thinks(answer) for answer in answers):
        raise ValueError(
            f"{path}: {line.id} has thoughts, and its rewrites were made with them; "
            "--thinking strip must be given to scripts/distill.py already"
        )


def _distilled(record: object) -> Distilled:
    """A parsed line as Distilled; ValueError with the first rule that it breaks."""
    if isinstance(record, ValueError):
        raise record
    _check_fields(record)
    line = Distilled(**record)
    _check_context(line)
    for token in line.response_ids:
        if type(token) is not int or token < 0:
            raise ValueError("'response_ids' holds something else than token ids")
    if line.prompt_tokens < 0 or line.response_tokens != len(line.response_ids):
        raise ValueError(
            f"prompt_tokens={line.prompt_tokens}, response_tokens={line.response_tokens} "
            f"do not fit {len(line.response_ids)} response_ids"
        )
    if not line.status or line.finish not in FINISHES:
        raise ValueError(
            f"status={line.status!r}, finish={line.finish!r}; expected a status, and a finish "
            f"among {', '.join(FINISHES)}"
        )
    message("assistant", line.reference, "reference")
    for stage, statuses in line.tries.items():
        is_list = isinstance(statuses, list)
        if not is_list or not all(isinstance(status, str) for status in statuses):
            raise ValueError(f"'tries' of {stage!r}: expected a list of statuses")
    _check_target(line)
    return line


def _check_fields(record: object) -> None:
    """ValueError for other field names than Distilled's, of which OPTIONAL may be absent, and for
    a value of another type."""
    names = [field.name for field in fields(Distilled)]
    if not isinstance(record, dict) or record.keys() | set(OPTIONAL) != set(names):
        got = ", ".join(record) if isinstance(record, dict) else kind(record)
        raise ValueError(f"expected the fields {', '.join(names)}; got {got}")
    types = dict.fromkeys(names, str) | {
        "messages": list,
        "response_ids": list,
        "prompt_tokens": int,
        "response_tokens": int,
        "tries": dict,
        "answer": dict,
    }
    for name, value in record.items():
        if type(value) is not types[name]:  # not isinstance, for which a bool is an int
            raise ValueError(f"{name!r} is {kind(value)}, expected {types[name].__name__}")


def _check_context(line: Distilled) -> None:
    """ValueError for messages that are no context of a turn, or an id that does not count the
    assistant's among them."""
    for number, entry in enumerate(line.messages, 1):
        if not isinstance(entry, dict) or not {"role", "content"} <= entry.keys() <= MESSAGE_KEYS:
            raise ValueError(f"message {number}: expected an object of role and content")
        if entry["role"] not in ROLES:
            raise ValueError(f"message {number}: unknown role {entry['role']!r}")
        may_be_empty = entry["role"] == "tool" or bool(calls_of(entry))
        message(entry["role"], entry["content"], f"message {number}", may_be_empty)
    check_turns(line.messages, last=("user", "tool"))
    check_messages(line.messages)
    if line.answer:
        check_messages([line.answer])
        if line.answer["role"] != "assistant" or not calls_of(line.answer):
            raise ValueError("'answer' is not the assistant's message with its tool calls")
    earlier = sum(entry["role"] == "assistant" for entry in line.messages)
    if not re.fullmatch(rf".+/{earlier}", line.id, re.DOTALL):
        raise ValueError(f"id {line.id!r}; expected 'row/{earlier}', as many turns come before it")


def _check_target(line: Distilled) -> None:
    """ValueError unless the target is the response, for a status in KEPT, or the reference."""
    kept = line.status in KEPT
    if kept and not line.response_ids:
        raise ValueError(f"status {line.status!r}, but 'response_ids' is empty")
    source = "response" if kept else "reference"
    if line.target != getattr(line, source):
        raise ValueError(f"status {line.status!r}, but 'target' is not the {source}")
