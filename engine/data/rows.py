"""Rows: a data file becomes conversations

    file -> records (records.py) -> shape (record_shapes.py) -> messages (conversation.py) -> Row

A row is one conversation: an optional system message, then user and assistant in turns, the
assistant last. Nothing is dropped or guessed silently. A row that cannot be used stops the load
with its line, or is listed in `Rows.bad`. Fields of rows and of messages from which no text and no
id was made are named in `Rows.unused`. An unsupported field that would change what is trained on
makes its row unusable.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.data.conversation import context_only_turns, conversation_of
from engine.data.fields import SURROGATE, is_given, kind, message
from engine.data.record_shapes import check_columns, check_fields_are_supported, find_shape
from engine.data.records import DataFile, records


@dataclass(frozen=True)
class Row:
    """One conversation: messages of {"role", "content"}, the assistant's answer last.

    Rows loaded with need_reference=False end with the user's message instead.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    tests: str = ""  # a program's, for the verifier `code`
    context_only: frozenset[int] = frozenset()  # assistant turns, from 0, that carry no loss

    @property
    def reference(self) -> str:
        """The answer that ends the conversation."""
        if self.messages[-1]["role"] != "assistant":
            raise ValueError(f"row {self.id} has no reference: it was loaded as a prompt only")
        return self.messages[-1]["content"]

    @property
    def turns(self) -> list[int]:
        """Where in `messages` the assistant speaks."""
        return [i for i, said in enumerate(self.messages) if said["role"] == "assistant"]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: the line it starts on, why, and its number (from 1)."""

    line: int
    reason: str
    row: int
    sort: str = ""  # "syntax": it cannot be parsed; "id": its id is taken; "" for all else


class _Taken(ValueError):
    """An id that an earlier row has."""


class Rows(list):
    """The usable rows of the file `path`, whose bytes hash to `sha256` (with a system message
    that was added: both together).

    `bad` lists the unusable ones; `unused` names the fields that no row's text or id was made of
    (those of messages as "messages[].name"); `inputs` those beside `input` that were read as it.
    """

    def __init__(self, rows: list, path: Path, sha256: str, bad=(), unused=(), inputs=()):
        super().__init__(rows)
        self.path, self.sha256 = path, sha256
        self.bad: list[BadRow] = list(bad)
        self.unused: tuple[str, ...] = tuple(sorted(unused))
        self.inputs: tuple[str, ...] = tuple(sorted(inputs))

    def only(self, rows: list) -> Rows:
        """Some of these rows, of the same file."""
        return Rows(rows, self.path, self.sha256, self.bad, self.unused, self.inputs)


def load_rows(
    path: str | Path | DataFile,
    *,
    columns: dict[str, str] | None = None,
    skip_bad: bool | None = False,
    limit: int | None = None,
    need_reference: bool = True,
    system: str | None = None,
    check: Callable[[Row], None] | None = None,
) -> Rows:
    """Rows of a JSON array, JSONL or CSV file, gzipped or not.

    columns         {role: field} instead of finding each row's shape (see SHAPES); then only the
                    named fields make the text. `id` and `tests` can be named alone: each row's
                    shape is still found. An id of "" takes no field: ids are made of the texts
    skip_bad        return unusable rows in `.bad` instead of raising ValueError with all of them.
                    Broken syntax in a JSON array or a CSV always raises: what follows is guesswork;
                    so do most rows being unparsable, or having an id that is taken: the file is
                    something else than it was taken for, and good rows would be lost. None: as
                    False, where there is no flag to offer
    limit           stop after so many usable rows; what follows is not looked at
    need_reference  False: prompts only. An answer that is there is left out
    system          a system message for rows that have none; ids stay as they are, `.sha256` tells
    check           raises ValueError for a row that cannot be used, and says why

    A row's id is its `id` field (text or integer) where it has one, else a hash of its messages;
    the second and third copy of a row get `-2` and `-3`. So an id never depends on other rows,
    except on earlier copies of the same one. An id used twice makes the later row unusable.
    """
    if columns is not None:
        check_columns(columns, need_reference)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}; wanted at least 1, or None for every row")
    with DataFile.of(path) as file:
        reader = _Reader(file.path, columns, need_reference, system, check)
        for line, record in records(file):
            reader.read(line, record)
            if len(reader.rows) == limit:
                break
        sha256 = file.sha256()
    reader.stop_for_bad_rows(skip_bad)
    if system:
        sha256 = hashlib.sha256(f"{sha256} {system}".encode()).hexdigest()
    return Rows(reader.rows, file.path, sha256, reader.bad, reader.unused, reader.inputs)


class _Reader:
    """Makes rows of records, one after the other."""

    def __init__(
        self,
        path: Path,
        columns: dict[str, str] | None,
        need_reference: bool,
        system: str | None,
        check: Callable[[Row], None] | None,
    ) -> None:
        self.path, self.columns, self.need_reference = path, columns, need_reference
        self.system, self.check = system, check
        self.rows: list[Row] = []
        self.bad: list[BadRow] = []
        self.unused: set[str] = set()
        self.inputs: set[str] = set()
        self.looked = 0  # records
        self._lines: dict[str, int] = {}  # id -> the line of the row that has it
        self._copies: Counter[str] = Counter()

    def read(self, line: int, record: object) -> None:
        """A record more: to `rows`, or to `bad` with the reason."""
        self.looked += 1
        try:
            row = self._row(line, record)
        except ValueError as error:
            sort = ""
            if isinstance(record, ValueError):
                sort = "syntax"
            elif isinstance(error, _Taken):
                sort = "id"
            self.bad.append(BadRow(line, str(error), self.looked, sort))
        else:
            self.rows.append(row)

    def _row(self, line: int, record: object) -> Row:
        if isinstance(record, ValueError):
            raise record
        if not isinstance(record, dict):
            raise ValueError(f"the row is {kind(record)}, wanted an object")
        columns = self.columns or {}
        text_is_named = bool({"prompt", "messages"} & columns.keys())
        found = {} if text_is_named else find_shape(self.path, record, self.need_reference)
        shape = {**found, **columns}
        check_fields_are_supported(record, shape, found)
        spoken, extra = conversation_of(record, shape, self.need_reference)
        messages = tuple({"role": m["role"], "content": m["content"]} for m in spoken)
        silent = context_only_turns(spoken) if self.need_reference else frozenset()
        name = _row_id(record, shape.get("id", "id"), messages, self._copies)
        tests = _tests(record, shape)
        if name in self._lines:
            raise _Taken(f"id {name!r} is taken by line {self._lines[name]}")
        if self.system and messages[0]["role"] != "system":
            messages = (message("system", self.system, "--system"), *messages)
        row = Row(name, messages, tests, silent)
        if self.check is not None:
            self.check(row)
        self._lines[name] = line
        used = {*shape.values(), shape.get("id", "id")}
        if tests:
            used.add("tests")
        if found:
            used.add("input")  # one that is empty, beside a context
        self.unused |= {*(record.keys() - used), *extra}
        if found.get("input", "input") != "input" and is_given(record, shape, "input"):
            self.inputs.add(found["input"])
        return row

    def stop_for_bad_rows(self, skip_bad: bool | None) -> None:
        """ValueError for bad rows that are not to be skipped, or no good ones."""
        listed = [f"{self.path}:{b.line} (row {b.row}): {b.reason}" for b in self.bad]
        what = f"{self.path}: {len(self.bad)} unusable rows"
        sorts = Counter(bad.sort for bad in self.bad)
        for sort, why in _HOPELESS.items():
            if sorts[sort] > 1 and 2 * sorts[sort] > self.looked:
                what = f"{self.path}: {sorts[sort]} of {self.looked} rows {why[0]}"
                raise ValueError(listing(what, listed, why[1]))
        if self.bad and not skip_bad:
            repair = "repair them"
            if skip_bad is False:  # None: the script has no such flag
                repair += ", or leave them out with --skip-bad"
            rename = (
                "if the ids name sources and not rows, give --columns id= (with the roles that you "
                "named): ids are then made of the texts"
            )
            if not sorts["id"]:
                ways = [repair]
            elif sorts["id"] == len(self.bad):
                ways = [rename]
            else:
                ways = [rename, repair]
            raise ValueError(listing(what, listed, "; ".join(ways)))
        if not self.rows:
            first = f"; the first: {listed[0]}" if listed else ""
            raise ValueError(
                f"{self.path} holds no usable row ({len(self.bad)} unusable); wanted at least one"
                f"{first}"
            )


# what is said where most rows of a file fail alike, and what to do; --skip-bad is no way out there
_HOPELESS = {
    "syntax": (
        "cannot be parsed",
        "it is not what it was taken for (JSONL is one JSON object a line, a CSV has as many cells "
        "in every row as in its header); --skip-bad would lose the good rows too: repair it",
    ),
    "id": (
        "have an id that an earlier row has",
        "the ids name sources, not rows; --skip-bad would lose good rows: give --columns id= (with "
        "the roles that you named), and ids are made of the texts",
    ),
}


def listing(what: str, faults: list[str], way_out: str) -> str:
    """An error's text: what is wrong, what to do, the first ten faults and how many more."""
    more = [f"... and {len(faults) - 10} more"] if len(faults) > 10 else []
    return "\n  ".join([f"{what}; {way_out}:", *faults[:10], *more])


def _tests(record: dict, shape: dict[str, str]) -> str:
    """Source of the row's tests; a list (MBPP's) is one statement after the other. A `tests` field
    that holds something else is only a fault where --columns names it."""
    name = shape.get("tests", "tests")
    tests = record.get(name) or ""
    if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        tests = "\n".join(tests)
    if isinstance(tests, str):
        return tests
    if "tests" in shape:
        raise ValueError(f"{name!r} is {kind(tests)}, wanted text or a list of texts")
    return ""


def _row_id(record: dict, name: str, messages: tuple[dict, ...], copies: Counter[str]) -> str:
    given = record.get(name) if name else None
    if given is not None:
        if not isinstance(given, str | int) or isinstance(given, bool) or not str(given).strip():
            raise ValueError(f"{name!r} is {kind(given)}, wanted text or an integer")
        if SURROGATE.search(str(given)):
            raise ValueError(f"{name!r} holds half of a surrogate pair, which UTF-8 cannot write")
        return str(given)
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]
    copies[digest] += 1
    return digest if copies[digest] == 1 else f"{digest}-{copies[digest]}"
