"""Function calls in a text: which are made, and whether two are the same

Two notations, never mixed (a text that answers a JSON call in Python's notation is not the same):

    Python     name(...) with all that follows it: .method(...), [index], (...), .attribute
    JSON       {"name": ..., "arguments": {...}}, also "parameters" for "arguments", the arguments
               as JSON in a string, wrapped in {"function": {...}}, in lists or in "tool_calls";
               tags or fences around them (<tool_call>) do not matter

Python's calls are compared as its parser reads them: spaces, comments, kind of quotes and the order
of keyword arguments, dictionary keys and set elements do not count, the order of positional
arguments does; numbers compare by value; true/false/null are True/False/None. A call that does not
parse (a `<placeholder>`) is compared as text without spaces and quotes.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

_CALL = re.compile(r"(?<![\w.])([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)[ \t]*(?=\()")
_ATTRIBUTE = re.compile(r"(\s*)\.[A-Za-z_]\w*([ \t]*\()?")
_JSON_NAMES = {"true": True, "false": False, "null": None}
_NEVER_PARSED = (SyntaxError, ValueError, RecursionError, MemoryError)
# A text with more of these than any real one has is given up: it would take the square of its
# length. What is left unread is no call, so that such a text is not accepted.
UNCLOSED, PARTS, JSON_STARTS = 100, 50, 1000


# ---- Python's notation


def python_calls(text: str, names: set[str] | None = None) -> Iterator[tuple[int, str, str]]:
    """(place, name, source) of every outermost call, of these names only where they are given.

    The source is the longest expression that begins with the call: chained calls, indices and
    attributes belong to it.
    """
    at, unclosed = 0, 0
    while (found := _CALL.search(text, at)) and unclosed < UNCLOSED:
        at = found.end()
        if names is None or found[1] in names:
            source = _expression(text, found.start(), at)
            if source is None:
                unclosed += 1
            else:
                yield found.start(), found[1], source
                at = found.start() + len(source)


def _expression(text: str, start: int, parenthesis: int) -> str | None:
    """The longest expression from `start` on whose first parenthesis is that one; None where it is
    never closed. Where nothing parses, all that looks like one."""
    end = _closing(text, parenthesis)
    if end is None:
        return None
    sources = [text[start:end]]
    while len(sources) < PARTS and (end := _next_part(text, end)) is not None:
        sources.append(text[start:end])
    return next((s for s in reversed(sources) if _parsed(s) is not None), sources[-1])


def _next_part(text: str, end: int) -> int | None:
    """Past what goes on a call that ends there: (...), [...], .name(...), .name; None if nothing.

    A method may stand on the next line; a name alone may not, nor one with a space before its dot.
    """
    if text[end : end + 1] in ("(", "["):
        return _closing(text, end)
    found = _ATTRIBUTE.match(text, end)
    if found is None:
        return None
    if found[2]:
        return _closing(text, found.end() - 1)
    return None if found[1] else found.end()


def _closing(text: str, start: int) -> int | None:
    """Past the bracket that closes the one at `start`; None where none does.

    As Python reads it, where that parses; else without comments (`f(color=#fff)` has none) and
    triple quotes.
    """
    as_python, plain = _scan(text, start, python=True), _scan(text, start, python=False)
    if as_python is not None and (plain is None or _parsed(f"f{text[start:as_python]}")):
        return as_python
    return plain


def _scan(text: str, start: int, python: bool) -> int | None:
    opens, closes = text[start], {"(": ")", "[": "]"}[text[start]]
    depth, quote, at = 0, "", start
    while at < len(text):
        char = text[at]
        if quote:
            if char == "\\":
                at += 1
            elif text.startswith(quote, at):
                at += len(quote) - 1
                quote = ""
        elif char in "'\"":
            quote = char * 3 if python and text.startswith(char * 3, at) else char
            at += len(quote) - 1
        elif char == "#" and python:
            line = text.find("\n", at)
            at = len(text) if line < 0 else line
        elif char == opens:
            depth += 1
        elif char == closes:
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    return None


def _parsed(source: str) -> ast.expr | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string literal warns
            return ast.parse(f"({source.strip()}\n)", mode="eval").body  # over several lines
    except _NEVER_PARSED:
        return None


def call_meaning(source: str) -> object:
    """A call of Python's notation in a form in which equal calls are equal."""
    tree = _parsed(source)
    try:
        if tree is not None:
            return _canonical(tree)
    except RecursionError:
        pass
    return re.sub(r"[\s'\"]", "", source)


def _canonical(node: ast.expr) -> object:
    match node:
        case ast.Call(func=func, args=args, keywords=keywords):
            named = frozenset((keyword.arg, _canonical(keyword.value)) for keyword in keywords)
            return ("call", _canonical(func), tuple(map(_canonical, args)), named)
        case ast.Attribute(value=value, attr=attribute):
            return ("attribute", _canonical(value), attribute)
        case ast.Subscript(value=value, slice=index):
            return ("index", _canonical(value), _canonical(index))
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return (type(node).__name__, tuple(map(_canonical, parts)))
        case ast.Set(elts=parts):
            return ("set", frozenset(map(_canonical, parts)))
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return ("dict", frozenset((k and _canonical(k), _canonical(v)) for k, v in pairs))
        case ast.Name(id=name) if name in _JSON_NAMES:
            return ("constant", str(_JSON_NAMES[name]))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return ("number", -value)
        case ast.Constant(value=bool() | None as value):
            return ("constant", str(value))
        case ast.Constant(value=int() | float() as value):
            return ("number", value)
    return ast.dump(node)  # strings and names end here, and expressions, compared as written


# ---- JSON


def json_calls(text: str) -> list[tuple[int, object]]:
    """(place, call) of every call in JSON, in a form in which equal calls are equal."""
    found, at, decoder = [], 0, json.JSONDecoder()
    for _ in range(JSON_STARTS):
        begins = min((n for n in (text.find("{", at), text.find("[", at)) if n >= 0), default=-1)
        if begins < 0:
            break
        try:
            value, at = decoder.raw_decode(text, begins)
            found += [(begins, call) for call in _calls_of(value)]
        except ValueError:
            at = begins + 1
        except RecursionError:  # nested as no call is
            break
    return found


def _calls_of(value: Any) -> Iterator[object]:
    """The calls that a JSON value is, or is a list of."""
    if isinstance(value, list):
        for part in value:
            yield from _calls_of(part)
    elif isinstance(value, dict):
        if isinstance(value.get("tool_calls"), list):
            yield from _calls_of(value["tool_calls"])
        elif isinstance(value.get("function"), dict):
            yield from _calls_of(value["function"])
        elif isinstance(value.get("name"), str):
            for key in ("arguments", "parameters"):
                if key in value:
                    yield (value["name"], _json_meaning(_arguments(value[key])))
                    return


def _arguments(given: Any) -> Any:
    """A call's arguments; some write them as JSON in a string."""
    if isinstance(given, str):
        try:
            return json.loads(given)
        except (ValueError, RecursionError):
            return given
    return given


def _json_meaning(value: Any) -> object:
    match value:
        case dict():
            return ("object", frozenset((key, _json_meaning(v)) for key, v in value.items()))
        case list():
            return ("list", tuple(map(_json_meaning, value)))
        case bool() | None:
            return ("constant", value)
        case int() | float():
            return ("number", value)
    return ("text", value)
