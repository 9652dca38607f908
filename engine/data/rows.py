"""Rows: a data file becomes conversations.

Files are UTF-8 JSON (an array), JSONL or CSV (engine/data/records.py). A row is one conversation:
an
optional system message, then user and assistant in turns, the assistant last. Nothing is dropped or
guessed in silence: a row that cannot be used stops the load with its line, or is listed in
`Rows.bad`; fields, of rows and of messages, that no text or id was made of are named in
`Rows.unused`. A field that would change what is trained on, and is not supported, makes its row
unusable.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.data.records import DataFile, Number, records, wrapped

# what `--columns` may name; input, history, system, id and tests are optional in every row
ROLES = ("prompt", "input", "response", "history", "system", "messages", "id", "tests")
_ALPACA = {
    "prompt": "instruction",
    "response": "output",
    "input": "input",
    "history": "history",
    "system": "system",
}
_DOLLY = {"prompt": "instruction", "response": "response", "input": "context"}  # as published
SHAPES = (
    {"messages": "messages", "system": "system"},
    {"messages": "conversations", "system": "system"},
    _ALPACA,
    _DOLLY,
    {"prompt": "question", "response": "answer", "input": "context"},
    {"prompt": "prompt", "response": "response"},
    {"prompt": "prompt", "response": "completion"},
)
SPEAKERS = {  # OpenAI's names and ShareGPT's
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
# what other programs call it when a message is not, or alone is, to be trained on
TRAINED = ("weight", "train", "training", "trainable", "loss_mask", "loss")
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
# keys of a message whose text would be missing from what is trained on
UNSUPPORTED = {
    "tool_calls": "tool calls are not supported",
    "function_call": "tool calls are not supported",
    "reasoning_content": "thoughts beside the text are not supported",
    "reasoning": "thoughts beside the text are not supported",
    "thinking": "thoughts beside the text are not supported",
}
_SURROGATE = re.compile("[\ud800-\udfff]")


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


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=goal,response=target` as {role: field name}; the roles are ROLES.

    `id=` names no field: then ids are made of the rows' texts.
    """
    columns: dict[str, str] = {}
    for part in text.split(","):
        role, equals, name = (piece.strip() for piece in part.partition("="))
        nameless = role == "id" and equals
        if not (name or nameless) or role not in ROLES or role in columns:
            raise ValueError(
                f"--columns: cannot read {part.strip()!r} in {text!r}; wanted ROLE=FIELD, each "
                f"role once, roles being {', '.join(ROLES)} (id= for ids made of the texts)"
            )
        columns[role] = name
    return columns


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
        _check_columns(columns, need_reference)
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
            unparsed = isinstance(record, ValueError)
            sort = "syntax" if unparsed else "id" if isinstance(error, _Taken) else ""
            self.bad.append(BadRow(line, str(error), self.looked, sort))
        else:
            self.rows.append(row)

    def _row(self, line: int, record: object) -> Row:
        if isinstance(record, ValueError):
            raise record
        if not isinstance(record, dict):
            raise ValueError(f"the row is {kind(record)}, wanted an object")
        whole = self.columns is not None and {"prompt", "messages"} & self.columns.keys()
        found = {} if whole else _shape(self.path, record, self.need_reference)
        shape = {**found, **(self.columns or {})}
        _check_not_lost(record, shape, found)
        spoken, extra = _conversation(record, shape, self.need_reference)
        messages = tuple({"role": m["role"], "content": m["content"]} for m in spoken)
        silent = _context_only(spoken) if self.need_reference else frozenset()
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
        used = {*shape.values(), shape.get("id", "id"), *(["tests"] if tests else [])}
        used |= {"input"} if found else set()  # one that is empty, beside a context
        self.unused |= {*(record.keys() - used), *extra}
        if found.get("input", "input") != "input" and _given(record, shape, "input"):
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
            ways = ["repair them" + (", or leave them out with --skip-bad" * (skip_bad is False))]
            if sorts["id"]:
                taken = "if the ids name sources and not rows, give --columns id= (with the "
                ways.insert(0, taken + "roles that you named): ids are then made of the texts")
            ways = ways[:1] if sorts["id"] == len(self.bad) else ways
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


def _check_columns(columns: dict[str, str], need_reference: bool) -> None:
    if unknown := columns.keys() - set(ROLES):
        raise ValueError(f"columns: unknown roles {sorted(unknown)}; wanted {', '.join(ROLES)}")
    if columns.keys() <= {"id", "tests"}:
        return
    if ("messages" in columns) == ("prompt" in columns):
        raise ValueError(f"columns={columns}: name either 'prompt' or 'messages'")
    if need_reference and "prompt" in columns and "response" not in columns:
        raise ValueError(f"columns={columns}: the answer is missing; add response=FIELD")


def listing(what: str, faults: list[str], way_out: str) -> str:
    """An error's text: what is wrong, what to do, the first ten faults and how many more."""
    more = [f"... and {len(faults) - 10} more"] if len(faults) > 10 else []
    return "\n  ".join([f"{what}; {way_out}:", *faults[:10], *more])


# ---- a record's shape, text and id


def _shape(path: Path, record: dict, need_reference: bool) -> dict[str, str]:
    """The columns of the one known shape that the record's fields fit."""
    needed = ("messages", "prompt", "response") if need_reference else ("messages", "prompt")
    wanted = [[shape[role] for role in needed if role in shape] for shape in SHAPES]
    found = [i for i, names in enumerate(wanted) if all(name in record for name in names)]
    if not found:
        shapes = dict.fromkeys("/".join(names) for names in wanted)
        raise ValueError(
            f"fields {', '.join(map(repr, record)) or '(none)'} fit no known shape; "
            f"wanted {' or '.join(shapes)}, or --columns{wrapped(path, record)}"
        )
    if "messages" not in SHAPES[found[0]] and any(wanted[i] != wanted[found[0]] for i in found):
        both = " and ".join("/".join(wanted[i]) for i in found)
        raise ValueError(f"the row fits {both}; say which with --columns")
    shape = SHAPES[found[0]]
    if shape is _ALPACA and not _given(record, shape, "input") and _given(record, _DOLLY, "input"):
        return {**shape, "input": "context"}
    return shape


def _check_not_lost(record: dict, shape: dict[str, str], found: dict[str, str]) -> None:
    """ValueError for a field that changes what is trained on and is not used; `found` is the shape
    where it was found, and not named by --columns."""
    if record.get("loss_mask") is not None:
        raise ValueError(
            "'loss_mask' of a row is not supported: give the messages a \"weight\" of 0 or 1"
        )
    if found or "messages" in shape:
        for name in ("tools", "functions"):
            if record.get(name):
                raise ValueError(f"{name!r}: tool calls are not supported")
    if "prompt" in found and "context" not in found.values():
        if _given(record, _DOLLY, "input"):
            prompt, response = found["prompt"], found.get("response", "response")
            raise ValueError(
                f"'context' is not used: say --columns prompt={prompt},input=context,"
                f"response={response} to put it behind the {prompt}, or the same without "
                "input=context to leave it out"
            )


def _conversation(
    record: dict, shape: dict[str, str], need_reference: bool
) -> tuple[list[dict], set[str]]:
    """The messages, and names of keys of messages that were not used."""
    if "messages" in shape:
        messages, extra = _spoken(record, shape, need_reference)
    else:
        messages, extra = _written(record, shape, need_reference), set()
    if _given(record, shape, "system"):
        if messages[0]["role"] == "system":
            raise ValueError(f"both a system message and a {shape['system']!r} field; keep one")
        messages.insert(0, message("system", record[shape["system"]], shape["system"]))
    return messages, extra


def _written(record: dict, shape: dict[str, str], need_reference: bool) -> list[dict[str, str]]:
    """The messages of a record that has its prompt and its answer in fields of their own."""
    messages = []
    if _given(record, shape, "history"):
        name, history = shape["history"], record[shape["history"]]
        for i, pair in enumerate(history if isinstance(history, list) else [None], 1):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"{name!r} is not a list of [user, assistant] pairs")
            messages.append(message("user", _text(pair[0]), f"{name} {i}, user"))
            messages.append(message("assistant", _text(pair[1]), f"{name} {i}, assistant"))
    prompt = _text(_field(record, shape["prompt"]))
    messages.append(message("user", prompt, shape["prompt"]))
    if _given(record, shape, "input"):
        extra = message("user", _text(record[shape["input"]]), shape["input"])
        messages[-1]["content"] += "\n" + extra["content"]
    if need_reference:
        answer = _text(_field(record, shape["response"]))
        messages.append(message("assistant", answer, shape["response"]))
    return messages


def _spoken(
    record: dict, shape: dict[str, str], need_reference: bool
) -> tuple[list[dict], set[str]]:
    """The messages of a list of {role, content} or {from, value}, "trained" beside them where a
    message says it; and the names of their keys that are not used."""
    name = shape["messages"]
    entries = _field(record, name)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{name!r} is {kind(entries)}, wanted a list of messages")
    messages: list[dict] = []
    extra: set[str] = set()
    for i, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"message {i} is {kind(entry)}, wanted an object")
        role = entry.get("role", entry.get("from"))
        if isinstance(role, str) and role in TOOL_ROLES:
            raise ValueError(f"message {i} has the role {role!r}: tool calls are not supported")
        for key, why in UNSUPPORTED.items():
            if entry.get(key):
                raise ValueError(f"message {i} has {key!r}: {why}")
        if not isinstance(role, str) or role not in SPEAKERS:
            raise ValueError(f"message {i}: unknown role {role!r}; known: {', '.join(SPEAKERS)}")
        text = _joined(entry.get("content", entry.get("value")), i)
        said = message(SPEAKERS[role], text, f"message {i}")
        trained = _trained(entry, i)
        if trained and said["role"] != "assistant":
            raise ValueError(
                f"message {i} is the {said['role']}'s and asks to be trained on; only the "
                "assistant's are"
            )
        used = ("role", "from", "content", "value", *TRAINED)
        given = {key for key, value in entry.items() if value not in (None, "", [], {})}
        extra |= {f"{name}[].{key}" for key in given - set(used)}
        messages.append(said if trained is None else said | {"trained": trained})
    if not need_reference and messages[-1]["role"] == "assistant":
        messages.pop()
    check_turns(messages, last="assistant" if need_reference else "user")
    return messages, extra


def _joined(content: object, number: int) -> object:
    """The text of a message; parts that are all text are joined, as chat templates join them."""
    if not isinstance(content, list) or not content:
        return _text(content)
    for part in content:
        fine = isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text")
        if not fine or not isinstance(part.get("text"), str):
            what = part.get("type") if isinstance(part, dict) else kind(part)
            raise ValueError(
                f"'message {number}' is a list with a part that is no text ({what}); wanted text, "
                'or parts {"type": "text", "text": ...}'
            )
    return "".join(part["text"] for part in content)


def _trained(entry: dict, number: int) -> bool | None:
    """What a message says of its being trained on; None where it says nothing."""
    said = {key: entry[key] for key in TRAINED if entry.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(
                f"message {number}: {key!r} is {value!r}; 0 or 1 (false or true) is supported"
            )
    if len({bool(value) for value in said.values()}) > 1:
        raise ValueError(f"message {number}: {', '.join(said)} contradict each other")
    return bool(next(iter(said.values()))) if said else None


def _context_only(messages: Sequence[dict]) -> frozenset[int]:
    """The numbers of the assistant's turns that are not to be trained on."""
    turns = [said.get("trained") for said in messages if said["role"] == "assistant"]
    silent = frozenset(i for i, trained in enumerate(turns) if trained is False)
    if turns and len(silent) == len(turns):
        raise ValueError("no message of the assistant is to be trained on")
    return silent


def check_turns(messages: Sequence[dict[str, str]], last: str) -> None:
    """ValueError unless user and assistant alternate, a system message at most coming first, and
    `last` speaks last."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    for i, said in enumerate(messages[first:]):
        wanted = ("user", "assistant")[i % 2]
        if said["role"] != wanted:
            number = first + i + 1
            raise ValueError(f"message {number} is the {said['role']}'s, wanted the {wanted}'s")
    if len(messages) == first or messages[-1]["role"] != last:
        raise ValueError(f"the conversation does not end with the {last}")


def message(role: str, text: object, where: str) -> dict[str, str]:
    """One message; ValueError calls the text by `where` if it is none that can be used."""
    if not isinstance(text, str):
        raise ValueError(f"{where!r} is {kind(text)}, wanted text")
    if not text.strip() and role != "system":  # an empty system message silences a template's own
        raise ValueError(f"{where!r} is empty")
    if _SURROGATE.search(text):
        raise ValueError(f"{where!r} holds half of a surrogate pair, which UTF-8 cannot write")
    return {"role": role, "content": text}


def _text(value: object) -> object:
    """A number as the text it was written as; everything else as it is."""
    if isinstance(value, Number):
        return value.text
    return str(value) if type(value) is int else value


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    if value in ([], {}, ""):
        return "empty"
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _field(record: dict, name: str) -> object:
    if name not in record:
        raise ValueError(f"no field {name!r} among {', '.join(map(repr, record)) or 'none'}")
    return record[name]


def _given(record: dict, shape: dict[str, str], role: str) -> bool:
    """Whether an optional field is there and says something (null, blanks and [] do not)."""
    value = _text(record.get(shape.get(role)))
    return bool(value.strip() if isinstance(value, str) else value)


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
        if _SURROGATE.search(str(given)):
            raise ValueError(f"{name!r} holds half of a surrogate pair, which UTF-8 cannot write")
        return str(given)
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]
    copies[digest] += 1
    return digest if copies[digest] == 1 else f"{digest}-{copies[digest]}"
