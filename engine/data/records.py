"""Records: a data file in one pass, as JSON values or CSV rows

    with DataFile(path) as file:
        for line, record in records(file): ...      # a ValueError stands for an unreadable record

The file's beginning tells its format. A JSON file that holds its rows in another form (under a key,
with commas between the lines) is refused with the command that turns it into JSONL.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.data.csv_records import csv_records
from engine.data.data_file import DataFile, lines
from engine.data.json_records import JSON_SPACE, json_array, json_lines, json_objects

PARTS_OF_A_ROW = ("messages", "conversations", "tools", "functions")  # lists of objects too
_COLON = re.compile(r"\s*:\s*")
_COMMA = re.compile(r"\s*,\s*")
_LIST_OF_OBJECTS = re.compile(r"\[\s*\{")
_OBJECT_OVER_LINES = re.compile(r'\{\s*\n\s*"')


def records(file: DataFile) -> Iterator[tuple[int, object]]:
    """(line on which it begins, record); a ValueError in place of a record that is unreadable.

    Raises ValueError, naming file, line and reason, where nothing can be read past a fault.
    """
    head = file.head()
    begin = JSON_SPACE.match(head).end()
    head = head[begin:]
    if file.suffix == ".csv":
        return csv_records(file)
    if head.startswith("["):
        return json_array(file)
    if head.startswith("{") and not _is_json(head.partition("\n")[0]):
        fault = _why_not_jsonl(file.path, head)
        if fault is not None:
            raise ValueError(f"{file.path} {fault}")
        if _OBJECT_OVER_LINES.match(head):
            return json_objects(file)
    if head.startswith("{") or file.suffix in (".json", ".jsonl", ".ndjson"):
        return json_lines(lines(file))
    raise ValueError(
        f"{file.path} begins with {head[:1]!r}; expected a JSON array, JSONL or a .csv file"
    )


# ---- JSON in another form, and the command that makes JSONL of it


def _why_not_jsonl(path: Path, head: str) -> str | None:
    """Why a file whose first line begins with "{" and is not a JSON value cannot be read.

    None where its beginning shows no form that is known and not supported.
    """
    lines_of_head = [line.strip() for line in head.split("\n")]
    first = lines_of_head[0]
    second = ""  # the next line that is not blank
    for line in lines_of_head[1:]:
        if line:
            second = line
            break
    first_is_an_object = first.endswith(",") and _is_json(first[:-1])
    if first_is_an_object and (second.endswith(",") or not second):
        return (
            "has a comma after every line; expected one JSON object a line, and nothing else: "
            f"sed 's/,[[:space:]]*$//' {shlex.quote(str(path))} > rows.jsonl"
        )
    key = _key_of_rows(head)
    if key:
        return f"is one JSON object with its rows under {key!r}; {_unwrap_command(path, key)}"
    return None


def _is_json(text: str) -> bool:
    """Whether a text is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _key_of_rows(head: str) -> str:
    """The first key of the object whose value is a list of objects; "" if `head` shows none."""
    decoder = json.JSONDecoder()
    at = 1  # past "{"
    try:
        while True:
            begin = JSON_SPACE.match(head, at).end()
            key, at = decoder.raw_decode(head, begin)
            at = _COLON.match(head, at).end()
            if _LIST_OF_OBJECTS.match(head, at):
                return "" if key in PARTS_OF_A_ROW else key
            _, at = decoder.raw_decode(head, at)
            at = _COMMA.match(head, at).end()
    except (ValueError, RecursionError, AttributeError):  # the beginning ends, or is broken
        return ""


def advice_for_wrapped_rows(path: Path, record: dict[str, Any]) -> str:
    """The end of a message about a record that is no row but holds rows under a key; "" if not."""
    for key, value in record.items():
        if not isinstance(value, list) or not value:
            continue
        are_objects = all(isinstance(row, dict) for row in value)
        if not are_objects:
            continue
        are_messages = "role" in value[0] or "from" in value[0]
        if not are_messages:
            command = _unwrap_command(path, key)
            return f"; it holds a list of objects under {key!r}: if those are the rows, {command}"
    return ""


def _unwrap_command(path: Path, key: str) -> str:
    """The command that writes the rows under `key` one a line."""
    program = (
        f"import json; [print(json.dumps(row)) for row in json.load(open({str(path)!r}, "
        f"encoding='utf-8'))[{key!r}]]"
    )
    return f"write them one a line: python -c {shlex.quote(program)} > rows.jsonl"
