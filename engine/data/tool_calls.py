"""Tools and their calls in a record: the notations that people have, as model/messages.py has them

tools     a list of definitions, or that list as JSON in a text; each in OpenAI's form
          {"type": "function", "function": {...}}, or bare: {"name", "description", "parameters"}
calls     OpenAI's {"function": {"name", "arguments"}}, or bare {"name", "arguments"}; the
          arguments an object, or that object as JSON in a text
"""

from __future__ import annotations

import json
from typing import Any

from engine.data.fields import SURROGATE, kind
from engine.data.json_records import Number
from model.messages import calls_of, texts_of


def tools_of_field(value: object, name: str) -> list[dict[str, Any]]:
    """The tools in the field `name` of a record; [] where it is empty. ValueError for no tools."""
    given = _parsed(value, repr(name)) if isinstance(value, str) and value.strip() else value
    if given in (None, "", [], {}) or (isinstance(given, str) and not given.strip()):
        return []
    if not isinstance(given, list):
        raise ValueError(f"{name!r} is {kind(given)}, expected a list of tools")
    return [_tool(tool, f"tool {number} of {name!r}") for number, tool in enumerate(given, 1)]


def _tool(given: object, where: str) -> dict[str, Any]:
    """A tool's definition in OpenAI's form."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {kind(given)}, expected an object with a name")
    inner = given.get("function")
    definition = inner if isinstance(inner, dict) else given
    if not isinstance(definition.get("name"), str) or not definition["name"].strip():
        raise ValueError(f"{where} has no name")
    _check_texts(given, where)
    if definition is given:
        return {"type": "function", "function": plain(given)}
    return plain(given)


def calls_of_entry(entry: dict, where: str) -> list[dict[str, Any]]:
    """The calls that an entry of `messages` makes; [] where it makes none."""
    both = entry.get("tool_calls") and entry.get("function_call")
    if both:
        raise ValueError(f"{where} has both 'tool_calls' and 'function_call'; keep one")
    if entry.get("function_call"):
        return calls_of_text(entry["function_call"], f"{where}, 'function_call'")
    if entry.get("tool_calls"):
        return calls_of_text(entry["tool_calls"], f"{where}, 'tool_calls'")
    return []


def calls_of_text(value: object, where: str) -> list[dict[str, Any]]:
    """One call or a list of calls, as objects or as JSON in a text."""
    given = _parsed(value, where) if isinstance(value, str) else value
    calls = given if isinstance(given, list) else [given]
    if not calls:
        raise ValueError(f"{where}: there is no call in it")
    return [_call(call, f"{where}, call {number}") for number, call in enumerate(calls, 1)]


def _call(given: object, where: str) -> dict[str, Any]:
    """A call in OpenAI's form, its arguments an object."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {kind(given)}, expected an object with name and arguments")
    inner = given.get("function")
    function = inner if isinstance(inner, dict) else given
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where} has no name of a function")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        arguments = _parsed(arguments, f"{where}: the arguments of {name!r}")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{where}: the arguments of {name!r} are {kind(arguments)}, expected an object, or one "
            "as JSON in a text"
        )
    call = {"type": "function", "function": {"name": name, "arguments": plain(arguments)}}
    call_id = given.get("id")
    if isinstance(call_id, str) and call_id:
        call["id"] = call_id
    _check_texts(call, where)
    return call


def _parsed(text: str, where: str) -> object:
    """The JSON value of a text."""
    try:
        return json.loads(text, parse_float=Number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def plain(value: Any) -> Any:
    """A copy of a JSON value, its numbers plain ones."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(value)
    return value


def _check_texts(value: dict, where: str) -> None:
    """ValueError for a text that UTF-8 cannot write."""
    for text in texts_of(value):
        if SURROGATE.search(text):
            raise ValueError(f"{where} holds half of a surrogate pair, which UTF-8 cannot write")


def calls_as_text(message: dict[str, Any]) -> str:
    """A message of the assistant as one text: its content, then its calls as Hermes writes them.

    For messages and verdicts, which compare calls as objects. What a model is shown and learns is
    the form of its own chat template.
    """
    parts = [message["content"]] if message["content"] else []
    for call in calls_of(message):
        source = json.dumps(call["function"], ensure_ascii=False)
        parts.append(f"<tool_call>\n{source}\n</tool_call>")
    return "\n".join(parts)


def tools_as_text(tools: list[dict[str, Any]]) -> str:
    """Tools for a reader: the definition of one a line, as JSON."""
    definitions = [tool.get("function", tool) for tool in tools]
    return "\n".join(json.dumps(each, ensure_ascii=False) for each in definitions)
