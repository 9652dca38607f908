"""A record's shape: which of its fields holds the prompt, the answer, the messages

A shape is {role: field name}. It is found by the field names (SHAPES), or named by `--columns`.
"""

from __future__ import annotations

from pathlib import Path

from engine.data.fields import is_given
from engine.data.records import advice_for_wrapped_rows

# roles that `--columns` may name; input, history, system, id and tests are optional in every row
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

    `id=` names no field: ids are then made of the rows' texts. ValueError for anything else.
    """
    columns: dict[str, str] = {}
    for part in text.split(","):
        role, equals, name = (piece.strip() for piece in part.partition("="))
        is_named = name or (role == "id" and equals)
        if not is_named or role not in ROLES or role in columns:
            raise ValueError(
                f"--columns: cannot read {part.strip()!r} in {text!r}; expected ROLE=FIELD, each "
                f"role once, roles being {', '.join(ROLES)} (id= for ids made of the texts)"
            )
        columns[role] = name
    return columns


def check_columns(columns: dict[str, str], need_reference: bool) -> None:
    """ValueError for {role: field} with unknown roles, or from which no row can be made."""
    unknown = columns.keys() - set(ROLES)
    if unknown:
        raise ValueError(f"columns: unknown roles {sorted(unknown)}; expected {', '.join(ROLES)}")
    if columns.keys() <= {"id", "tests"}:  # beside these each row's shape is still found
        return
    if ("messages" in columns) == ("prompt" in columns):
        raise ValueError(f"columns={columns}: name either 'prompt' or 'messages'")
    if need_reference and "prompt" in columns and "response" not in columns:
        raise ValueError(f"columns={columns}: the answer is missing; add response=FIELD")


def find_shape(path: Path, record: dict, need_reference: bool) -> dict[str, str]:
    """The one known shape whose fields the record has.

    ValueError where no shape fits, or several fit that take their texts from different fields.
    """
    needed = ("messages", "prompt", "response") if need_reference else ("messages", "prompt")
    fitting = []  # (shape, names of the fields that it needs)
    every_shape = {}  # as keys, for the message: each once and in order
    for shape in SHAPES:
        names = [shape[role] for role in needed if role in shape]
        every_shape["/".join(names)] = None
        if all(name in record for name in names):
            fitting.append((shape, names))
    if not fitting:
        fields = ", ".join(map(repr, record)) or "(none)"
        advice = advice_for_wrapped_rows(path, record)
        raise ValueError(
            f"fields {fields} fit no known shape; "
            f"expected {' or '.join(every_shape)}, or --columns{advice}"
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


def check_fields_are_supported(
    record: dict, shape: dict[str, str], found_shape: dict[str, str]
) -> None:
    """ValueError for a field that would change what is trained on and is not supported.

    found_shape    the shape that `find_shape` found; {} where --columns names the text
    """
    if record.get("loss_mask") is not None:
        raise ValueError(
            "'loss_mask' of a row is not supported: give the messages a \"weight\" of 0 or 1"
        )
    if found_shape or "messages" in shape:
        for name in ("tools", "functions"):
            if record.get(name):
                raise ValueError(f"{name!r}: tool calls are not supported")
    if "prompt" in found_shape and "context" not in found_shape.values():
        if is_given(record, _DOLLY, "input"):
            prompt = found_shape["prompt"]
            response = found_shape.get("response", "response")
            raise ValueError(
                f"'context' is not used: say --columns prompt={prompt},input=context,"
                f"response={response} to put it after the {prompt}, or the same without "
                "input=context to leave it out"
            )
