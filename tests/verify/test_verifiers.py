"""Verifiers (engine/verify/verifiers.py): programs, patterns, plain text, the user's own.

And the published rules with their mistakes; their outcomes were worked out by hand from the
published code.

The cases of `number` and `call` are in test_number_and_call_verdicts.py and
test_number_and_call_notations.py, the forms in which programs are written in test_programs.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.data.rows import Row, load_rows
from engine.verify.verifiers import VERIFIERS, get_verifier


def row(reference: str, tests: str = "") -> Row:
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": reference})
    return Row("r", messages, tests)


def test_verifiers_are_found_by_name_and_unknown_names_refused():
    with pytest.raises(ValueError, match="no verifier 'numbr'; expected one of none, number, call"):
        get_verifier("numbr")
    with pytest.raises(ValueError, match="is not a regular expression: unterminated character set"):
        get_verifier("regex:[a")
    assert get_verifier("number") is VERIFIERS["number"]
    assert get_verifier("none")(row("x"), "anything") == (True, "ok")


PLAIN = [
    (r"regex:answer is (\w+)", "The answer is B.", "So the answer is A. No: answer is B", "ok"),
    (r"regex:answer is (\w+)", "The answer is B.", "The answer is B. Or answer is C", "mismatch"),
    (r"regex:answer is (\w+)", "The answer is B.", "B", "no_match"),
    (r"regex:answer is (\w+)", "B", "The answer is B", "reference_without_match"),
    (r"regex:^(?:yes|no)\b", "yes\nfor sure", "I think\nyes", "ok"),
    (r"regex:^(?:yes|no)\b", "yes", "no", "mismatch"),
    ("regex:a:b", "a:b", "see a:b", "ok"),
    ("json", "whatever", '{"a": [1, 2.5, null]}', "ok"),
    ("json", "whatever", " 5 \n", "ok"),
    ("json", "whatever", 'Here it is:\n```json\n{"a": 1}\n```\nFine?', "ok"),
    ("json", "whatever", '```json\n{"a": 1}\n```\nor\n```json\n{"a": 1,}\n```', "no_json"),
    ("json", "whatever", 'Here it is:\n~~~JSON\r\n{"a": 1}\r\n~~~', "ok"),
    ("json", "whatever", '1. So:\n   ```json5\n   {"a": 1}\n   ```', "ok"),
    ("json", "whatever", '```json\n{"a": "```"}\n```', "ok"),
    ("json", "whatever", 'Here it is: {"a": 1}', "no_json"),
    ("json", "whatever", "{'a': 1}", "no_json"),
    ("json", "whatever", '{"a": NaN}', "no_json"),
    ("json", "whatever", "[" * 100_000, "no_json"),
    ("exact", "Paris,  France", " Paris,\nFrance ", "ok"),
    ("exact", "Paris", "paris", "mismatch"),
    ("exact", "Paris", "It is Paris", "mismatch"),
    ("contains", "Paris,  France", "It is paris,\nfrance.", "ok"),
    ("contains", "Paris", "Par is", "mismatch"),
]


@pytest.mark.parametrize("name, reference, text, reason", PLAIN)
def test_patterns_json_and_plain_text_get_their_verdict(name, reference, text, reason):
    assert get_verifier(name)(row(reference), text) == (reason == "ok", reason)


def test_a_pattern_that_backtracks_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr("engine.verify.verifiers.PATTERN_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    verify = get_verifier(r"regex:^(a+)+$")
    assert verify(row("aa"), "a" * 60 + "b") == (False, "too_slow")
    assert verify(row("aa"), "aa") == (True, "ok"), "the next text is judged"
    assert signal.getsignal(signal.SIGALRM) is before
    answers = []
    thread = threading.Thread(target=lambda: answers.append(verify(row("aa"), "aaa")))
    thread.start()
    thread.join()
    assert answers == [(False, "mismatch")], "another thread has no signals, so no limit"


# ---- programs

PROGRAM = "Here is it:\n```python\ndef add(a, b):\n    return a + b\n```\nEnjoy."
TESTS = "assert add(2, 3) == 5\nassert add('a', 'b') == 'ab'"
CODE = [
    (PROGRAM, "ok"),
    ("def add(a, b):\n    return a + b", "ok"),  # no block: all of it is the program
    ("```python\nadd = 1\n```\nBetter:\n```py\nadd = lambda a, b: a + b\n```", "ok"),
    (PROGRAM.replace("+", "-"), "tests_error"),
    (PROGRAM.replace("add", "plus"), "tests_error"),
    ("Use the + operator.", "no_program"),
    ("```python\ndef add(a, b:\n```", "no_program"),
    ("```python\nimport sys\nsys.exit(0)\n```", "tests_exit"),
    ("```python\ndef add(a, b):\n    return a + b\nwhile True:\n    pass\n```", "tests_timeout"),
    ("```python\nx = 'x' * 10**10\n```", "tests_memory"),
]


@pytest.mark.parametrize("text, reason", CODE, ids=[reason for _, reason in CODE])
def test_programs_get_their_verdict(text, reason, monkeypatch):
    monkeypatch.setattr("engine.verify.verifiers.PROGRAM_SECONDS", 2)
    assert get_verifier("code")(row("see the tests", TESTS), text) == (reason == "ok", reason)


def test_code_is_refused_at_once_where_programs_cannot_be_contained(monkeypatch):
    get_verifier.cache_clear()
    monkeypatch.setattr("platform.machine", lambda: "s390x")
    with pytest.raises(OSError, match="need the sandbox"):
        get_verifier("code")


def test_the_tests_of_code_come_from_the_row_or_from_the_reference():
    verify = get_verifier("code")
    add = "def add(a, b):\n    return a + b\n"
    with_asserts = f"```python\n{add}\nassert add(2, 2) == 4  # so\n{TESTS}\n```"
    assert verify(row(with_asserts), PROGRAM) == (True, "ok")
    assert verify(row(with_asserts), PROGRAM.replace("+", "-")) == (False, "tests_error")
    assert verify(row(with_asserts, "assert add(1, 1) == 3"), PROGRAM) == (False, "tests_error")
    assert verify(row("add(a, b)"), PROGRAM) == (False, "reference_without_tests")
    assert verify(row(PROGRAM), PROGRAM) == (False, "reference_without_tests")


def test_the_tests_of_rows_are_read_from_a_file_as_text_or_as_a_list(tmp_path):
    """A list as in MBPP; under another name with --columns; a number is not used as tests."""
    records = [
        {"prompt": "add", "response": "r", "tests": TESTS},
        {"prompt": "add them", "response": "r", "tests": TESTS.split("\n")},
        {"prompt": "add it", "response": "r", "tests": 5, "test_list": [TESTS]},
    ]
    file = tmp_path / "d.json"
    file.write_text(json.dumps(records))
    rows = load_rows(file)
    assert [row.tests for row in rows] == [TESTS, TESTS, ""]
    assert rows.unused == ("test_list", "tests")
    columns = {"prompt": "prompt", "response": "response", "tests": "test_list"}
    assert load_rows(file, columns=columns)[2].tests == TESTS
    with pytest.raises(ValueError, match="row 3.*'tests' is a number, expected text or a list"):
        load_rows(file, columns={**columns, "tests": "tests"})


# ---- the user's own


def write_module(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(source)


def test_a_users_own_function_is_a_verifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "def short(row, text):\n    return len(text) < len(row.reference), 'too_long'\n"
    write_module(tmp_path, "rules_a", source + "class Odd:\n    pass\nnumber = 5\n")
    verify = get_verifier("rules_a:short")
    assert verify(row("four"), "abc") == (True, "too_long")
    assert verify(row("four"), "abcde") == (False, "too_long")
    assert str(tmp_path) not in sys.path, "sys.path is left as it was"
    with pytest.raises(ValueError, match="rules_a has no function 'long'; it has short"):
        get_verifier("rules_a:long")
    with pytest.raises(ValueError, match="rules_a has no function 'number'; it has short"):
        get_verifier("rules_a:number")


@pytest.mark.parametrize(
    "source, message",
    [
        (None, "cannot import 'rules_b' .ModuleNotFoundError.*expected it in"),
        ("import no_such_module", "cannot import 'rules_b' .ModuleNotFoundError: .*no_such_module"),
        ("def f(row, text", "cannot import 'rules_b' .SyntaxError"),
        ("def f(text): pass", r"cannot be called as f\(row, text\): too many positional"),
        ("def f(row, text, *, mode): pass", r"cannot be called as f\(row, text\): missing"),
    ],
)
def test_functions_that_cannot_be_verifiers_are_refused(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "rules_b", raising=False)
    get_verifier.cache_clear()
    if source is not None:
        write_module(tmp_path, "rules_b", source)
    with pytest.raises(ValueError, match=message):
        get_verifier("rules_b:f")


@pytest.mark.parametrize(
    "answer, message",
    [
        ("True", "answered True; expected"),
        ("(1, 'ok')", r"answered \(1, 'ok'\)"),
        ("(False, '')", r"answered \(False, ''\)"),
        ("(False, 'accepted')", "none of accepted, identical"),
        ("(False, 1 / 0)", "failed on the row that asks 'q': ZeroDivisionError"),
    ],
)
def test_answers_of_the_users_function_are_checked(tmp_path, monkeypatch, answer, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "rules_c", raising=False)
    get_verifier.cache_clear()
    write_module(tmp_path, "rules_c", f"def f(row, text):\n    return {answer}\n")
    verify = get_verifier("rules_c:f")
    with pytest.raises(ValueError, match=message):
        verify(row("x"), "y")


def test_user_code_is_imported_only_if_it_is_named(tmp_path):
    source = "open('imported', 'w')\ndef f(row, text):\n    return True, 'ok'\n"
    write_module(tmp_path, "rules_d", source)
    env = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    for name, is_imported in (("number", False), ("rules_d:f", True)):
        code = f"from engine.verify.verifiers import get_verifier as g; g('number'); g({name!r})"
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
        assert (tmp_path / "imported").exists() is is_imported


# ---- the published rules: outcome of ours beside theirs

PUBLISHED = [  # name, reference, text, ours, theirs
    ("number", "The answer is 18.", "So it is 18", "ok", True),
    ("number", "The answer is 18.", "So it is 17", "mismatch", False),
    ("number", "no idea", "none here", "reference_without_number", True),  # INVALID = INVALID
    ("number", "It is 3.5", "It is 7.25", "mismatch", True),  # neither is an integer
    ("number", "It is 3", "It is 3.0", "ok", False),
    ("number", "It is 12", "either 1, 2", "mismatch", False),  # two signs separate the digits
    ("number", "It is 12", "either 1,2", "mismatch", True),
    ("number", "It is 1200", "day 1 200", "mismatch", True),
    ("number", "It is -3", "5-3", "mismatch", True),
    ("number", "It is 1,234.", "It is 1234", "ok", True),
    ("number", "unknown", "-999999999", "reference_without_number", True),
    ("number", "It is 1/4", "It is 3/4", "mismatch", True),
    ("call", "f(a=1, b='x')", 'Sure: f(a = 1, b="x")', "ok", True),
    ("call", "f(a=1, b=2)", "f(b=2, a=1)", "ok", False),
    ("call", "f(a=1)", "f(a=1.0)", "ok", False),
    ("call", "f(a=1)", "my_f(a=1)", "no_call", True),
    ("call", "f(a='San Jose')", "f(a='SanJose')", "mismatch", True),
    ("call", "f(a=1)", "not f(a=2) but f(a=1)", "mismatch", True),
    ("call", "f(a=1)", "f(a=1, b=2)", "mismatch", False),
    ("call", "f(a='1')", "f(a=1)", "mismatch", False),
]  # fmt: skip


@pytest.mark.parametrize("name, reference, text, ours, theirs", PUBLISHED)
def test_the_published_rules_and_ours_get_their_verdict(name, reference, text, ours, theirs):
    assert get_verifier(name)(row(reference), text) == (ours == "ok", ours)
    expected = (theirs, "ok" if theirs else "mismatch")
    assert get_verifier(f"paper_{name}")(row(reference), text) == expected


@pytest.mark.parametrize(
    "text, ok",
    [
        ("Here is a solution:\n```python\n1/0\n```", True),  # it is not run
        ("  I have it.\n```python\n```", True),
        ("I implemented it:\n```python", True),
        ("Sure! Here is a solution:\n```python\nx = 1\n```", False),
        ("Here's a solution:\n```python\nx = 1\n```", False),
        ("here is a solution:\n```python\nx = 1\n```", False),
        ("Here is a solution:\n```java\nx = 1\n```", False),
        ("Here is a solution: x = 1", False),
    ],
)
def test_the_published_rule_for_programs_reads_the_beginning_and_a_fence(text, ok):
    verdict = (True, "ok") if ok else (False, "mismatch")
    assert get_verifier("paper_code")(row("anything"), text) == verdict
