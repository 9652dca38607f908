"""Verifiers: does a rewrite say the same as its row's reference?

A verifier is `(row, text) -> (ok, reason)`. The reason, a word or two, becomes the status of a
rejected rewrite. `--verify` takes one of these names, or `module:function` for your own.

    none             every text
    number           the last number equals the reference's last
    call             the reference's function calls, compared as Python (or JSON) reads them
    code             the text's program passes the row's tests (run in engine/verify/sandbox.py)
    regex:PATTERN    the pattern's last match (its first group, if any) equals the reference's
    json             valid JSON, as the last ```json block or as the whole text
    exact            the reference itself
    contains         the reference is part of the text

For `exact` and `contains` amounts of white space do not count, for `contains` letter case neither.

The tests of `code` are the row's `tests` field (`--columns tests=FIELD`) where it has one, else the
top-level `assert`s of the reference's program. Tests that run nothing (only definitions) accept
nothing. A pattern that takes longer than PATTERN_SECONDS on one text is `too_slow`, so that endless
backtracking does not stop the job. (This works in the main thread only: Python delivers signals
nowhere else.)

`--paper-exact` takes the rules of the published code instead (paper_rules.py), with their mistakes:

    paper_number     two texts without an integer at their end are equal; "1,2" is 12, "5-3" is -3
    paper_call       the call must be there letter by letter, spaces and kind of quotes aside: other
                     order of arguments fails, "my_f(1)" passes for "f(1)", 'San Jose' for 'SanJose'
    paper_code       "```python" and one of three beginnings: the program is not run
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from types import FrameType

from engine.data.distilled import KEPT
from engine.data.rows import Row
from engine.verify.answer_numbers import last_number
from engine.verify.calls import PythonCall, call_meaning, json_calls, python_calls
from engine.verify.paper_rules import paper_call, paper_code, paper_number
from engine.verify.programs import (
    compiles,
    fenced_blocks,
    free_names,
    future_first,
    parsed,
    program_in,
)

Verifier = Callable[[Row, str], tuple[bool, str]]

PROGRAM_SECONDS = 10.0  # wall clock of one program with its tests
PROGRAM_MEMORY_MB = 512
PATTERN_SECONDS = 5.0  # of a user's regular expression on one text


def _verdict(is_same: bool) -> tuple[bool, str]:
    """The answer of a verifier that has compared a text with the reference."""
    return (True, "ok") if is_same else (False, "mismatch")


def verify_none(row: Row, text: str) -> tuple[bool, str]:
    """Accepts every text."""
    return True, "ok"


def verify_number(row: Row, text: str) -> tuple[bool, str]:
    """Accepts a text whose last number equals the reference's last: 3 = 3.0, 1,234 = 1234.

    See engine/verify/answer_numbers.py for how numbers are read.
    """
    expected = last_number(row.reference)
    got = last_number(text)
    if expected is None:
        return False, "reference_without_number"
    if got is None:
        return False, "no_number"
    return _verdict(got == expected)


def verify_call(row: Row, text: str) -> tuple[bool, str]:
    """Accepts a text that makes the reference's calls, in any order, and calls those functions in
    no other way. The text around the calls does not count. See engine/verify/calls.py.

    Where the reference calls in JSON, the text must too, and must make no other call in JSON.
    """
    reference_calls = list(python_calls(row.reference))
    expected_json = _json_meanings(row.reference, reference_calls)
    if expected_json:
        made_json = {call.meaning for call in json_calls(text)}
        if not made_json:
            return False, "no_call"
        return _verdict(made_json == expected_json)
    if not reference_calls:
        return False, "reference_without_call"
    functions = {call.name for call in reference_calls}
    calls = list(python_calls(text, functions))
    if not calls:
        return False, "no_call"
    expected = {call_meaning(call.source) for call in reference_calls}
    made = {call_meaning(call.source) for call in calls}
    return _verdict(made == expected)


def _json_meanings(reference: str, reference_calls: Sequence[PythonCall]) -> set[object]:
    """The meanings of the calls in JSON, except arguments of calls in Python's notation."""
    spans = []
    for call in reference_calls:
        spans.append(range(call.position, call.position + len(call.source)))
    meanings = set()
    for call in json_calls(reference):
        is_argument = any(call.position in span for span in spans)
        if not is_argument:
            meanings.add(call.meaning)
    return meanings


# ---- programs, patterns, plain text


def verify_code(row: Row, text: str) -> tuple[bool, str]:
    """Accepts a text whose program (engine/verify/programs.py) passes the tests.

    The tests run after the program in one limited process (engine/verify/sandbox.py). The
    program's main guard (`if __name__ == "__main__"`) does not run, that of the tests does.
    """
    from engine.verify.sandbox import run_program

    tests = row.tests or _asserts(row.reference)
    if not _run_something(tests):
        return False, "reference_without_tests"
    program = program_in(text, free_names(tests))
    if not compiles(program):
        return False, "no_program"
    source = f'{program}\n\n__name__ = "__main__"\n{tests}\n'
    outcome = run_program(
        future_first(source), seconds=PROGRAM_SECONDS, memory_mb=PROGRAM_MEMORY_MB
    )
    if outcome.ok:
        return True, "ok"
    first_word = re.split("[: ]", outcome.reason)[0]  # "killed by SIGSEGV": killed
    return False, f"tests_{first_word}"


def _asserts(reference: str) -> str:
    """The top-level asserts and imports of the reference's last program that has asserts.

    Empty, which is a program that tests nothing, where none has.
    """
    sources = [block.code for block in reversed(fenced_blocks(reference))]
    sources.append(reference)
    for source in sources:
        tree = parsed(source)
        if tree is None:
            continue
        if any(isinstance(node, ast.Assert) for node in tree.body):
            kept = (ast.Assert, ast.Import, ast.ImportFrom)
            nodes = [node for node in tree.body if isinstance(node, kept)]
            return "\n".join(ast.unparse(node) for node in nodes)
    return ""


def _run_something(tests: str) -> bool:
    """Whether tests do more than define functions and classes, which would accept every program.

    True for tests that do not compile, since running them fails.
    """
    tree = parsed(tests)
    if tree is None:
        return True
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    actions = (ast.Call, ast.Assert, ast.Raise)
    for node in tree.body:
        if isinstance(node, definitions):
            continue
        if any(isinstance(inner, actions) for inner in ast.walk(node)):
            return True
    return False


class _TooSlow(Exception):
    """A block took longer than its time limit."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Inside `with`, _TooSlow where it takes longer; without effect outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def verify_regex(pattern: re.Pattern[str], row: Row, text: str) -> tuple[bool, str]:
    """Accepts a text in which the pattern's last match is the reference's last match.

    The pattern's first group is compared if it has one, else the whole match.
    """
    group = 1 if pattern.groups else 0

    def last_match(text: str) -> str | None:
        matches = list(pattern.finditer(text))
        return matches[-1][group] if matches else None

    try:
        with _time_limit(PATTERN_SECONDS):
            expected = last_match(row.reference)
            got = last_match(text)
    except _TooSlow:
        return False, "too_slow"
    if expected is None:
        return False, "reference_without_match"
    if got is None:
        return False, "no_match"
    return _verdict(got == expected)


def verify_json(row: Row, text: str) -> tuple[bool, str]:
    """Accepts valid JSON, whatever its content; the reference is not read."""
    source = text
    for block in fenced_blocks(text, _is_json):
        if block.info.lower().startswith("json"):
            source = block.code  # the last one stays
    if _is_json(source):
        return True, "ok"
    return False, "no_json"


def _is_json(text: str) -> bool:
    """Whether the text is one JSON value; NaN and Infinity, which Python reads, are not JSON."""
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _with_single_spaces(text: str) -> str:
    return " ".join(text.split())


def verify_exact(row: Row, text: str) -> tuple[bool, str]:
    """Accepts the reference itself; amounts of white space do not count."""
    return _verdict(_with_single_spaces(text) == _with_single_spaces(row.reference))


def verify_contains(row: Row, text: str) -> tuple[bool, str]:
    """Accepts a text that holds the whole reference, in any letter case."""
    reference = _with_single_spaces(row.reference).casefold()
    return _verdict(reference in _with_single_spaces(text).casefold())


# ---- by name

VERIFIERS: dict[str, Verifier] = {
    "none": verify_none,
    "number": verify_number,
    "call": verify_call,
    "code": verify_code,
    "json": verify_json,
    "exact": verify_exact,
    "contains": verify_contains,
    "paper_number": paper_number,
    "paper_call": paper_call,
    "paper_code": paper_code,
}


@lru_cache(maxsize=64)
def get_verifier(name: str) -> Verifier:
    """The verifier of a `--verify` name.

    ValueError for an unknown name, for a pattern that is not a regular expression, and for a user's
    function that cannot be imported or called as a verifier.

    OSError for `code` on a system that cannot contain programs.
    """
    if name == "code":
        from engine.verify.sandbox import check_sandbox

        check_sandbox()  # now, not after the first rewrite
    if name in VERIFIERS:
        return VERIFIERS[name]
    kind, colon, rest = name.partition(":")
    if kind == "regex" and colon:
        try:
            return partial(verify_regex, re.compile(rest, re.MULTILINE))
        except re.error as error:
            raise ValueError(f"--verify {name!r} is not a regular expression: {error}") from None
    if colon:
        return _users_verifier(name, kind, rest)
    raise ValueError(
        f"no verifier {name!r}; expected one of {', '.join(VERIFIERS)}, regex:PATTERN or "
        "module:function"
    )


def _users_verifier(name: str, module: str, function: str) -> Verifier:
    """The user's function `module.function`, with its answers checked on every call."""
    sys.path.append(str(Path.cwd()))  # sys.path has the script's directory, but not the user's
    try:
        code = importlib.import_module(module)
    except Exception as error:
        raise ValueError(
            f"--verify {name!r}: cannot import {module!r} ({type(error).__name__}: {error}); "
            f"expected it in {Path.cwd()} or on PYTHONPATH"
        ) from error
    finally:
        sys.path.pop()
    verify = getattr(code, function, None)
    if not callable(verify):
        public = []
        for known, value in vars(code).items():
            if inspect.isfunction(value) and not known.startswith("_"):
                public.append(known)
        raise ValueError(
            f"--verify {name!r}: {module} has no function {function!r}; it has "
            f"{', '.join(sorted(public)) or 'none'}"
        )
    try:
        inspect.signature(verify).bind(None, "")
    except TypeError as error:
        raise ValueError(
            f"--verify {name!r}: it cannot be called as {function}(row, text): {error}"
        ) from None
    return partial(_checked, name, verify)


def is_users(verifier: Verifier) -> bool:
    """Whether a verifier of `get_verifier` is a user's own function."""
    return isinstance(verifier, partial) and verifier.func is _checked


def _checked(name: str, verify: Verifier, row: Row, text: str) -> tuple[bool, str]:
    """The answer of a user's verifier; ValueError where it raises or answers something else."""
    try:
        answer = verify(row, text)
    except Exception as error:
        question = row.messages[0]["content"]
        raise ValueError(
            f"--verify {name!r} failed on the row that asks {question[:60]!r}"
            f": {type(error).__name__}: {error}"
        ) from error
    match answer:
        case (bool() as ok, str() as reason):
            is_status = reason.strip() and reason not in KEPT
            if ok or is_status:
                return ok, reason
    raise ValueError(
        f"--verify {name!r} answered {answer!r}; expected (True or False, reason), where the "
        f"reason says in words why not, and is none of {', '.join(KEPT)}"
    )
