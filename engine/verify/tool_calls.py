"""Verdicts for answers that call tools: calls are compared as objects

    verdict               of any verifier, for a row that may call tools or have thoughts
    verifier_of_calls     the verifier of a rewrite of an answer that calls tools
    verify_tool_calls     the calls of a text are those of a message
    verify_written_calls  the same, and they are written as the chat template writes calls

The order of keys, the spelling of numbers (1, 1.0, 1e0) and of texts, arguments as an object or as
JSON in a text, and the order of several calls do not count. A call in Python's notation,
`f(city="Oslo")`, or in tags (tagged_calls.py) is the call {"name": "f", "arguments": {"city":
"Oslo"}}. How often a call is made counts. A call in a thought is none.

A user's own verifier (module:function) judges calls itself: its row's last message has them.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from engine.data.rows import Row
from engine.data.thinking import without_thoughts
from engine.verify.calls import json_calls, json_spans, meaning_of_call, python_calls
from engine.verify.tagged_calls import TaggedCall, meaning_in_tags, tagged_calls
from engine.verify.verifiers import Verifier, is_users
from model.messages import calls_of


def verdict(verifier: Verifier, row: Row, text: str) -> tuple[bool, str]:
    """What `verifier` says of an answer to the row.

    An answer that should call tools is judged by its calls, whatever built-in verifier is named.
    Unless thoughts are text like any other (`Row.thinking`), what follows them is judged.
    """
    if row.thinking != "keep":
        row = _without_thoughts(row)
        text = without_thoughts(text)
    calls = calls_of(row.messages[-1])
    if calls and not is_users(verifier):
        return verify_tool_calls(calls, text)
    return verifier(row, text)


def verifier_of_calls(verifier: Verifier, answer: Mapping[str, Any], written: str) -> Verifier:
    """The verifier of a rewrite of `answer`, the assistant's message that calls tools.

    verifier: that of `--verify`. written: the calls alone, as the chat template writes them.
    """
    if is_users(verifier):
        return partial(_of_message, verifier, answer)
    has_text = bool(without_thoughts(answer["content"]).strip())
    return partial(verify_written_calls, calls_of(answer), without_thoughts(written), has_text)


def _of_message(
    verifier: Verifier, answer: Mapping[str, Any], row: Row, text: str
) -> tuple[bool, str]:
    """What the verifier says where the row's reference is the message `answer`."""
    *context, _ = row.messages
    return verifier(dataclasses.replace(row, messages=(*context, answer)), text)


def _without_thoughts(row: Row) -> Row:
    """The row, its reference without thoughts."""
    *context, reference = row.messages
    bare = {**reference, "content": without_thoughts(reference["content"])}
    return dataclasses.replace(row, messages=(*context, bare))


def verify_tool_calls(calls: Sequence[Mapping[str, Any]], text: str) -> tuple[bool, str]:
    """Accepts a text that makes exactly these calls (those of a message)."""
    functions = [call["function"] for call in calls]
    text = without_thoughts(text)
    tagged = _calls_in_tags(text)
    if tagged:
        expected = Counter(meaning_in_tags(function) for function in functions)
        made = Counter(call.meaning for call in tagged)
    else:
        expected = Counter(meaning_of_call(function) for function in functions)
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
    written = notation(without_thoughts(text))
    is_as_wanted = wanted in written if has_text else wanted == written
    return (True, "ok") if is_as_wanted else (False, "notation")


def _calls_in_tags(text: str) -> list[TaggedCall]:
    """The calls in tags; [] where a call in JSON comes before them, in whose arguments they are."""
    tagged = tagged_calls(text)
    if not tagged:
        return []
    is_first = all(tagged[0].start < call.position for call in json_calls(text))
    return tagged if is_first else []


def calls_in(text: str) -> Counter[object]:
    """The meaning of every call in a text in JSON or in Python's notation, with its count.

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


class _WrittenCall(NamedTuple):
    """A call, or a list of calls, in a text."""

    start: int
    end: int
    form: str  # how it is written, without what it says


def notation(text: str) -> str:
    """The text without spaces, each call reduced to how it is written: {"name","parameters"}."""
    parts = []
    done = 0
    for call in _written_calls(text):
        parts += [text[done : call.start], call.form]
        done = call.end
    parts.append(text[done:])
    return re.sub(r"\s", "", "".join(parts))


def _written_calls(text: str) -> list[_WrittenCall]:
    """The calls of a text, all in one notation: in tags, else in JSON, else in Python's."""
    tagged = _calls_in_tags(text)
    if tagged:
        return [_WrittenCall(call.start, call.end, "<function>") for call in tagged]
    in_json = json_spans(text)
    if in_json:
        return [_WrittenCall(span.start, span.end, _form(span.value)) for span in in_json]
    calls = []
    for call in python_calls(text):
        end = call.position + len(call.source)
        calls.append(_WrittenCall(call.position, end, "()"))
    return calls


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
