"""Rows: a data file becomes conversations

    file       data_file.py        bytes -> text
    records    records.py          text -> JSON values or CSV rows (json_records.py, csv_records.py)
    shape      record_shapes.py    which field holds the prompt, the answer, the messages
    messages   conversation.py     the fields' texts as system, user and assistant messages
    Row        here                with an id, and the tests of a program

A row is one conversation: an optional system message, then user and assistant in turns, the
assistant last. Nothing is dropped or guessed silently:

* A row that cannot be used ends the load with an error that names its line, or, with skip_bad, is
  listed in `Rows.bad`.
* Fields of rows and of messages that contribute no text and no id are named in `Rows.unused`.
* An unsupported field that would change what is trained on makes its row unusable.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.conversation import context_only_turns, conversation_of
from engine.data.disk_tables import SeenIds
from engine.data.fields import SURROGATE, is_given, kind, message
from engine.data.record_shapes import (
    check_columns,
    check_fields_are_supported,
    find_shape,
    with_tools_field,
)
from engine.data.sources import Place, Source, open_source, source_records
from engine.data.thinking import MODES, check_thoughts, without_thoughts
from engine.data.tool_calls import calls_as_text
from model.messages import calls_of

SHOWN_FAULTS = 10  # in the message of an error


@dataclass(frozen=True)
class Row:
    """One conversation: messages (model/messages.py), the assistant's answer last.

    Rows loaded with need_reference=False end with the user's message or a tool's instead.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    tests: str = ""  # Python source that tests a program, for the verifier `code`
    context_only: frozenset[int] = frozenset()  # assistant turns, counted from 0, without a loss
    thinking: str = "keep"  # one of thinking.MODES

    @property
    def reference(self) -> str:
        """The answer that ends the conversation, its calls as text (`calls_as_text`).

        ValueError if only the prompt was loaded.
        """
        self.require_reference()
        return calls_as_text(self.messages[-1])

    def require_reference(self) -> None:
        """ValueError if only the prompt was loaded."""
        if self.messages[-1]["role"] != "assistant":
            raise ValueError(f"row {self.id} has no reference: it was loaded as a prompt only")

    @property
    def turns(self) -> list[int]:
        """The indices of the assistant's messages in `messages`."""
        return [i for i, turn in enumerate(self.messages) if turn["role"] == "assistant"]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    line: int  # of the file, counted from 1, on which the row begins
    reason: str
    row: int  # its number among all rows of the file, counted from 1
    fault: str = ""  # "syntax": it cannot be parsed; "id": an earlier row has its id; "": another
    file: str = ""  # its path, where the rows come from several


class _DuplicateId(ValueError):
    """An earlier row has this id."""


class Rows(list):
    """The usable rows of a file.

    path      the file
    sha256    hash of its bytes; with a system message that was added, of both together
    bad       the unusable rows
    unused    names of fields that contribute to no row's text or id; those of messages are written
              "messages[].name"
    inputs    names of fields other than `input` that were read as the prompt's input
    """

    def __init__(
        self,
        rows: list,
        path: Path,
        sha256: str,
        bad: Iterable[BadRow] = (),
        unused: Iterable[str] = (),
        inputs: Iterable[str] = (),
    ) -> None:
        super().__init__(rows)
        self.path = path
        self.sha256 = sha256
        self.bad: list[BadRow] = list(bad)
        self.unused: tuple[str, ...] = tuple(sorted(unused))
        self.inputs: tuple[str, ...] = tuple(sorted(inputs))

    def only(self, rows: list) -> Rows:
        """`rows`, some of these, as Rows of the same file."""
        return Rows(rows, self.path, self.sha256, self.bad, self.unused, self.inputs)


def load_rows(
    path: str | Path | Source,
    *,
    columns: dict[str, str] | None = None,
    skip_bad: bool | None = False,
    limit: int | None = None,
    need_reference: bool = True,
    system: str | None = None,
    thinking: str = "keep",
    check: Callable[[Row], None] | None = None,
) -> Rows:
    """Rows of a JSON array, JSONL or CSV file, gzipped or not; of a table, or a directory of files
    (sources.py).

    columns         {role: field}; without it the shape of each row is found (see SHAPES). Only the
                    named fields contribute text. `id` and `tests` can be named alone: the shape is
                    still found. An empty field name for `id` makes ids of the texts
    skip_bad        True: unusable rows are listed in `.bad`. False: they end the load with
                    ValueError. None: as False, for callers without a --skip-bad to recommend
    limit           stop after so many usable rows; the rest of the file is not parsed
    need_reference  False: load prompts only, without the final answer
    system          a system message for rows that have none; it changes `.sha256`, and no id
    thinking        one of thinking.MODES: what becomes of the thoughts in the answers; another than
                    "keep" changes `.sha256`, and no id
    check           called with each row; raises ValueError for one that cannot be used

    ValueError whatever skip_bad is: broken syntax in a JSON array or a CSV, since the rows after it
    are guesswork; a file most of whose rows cannot be parsed, or have an id that an earlier row
    has, since it is not the kind of file it was taken for; a file without a usable row.

    A row's id is its `id` field (text or integer) where it has one, else a hash of its messages;
    the second and third copy of a row get `-2` and `-3`. So an id never depends on other rows,
    except on earlier copies of the same one. An id used twice makes the later row unusable.
    """
    rules = ReadRules(columns, skip_bad, limit, need_reference, system, thinking, check)
    return RowStream(open_source(path), rules).load()


@dataclass(frozen=True)
class ReadRules:
    """How rows are read: the arguments of `load_rows`."""

    columns: dict[str, str] | None = None
    skip_bad: bool | None = False
    limit: int | None = None
    need_reference: bool = True
    system: str | None = None
    thinking: str = "keep"
    check: Callable[[Row], None] | None = None

    def __post_init__(self) -> None:
        """ValueError for values with which nothing can be read."""
        if self.columns is not None:
            check_columns(self.columns, self.need_reference)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}; expected at least 1, or None for every row")
        if self.thinking not in MODES:
            raise ValueError(f"thinking={self.thinking!r}; expected one of {', '.join(MODES)}")


class RowStream:
    """The usable rows of an open source, one after the other: none is kept in memory.

    To be iterated once. ValueError, as `load_rows` raises it, at the end of the file: for rows that
    cannot be used, and where there is no other. From then on it has what `Rows` says of a file:

    sha256, bad, unused, inputs    as in `Rows`; of the unusable rows only the first `keep_bad`
    file_sha256                    the hash of the file's bytes alone
    count, bad_count               the usable and the unusable rows
    context_only                   the assistant's messages that are context only

    While it is iterated, `place` is where the last row stands.
    """

    def __init__(self, source: Source, rules: ReadRules, keep_bad: int = SHOWN_FAULTS) -> None:
        self.source = source
        self.rules = rules
        self.sha256 = ""
        self.file_sha256 = ""
        self.count = 0
        self.context_only = 0
        self.place: Place | None = None
        self._reader = _Reader(source.path, rules, keep_bad)

    @property
    def bad(self) -> list[BadRow]:
        """The first unusable rows."""
        return self._reader.bad

    @property
    def bad_count(self) -> int:
        """How many rows are unusable."""
        return self._reader.faults.total()

    @property
    def unused(self) -> list[str]:
        """Names of the fields that contribute to no row."""
        return sorted(self._reader.unused)

    @property
    def inputs(self) -> list[str]:
        """Names of the fields, other than `input`, that were read as input."""
        return sorted(self._reader.inputs)

    def __iter__(self) -> Iterator[Row]:
        rules = self.rules
        with self.source as source, contextlib.closing(self._reader):
            for place, record in source_records(source):
                row = self._reader.read(place, record)
                if row is None:
                    continue
                self.count += 1
                self.context_only += len(row.context_only)
                self.place = place
                yield row
                if self.count == rules.limit:
                    break
            self.file_sha256 = source.sha256()
        self._reader.stop_for_bad_rows(rules.skip_bad, self.count)
        sha256 = self.file_sha256
        if rules.system:
            sha256 = hashlib.sha256(f"{sha256} {rules.system}".encode()).hexdigest()
        if rules.thinking != "keep":
            text = f"{sha256} thinking {rules.thinking}"
            sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.sha256 = sha256

    def load(self) -> Rows:
        """All rows in memory, with all the unusable ones."""
        self._reader.keep_bad = sys.maxsize
        rows = list(self)
        return Rows(rows, self.source.path, self.sha256, self.bad, self.unused, self.inputs)


class _Reader:
    """Makes rows of records, one after the other; collects `bad`, `unused`, `inputs`."""

    def __init__(self, path: Path, rules: ReadRules, keep_bad: int) -> None:
        self.path = path
        self.columns = rules.columns or {}  # {role: field}
        self.need_reference = rules.need_reference
        self.system = rules.system
        self.thinking = rules.thinking
        self.check = rules.check
        self.keep_bad = keep_bad
        self.bad: list[BadRow] = []  # the first `keep_bad`
        self.faults: Counter[str] = Counter()  # of all unusable rows: BadRow.fault
        self.unused: set[str] = set()
        self.inputs: set[str] = set()
        self.count = 0  # records so far, usable or not
        self._seen = SeenIds()

    def close(self) -> None:
        """Forget the ids of the rows."""
        self._seen.close()

    def read(self, place: Place, record: object) -> Row | None:
        """The row of a record; None for one that is unusable, which is added to `bad`."""
        self.count += 1
        try:
            return self._row(place, record)
        except ValueError as error:
            fault = ""
            if isinstance(record, ValueError):
                fault = "syntax"
            elif isinstance(error, _DuplicateId):
                fault = "id"
            self.faults[fault] += 1
            if len(self.bad) < self.keep_bad:
                file = "" if place.file == self.path else str(place.file)
                self.bad.append(BadRow(place.line, str(error), self.count, fault, file))
            return None

    def _row(self, place: Place, record: object) -> Row:
        """The row of a record; ValueError where it has none."""
        if isinstance(record, ValueError):
            raise record
        if not isinstance(record, dict):
            raise ValueError(f"the row is {kind(record)}, expected an object")

        # 1. the texts: which fields they are in, and the conversation that they make
        found_shape: dict[str, str] = {}
        if "prompt" not in self.columns and "messages" not in self.columns:
            found_shape = find_shape(place.file, record, self.need_reference)
        shape = with_tools_field(record, {**found_shape, **self.columns}, found_shape)
        check_fields_are_supported(record, shape, found_shape)
        turns, unused_keys = conversation_of(record, shape, self.need_reference)
        messages = tuple(_without_flag(turn) for turn in turns)
        context_only: frozenset[int] = frozenset()
        if self.need_reference:
            context_only = context_only_turns(turns)

        # 2. the id (without the added system message, so that it stays the same), and the tests
        row_id = _row_id(record, shape.get("id", "id"), messages, self._seen)
        tests = _tests(record, shape)
        taken_by = self._seen.place_of(row_id)
        if taken_by is not None:
            raise _DuplicateId(f"id {row_id!r} is taken by {self._named(taken_by)}")

        # 3. the row
        if self.system and messages[0]["role"] != "system":
            system_message = message("system", self.system, "--system")
            messages = (system_message, *messages)
        if self.thinking != "keep":
            messages = tuple(_with_checked_thoughts(messages, self.thinking))
        row = Row(row_id, messages, tests, context_only, self.thinking)
        if self.check is not None:
            self.check(row)
        self._seen.add(row_id, place)
        self._note_fields(record, shape, found_shape, tests)
        self.unused |= unused_keys
        return row

    def _named(self, place: Place) -> str:
        """A place in a message: its line, with the file where there are several."""
        if place.file == self.path:
            return f"line {place.line}"
        return f"{place.file}:{place.line}"

    def _note_fields(
        self, record: dict, shape: dict[str, str], found_shape: dict[str, str], tests: str
    ) -> None:
        """Add to `unused` and `inputs` which fields a usable record has."""
        used = {*shape.values(), shape.get("id", "id")}
        if tests:
            used.add("tests")
        if found_shape:
            used.add("input")  # an empty one, beside a context
        self.unused |= record.keys() - used
        input_name = found_shape.get("input", "input")
        if input_name != "input" and is_given(record, shape, "input"):
            self.inputs.add(input_name)

    def stop_for_bad_rows(self, skip_bad: bool | None, usable: int) -> None:
        """ValueError for bad rows that are not to be skipped, or if there is no usable row."""
        listed = []
        for bad in self.bad[:SHOWN_FAULTS]:
            listed.append(f"{bad.file or self.path}:{bad.line} (row {bad.row}): {bad.reason}")
        bad_count = self.faults.total()
        for common in _COMMON_FAULTS:
            count = self.faults[common.fault]
            if count > 1 and 2 * count > self.count:
                error = f"{self.path}: {count} of {self.count} rows {common.text}"
                raise ValueError(listing(error, listed, common.advice, bad_count))
        if bad_count and not skip_bad:
            error = f"{self.path}: {bad_count} unusable rows"
            raise ValueError(listing(error, listed, self._way_out(skip_bad), bad_count))
        if not usable:
            first = f"; the first: {listed[0]}" if listed else ""
            raise ValueError(
                f"{self.path} holds no usable row ({bad_count} unusable); expected at least "
                f"one{first}"
            )

    def _way_out(self, skip_bad: bool | None) -> str:
        """Advice for the bad rows: repair or skip them, make other ids of them, or both."""
        repair = "repair them"
        if skip_bad is False:  # None: the script has no such flag
            repair += ", or leave them out with --skip-bad"
        rename = (
            "if the ids name sources and not rows, give --columns id= (with the roles that you "
            "named): ids are then made of the texts"
        )
        if not self.faults["id"]:
            return repair
        if self.faults["id"] == self.faults.total():
            return rename
        return f"{rename}; {repair}"


class _CommonFault(NamedTuple):
    """A fault that ends the load whatever `skip_bad` is, where most rows have it."""

    fault: str  # of a BadRow
    text: str  # the end of "N of M rows ..."
    advice: str


_COMMON_FAULTS = (
    _CommonFault(
        "syntax",
        "cannot be parsed",
        "the file is not in the expected format (JSONL is one JSON object a line, a CSV has as "
        "many cells in every row as in its header); --skip-bad would lose the good rows too: "
        "repair it",
    ),
    _CommonFault(
        "id",
        "have an id that an earlier row has",
        "the ids name sources, not rows; --skip-bad would lose good rows: give --columns id= (with "
        "the roles that you named), and ids are made of the texts",
    ),
)


def listing(error: str, faults: Sequence[str], way_out: str, count: int | None = None) -> str:
    """The text of an error: what is wrong, what to do, the first ten faults and how many more.

    count: of all faults, where `faults` holds only the first of them.
    """
    count = len(faults) if count is None else count
    lines = [f"{error}; {way_out}:", *faults[:SHOWN_FAULTS]]
    if count > SHOWN_FAULTS:
        lines.append(f"... and {count - SHOWN_FAULTS} more")
    return "\n  ".join(lines)


class FirstFaults:
    """The first faults of many, as texts, and their count."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, fault: str) -> None:
        """Count a fault, and keep it where it is one of the first."""
        self.count += 1
        if len(self.first) < SHOWN_FAULTS:
            self.first.append(fault)

    def listing(self, error: str, way_out: str) -> str:
        """The text of an error (`listing`)."""
        return listing(error, self.first, way_out, self.count)


def _without_flag(turn: dict) -> dict:
    """The message without the flag that says whether it is to be trained on."""
    return {key: value for key, value in turn.items() if key != "trained"}


def _with_checked_thoughts(messages: Iterable[dict], thinking: str) -> Iterator[dict]:
    """The messages, their thoughts removed where `thinking` is "strip".

    ValueError for an answer that is nothing but a thought, or whose thoughts cannot be told.
    """
    for number, turn in enumerate(messages, 1):
        if turn["role"] != "assistant":
            yield turn
            continue
        content = turn["content"]
        check_thoughts(content, f"message {number}")
        answer = without_thoughts(content)
        if not answer.strip() and not calls_of(turn):
            raise ValueError(f"message {number} is a thought without an answer behind it")
        yield {**turn, "content": answer} if thinking == "strip" else turn


def _tests(record: dict, shape: dict[str, str]) -> str:
    """Source of the row's tests, "" without; a list of texts (as MBPP has) is joined by newlines.

    ValueError for another value, but only where --columns names the field.
    """
    name = shape.get("tests", "tests")
    tests = record.get(name)
    if not tests:
        return ""
    if isinstance(tests, str):
        return tests
    if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        return "\n".join(tests)
    if "tests" in shape:
        raise ValueError(f"{name!r} is {kind(tests)}, expected text or a list of texts")
    return ""


def _row_id(record: dict, name: str, messages: tuple[dict, ...], seen: SeenIds) -> str:
    """The id in the field `name`, else a hash of the messages and which copy of them this is."""
    given = record.get(name) if name else None
    if given is not None:
        is_id = isinstance(given, str | int) and not isinstance(given, bool)
        is_blank = is_id and not str(given).strip()
        if not is_id or is_blank:
            raise ValueError(f"{name!r} is {kind(given)}, expected text or an integer")
        row_id = str(given)
        if SURROGATE.search(row_id):
            raise ValueError(f"{name!r} holds half of a surrogate pair, which UTF-8 cannot write")
        return row_id
    text = json.dumps(messages, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    copy = seen.copies_of(digest)
    if copy == 1:
        return digest
    return f"{digest}-{copy}"
