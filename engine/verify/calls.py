"""Function calls in a text: find them, and compare two by meaning

    python_calls(text), json_calls(text)    every outermost call with its position in the text
    call_meaning(source)                    a value that is equal for equal calls

Two notations, which are never equal to each other:

    Python     name(...) with all that follows it: .method(...), [index], (...), .attribute
    JSON       {"name": ..., "arguments": {...}}, also "parameters" for "arguments", the arguments
               as JSON in a string; also wrapped in {"function": {...}}, in lists or in
               "tool_calls"; tags or fences around them (<tool_call>) do not matter

Python calls are compared as Python parses them: spaces, comments, kind of quotes and the order of
keyword arguments, dictionary keys and set elements do not count, the order of positional arguments
does; numbers compare by value; true/false/null are True/False/None. A call that does not parse (a
`<placeholder>`) is compared as text without spaces and quotes.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_CALL = re.compile(r"(?<![\w.])([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)[ \t]*(?=\()")
_ATTRIBUTE = re.compile(r"(\s*)\.[A-Za-z_]\w*([ \t]*\()?")
_JSON_START = re.compile(r"[{\[]")
_JSON_NAMES = {"true": True, "false": False, "null": None}  # read as Python's constants
_PARSE_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)
# Limits that no real text reaches; without them hostile texts take time quadratic in their length.
# Past a limit no further call is found, so such a text is not accepted.
MAX_UNCLOSED = 100  # calls whose parenthesis is never closed
MAX_PARTS = 50  # of one chain: f(...).g[...].h(...)
MAX_JSON_STARTS = 1000  # positions at which a JSON value may begin


# ---- Python's notation


class PythonCall(NamedTuple):
    """A call in Python's notation."""

    position: int  # of its first character in the text
    name: str  # of the function, with its modules: "shop.find"
    source: str  # the longest expression that begins with the call, with all chained to it


def python_calls(text: str, names: set[str] | None = None) -> Iterator[PythonCall]:
    """Every outermost call, in the order of the text; `names` limits them to these functions.

    The source is the longest expression that begins with the call: chained calls, indices and
    attributes belong to it.
    """
    position = 0
    unclosed = 0
    while unclosed < MAX_UNCLOSED:
        call = _CALL.search(text, position)
        if call is None:
            return
        position = call.end()
        name = call[1]
        if names is not None and name not in names:
            continue
        source = _expression(text, call.start(), call.end())
        if source is None:
            unclosed += 1
        else:
            yield PythonCall(call.start(), name, source)
            position = call.start() + len(source)


def _expression(text: str, start: int, parenthesis: int) -> str | None:
    """The longest expression that begins at `start`; its first parenthesis is at `parenthesis`.

    Where none parses, the longest text that looks like a chain of calls. None where the parenthesis
    is never closed.
    """
    end = _closing(text, parenthesis)
    if end is None:
        return None
    prefixes = [text[start:end]]  # the call alone, then with each further part of its chain
    while len(prefixes) < MAX_PARTS:
        end = _end_of_next_part(text, end)
        if end is None:
            break
        prefixes.append(text[start:end])
    for prefix in reversed(prefixes):
        if _parsed(prefix) is not None:
            return prefix
    return prefixes[-1]


def _end_of_next_part(text: str, end: int) -> int | None:
    """The end of (...), [...], .name(...) or .name that continues a call ending at `end`, or None.

    A method call may stand on the next line; a plain attribute must follow without a space.
    """
    if text[end : end + 1] in ("(", "["):
        return _closing(text, end)
    attribute = _ATTRIBUTE.match(text, end)
    if attribute is None:
        return None
    space, parenthesis = attribute.groups()
    if parenthesis:
        return _closing(text, attribute.end() - 1)
    if space:
        return None
    return attribute.end()


def _closing(text: str, start: int) -> int | None:
    """The position past the bracket that closes the one at `start`; None where none does.

    Read as Python where the result parses; else as a text without comments (the # in
    `f(color=#fff)` begins none) and without triple quotes.
    """
    as_python = _scan(text, start, python=True)
    as_plain = _scan(text, start, python=False)
    if as_python is None:
        return as_plain
    if as_plain is None or _parsed(f"f{text[start:as_python]}"):
        return as_python
    return as_plain


def _scan(text: str, start: int, python: bool) -> int | None:
    """The position past the bracket that closes the one at `start`; None where none does.

    Brackets in strings do not count; with `python`, neither do those in comments and triple quotes.
    """
    opens = text[start]
    closes = {"(": ")", "[": "]"}[opens]
    depth = 0
    quote = ""  # the sign that ends the string we are in, "" outside of strings
    position = start
    while position < len(text):
        char = text[position]
        if quote:
            if char == "\\":
                position += 1  # the escaped character
            elif text.startswith(quote, position):
                position += len(quote) - 1
                quote = ""
        elif char in "'\"":
            is_triple = python and text.startswith(char * 3, position)
            quote = char * 3 if is_triple else char
            position += len(quote) - 1
        elif char == "#" and python:
            newline = text.find("\n", position)
            position = len(text) if newline < 0 else newline
        elif char == opens:
            depth += 1
        elif char == closes:
            depth -= 1
            if depth == 0:
                return position + 1
        position += 1
    return None


def _parsed(source: str) -> ast.expr | None:
    """The syntax tree of an expression; None where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string literal warns
            in_parentheses = f"({source.strip()}\n)"  # so that it may go over several lines
            return ast.parse(in_parentheses, mode="eval").body
    except _PARSE_ERRORS:
        return None


def call_meaning(source: str) -> object:
    """A hashable value that is equal for equal calls; `source` is in Python's notation."""
    tree = _parsed(source)
    try:
        if tree is not None:
            return _canonical(tree)
    except RecursionError:
        pass
    return re.sub(r"[\s'\"]", "", source)


def _canonical(node: ast.expr) -> object:
    """A node as nested tuples and frozensets, which are equal where the meaning is equal."""
    match node:
        case ast.Call(func=func, args=args, keywords=keywords):
            positional = tuple(map(_canonical, args))
            named = frozenset((keyword.arg, _canonical(keyword.value)) for keyword in keywords)
            return ("call", _canonical(func), positional, named)
        case ast.Attribute(value=value, attr=attribute):
            return ("attribute", _canonical(value), attribute)
        case ast.Subscript(value=value, slice=index):
            return ("index", _canonical(value), _canonical(index))
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return (type(node).__name__, tuple(map(_canonical, parts)))
        case ast.Set(elts=parts):
            return ("set", frozenset(map(_canonical, parts)))
        case ast.Dict(keys=keys, values=values):
            items = []
            for key, value in zip(keys, values, strict=True):
                canonical_key = None if key is None else _canonical(key)  # None: **other
                items.append((canonical_key, _canonical(value)))
            return ("dict", frozenset(items))
        case ast.Name(id=name) if name in _JSON_NAMES:
            return ("constant", str(_JSON_NAMES[name]))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return ("number", -value)
        case ast.Constant(value=bool() | None as value):
            return ("constant", str(value))
        case ast.Constant(value=int() | float() as value):
            return ("number", value)
    return ast.dump(node)  # strings, names, and other expressions, compared as written


# ---- JSON


class JsonCall(NamedTuple):
    """A call in JSON."""

    position: int  # of the JSON value that holds it
    meaning: object  # a hashable value that is equal for equal calls


def json_calls(text: str) -> list[JsonCall]:
    """Every call in JSON, in the order of the text."""
    calls = []
    for start, _, value in _json_values(text):
        try:
            calls += [JsonCall(start, meaning) for meaning in _meanings_of_calls(value)]
        except RecursionError:  # nested deeper than any call
            break
    return calls


def json_spans(text: str) -> list[JsonSpan]:
    """Every JSON value in the text that is a call or holds one."""
    spans = []
    for span in _json_values(text):
        try:
            if list(_meanings_of_calls(span.value)):
                spans.append(span)
        except RecursionError:
            break
    return spans


class JsonSpan(NamedTuple):
    """A JSON value in a text."""

    start: int
    end: int
    value: Any


def _json_values(text: str) -> Iterator[JsonSpan]:
    """Every outermost object and list in JSON, in the order of the text."""
    decoder = json.JSONDecoder()
    position = 0
    for _ in range(MAX_JSON_STARTS):
        bracket = _JSON_START.search(text, position)
        if bracket is None:
            break
        start = bracket.start()
        try:
            value, position = decoder.raw_decode(text, start)
        except ValueError:
            position = start + 1
        except RecursionError:  # nested deeper than any call
            break
        else:
            yield JsonSpan(start, position, value)


def _meanings_of_calls(value: Any) -> Iterator[object]:
    """The meaning of every call that a JSON value is, or holds in lists and wrappers."""
    if isinstance(value, list):
        for part in value:
            yield from _meanings_of_calls(part)
    elif isinstance(value, dict):
        if isinstance(value.get("tool_calls"), list):
            yield from _meanings_of_calls(value["tool_calls"])
        elif isinstance(value.get("function"), dict):
            yield from _meanings_of_calls(value["function"])
        elif isinstance(value.get("name"), str):
            for key in ("arguments", "parameters"):
                if key in value:
                    yield meaning_of_call({"name": value["name"], "arguments": value[key]})
                    return


def meaning_of_call(call: Mapping[str, Any]) -> object:
    """A hashable value that is equal for equal calls {"name", "arguments"}."""
    return (call["name"], json_meaning(_arguments(call["arguments"])))


def _arguments(given: Any) -> Any:
    """A call's arguments; some models write them as JSON in a string."""
    if isinstance(given, str):
        try:
            return json.loads(given)
        except (ValueError, RecursionError):
            return given
    return given


def json_meaning(value: Any) -> object:
    """A JSON value as nested tuples and frozensets; numbers of equal value are equal."""
    match value:
        case dict():
            return ("object", frozenset((key, json_meaning(v)) for key, v in value.items()))
        case list():
            return ("list", tuple(map(json_meaning, value)))
        case bool() | None:
            return ("constant", value)
        case int() | float():
            return ("number", value)
    return ("text", value)
