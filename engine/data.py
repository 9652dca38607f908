"""Data: a file becomes rows, rows become token ids, ids become micro-batches.

    rows = load_rows("train.jsonl")                     # or load_distilled("distilled.jsonl")
    examples, counts = encode(rows, chat, max_length=1024)
    for batch in pack(examples[:8], micro_tokens=4096): ...

Files are UTF-8 JSON (an array), JSONL or CSV. A row is one conversation: an optional system message,
then user and assistant in turns, the assistant last. Nothing is dropped, cut or guessed in silence:
an unusable row stops the load with its line, or is counted in `Rows.bad`; a row that does not fit
is named, or cut and counted; fields that nobody asked for are named in `Rows.unused`.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.chat import Chat
    from model.tokenizer import Tokenizer

# what `--columns` may name; input, history and system are optional in every row
ROLES = ("prompt", "input", "response", "history", "system", "messages", "id")
SHAPES = (
    {"messages": "messages", "system": "system"},
    {"messages": "conversations", "system": "system"},
    {
        "prompt": "instruction",
        "response": "output",
        "input": "input",
        "history": "history",
        "system": "system",
    },
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
KEPT = ("accepted", "identical")  # the statuses whose target is the response, not the reference
FINISHES = ("stop", "length", "stop_string", "prompt_too_long")
TARGETS = ("target", "response", "reference")
_SPACE = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


# ---- rows


@dataclass(frozen=True)
class Row:
    """One conversation: messages of {"role", "content"}, the assistant's answer last.

    Rows loaded with need_reference=False end with the user's message instead.
    """

    id: str
    messages: tuple[dict[str, str], ...]

    @property
    def reference(self) -> str:
        """The answer that ends the conversation."""
        if self.messages[-1]["role"] != "assistant":
            raise ValueError(f"row {self.id} has no reference: it was loaded as a prompt only")
        return self.messages[-1]["content"]

    @property
    def turns(self) -> list[int]:
        """Where in `messages` the assistant speaks."""
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: the line it starts on, its number in the file (from 1), why."""

    line: int
    row: int
    reason: str


class Rows(list[Row]):
    """The usable rows of `path`; `bad`, the others; `sha256` of the file's bytes; `unused`, the
    names of fields that no row's text or id was made of."""

    def __init__(self, rows: list[Row], path: Path, sha256: str, bad: list[BadRow], unused: set):
        super().__init__(rows)
        self.path, self.sha256, self.bad = path, sha256, bad
        self.unused = tuple(sorted(unused))


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=goal,response=target` as {role: field name}; the roles are ROLES."""
    columns: dict[str, str] = {}
    for part in text.split(","):
        role, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals or not name or role not in ROLES or role in columns:
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
) -> Rows:
    """Rows of a JSON array, JSONL or CSV file.

    columns         {role: field} instead of finding the shape row by row (see SHAPES); then only
                    the named fields make the text
    skip_bad        return unusable rows in `.bad` instead of raising ValueError with all of them;
                    broken syntax in a JSON array or a CSV always raises: what follows is guesswork
    limit           stop after so many usable rows; what follows is not looked at
    need_reference  False: prompts only. An answer that is there is left out

    A row's id is its `id` field (text or integer) where it has one, else a hash of its messages; the
    second and third copy of a row get `-2` and `-3`. So an id never depends on other rows, except
    on earlier copies of the same one. An id used twice makes the later row unusable.
    """
    path = Path(path)
    if columns is not None and not {"messages", "prompt"} & columns.keys():
        raise ValueError(f"columns={columns} names neither 'prompt' nor 'messages'; name one")
    if columns is not None and need_reference and not {"messages", "response"} & columns.keys():
        raise ValueError(f"columns={columns} does not name 'response'; add response=FIELD")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}; wanted at least 1, or None for every row")
    text, sha256 = _read(path)
    rows, bad, unused = [], [], set()
    lines: dict[str, int] = {}  # id -> the line of the row that has it
    copies: Counter[str] = Counter()
    for number, (line, record) in enumerate(_records(path, text), 1):
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError(f"the row is {_kind(record)}, wanted an object")
            shape = columns or _shape(record, need_reference)
            messages = _conversation(record, shape, need_reference)
            name = _row_id(record, shape.get("id", "id"), messages, copies)
            if name in lines:
                raise ValueError(f"id {name!r} is taken by line {lines[name]}")
        except ValueError as error:
            bad.append(BadRow(line, number, str(error)))
            continue
        lines[name] = line
        unused |= record.keys() - {*shape.values(), shape.get("id", "id")}
        rows.append(Row(name, messages))
        if len(rows) == limit:
            break
    if bad and not skip_bad:
        listed = [f"{path}:{b.line} (row {b.row}): {b.reason}" for b in bad]
        raise ValueError(_listing(f"{path}: {len(bad)} rows cannot be used", listed, "--skip-bad"))
    if not rows:
        raise ValueError(f"{path} holds no usable rows ({len(bad)} unusable)")
    return Rows(rows, path, sha256, bad, unused)


def _listing(what: str, lines: list[str], way_out: str) -> str:
    more = [f"... and {len(lines) - 10} more"] if len(lines) > 10 else []
    return "\n  ".join([f"{what}; repair them, or {way_out}:", *lines[:10], *more])


# ---- files


def _read(path: Path) -> tuple[str, str]:
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
    """(line the row starts on, the row); a ValueError stands for a row that cannot be read."""
    first = text[_SPACE.match(text).end() :][:1]
    if path.suffix.lower() == ".csv":
        return _csv(path, text)
    if first == "[":
        return _json_array(path, text)
    if first == "{" or path.suffix in (".json", ".jsonl", ".ndjson"):
        return _json_lines(text)
    raise ValueError(f"{path}: wanted a JSON array, JSONL or a .csv file; it starts with {first!r}")


def _json_lines(text: str) -> Iterator[tuple[int, object]]:
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON allows in a text.
    for line, source in enumerate(text.split("\n"), 1):
        if source.strip():
            try:
                yield line, json.loads(source)
            except json.JSONDecodeError as error:
                yield line, ValueError(f"bad JSON: {error.msg} (column {error.colno})")
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 levels
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
        if cells and not header:
            header = cells
            if len(set(header)) < len(header):
                raise ValueError(f"{path}:{line}: two columns have one name: {header}")
        elif len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        elif cells:  # an empty line has none and is no row
            yield line, ValueError(f"{len(cells)} cells, wanted {len(header)} as in the header")
        line = reader.line_num + 1


# ---- a record's shape, text and id


def _shape(record: dict, need_reference: bool) -> dict[str, str]:
    """The columns of the one known shape that the record's fields fit."""
    needed = ("messages", "prompt", "response") if need_reference else ("messages", "prompt")
    wanted = [[shape[role] for role in needed if role in shape] for shape in SHAPES]
    found = [i for i, names in enumerate(wanted) if all(name in record for name in names)]
    if not found:
        raise ValueError(
            f"fields {', '.join(map(repr, record)) or '(none)'} fit no known shape; wanted "
            f"{' or '.join('/'.join(names) for names in wanted)}, or --columns"
        )
    if "messages" not in SHAPES[found[0]] and any(wanted[i] != wanted[found[0]] for i in found):
        both = " and ".join("/".join(wanted[i]) for i in found)
        raise ValueError(f"the row fits {both}: name the fields with --columns")
    return SHAPES[found[0]]


def _conversation(record: dict, shape: dict[str, str], need_reference: bool) -> tuple[dict, ...]:
    turns = _spoken if "messages" in shape else _written
    messages = turns(record, shape, need_reference)
    if _given(record, shape, "system"):
        if messages[0]["role"] == "system":
            raise ValueError(f"a system message and a {shape['system']!r} field; keep one")
        messages.insert(0, _message("system", record[shape["system"]], shape["system"]))
    return tuple(messages)


def _written(record: dict, shape: dict[str, str], need_reference: bool) -> list[dict[str, str]]:
    """The messages of one prompt and answer, each in a field of its own."""
    messages = []
    if _given(record, shape, "history"):
        name, history = shape["history"], record[shape["history"]]
        pairs = history if isinstance(history, list) else [None]
        for i, pair in enumerate(pairs, 1):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"{name!r} is not a list of [user, assistant] pairs")
            messages.append(_message("user", pair[0], f"{name} {i}, user"))
            messages.append(_message("assistant", pair[1], f"{name} {i}, assistant"))
    messages.append(_message("user", _field(record, shape["prompt"]), shape["prompt"]))
    if _given(record, shape, "input"):
        extra = _message("user", record[shape["input"]], shape["input"])
        messages[-1]["content"] += "\n" + extra["content"]
    if need_reference:
        answer = _field(record, shape["response"])
        messages.append(_message("assistant", answer, shape["response"]))
    return messages


def _spoken(record: dict, shape: dict[str, str], need_reference: bool) -> list[dict[str, str]]:
    """The messages of a list of {role, content} or {from, value}."""
    name = shape["messages"]
    entries = _field(record, name)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{name!r} is {_kind(entries)}, wanted a list of messages")
    messages = []
    for i, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"message {i} is {_kind(entry)}, wanted an object")
        role = entry.get("role", entry.get("from"))
        if not isinstance(role, str) or role not in SPEAKERS:
            raise ValueError(f"message {i}: unknown role {role!r}; known: {', '.join(SPEAKERS)}")
        text = entry.get("content", entry.get("value"))
        messages.append(_message(SPEAKERS[role], text, f"message {i}"))
    if not need_reference and messages[-1]["role"] == "assistant":
        messages.pop()
    check_turns(messages, last="assistant" if need_reference else "user")
    return messages


def check_turns(messages: Sequence[dict[str, str]], last: str) -> None:
    """ValueError unless user and assistant alternate (one system message may come first) and
    `last` speaks last."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    offset = len(messages) - len(turns)
    for i, message in enumerate(turns):
        wanted = ("user", "assistant")[i % 2]
        if message["role"] != wanted:
            raise ValueError(
                f"message {i + offset + 1} is the {message['role']}'s, wanted {wanted}"
            )
    if not turns or turns[-1]["role"] != last:
        raise ValueError(f"the conversation does not end with the {last}")


def _field(record: dict, name: str) -> object:
    if name not in record:
        raise ValueError(f"no field {name!r} among {', '.join(map(repr, record)) or 'none'}")
    return record[name]


def _given(record: dict, shape: dict[str, str], role: str) -> bool:
    """Whether an optional field is there and says something (null, "", " " and [] do not)."""
    value = record.get(shape.get(role))
    return bool(value.strip() if isinstance(value, str) else value)


def _message(role: str, text: object, where: str) -> dict[str, str]:
    if not isinstance(text, str):
        raise ValueError(f"{where!r} is {_kind(text)}, wanted text")
    if not text.strip() and role != "system":  # an empty one silences a template's own
        raise ValueError(f"{where!r} is empty")
    if _SURROGATE.search(text):
        raise ValueError(f"{where!r} holds half of a surrogate pair, which no encoding can write")
    return {"role": role, "content": text}


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    if value in ([], ""):
        return "empty"
    return names.get(type(value), "a number")


def _row_id(record: dict, name: str, messages: tuple[dict, ...], copies: Counter[str]) -> str:
    given = record.get(name)
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, str | int) or not str(given).strip():
            raise ValueError(f"{name!r} is {_kind(given)}, wanted text or an integer")
        return str(given)
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]
    copies[digest] += 1
    return digest if copies[digest] == 1 else f"{digest}-{copies[digest]}"


# ---- distilled lines


@dataclass(frozen=True)
class Distilled:
    """One line of distilled data: an assistant turn, its reference, what the seed model wrote.

    `id` is "row/turn", the assistant turns of a row counted from 0; `messages` the context, earlier
    assistant turns already replaced by their targets; `response_ids` the sampled ids without the
    end token; `target` the response where `status` is in KEPT, else the reference.
    """

    id: str
    messages: list[dict[str, str]]
    reference: str
    response: str
    response_ids: list[int]
    target: str
    status: str
    stage: str
    finish: str
    prompt_tokens: int
    response_tokens: int


def is_distilled(path: str | Path) -> bool:
    """Whether the file's first line is a distilled one (see Distilled), by its field names."""
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
    return all(f'"{name}"'.encode() in first for name in ("response_ids", "target", "status"))


def load_distilled(path: str | Path) -> list[Distilled]:
    """Every line of a distilled file, or ValueError naming the lines that are not as Distilled
    says; a torn last line is one of them: `distill.py --resume` completes a killed run."""
    path = Path(path)
    text, _ = _read(path)
    lines, bad = [], []
    seen: dict[str, int] = {}
    for number, record in _json_lines(text):
        try:
            line = _distilled(record)
            if line.id in seen:
                raise ValueError(f"id {line.id!r} is taken by line {seen[line.id]}")
        except ValueError as error:
            bad.append(f"{path}:{number}: {error}")
            continue
        seen[line.id] = number
        lines.append(line)
    if bad:
        what = f"{path}: {len(bad)} lines are no distilled data"
        raise ValueError(_listing(what, bad, "complete the file with distill.py --resume"))
    if not lines:
        raise ValueError(f"{path} holds no distilled lines")
    return lines


def _distilled(record: object) -> Distilled:
    if isinstance(record, ValueError):
        raise record
    names = [field.name for field in fields(Distilled)]
    if not isinstance(record, dict) or record.keys() != set(names):
        got = ", ".join(record) if isinstance(record, dict) else _kind(record)
        raise ValueError(f"wanted the fields {', '.join(names)}; got {got}")
    kinds = {"messages": list, "response_ids": list, "prompt_tokens": int, "response_tokens": int}
    for name, value in record.items():
        if type(value) is not kinds.get(name, str):  # `type`, as a boolean is an int to isinstance
            raise ValueError(f"{name!r} is {_kind(value)}, wanted {kinds.get(name, str).__name__}")
    line = Distilled(**record)
    if not re.fullmatch(r".+/\d+", line.id, re.DOTALL):
        raise ValueError(f"id {line.id!r}; wanted 'row/turn'")
    for i, message in enumerate(line.messages, 1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError(f"message {i}: wanted an object of role and content")
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"message {i}: unknown role {message['role']!r}")
        _message(message["role"], message["content"], f"message {i}")
    check_turns(line.messages, last="user")
    earlier = sum(m["role"] == "assistant" for m in line.messages)
    if earlier != int(line.id.rpartition("/")[2]):
        raise ValueError(f"id {line.id!r}, but {earlier} assistant turns come before")
    if not all(type(i) is int and i >= 0 for i in line.response_ids):
        raise ValueError("'response_ids' holds something else than token ids")
    if line.prompt_tokens < 0 or line.response_tokens != len(line.response_ids):
        raise ValueError(
            f"prompt_tokens={line.prompt_tokens}, response_tokens={line.response_tokens} "
            f"do not fit {len(line.response_ids)} response_ids"
        )
    if line.finish not in FINISHES or not line.status:
        raise ValueError(f"finish={line.finish!r}, status={line.status!r}; finish: {FINISHES}")
    kept = line.status in KEPT
    if not line.reference.strip() or (kept and not line.response_ids):
        raise ValueError("the target is empty")
    if line.target != (line.response if kept else line.reference):
        raise ValueError(
            f"status {line.status!r}, but 'target' is not the {'response' if kept else 'reference'}"
        )
    return line


# ---- encoding


@dataclass(frozen=True)
class Example:
    """Token ids of one assistant turn: the prompt's, then ids[n_prompt:], which carry the loss."""

    id: str
    ids: list[int]
    n_prompt: int


@dataclass
class EncodeCounts:
    """What `encode` made and did; every number in it belongs in front of the user."""

    examples: int = 0
    tokens: int = 0
    response_tokens: int = 0  # those that carry loss, end tokens included
    from_response: int = 0  # examples made of sampled ids; the others are encoded references
    truncated: int = 0  # cut from the response's end to fit max_length, so without end token
    unfinished: int = 0  # sampled up to the token limit: trained without an end token
    special: int = 0  # text spells a special token, encoded as plain text


@dataclass(frozen=True)
class _Turn:
    id: str
    messages: Sequence[dict[str, str]]
    text: str
    ids: list[int] | None  # sampled; None: encode the text
    ends: bool


def encode(
    rows: Sequence[Row] | Sequence[Distilled],
    chat: Chat,
    *,
    target: str = "target",
    max_length: int,
    truncate: bool = False,
) -> tuple[list[Example], EncodeCounts]:
    """One example per assistant turn: prompt ids + answer ids + the chat's end token.

    target      what follows the prompt. Of distilled lines: "target" (the sampled ids where the
                rewrite was kept, never a re-encoding; else the reference), "response" (always the
                sampled ids) or "reference" (then earlier turns in the context are references too:
                the control never sees a rewrite). Rows only have their reference
    max_length  tokens of a whole example. Longer ones raise ValueError naming them, or with
                `truncate` lose the end of their answer. A prompt is never cut: one that leaves no
                room for an answer always raises

    A response that hit the sampler's token limit ("response" only) gets no end token: the model
    must not learn to stop there.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}; wanted one of {', '.join(TARGETS)}")
    counts = EncodeCounts()
    examples, faults, too_long = [], [], []
    for turn in _turns(rows, target):
        prompt = chat.prompt_ids(turn.messages)
        answer = chat.response_ids(turn.text) if turn.ids is None else list(turn.ids)
        if not answer:
            faults.append(f"{turn.id}: its {target} has no token")
            continue
        if turn.ends:
            answer.append(chat.end_id)
        room = max_length - len(prompt)
        if room < 1:
            faults.append(
                f"{turn.id}: a prompt of {len(prompt)} tokens leaves no room for an answer"
            )
            continue
        if len(answer) > room:
            too_long.append(f"{turn.id}: {len(prompt)} + {len(answer)} tokens")
            answer = answer[:room]
        said = [*turn.messages, {"role": "assistant", "content": turn.text}]
        examples.append(Example(turn.id, prompt + answer, len(prompt)))
        counts.examples += 1
        counts.tokens += len(prompt) + len(answer)
        counts.response_tokens += len(answer)
        counts.from_response += turn.ids is not None
        counts.unfinished += not turn.ends
        counts.special += chat.spells_special(said)
    if faults:
        what = f"{len(faults)} turns cannot be trained on (max_length={max_length})"
        raise ValueError(_listing(what, faults, "raise --max-length"))
    if too_long and not truncate:
        what = f"{len(too_long)} turns are longer than max_length={max_length}"
        raise ValueError(_listing(what, too_long, "raise --max-length, or --truncate answers"))
    counts.truncated = len(too_long)
    return examples, counts


def _turns(rows: Sequence[Row] | Sequence[Distilled], target: str) -> Iterator[_Turn]:
    references = {row.id: row.reference for row in rows}
    for row in rows:
        if isinstance(row, Row):
            if target == "response":
                raise ValueError(
                    f"row {row.id} has no response, only its reference: target='response' needs "
                    "distilled data (scripts/distill.py makes it)"
                )
            for k, at in enumerate(row.turns):
                text = row.messages[at]["content"]
                yield _Turn(f"{row.id}/{k}", row.messages[:at], text, None, True)
            continue
        sampled = target == "response" or (target == "target" and row.status in KEPT)
        if not sampled:
            context = _as_given(row, references) if target == "reference" else row.messages
            yield _Turn(row.id, context, row.reference, None, True)
        else:
            ends = row.finish != "length" or row.status == "identical"
            yield _Turn(row.id, row.messages, row.response, row.response_ids, ends)


def _as_given(line: Distilled, references: dict[str, str]) -> list[dict[str, str]]:
    """The line's context as the data file had it: earlier answers are references again."""
    name, turn = line.id.rpartition("/")[0], 0
    messages = []
    for message in line.messages:
        if message["role"] == "assistant":
            earlier = f"{name}/{turn}"
            if earlier not in references:
                raise ValueError(
                    f"{line.id}: the reference of its earlier turn {earlier} is absent"
                )
            message = {"role": "assistant", "content": references[earlier]}
            turn += 1
        messages.append(message)
    return messages


def pack(examples: Sequence[Example] | Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Micro-batches of at most micro_tokens tokens, as indices into `examples` (or lengths).

    First fit, longest first, equals in their order: the same input gives the same batches. No
    example is split; one longer than micro_tokens goes alone. The first batch holds the longest
    example, so what does not fit the memory shows at once. Indices inside a batch ascend.
    """
    if micro_tokens < 1:
        raise ValueError(f"micro_tokens={micro_tokens}; wanted at least 1")
    lengths = [x if isinstance(x, int) else len(x.ids) for x in examples]
    batches: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (b for b, room in enumerate(rooms) if lengths[index] <= room)
        batch = next(fits, len(batches))
        if batch == len(batches):
            batches.append([])
            rooms.append(micro_tokens)
        batches[batch].append(index)
        rooms[batch] -= lengths[index]
    return [sorted(batch) for batch in batches]


def show(examples: Sequence[Example], tokenizer: Tokenizer, n: int) -> str:
    """The first n examples for a terminal: every token as id and piece; `*` marks loss."""
    lines = []
    for example in examples[:n]:
        loss = len(example.ids) - example.n_prompt
        lines.append(f"{example.id}: {len(example.ids)} tokens, {loss} with loss (*)")
        parts = (" ", example.ids[: example.n_prompt]), ("*", example.ids[example.n_prompt :])
        for mark, ids in parts:
            # a piece's own spaces become ␣, so that lines break between tokens only
            tokens = " ".join(f"{i}{tokenizer.piece(i)!r}".replace(" ", "␣") for i in ids)
            margin = f"  {mark} "
            lines += textwrap.wrap(
                tokens,
                width=96,
                initial_indent=margin,
                subsequent_indent=margin,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)
