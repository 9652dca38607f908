"""Distilled data: one JSON line per assistant turn, with its reference and the seed model's
rewrite."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from engine.data.conversation import check_turns
from engine.data.data_file import DataFile, lines
from engine.data.fields import kind, message
from engine.data.json_records import json_lines
from engine.data.rows import Rows, listing

if TYPE_CHECKING:
    pass

KEPT = ("accepted", "identical")  # the statuses whose target is the response, not the reference
CONTEXT = "context_only"  # the status of a turn that its row does not want to be trained on
FINISHES = ("stop", "length", "stop_string", "prompt_too_long")
TARGETS = ("target", "response", "reference")


# ---- distilled lines


@dataclass(frozen=True)
class Distilled:
    """One line of distilled data: an assistant turn, its reference, what the seed model wrote."""

    id: str  # "row/turn"; turn counts the assistant's turns from 0
    messages: list[dict[str, str]]  # the context, earlier answers already replaced by targets
    reference: str
    response: str
    response_ids: list[int]  # as sampled, without the end token
    target: str  # the response where `status` is in KEPT, else the reference
    status: str  # one of KEPT, or why the response was rejected
    stage: str  # of the cascade that wrote the target; "reference" where none did
    finish: str  # one of FINISHES
    prompt_tokens: int  # of the prompt that was sampled from
    response_tokens: int  # == len(response_ids)
    tries: dict[str, list[str]] = field(default_factory=dict)  # by stage, what became of each


def is_distilled(path: str | Path | DataFile) -> bool:
    """Whether the file's first line has the field names of a distilled one.

    A file that is open already stays so, and is still read from its beginning.
    """
    if not isinstance(path, DataFile):
        with DataFile(path) as file:
            return is_distilled(file)
    if not path.head().lstrip().startswith("{") or path.suffix == ".csv":
        return False
    first = path.first_line()
    return all(name in first for name in ('"response_ids"', '"target"', '"status"'))


def load_distilled(path: str | Path | DataFile, limit: int | None = None) -> Rows:
    """The lines of a distilled file as Distilled; ValueError names those that break its rules.

    limit: stop after so many; what follows is not looked at. A torn last line breaks the rules:
    `distill.py --resume` completes a killed run.
    """
    made, bad = [], []
    seen: dict[str, int] = {}
    with DataFile.of(path) as file:
        for number, record in json_lines(lines(file)):
            try:
                line = _distilled(record)
                if line.id in seen:
                    raise ValueError(f"id {line.id!r} is taken by line {seen[line.id]}")
            except ValueError as error:
                bad.append(f"{file.path}:{number}: {error}")
                continue
            seen[line.id] = number
            made.append(line)
            if len(made) == limit:
                break
        sha256 = file.sha256()
    if bad:
        what = f"{file.path}: {len(bad)} lines are no distilled data"
        raise ValueError(listing(what, bad, "a killed run is completed by distill.py --resume"))
    if not made:
        raise ValueError(f"{file.path} holds no line; wanted distilled data (scripts/distill.py)")
    return Rows(made, file.path, sha256)


def _distilled(record: object) -> Distilled:
    if isinstance(record, ValueError):
        raise record
    names = [field.name for field in fields(Distilled)]
    if not isinstance(record, dict) or record.keys() | {"tries"} != set(names):
        got = ", ".join(record) if isinstance(record, dict) else kind(record)
        raise ValueError(f"wanted the fields {', '.join(names)}; got {got}")
    kinds = {"messages": list, "response_ids": list, "prompt_tokens": int, "response_tokens": int}
    kinds["tries"] = dict
    for name, value in record.items():
        if type(value) is not kinds.get(name, str):  # `type`, since to isinstance a bool is an int
            raise ValueError(f"{name!r} is {kind(value)}, wanted {kinds.get(name, str).__name__}")
    line = Distilled(**record)
    _check_context(line)
    if not all(type(i) is int and i >= 0 for i in line.response_ids):
        raise ValueError("'response_ids' holds something else than token ids")
    if line.prompt_tokens < 0 or line.response_tokens != len(line.response_ids):
        raise ValueError(
            f"prompt_tokens={line.prompt_tokens}, response_tokens={line.response_tokens} "
            f"do not fit {len(line.response_ids)} response_ids"
        )
    if not line.status or line.finish not in FINISHES:
        raise ValueError(
            f"status={line.status!r}, finish={line.finish!r}; wanted a status, and a finish "
            f"among {', '.join(FINISHES)}"
        )
    message("assistant", line.reference, "reference")
    for stage, statuses in line.tries.items():
        if not isinstance(statuses, list) or not all(isinstance(s, str) for s in statuses):
            raise ValueError(f"'tries' of {stage!r}: wanted a list of statuses")
    kept = line.status in KEPT
    if kept and not line.response_ids:
        raise ValueError(f"status {line.status!r}, but 'response_ids' is empty")
    if line.target != (line.response if kept else line.reference):
        source = "response" if kept else "reference"
        raise ValueError(f"status {line.status!r}, but 'target' is not the {source}")
    return line


def _check_context(line: Distilled) -> None:
    for i, said in enumerate(line.messages, 1):
        if not isinstance(said, dict) or said.keys() != {"role", "content"}:
            raise ValueError(f"message {i}: wanted an object of role and content")
        if said["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"message {i}: unknown role {said['role']!r}")
        message(said["role"], said["content"], f"message {i}")
    check_turns(line.messages, last="user")
    earlier = sum(said["role"] == "assistant" for said in line.messages)
    if not re.fullmatch(rf".+/{earlier}", line.id, re.DOTALL):
        raise ValueError(f"id {line.id!r}; wanted 'row/{earlier}', as many turns come before it")
