"""Data: rows become token ids, ids become micro-batches.

    rows = load_rows("train.jsonl")                     # or load_distilled("distilled.jsonl")
    examples, counts = encode(rows, chat, max_length=1024)
    for batch in pack(examples[:8], micro_tokens=4096): ...

How a file becomes rows stands in rows.py; its names are offered here too. Nothing is cut in
silence: a turn that does not fit is named, or cut and counted.
"""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from engine.rows import (
    BadRow,
    Row,
    Rows,
    check_turns,
    json_lines,
    kind,
    listing,
    load_rows,
    message,
    parse_columns,
    read_utf8,
)
from kernels.philox import mix as hashed

if TYPE_CHECKING:
    from model.chat import Chat
    from model.tokenizer import Tokenizer

__all__ = [
    "BadRow", "Distilled", "EncodeCounts", "Example", "KEPT", "Row", "Rows", "check_examples",
    "encode", "fingerprint", "is_distilled", "load_distilled", "load_rows", "pack",
    "parse_columns", "show",
]  # fmt: skip
KEPT = ("accepted", "identical")  # the statuses whose target is the response, not the reference
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


def is_distilled(path: str | Path) -> bool:
    """Whether the file's first line has the field names of a distilled one."""
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
    return all(name in first for name in (b'"response_ids"', b'"target"', b'"status"'))


def load_distilled(path: str | Path) -> Rows:
    """Every line of a distilled file as Distilled; ValueError names the lines that break its rules.

    A torn last line is one of them: `distill.py --resume` completes a killed run.
    """
    path = Path(path)
    text, sha256 = read_utf8(path)
    lines, bad = [], []
    seen: dict[str, int] = {}
    for number, record in json_lines(text):
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
        raise ValueError(listing(what, bad, "a killed run is completed by distill.py --resume"))
    if not lines:
        raise ValueError(f"{path} holds no line; wanted distilled data (scripts/distill.py)")
    return Rows(lines, path, sha256)


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
    truncated: int = 0  # cut from the answer's end to fit max_length, so without end token
    unfinished: int = 0  # sampled up to the token limit: trained without an end token
    glued: int = 0  # the same, kept under --paper-exact: trained with an end token
    mixed: int = 0  # kept rewrites whose reference was taken, as --mix asks
    special: int = 0  # their text spells a special token, encoded as plain text


@dataclass(frozen=True)
class _Turn:
    id: str
    messages: Sequence[dict[str, str]]
    text: str
    ids: list[int] | None = None  # sampled; None: encode the text
    ends: bool = True
    glued: bool = False  # it ends where the sampler's limit cut it, and is trained to end there
    mixed: bool = False  # a rewrite that gave way to its reference


def encode(
    rows: Sequence[Row] | Sequence[Distilled],
    chat: Chat,
    *,
    target: str = "target",
    max_length: int,
    model_limit: int | None = None,
    truncate: bool | None = False,
    mix: float = 0.0,
    seed: int = 0,
) -> tuple[list[Example], EncodeCounts]:
    """One example per assistant turn: prompt ids, answer ids, the chat's end token.

    target      the answer. Of distilled lines: "target" (the sampled ids where the rewrite was
                kept, never a re-encoding; else the reference), "response" (always the sampled
                ids) or "reference" (then earlier answers in the context are references too: the
                control never sees a rewrite). Rows only have their reference
    max_length  tokens of a whole example. Longer ones raise ValueError naming them, or with
                `truncate` lose the end of their answer. A prompt is never cut: one that leaves no
                room for an answer always raises
    model_limit what the model was made for: where it binds, no message asks for --max-length
    truncate    None: neither flag belongs to these rows (validation)
    mix         share of the kept rewrites of "target" that give way to their reference, drawn by
                row id and `seed`; the contexts stay as they are

    A response that hit the sampler's token limit gets no end token: a model must not learn to stop
    there. (Selection keeps none such, but under --paper-exact, which wants them with an end token,
    as published: counted.) An answer without a token raises ValueError.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}; wanted one of {', '.join(TARGETS)}")
    if not 0 <= mix <= 1 or (mix and (target != "target" or isinstance(rows[0], Row))):
        raise ValueError(
            f"mix={mix} with target={target!r}: a share from 0 to 1 of the rewrites in distilled "
            "data is wanted, with target='target'"
        )
    limits = {"max_length": max_length, "model_limit": model_limit}
    counts = EncodeCounts()
    examples, faults, too_long = [], [], []
    for turn in _turns(rows, target, mix, seed):
        try:
            prompt = chat.prompt_ids(turn.messages)
        except ValueError as error:  # the chat template refuses this conversation
            faults.append(f"{turn.id}: {error}")
            continue
        answer = chat.response_ids(turn.text) if turn.ids is None else list(turn.ids)
        room = max_length - len(prompt)
        where = f"{turn.id} ({turn.messages[-1]['content'][:40]!r})"  # an id alone is a mere hash
        if not answer or room < 1:
            why = f"{len(prompt)} prompt tokens leave no room" if answer else "no token to train on"
            faults.append(f"{where}: {why}")
            continue
        if turn.ends:
            answer.append(chat.end_id)
        if len(answer) > room:
            too_long.append(f"{where}: {len(prompt)} + {len(answer)} tokens")
            answer = answer[:room]
        examples.append(Example(turn.id, prompt + answer, len(prompt)))
        counts.examples += 1
        counts.tokens += len(prompt) + len(answer)
        counts.response_tokens += len(answer)
        counts.from_response += turn.ids is not None
        counts.unfinished += not turn.ends
        counts.glued += turn.glued
        counts.mixed += turn.mixed
        said = {"role": "assistant", "content": turn.text}
        counts.special += chat.spells_special([*turn.messages, said])
    if faults:
        what = f"{len(faults)} turns cannot be trained on with max_length={max_length}"
        raise ValueError(listing(what, faults, _what_helps("remove them", **limits)))
    if too_long and not truncate:
        what = f"{len(too_long)} turns are longer than max_length={max_length}"
        cut = "remove them" if truncate is None else "--truncate answers"
        raise ValueError(listing(what, too_long, _what_helps(cut, **limits)))
    counts.truncated = len(too_long)
    return examples, counts


def _what_helps(otherwise: str, max_length: int, model_limit: int | None) -> str:
    """What to do about rows that are too long: a larger limit only where the model takes one."""
    if model_limit is None or max_length < model_limit:
        return f"raise --max-length, or {otherwise}"
    return f"the model itself was made for {model_limit} tokens: {otherwise}"


def _turns(
    rows: Sequence[Row] | Sequence[Distilled], target: str, mix: float, seed: int
) -> Iterator[_Turn]:
    references = {row.id: row.reference for row in rows}
    for row in rows:
        if isinstance(row, Row):
            if target == "response":
                raise ValueError(
                    f"row {row.id} has no response, only its reference: target='response' needs "
                    "distilled data (scripts/distill.py makes it)"
                )
            for k, at in enumerate(row.turns):
                yield _Turn(f"{row.id}/{k}", row.messages[:at], row.messages[at]["content"])
        elif target == "target" and row.status in KEPT and _drawn(row.id, seed) < mix:
            yield _Turn(row.id, row.messages, row.reference, mixed=True)
        elif target == "response" or (target == "target" and row.status in KEPT):
            cut = row.finish == "length" and row.status != "identical"
            glued = cut and row.status in KEPT
            ends = glued or not cut
            yield _Turn(row.id, row.messages, row.response, row.response_ids, ends, glued)
        elif target == "target":
            yield _Turn(row.id, row.messages, row.reference)
        else:
            yield _Turn(row.id, _as_given(row, references), row.reference)


def _drawn(row_id: str, seed: int) -> float:
    """A number in [0, 1) that belongs to the row."""
    return hashed("mix", seed, row_id) / 2**64


def _as_given(line: Distilled, references: dict[str, str]) -> list[dict[str, str]]:
    """The line's context as the data file had it: earlier answers are references again."""
    row = line.id.rpartition("/")[0]
    messages, turn = [], 0
    for said in line.messages:
        if said["role"] == "assistant":
            if f"{row}/{turn}" not in references:
                raise ValueError(f"{line.id}: the line of its earlier turn {row}/{turn} is absent")
            said = {"role": "assistant", "content": references[f"{row}/{turn}"]}
            turn += 1
        messages.append(said)
    return messages


def check_examples(examples: Sequence[Example]) -> None:
    """ValueError naming rows that cannot be trained on."""
    if not examples:
        raise ValueError("there is nothing to train on: no example")
    empty = [e.id for e in examples if not 0 < e.n_prompt < len(e.ids)]
    if empty:
        raise ValueError(f"{len(empty)} rows have no prompt or no response token: {empty[:10]}")


def fingerprint(examples: Sequence[Example]) -> str:
    """Hash of what is trained on: ids, tokens, where the loss begins."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.ids, example.n_prompt]).encode())
    return digest.hexdigest()


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


def show(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    n: int,
    losses: Sequence[Sequence[float]] | None = None,
) -> str:
    """The first n examples for a terminal: every token as id and piece; `*` marks loss.

    With `losses`, per example those of its response tokens (nats), each stands behind its token.
    """
    lines = []
    for number, example in enumerate(examples[:n]):
        loss = len(example.ids) - example.n_prompt
        mean = "" if losses is None else f", {sum(losses[number]) / loss:.3f} nats each"
        lines.append(f"{example.id}: {len(example.ids)} tokens, {loss} with loss (*){mean}")
        halves = example.ids[: example.n_prompt], example.ids[example.n_prompt :]
        for margin, ids in zip(("    ", "  * "), halves, strict=True):
            # A piece's own spaces become ␣, so that lines break between tokens only.
            tokens = [f"{i}{tokenizer.piece(i)!r}".replace(" ", "␣") for i in ids]
            if losses is not None and margin.strip():
                pairs = zip(tokens, losses[number], strict=True)
                tokens = [f"{token}:{nats:.2f}" for token, nats in pairs]
            lines += textwrap.wrap(
                " ".join(tokens),
                width=96,
                initial_indent=margin,
                subsequent_indent=margin,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)
