"""Verifiers: did a text keep what its row's reference says?

A verifier is `(row, text) -> (ok, reason)`; the reason, a word or two, becomes the status of a
rewrite that is not ok. `--verify` takes one of these names, or `module:function`: your own.

    none             every text
    number           the last number equals the reference's last
    call             the reference's function calls, compared as Python (or JSON) reads them
    code             the text's program passes the row's tests (run in engine/verify/sandbox.py)
    regex:PATTERN    the pattern's last match (its first group, if any) equals the reference's
    json             valid JSON, as the last ```json block or as the whole text
    exact            the reference itself
    contains         the reference stands in the text

Spaces around and between words do not count for the last two, nor letter case for `contains`.

The tests of `code` are the row's `tests` field (`--columns tests=FIELD`) where it has one, else the
top-level `assert`s of the reference's program. Tests that run nothing (only definitions) accept
nothing. A pattern that takes longer than PATTERN_SECONDS on one text is `too_slow`, so that one
which backtracks without end does not hold up the job (in the main thread, where Python allows it).

What the published code checks instead (paper.md 1.3), with its mistakes, for `--paper-exact`:

    paper_number     two texts without an integer at their end are equal; "1, 2" is 12, "5-3" is -3
    paper_call       the call must be there letter by letter, spaces and kind of quotes aside: other
                     order of arguments fails, "my_f(1)" passes for "f(1)", 'San Jose' for 'SanJose'
    paper_code       "```python" and one of three beginnings: what the program does is not looked at
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from types import FrameType

from engine.data.distilled import KEPT
from engine.data.rows import Row
from engine.verify.answer_numbers import last_number
from engine.verify.calls import call_meaning, json_calls, python_calls
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


def verify_none(row: Row, text: str) -> tuple[bool, str]:
    """Accepts every text."""
    return True, "ok"


def verify_number(row: Row, text: str) -> tuple[bool, str]:
    """Accepts a text whose last number equals the reference's last: 3 = 3.0, 1,234 = 1234.

    See engine/verify/answer_numbers.py for how numbers are read."""
    wanted, got = last_number(row.reference), last_number(text)
    if wanted is None:
        return False, "reference_without_number"
    if got is None:
        return False, "no_number"
    return (True, "ok") if got == wanted else (False, "mismatch")


def verify_call(row: Row, text: str) -> tuple[bool, str]:
    """Accepts a text that makes the reference's calls, in any order, and calls those functions in
    no other way; whatever stands around the calls does not matter. See engine/verify/calls.py.

    Where the reference calls in JSON, the text must too, and must make no other call in JSON.
    """
    wanted = list(python_calls(row.reference))
    inside = [range(place, place + len(source)) for place, _, source in wanted]
    in_json = {c for at, c in json_calls(row.reference) if not any(at in span for span in inside)}
    if in_json:
        made = {call for _, call in json_calls(text)}
        if not made:
            return False, "no_call"
        return (True, "ok") if made == in_json else (False, "mismatch")
    if not wanted:
        return False, "reference_without_call"
    calls = list(python_calls(text, names={name for _, name, _ in wanted}))
    if not calls:
        return False, "no_call"
    same = {call_meaning(s) for *_, s in calls} == {call_meaning(s) for *_, s in wanted}
    return (True, "ok") if same else (False, "mismatch")


# ---- programs, patterns, plain text

SECONDS, MEMORY_MB = 10, 512  # a program's limits
PATTERN_SECONDS = 5.0  # a pattern's, on one text


def verify_code(row: Row, text: str) -> tuple[bool, str]:
    """Accepts a text whose program (engine/verify/programs.py) passes the tests.

    The tests run behind the program in one limited process (engine/verify/sandbox.py). The
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
    outcome = run_program(future_first(source), seconds=SECONDS, memory_mb=MEMORY_MB)
    return (True, "ok") if outcome.ok else (False, "tests_" + re.split("[: ]", outcome.reason)[0])


def _asserts(reference: str) -> str:
    """The asserts at the top of the reference's last program that has some, with that program's
    imports; "" where there are none."""
    for source in (*(block.code for block in reversed(fenced_blocks(reference))), reference):
        tree = parsed(source)
        nodes = tree.body if tree else []
        if any(isinstance(node, ast.Assert) for node in nodes):
            kept = (ast.Assert, ast.Import, ast.ImportFrom)
            return "\n".join(ast.unparse(node) for node in nodes if isinstance(node, kept))
    return ""


def _run_something(tests: str) -> bool:
    """Whether tests do more than define: those that only define would accept every program.

    Tests that do not compile count: the run then says so.
    """
    tree = parsed(tests)
    if tree is None:
        return True
    calls = (ast.Call, ast.Assert, ast.Raise)
    defines = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in tree.body if not isinstance(node, defines)]
    return any(isinstance(inner, calls) for node in nodes for inner in ast.walk(node))


class _TooSlow(Exception):
    pass


@contextmanager
def _seconds(limit: float) -> Iterator[None]:
    """_TooSlow where the block takes longer; no limit but in the main thread, which has signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def verify_regex(pattern: re.Pattern[str], row: Row, text: str) -> tuple[bool, str]:
    """Accepts a text in which the pattern's last match is the reference's last match."""

    def last(said: str) -> str | None:
        found = list(pattern.finditer(said))
        return found[-1][1 if pattern.groups else 0] if found else None

    try:
        with _seconds(PATTERN_SECONDS):
            wanted, got = last(row.reference), last(text)
    except _TooSlow:
        return False, "too_slow"
    if wanted is None:
        return False, "reference_without_match"
    if got is None:
        return False, "no_match"
    return (True, "ok") if got == wanted else (False, "mismatch")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def verify_json(row: Row, text: str) -> tuple[bool, str]:
    """Accepts valid JSON; what it says is not compared with the reference."""
    blocks = [b.code for b in fenced_blocks(text, _is_json) if b.info.lower().startswith("json")]
    return (True, "ok") if _is_json(blocks[-1] if blocks else text) else (False, "no_json")


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _spaced(text: str) -> str:
    return " ".join(text.split())


def verify_exact(row: Row, text: str) -> tuple[bool, str]:
    """Accepts the reference itself, spaces around and between words aside."""
    return (True, "ok") if _spaced(text) == _spaced(row.reference) else (False, "mismatch")


def verify_contains(row: Row, text: str) -> tuple[bool, str]:
    """Accepts a text that holds the whole reference, in any letter case."""
    holds = _spaced(row.reference).casefold() in _spaced(text).casefold()
    return (True, "ok") if holds else (False, "mismatch")


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
    """The verifier of that name; ValueError where there is none, or it cannot be one.

    OSError for `code` on a system that cannot contain programs.
    """
    if name == "code":
        from engine.verify.sandbox import check_sandbox

        check_sandbox()  # now, and not when the first rewrite is there
    if name in VERIFIERS:
        return VERIFIERS[name]
    kind, colon, rest = name.partition(":")
    if kind == "regex" and colon:
        try:
            return partial(verify_regex, re.compile(rest, re.MULTILINE))
        except re.error as error:
            raise ValueError(f"--verify {name!r}: no regular expression: {error}") from None
    if colon:
        return _users(name, kind, rest)
    raise ValueError(
        f"no verifier {name!r}; wanted one of {', '.join(VERIFIERS)}, regex:PATTERN or "
        "module:function"
    )


def _users(name: str, module: str, function: str) -> Verifier:
    """A verifier of the user's own, whose answers are checked."""
    sys.path.append(str(Path.cwd()))  # a script's own directory is there, not the user's
    try:
        code = importlib.import_module(module)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"--verify {name!r}: cannot import {module!r} ({what}); it is looked for in "
            f"{Path.cwd()} and on PYTHONPATH"
        ) from error
    finally:
        sys.path.pop()
    verify = getattr(code, function, None)
    if not callable(verify):
        own = [n for n, v in vars(code).items() if inspect.isfunction(v) and n[0] != "_"]
        raise ValueError(
            f"--verify {name!r}: {module} has no function {function!r}; it has "
            f"{', '.join(sorted(own)) or 'none'}"
        )
    try:
        inspect.signature(verify).bind(None, "")
    except TypeError as error:
        raise ValueError(
            f"--verify {name!r}: it cannot be called as {function}(row, text): {error}"
        ) from None

    def checked(row: Row, text: str) -> tuple[bool, str]:
        try:
            answer = verify(row, text)
        except Exception as error:
            raise ValueError(
                f"--verify {name!r} failed on the row that asks {row.messages[0]['content'][:60]!r}"
                f": {type(error).__name__}: {error}"
            ) from error
        match answer:
            case (bool() as ok, str() as reason) if ok or (reason.strip() and reason not in KEPT):
                return ok, reason
        raise ValueError(
            f"--verify {name!r} answered {answer!r}; wanted (True or False, reason), the reason "
            f"text that says why not, and none of {', '.join(KEPT)}"
        )

    return checked
