"""Which field of a record holds the prompt, the answer, the messages: the shapes people have."""

from __future__ import annotations

from pathlib import Path

from engine.data.fields import is_given
from engine.data.records import wrapped

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


def check_columns(columns: dict[str, str], need_reference: bool) -> None:
    if unknown := columns.keys() - set(ROLES):
        raise ValueError(f"columns: unknown roles {sorted(unknown)}; wanted {', '.join(ROLES)}")
    if columns.keys() <= {"id", "tests"}:
        return
    if ("messages" in columns) == ("prompt" in columns):
        raise ValueError(f"columns={columns}: name either 'prompt' or 'messages'")
    if need_reference and "prompt" in columns and "response" not in columns:
        raise ValueError(f"columns={columns}: the answer is missing; add response=FIELD")


# ---- a record's shape, text and id


def find_shape(path: Path, record: dict, need_reference: bool) -> dict[str, str]:
    """The columns of the one known shape that the record's fields fit.

    ValueError where none fits, or several whose texts stand in different fields.
    """
    needed = ("messages", "prompt", "response") if need_reference else ("messages", "prompt")
    fitting = []  # (shape, names of the fields that it needs)
    every_shape = {}  # what the message lists, each once and in order
    for shape in SHAPES:
        names = [shape[role] for role in needed if role in shape]
        every_shape["/".join(names)] = None
        if all(name in record for name in names):
            fitting.append((shape, names))
    if not fitting:
        fields = ", ".join(map(repr, record)) or "(none)"
        raise ValueError(
            f"fields {fields} fit no known shape; "
            f"wanted {' or '.join(every_shape)}, or --columns{wrapped(path, record)}"
        )
    shape, names = fitting[0]
    ambiguous = any(others != names for _, others in fitting)
    if "messages" not in shape and ambiguous:
        both = " and ".join("/".join(others) for _, others in fitting)
        raise ValueError(f"the row fits {both}; say which with --columns")
    no_input = shape is _ALPACA and not is_given(record, shape, "input")
    if no_input and is_given(record, _DOLLY, "input"):
        return {**shape, "input": "context"}
    return shape


def check_fields_are_supported(record: dict, shape: dict[str, str], found: dict[str, str]) -> None:
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
        if is_given(record, _DOLLY, "input"):
            prompt, response = found["prompt"], found.get("response", "response")
            raise ValueError(
                f"'context' is not used: say --columns prompt={prompt},input=context,"
                f"response={response} to put it behind the {prompt}, or the same without "
                "input=context to leave it out"
            )
