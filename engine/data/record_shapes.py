"""A record's shape: which of its fields holds the prompt, the answer, the messages

A shape is {role: field name}. It is found by the field names (SHAPES), or named by `--columns`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from engine.data.fields import is_given
from engine.data.records import advice_for_wrapped_rows

# roles that `--columns` may name; all but prompt, response and messages are optional in every row
ROLES = ("prompt", "input", "response", "history", "system", "messages", "id", "tests", "tools")
MAY_NAME_NONE = ("id", "tools")
SHOWN = 200  # characters of a row in a message
TOOL_FIELDS = ("tools", "functions")  # in which tools are looked for
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

    `id=` names no field: ids are then made of the rows' texts; `tools=` leaves the tools out.
    ValueError for anything else.
    """
    columns: dict[str, str] = {}
    for part in text.split(","):
        role, equals, name = part.partition("=")
        role = role.strip()
        name = name.strip()
        names_none = role in MAY_NAME_NONE and equals != "" and not name
        if not (name or names_none) or role not in ROLES or role in columns:
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
    if columns.keys() <= {"id", "tests", "tools"}:  # beside these each row's shape is still found
        return
    names_both = "messages" in columns and "prompt" in columns
    names_neither = "messages" not in columns and "prompt" not in columns
    if names_both or names_neither:
        raise ValueError(f"columns={columns}: name either 'prompt' or 'messages'")
    if need_reference and "prompt" in columns and "response" not in columns:
        raise ValueError(f"columns={columns}: the answer is missing; add response=FIELD")


class FittingShape(NamedTuple):
    """A known shape whose needed fields a record has."""

    shape: dict[str, str]
    names: list[str]  # of the fields that it needs


def find_shape(path: Path, record: dict, need_reference: bool) -> dict[str, str]:
    """The one known shape whose fields the record has.

    ValueError where no shape fits, or several fit that take their texts from different fields.
    """
    needed_roles = ("messages", "prompt", "response") if need_reference else ("messages", "prompt")
    fitting: list[FittingShape] = []
    descriptions: list[str] = []  # of every shape by its needed fields, for the message
    for shape in SHAPES:
        names = [shape[role] for role in needed_roles if role in shape]
        description = "/".join(names)
        if description not in descriptions:
            descriptions.append(description)
        if all(name in record for name in names):
            fitting.append(FittingShape(shape, names))
    if not fitting:
        fields = ", ".join(repr(name) for name in record) or "(none)"
        advice = advice_for_wrapped_rows(path, record) or _nearest(record, needed_roles)
        raise ValueError(
            f"fields {fields} fit no known shape; "
            f"expected {' or '.join(descriptions)}, or --columns{advice}"
        )
    first = fitting[0]
    is_ambiguous = any(other.names != first.names for other in fitting)
    if "messages" not in first.shape and is_ambiguous:
        all_fitting = " and ".join("/".join(fits.names) for fits in fitting)
        raise ValueError(f"the row fits {all_fitting}; say which with --columns")
    # a row of Alpaca's fields with Dolly's context instead of an input
    is_alpaca_without_input = first.shape is _ALPACA and not is_given(record, _ALPACA, "input")
    if is_alpaca_without_input and is_given(record, _DOLLY, "input"):
        return {**_ALPACA, "input": "context"}
    return first.shape


def _nearest(record: dict, needed_roles: Sequence[str]) -> str:
    """The end of a message about a record without a shape: the row, and the shape nearest to it.

    The nearest is the one of whose needed fields the record has most, names that are spelled almost
    alike counting half.
    """
    best_score = 0.0
    best: list[str] = []
    for shape in SHAPES:
        names = [shape[role] for role in needed_roles if role in shape]
        score = sum(_likeness(name, record) for name in names) / len(names)
        if score > best_score:
            best_score = score
            best = names
    row = json.dumps(record, ensure_ascii=False, default=str)
    shown = row if len(row) <= SHOWN else row[:SHOWN] + " ..."
    if not best:
        return f"; the row: {shown}"
    missing = ", ".join(repr(name) for name in best if name not in record)
    return f"; the nearest is {'/'.join(best)}, without {missing}; the row: {shown}"


def _likeness(name: str, record: dict) -> float:
    """1 where the record has the field, 0.5 where it has one of almost that name, else 0."""
    if name in record:
        return 1.0
    fields = [field for field in record if isinstance(field, str)]
    return 0.5 if get_close_matches(name, fields, n=1, cutoff=0.75) else 0.0


def with_tools_field(
    record: dict, shape: dict[str, str], found_shape: dict[str, str]
) -> dict[str, str]:
    """The shape with the field that holds the record's tools, if it has one.

    found_shape    the shape that `find_shape` found; {} where --columns names the text: then tools
                   are read only beside messages, or where --columns names their field. ValueError
                   for two fields with tools
    """
    if "tools" in shape or not (found_shape or "messages" in shape):
        return shape
    given = [name for name in TOOL_FIELDS if record.get(name) not in (None, "", [], "[]")]
    if len(given) > 1:
        raise ValueError(f"both {given[0]!r} and {given[1]!r} are given; keep one")
    return {**shape, "tools": given[0]} if given else shape


def check_fields_are_supported(
    record: dict, shape: dict[str, str], found_shape: dict[str, str]
) -> None:
    """ValueError for a field that is not supported and would change the texts or the loss.

    found_shape    the shape that `find_shape` found; {} where --columns names the text
    """
    if record.get("loss_mask") is not None:
        raise ValueError(
            "'loss_mask' of a row is not supported: give the messages a \"weight\" of 0 or 1"
        )
    if "prompt" in found_shape and "context" not in found_shape.values():
        if is_given(record, _DOLLY, "input"):
            prompt = found_shape["prompt"]
            response = found_shape.get("response", "response")
            raise ValueError(
                f"'context' is not used: say --columns prompt={prompt},input=context,"
                f"response={response} to put it after the {prompt}, or the same without "
                "input=context to leave it out"
            )
