"""Rows: a data file becomes conversations.

Files are UTF-8 JSON (an array), JSONL or CSV. A row is one conversation: an optional system
message, then user and assistant in turns, the assistant last. Nothing is dropped or guessed in
silence: a row that cannot be used stops the load with its line, or is listed in `Rows.bad`; fields
that no text or id was made of are named in `Rows.unused`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# what `--columns` may name; input, history, system, id and tests are optional in every row
ROLES = ("prompt", "input", "response", "history", "system", "messages", "id", "tests")
_ALPACA = {
    "prompt": "instruction",
    "response": "output",
    "input": "input",
    "history": "history",
    "system": "system",
}
SHAPES = (
    {"messages": "messages", "system": "system"},
    {"messages": "conversations", "system": "system"},
    _ALPACA,
    {"prompt": "question", "response": "answer"},
    {"prompt": "prompt", "response": "response"},
    {"prompt": "prompt", "response": "completion"},
)
SPEAKERS = {  # OpenAI's names and ShareGPT's
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_SPACE = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One conversation: messages of {"role", "content"}, the assistant's answer last.

    Rows loaded with need_reference=False end with the user's message instead.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    tests: str = ""  # a program's, for the verifier `code`

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


class Rows(list):
    """The usable rows of the file `path`, whose bytes hash to `sha256` (with a system message
    that was added: both together).

    `bad` lists the unusable ones; `unused` names the fields that no row's text or id was made of.
    """

    def __init__(self, rows: list, path: Path, sha256: str, bad=(), unused=()):
        super().__init__(rows)
        self.path, self.sha256 = path, sha256
        self.bad: list[BadRow] = list(bad)
        self.unused: tuple[str, ...] = tuple(sorted(unused))


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=goal,response=target` as {role: field name}; the roles are ROLES."""
    columns: dict[str, str] = {}
    for part in text.split(","):
        role, _, name = (piece.strip() for piece in part.partition("="))
        if not name or role not in ROLES or role in columns:
            raise ValueError(
                f"--columns: cannot read {part.strip()!r} in {text!r}; "
                f"wanted ROLE=FIELD, each role once, roles being {', '.join(ROLES)}"
            )
        columns[role] = name
    return columns


def load_rows(
    path: str | Path,
    *,
    columns: dict[str, str] | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
    need_reference: bool = True,
    system: str | None = None,
) -> Rows:
    """Rows of a JSON array, JSONL or CSV file.

    columns         {role: field} instead of finding each row's shape (see SHAPES); then only the
                    named fields make the text
    skip_bad        return unusable rows in `.bad` instead of raising ValueError with all of them;
                    broken syntax in a JSON array or a CSV always raises: what follows is guesswork
    limit           stop after so many usable rows; what follows is not looked at
    need_reference  False: prompts only. An answer that is there is left out
    system          a system message for rows that have none; ids stay as they are, `.sha256` tells

    A row's id is its `id` field (text or integer) where it has one, else a hash of its messages;
    the second and third copy of a row get `-2` and `-3`. So an id never depends on other rows,
    except on earlier copies of the same one. An id used twice makes the later row unusable.
    """
    path = Path(path)
    if columns is not None:
        _check_columns(columns, need_reference)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}; wanted at least 1, or None for every row")
    text, sha256 = read_utf8(path)
    rows, bad, unused = [], [], set()
    lines: dict[str, int] = {}  # id -> the line of the row that has it
    copies: Counter[str] = Counter()
    for number, (line, record) in enumerate(_records(path, text), 1):
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError(f"the row is {kind(record)}, wanted an object")
            shape = columns or _shape(record, need_reference)
            messages = _conversation(record, shape, need_reference)
            name = _row_id(record, shape.get("id", "id"), messages, copies)
            tests = _tests(record, shape)
            if name in lines:
                raise ValueError(f"id {name!r} is taken by line {lines[name]}")
        except ValueError as error:
            bad.append(BadRow(line, str(error), number))
            continue
        lines[name] = line
        if system and messages[0]["role"] != "system":
            messages = (message("system", system, "--system"), *messages)
        used = {*shape.values(), shape.get("id", "id"), *(["tests"] if tests else [])}
        unused |= record.keys() - used
        rows.append(Row(name, messages, tests))
        if len(rows) == limit:
            break
    if bad and not skip_bad:
        listed = [f"{path}:{b.line} (row {b.row}): {b.reason}" for b in bad]
        what = f"{path}: {len(bad)} unusable rows"
        raise ValueError(listing(what, listed, "repair them, or leave them out with --skip-bad"))
    if not rows:
        raise ValueError(f"{path} holds no usable row ({len(bad)} unusable); wanted at least one")
    if system:
        sha256 = hashlib.sha256(f"{sha256} {system}".encode()).hexdigest()
    return Rows(rows, path, sha256, bad, unused)


def _check_columns(columns: dict[str, str], need_reference: bool) -> None:
    if unknown := columns.keys() - set(ROLES):
        raise ValueError(f"columns: unknown roles {sorted(unknown)}; wanted {', '.join(ROLES)}")
    if ("messages" in columns) == ("prompt" in columns):
        raise ValueError(f"columns={columns}: name either 'prompt' or 'messages'")
    if need_reference and "prompt" in columns and "response" not in columns:
        raise ValueError(f"columns={columns}: the answer is missing; add response=FIELD")


def listing(what: str, faults: list[str], way_out: str) -> str:
    """An error's text: what is wrong, what to do, the first ten faults and how many more."""
    more = [f"... and {len(faults) - 10} more"] if len(faults) > 10 else []
    return "\n  ".join([f"{what}; {way_out}:", *faults[:10], *more])


# ---- files


def read_utf8(path: Path) -> tuple[str, str]:
    """The text of a UTF-8 file, without byte order mark, and the sha256 of its bytes."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[at]:02x} at offset {at} "
            f"(line {data.count(10, 0, at) + 1}); convert it: iconv -f ENCODING -t UTF-8"
        ) from None
    return text.removeprefix("\ufeff"), hashlib.sha256(data).hexdigest()


def _records(path: Path, text: str) -> Iterator[tuple[int, object]]:
    """(line it starts on, record); a ValueError stands for a record that cannot be read."""
    first = text[_SPACE.match(text).end() :][:1]
    if path.suffix.lower() == ".csv":
        return _csv(path, text)
    if first == "[":
        return _json_array(path, text)
    if first == "{" or path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        return json_lines(text)
    raise ValueError(f"{path} begins with {first!r}; wanted a JSON array, JSONL or a .csv file")


def json_lines(text: str) -> Iterator[tuple[int, object]]:
    """(line, value) of JSONL; a ValueError stands for a line that is no JSON."""
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON allows in a text.
    for line, source in enumerate(text.split("\n"), 1):
        if source.strip():
            try:
                yield line, json.loads(source)
            except json.JSONDecodeError as error:
                yield line, ValueError(f"bad JSON: {error.msg} (column {error.colno})")
            except (ValueError, RecursionError) as error:  # 5,000 digits, 5,000 brackets
                yield line, ValueError(f"bad JSON: {error}")


def _json_array(path: Path, text: str) -> Iterator[tuple[int, object]]:
    def broken(at: int, what: str) -> ValueError:
        line = text.count("\n", 0, at) + 1
        return ValueError(
            f"{path}:{line}: bad JSON: {what}; a broken array cannot be read past this point "
            "(--skip-bad does not help): repair it, or write one row per line (JSONL)"
        )

    decoder = json.JSONDecoder()
    at = _SPACE.match(text).end()
    inside = _SPACE.match(text, at + 1).end()
    at = inside if text[inside : inside + 1] == "]" else at
    line, counted = 1, 0
    while text[at] != "]":  # it is on "[" or ",": a row follows
        start = _SPACE.match(text, at + 1).end()
        try:
            record, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise broken(error.pos, error.msg) from None
        except (ValueError, RecursionError) as error:
            raise broken(start, str(error)) from None
        line, counted = line + text.count("\n", counted, start), start
        yield line, record
        at = _SPACE.match(text, end).end()
        if text[at : at + 1] not in (",", "]"):
            raise broken(at, "wanted ',' or ']' after a row")
    if text[at + 1 :].strip():
        raise broken(_SPACE.match(text, at + 1).end(), "text after the closing ']'")


def _csv(path: Path, text: str) -> Iterator[tuple[int, object]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{line}: bad CSV: {error}; repair it") from None
        if cells is None:
            return
        if not cells:  # an empty line, which is no row
            pass
        elif not header:
            header = cells
            if len(set(header)) < len(header):
                raise ValueError(f"{path}:{line}: two columns have one name: {header}; rename one")
        elif len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        else:
            yield line, ValueError(f"{len(cells)} cells, wanted {len(header)} as in the header")
        line = reader.line_num + 1


# ---- a record's shape, text and id


def _shape(record: dict, need_reference: bool) -> dict[str, str]:
    """The columns of the one known shape that the record's fields fit."""
    needed = ("messages", "prompt", "response") if need_reference else ("messages", "prompt")
    wanted = [[shape[role] for role in needed if role in shape] for shape in SHAPES]
    found = [i for i, names in enumerate(wanted) if all(name in record for name in names)]
    if not found:
        shapes = dict.fromkeys("/".join(names) for names in wanted)
        raise ValueError(
            f"fields {', '.join(map(repr, record)) or '(none)'} fit no known shape; "
            f"wanted {' or '.join(shapes)}, or --columns"
        )
    if "messages" not in SHAPES[found[0]] and any(wanted[i] != wanted[found[0]] for i in found):
        both = " and ".join("/".join(wanted[i]) for i in found)
        raise ValueError(f"the row fits {both}; say which with --columns")
    return SHAPES[found[0]]


def _conversation(record: dict, shape: dict[str, str], need_reference: bool) -> tuple[dict, ...]:
    turns = _spoken if "messages" in shape else _written
    messages = turns(record, shape, need_reference)
    if _given(record, shape, "system"):
        if messages[0]["role"] == "system":
            raise ValueError(f"both a system message and a {shape['system']!r} field; keep one")
        messages.insert(0, message("system", record[shape["system"]], shape["system"]))
    return tuple(messages)


def _written(record: dict, shape: dict[str, str], need_reference: bool) -> list[dict[str, str]]:
    """The messages of a record that has its prompt and its answer in fields of their own."""
    messages = []
    if _given(record, shape, "history"):
        name, history = shape["history"], record[shape["history"]]
        for i, pair in enumerate(history if isinstance(history, list) else [None], 1):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"{name!r} is not a list of [user, assistant] pairs")
            messages.append(message("user", pair[0], f"{name} {i}, user"))
            messages.append(message("assistant", pair[1], f"{name} {i}, assistant"))
    messages.append(message("user", _field(record, shape["prompt"]), shape["prompt"]))
    if _given(record, shape, "input"):
        extra = message("user", record[shape["input"]], shape["input"])
        messages[-1]["content"] += "\n" + extra["content"]
    if need_reference:
        answer = _field(record, shape["response"])
        messages.append(message("assistant", answer, shape["response"]))
    return messages


def _spoken(record: dict, shape: dict[str, str], need_reference: bool) -> list[dict[str, str]]:
    """The messages of a list of {role, content} or {from, value}."""
    name = shape["messages"]
    entries = _field(record, name)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{name!r} is {kind(entries)}, wanted a list of messages")
    messages = []
    for i, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"message {i} is {kind(entry)}, wanted an object")
        role = entry.get("role", entry.get("from"))
        if not isinstance(role, str) or role not in SPEAKERS:
            raise ValueError(f"message {i}: unknown role {role!r}; known: {', '.join(SPEAKERS)}")
        text = entry.get("content", entry.get("value"))
        messages.append(message(SPEAKERS[role], text, f"message {i}"))
    if not need_reference and messages[-1]["role"] == "assistant":
        messages.pop()
    check_turns(messages, last="assistant" if need_reference else "user")
    return messages


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
    value = record.get(shape.get(role))
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
    given = record.get(name)
    if given is not None:
        if not isinstance(given, str | int) or isinstance(given, bool) or not str(given).strip():
            raise ValueError(f"{name!r} is {kind(given)}, wanted text or an integer")
        if _SURROGATE.search(str(given)):
            raise ValueError(f"{name!r} holds half of a surrogate pair, which UTF-8 cannot write")
        return str(given)
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]
    copies[digest] += 1
    return digest if copies[digest] == 1 else f"{digest}-{copies[digest]}"
