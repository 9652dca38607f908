"""Fields of a record: their text, their type in words, whether they are given."""

from __future__ import annotations

import re

from engine.data.json_records import Number

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair: no text that UTF-8 can write
TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "a boolean",
    type(None): "null",
    bytes: "bytes",
}


def message(role: str, text: object, where: str, may_be_empty: bool = False) -> dict[str, str]:
    """One message; ValueError, naming the text by `where`, for a text that cannot be used."""
    if not isinstance(text, str):
        raise ValueError(f"{where!r} is {kind(text)}, expected text")
    may_be_empty = may_be_empty or role == "system"  # an empty one silences a template's own
    if not text.strip() and not may_be_empty:
        raise ValueError(f"{where!r} is empty")
    if SURROGATE.search(text):
        raise ValueError(f"{where!r} holds half of a surrogate pair, which UTF-8 cannot write")
    return {"role": role, "content": text}


def as_text(value: object) -> object:
    """A number as the text it was written as; everything else as it is."""
    if isinstance(value, Number):
        return value.text
    if type(value) is int:  # not isinstance, for which a bool is an int
        return str(value)
    return value


def kind(value: object) -> str:
    """The type of a JSON value in words, for messages: "text", "a list", "empty" ..."""
    if value in ([], {}, ""):
        return "empty"
    return TYPE_NAMES.get(type(value), "a number")


def required_field(record: dict, name: str) -> object:
    """The value of a field; ValueError, listing the record's fields, where it is missing."""
    if name not in record:
        given = ", ".join(repr(field) for field in record)
        raise ValueError(f"no field {name!r} among {given or 'none'}")
    return record[name]


def is_given(record: dict, shape: dict[str, str], role: str) -> bool:
    """Whether an optional field is there and not empty: null, blanks and [] count as empty."""
    name = shape.get(role)
    value = as_text(record.get(name))
    if isinstance(value, str):
        return bool(value.strip())
    return bool(value)
