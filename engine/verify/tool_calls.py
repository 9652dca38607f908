"""Verdicts for answers that call tools: calls are compared as objects

    verdict               of any verifier, for a row that may call tools or have thoughts
    verify_tool_calls     the calls of a text are those of a message
    verify_written_calls  the same, and they are written as the chat template writes calls

The order of keys, the spelling of numbers (1, 1.0, 1e0) and of texts, arguments as an object or as
JSON in a text, and the order of several calls do not count. A call in Python's notation,
`f(city="Oslo")`, is the call {"name": "f", "arguments": {"city": "Oslo"}}. How often a call is made
counts.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.data.rows import Row
from engine.data.thinking import without_thoughts
from engine.verify.calls import json_calls, json_spans, meaning_of_call, python_calls
from model.messages import calls_of

if TYPE_CHECKING:
    from engine.verify.verifiers import Verifier


def verdict(verifier: Verifier, row: Row, text: str) -> tuple[bool, str]:
    """What `verifier` says of an answer to the row.

    An answer that should call tools is judged by its calls, whatever the verifier. Unless thoughts
    are text like any other (`Row.thinking`), what follows them is judged.
    """
    if row.thinking != "keep":
        row = _without_thoughts(row)
        text = without_thoughts(text)
    calls = calls_of(row.messages[-1])
    return verify_tool_calls(calls, text) if calls else verifier(row, text)


def _without_thoughts(row: Row) -> Row:
    """The row, its reference without thoughts."""
    *context, reference = row.messages
    bare = {**reference, "content": without_thoughts(reference["content"])}
    return dataclasses.replace(row, messages=(*context, bare))


def verify_tool_calls(calls: Sequence[Mapping[str, Any]], text: str) -> tuple[bool, str]:
    """Accepts a text that makes exactly these calls (those of a message)."""
    expected = Counter(meaning_of_call(call["function"]) for call in calls)
    made = calls_in(text)
    if not made:
        return False, "no_call"
    return (True, "ok") if made == expected else (False, "mismatch")


def verify_written_calls(
    calls: Sequence[Mapping[str, Any]], alone: str, has_text: bool, row: Row, text: str
) -> tuple[bool, str]:
    """Accepts a text that makes exactly these calls in the notation of the chat template.

    alone: the calls alone, as the template writes them. has_text: whether the reference has text
    beside its calls; then the text may have some too. A call in another notation would teach the
    model a form that no program behind it reads: `notation`.
    """
    ok, reason = verify_tool_calls(calls, text)
    if not ok:
        return ok, reason
    wanted = notation(alone)
    written = notation(text)
    is_as_wanted = wanted in written if has_text else wanted == written
    return (True, "ok") if is_as_wanted else (False, "notation")


def calls_in(text: str) -> Counter[object]:
    """The meaning of every call in a text, with its count.

    Calls in Python's notation count where there is none in JSON.
    """
    made = Counter(call.meaning for call in json_calls(text))
    if made:
        return made
    for call in python_calls(text):
        meaning = _meaning_of_python(call.source)
        if meaning is not None:
            made[meaning] += 1
    return made


def _meaning_of_python(source: str) -> object | None:
    """The meaning of `f(name=value, ...)` as a call in JSON; None for any other expression."""
    try:
        tree = ast.parse(source.strip(), mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args:
            return None
        arguments = {part.arg: ast.literal_eval(part.value) for part in tree.keywords}
        name = ast.unparse(tree.func)
        json.dumps(arguments)  # TypeError for what JSON has not: sets, bytes, complex numbers
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    if None in arguments:  # f(**others)
        return None
    return meaning_of_call({"name": name, "arguments": arguments})


def notation(text: str) -> str:
    """The text without spaces, each call reduced to how it is written: {"name","parameters"}."""
    parts = []
    done = 0
    for start, end, value in json_spans(text):
        parts += [text[done:start], _form(value)]
        done = end
    parts.append(text[done:])
    if done == 0:  # no call in JSON
        parts = []
        for call in python_calls(text):
            parts += [text[done : call.position], f"{call.name}()"]
            done = call.position + len(call.source)
        parts.append(text[done:])
    return re.sub(r"\s", "", "".join(parts))


def _form(value: Any) -> str:
    """How a JSON value that holds calls is written: its keys, and the types of the arguments."""
    if isinstance(value, list):
        return "[" + ",".join(_form(part) for part in value) + "]"
    if not isinstance(value, dict):
        return ""
    keys = []
    for key in sorted(value):
        part = value[key]
        if key in ("tool_calls", "function"):
            keys.append(f"{key}:{_form(part)}")
        else:
            keys.append(f"{key}:text" if isinstance(part, str) else key)
    return "{" + ",".join(keys) + "}"
