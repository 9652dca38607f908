"""Calls whose arguments stand in tags, as Qwen3-Coder writes them

    <function=get_weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>

This notation has no types: the text "2" and the number 2 are written alike, and a boolean may be
written `True` or `true`. So its calls are compared by what their arguments can be read as. Space
around an argument does not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from engine.verify.calls import json_meaning

_OPENS = re.compile(r"<function=([^<>\s]+)\s*>")
_CLOSES = "</function>"
_PARAMETER = re.compile(r"<parameter=([^<>\s]+)\s*>((?:(?!<parameter=).)*?)</parameter>", re.DOTALL)
_CONSTANTS = {"True": True, "False": False, "None": None}  # as Python writes them


class TaggedCall(NamedTuple):
    """A call in tags."""

    start: int  # of <function=...>
    end: int  # past </function>
    meaning: object  # a hashable value that is equal for equal calls


def tagged_calls(text: str) -> list[TaggedCall]:
    """Every call in tags, in the order of the text."""
    calls = []
    position = 0
    while opened := _OPENS.search(text, position):
        closes = text.find(_CLOSES, opened.end())
        if closes < 0:
            break
        arguments = dict(_PARAMETER.findall(text[opened.end() : closes]))
        position = closes + len(_CLOSES)
        meaning = meaning_in_tags({"name": opened[1], "arguments": arguments})
        calls.append(TaggedCall(opened.start(), position, meaning))
    return calls


def meaning_in_tags(call: Mapping[str, Any]) -> object:
    """A hashable value that is equal for calls {"name", "arguments"} that are written alike."""
    arguments = {name: _read(value) for name, value in call["arguments"].items()}
    return (call["name"], json_meaning(arguments))


def _read(value: Any) -> Any:
    """An argument as it can be read from its text; a text that is no JSON is itself."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
