"""Fields of a record: their text, their type in words, whether they are given."""

from __future__ import annotations

import re

from engine.data.json_records import Number

SURROGATE = re.compile("[\ud800-\udfff]")


def message(role: str, text: object, where: str) -> dict[str, str]:
    """One message; ValueError, naming the text by `where`, for a text that cannot be used."""
    if not isinstance(text, str):
        raise ValueError(f"{where!r} is {kind(text)}, expected text")
    if not text.strip() and role != "system":  # an empty system message silences a template's own
        raise ValueError(f"{where!r} is empty")
    if SURROGATE.search(text):
        raise ValueError(f"{where!r} holds half of a surrogate pair, which UTF-8 cannot write")
    return {"role": role, "content": text}


def as_text(value: object) -> object:
    """A number as the text it was written as; everything else as it is."""
    if isinstance(value, Number):
        return value.text
    return str(value) if type(value) is int else value


def kind(value: object) -> str:
    """The type of a JSON value in words, for messages: "text", "a list", "empty" ..."""
    if value in ([], {}, ""):
        return "empty"
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def required_field(record: dict, name: str) -> object:
    """The value of a field; ValueError, listing the record's fields, where it is missing."""
    if name not in record:
        raise ValueError(f"no field {name!r} among {', '.join(map(repr, record)) or 'none'}")
    return record[name]


def is_given(record: dict, shape: dict[str, str], role: str) -> bool:
    """Whether an optional field is there and not empty: null, blanks and [] count as empty."""
    value = as_text(record.get(shape.get(role)))
    if isinstance(value, str):
        return bool(value.strip())
    return bool(value)
