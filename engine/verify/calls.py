"""Function calls in a text: find them, and compare two by meaning

    python_calls(text), json_calls(text)    every outermost call with its place in the text
    call_meaning(source)                    a value that is equal for equal calls

Two notations, which are never equal to each other:

    Python     name(...) with all that follows it: .method(...), [index], (...), .attribute
    JSON       {"name": ..., "arguments": {...}}, also "parameters" for "arguments", the arguments
               as JSON in a string, wrapped in {"function": {...}}, in lists or in "tool_calls";
               tags or fences around them (<tool_call>) do not matter

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
from collections.abc import Iterator
from typing import Any

_CALL = re.compile(r"(?<![\w.])([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)[ \t]*(?=\()")
_ATTRIBUTE = re.compile(r"(\s*)\.[A-Za-z_]\w*([ \t]*\()?")
_JSON_START = re.compile(r"[{\[]")
_JSON_NAMES = {"true": True, "false": False, "null": None}
_PARSE_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)
# Limits that no real text reaches; without them hostile texts take time quadratic in their length.
# Past a limit no further call is found, so such a text is not accepted.
MAX_UNCLOSED = 100  # calls whose parenthesis is never closed
MAX_PARTS = 50  # of one chain: f(...).g[...].h(...)
MAX_JSON_STARTS = 1000  # places at which a JSON value may begin


# ---- Python's notation


def python_calls(text: str, names: set[str] | None = None) -> Iterator[tuple[int, str, str]]:
    """(place, name, source) of every outermost call; `names` limits them to these functions.

    The source is the longest expression that begins with the call: chained calls, indices and
    attributes belong to it.
    """
    at = 0
    unclosed = 0
    while unclosed < MAX_UNCLOSED:
        call = _CALL.search(text, at)
        if call is None:
            return
        at = call.end()
        name = call[1]
        if names is not None and name not in names:
            continue
        source = _expression(text, call.start(), call.end())
        if source is None:
            unclosed += 1
        else:
            yield call.start(), name, source
            at = call.start() + len(source)


def _expression(text: str, start: int, parenthesis: int) -> str | None:
    """The longest expression that begins at `start`; its first parenthesis is at `parenthesis`.

    Where no prefix parses, the longest that looks like a chain of calls. None where the parenthesis
    is never closed.
    """
    end = _closing(text, parenthesis)
    if end is None:
        return None
    prefixes = [text[start:end]]
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
    return None if space else attribute.end()


def _closing(text: str, start: int) -> int | None:
    """The place past the bracket that closes the one at `start`; None where none does.

    Read as Python where the result parses; else without comments (`f(color=#fff)` has none) and
    without triple quotes.
    """
    as_python = _scan(text, start, python=True)
    as_plain = _scan(text, start, python=False)
    if as_python is None:
        return as_plain
    if as_plain is None or _parsed(f"f{text[start:as_python]}"):
        return as_python
    return as_plain


def _scan(text: str, start: int, python: bool) -> int | None:
    """The place past the bracket that closes the one at `start`; None where none does.

    Brackets in strings do not count; with `python`, neither do those in comments and triple quotes.
    """
    opens = text[start]
    closes = {"(": ")", "[": "]"}[opens]
    depth = 0
    quote = ""  # the sign that ends the string we are in, "" outside of strings
    at = start
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
            newline = text.find("\n", at)
            at = len(text) if newline < 0 else newline
        elif char == opens:
            depth += 1
        elif char == closes:
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return None


def _parsed(source: str) -> ast.expr | None:
    """The syntax tree of an expression; None where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string literal warns
            # in parentheses, so that it may go over several lines
            return ast.parse(f"({source.strip()}\n)", mode="eval").body
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
    """A node as nested tuples and frozensets, without what does not count."""
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
            pairs = zip(keys, values, strict=True)  # the key of `**other` is None
            canonical = ((k and _canonical(k), _canonical(v)) for k, v in pairs)
            return ("dict", frozenset(canonical))
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


def json_calls(text: str) -> list[tuple[int, object]]:
    """(place, meaning) of every call in JSON; the meanings of equal calls are equal."""
    calls = []
    decoder = json.JSONDecoder()
    at = 0
    for _ in range(MAX_JSON_STARTS):
        bracket = _JSON_START.search(text, at)
        if bracket is None:
            break
        start = bracket.start()
        try:
            value, at = decoder.raw_decode(text, start)
            calls += [(start, call) for call in _calls_of(value)]
        except ValueError:
            at = start + 1
        except RecursionError:  # nested deeper than any call
            break
    return calls


def _calls_of(value: Any) -> Iterator[object]:
    """The meaning of every call that a JSON value is, or holds in lists and wrappers."""
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
    """A call's arguments; some models write them as JSON in a string."""
    if isinstance(given, str):
        try:
            return json.loads(given)
        except (ValueError, RecursionError):
            return given
    return given


def _json_meaning(value: Any) -> object:
    """A JSON value as nested tuples and frozensets; numbers of equal value are equal."""
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
