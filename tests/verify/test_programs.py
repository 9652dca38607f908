"""The program in an answer (engine/verify/programs.py), in the forms in which models write it.

For the task HumanEval and for `--verify code`.
"""

from __future__ import annotations

import time

import pytest

from engine.data.rows import Row
from engine.evaluate.tasks.base import Item
from engine.evaluate.tasks.run import TASKS
from engine.verify.programs import (
    Block,
    bound_names,
    compiles,
    fenced_blocks,
    free_names,
    future_first,
    program_in,
)
from engine.verify.sandbox import Unprotected, run_program
from engine.verify.verifiers import get_verifier


@pytest.fixture(autouse=True, scope="module")
def sandboxed() -> None:
    try:
        run_program("pass")
    except Unprotected as error:
        pytest.skip(str(error))


F = "def add_all(xs):\n    return sum(xs)\n"
PROBLEM = {
    "task_id": "Made/1",
    "entry_point": "add_all",
    "prompt": 'from typing import List\n\n\ndef add_all(xs: List[int]) -> int:\n    """ Add. """\n',
    "test": "def check(f):\n    assert f([1, 2]) == 3\n    assert f([]) == 0\n",
}
DOCSTRING = '    """Add.\n\n    ```\n    add_all([1])\n    ```\n    """\n'
IN_DOCSTRING = F.replace("\n", "\n" + DOCSTRING, 1)
MAIN = 'if __name__ == "__main__":\n    '

# name -> (answer, whether the program in it is right)
FORMS = {
    "python": (f"Here:\n```python\n{F}```\nDone.", True),
    "capitals": (f"```PYTHON\n{F}```", True),
    "py": (f"```py\n{F}```", True),
    "py3": (f"```py3\n{F}```", True),
    "python3": (f"```python3\n{F}```", True),
    "title": (f'```python title="x"\n{F}```\nIt adds all of them.\n', True),
    "space before the language": (f"``` python\n{F}```", True),
    "unlabelled": (f"```\n{F}```", True),
    "tildes": (f"~~~python\n{F}~~~\nIt adds.", True),
    "four backticks": (f"````python\n{F}````", True),
    "list item": (
        "1. So:\n\n   ```python\n   def add_all(xs):\n       return sum(xs)\n   ```\n",
        True,
    ),
    "list item on its line": (
        "- ```python\n  def add_all(xs):\n      return sum(xs)\n  ```\n",
        True,
    ),
    "quotation": ("> ```python\n> def add_all(xs):\n>     return sum(xs)\n> ```\n", True),
    "unclosed": (f"```python\n{F}", True),
    "closed behind the last line": (f"```python\n{F.rstrip()}``` So it is.", True),
    "prose before": (f"Here is the function:\n\n{F}", True),
    "prose behind": (f"{F}\nThis adds all of the numbers.", True),
    "prose around": (f"Solution\n\n{F}\nExplanation\n\nIt adds them.", True),
    "old Markdown": ("So:\n\n    def add_all(xs):\n        return sum(xs)\n\nDone.", True),
    "[PYTHON]": (f"[PYTHON]\n{F}[/PYTHON]\nDone.", True),
    "CRLF": (f"Here:\n```python\n{F}```\n".replace("\n", "\r\n"), True),
    "from __future__": (f"```python\nfrom __future__ import annotations\n\n{F}```", True),
    "fence in the docstring": (f"```python\n{IN_DOCSTRING}```", True),
    "usage behind": (f"```python\n{F}```\nUse:\n```python\nprint(add_all([1, 2]))\n```", True),
    "usage before": (f"```python\nadd_all([1, 2])\n```\n```python\n{F}```", True),
    "imports in another block": (
        "```python\nimport math\n```\n```python\ndef add_all(xs):\n    return math.fsum(xs)\n```",
        True,
    ),
    "helper in another block": (
        "```python\ndef total(xs):\n    return sum(xs)\n```\nThen\n"
        "```python\ndef add_all(xs):\n    return total(xs)\n```",
        True,
    ),
    "other languages around": (
        f"```bash\npip install x\n```\n```python\n{F}```\n```text\n3\n```",
        True,
    ),
    "the better one": (
        f"```python\ndef add_all(xs):\n    return 0\n```\nBetter:\n```python\n{F}```",
        True,
    ),
    "lambda": ("```python\nadd_all = lambda xs: sum(xs)\n```", True),
    "unittest": (f"```python\n{F}\nimport unittest\n{MAIN}unittest.main()\n```", True),
    "input": (f"```python\n{F}\n{MAIN}print(add_all(input()))\n```", True),
    "sys.exit": (f"```python\nimport sys\n{F}\n{MAIN}sys.exit(main())\n```", True),
    "sys.argv": (f"```python\nimport sys\n{F}\n{MAIN}print(sys.argv[1])\n```", True),
    "async": ("```python\nasync def add_all(xs):\n    return sum(xs)\n```", False),
    "class with method": (
        "```python\nclass Solution:\n    def add_all(self, xs):\n        return sum(xs)\n```",
        False,
    ),
    "renamed": ("```python\ndef add_them(xs):\n    return sum(xs)\n```", False),
    "wrong": ("```python\ndef add_all(xs):\n    return len(xs)\n```", False),
    "empty": ("", False),
    "prose": ("I would add all of them.", False),
}
# Bodies without a head, which HumanEval alone takes: its prompt gives the head.
BODIES = {
    "body": ("    return sum(xs)\n", True),
    "body in a fence": ("```python\n    return sum(xs)\n```", True),
    "body without its indentation": ("```\nreturn sum(xs)\n```", True),
    "body of several lines": ("    total = sum(xs)\n    return total\n", True),
    "body that lost its first spaces": ("total = sum(xs)\n    return total\n", True),
}


def judge_humaneval(problem: dict, answer: str) -> tuple[dict, str]:
    """The scores of an answer to a problem, and the reason of a failure."""
    return TASKS["humaneval"].judge(Item("x", (), "", problem), answer)


def row_of(reference: str, tests: str = "") -> Row:
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": reference})
    return Row("r", messages, tests)


@pytest.mark.parametrize("name", [*FORMS, *BODIES])
def test_humaneval_reads_every_form(name):
    forms = FORMS | BODIES
    answer, right = forms[name]
    scores, why = judge_humaneval(PROBLEM, answer)
    assert scores == {"pass": right}, why


@pytest.mark.parametrize("name", FORMS)
def test_verify_code_reads_every_form(name):
    answer, right = FORMS[name]
    row = row_of("see the tests", "assert add_all([1, 2]) == 3\nassert add_all([]) == 0")
    accepted, _ = get_verifier("code")(row, answer)
    assert accepted is right


@pytest.mark.parametrize(
    "reference",
    [
        f"```\n{F}assert add_all([1, 2]) == 3\n```",
        f"~~~python\n{F}assert add_all([1, 2]) == 3\n~~~",
        f"```python\n{F}assert add_all([1, 2]) == 3",
        f"```python\n{F}assert add_all([1, 2]) == 3\n```\n```python\nprint(add_all([1]))\n```",
        f"{F}assert add_all([1, 2]) == 3\n",
        f"```python\nimport math\n{F}assert math.isclose(add_all([1, 2]), 3)\n```",
    ],
)
def test_the_tests_in_a_reference_are_found_in_every_form(reference):
    verify = get_verifier("code")
    assert verify(row_of(reference), f"```python\n{F}```") == (True, "ok")
    wrong = F.replace("sum", "len")
    assert verify(row_of(reference), f"```python\n{wrong}```") == (False, "tests_error")


def test_tests_that_run_nothing_accept_nothing():
    """Every program would pass functions and classes that are not called."""
    verify = get_verifier("code")
    for tests in (
        "def check(candidate):\n    assert candidate([1]) == 1\n",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): assert False\n",
        '"""Only words."""\nMETADATA = {}\n',
    ):
        assert verify(row_of("x", tests), F) == (False, "reference_without_tests")


def test_the_main_guard_of_the_tests_runs_and_that_of_the_program_does_not():
    verify = get_verifier("code")
    tests = 'def main():\n    assert add_all([1]) == 1\nif __name__ == "__main__":\n    main()\n'
    assert verify(row_of("x", tests), f"{F}{MAIN}1 / 0\n") == (True, "ok")
    assert verify(row_of("x", tests), F.replace("sum", "max")) == (True, "ok")
    failing = tests.replace("== 1", "== 2")
    assert verify(row_of("x", failing), F) == (False, "tests_error")


@pytest.mark.parametrize(
    "value",
    [
        "type('Any', (), {'__eq__': lambda self, other: True})()",
        "type('Any', (int,), {'__eq__': lambda self, other: True})()",
        "__import__('unittest.mock').mock.ANY",
        "[__import__('unittest.mock').mock.ANY]",
    ],
)
def test_a_result_that_equals_everything_does_not_pass(value):
    answer = f"```python\ndef add_all(xs):\n    return {value}\n```"
    scores, why = judge_humaneval(PROBLEM, answer)
    assert scores == {"pass": False}
    assert "decides by itself what it equals" in why or why.startswith("error: AssertionError")


def test_results_of_the_standard_library_pass():
    for value in ("collections.Counter('aab')", "collections.OrderedDict(a=2, b=1)"):
        record = PROBLEM | {"test": "def check(c):\n    assert c(0) == {'a': 2, 'b': 1}\n"}
        answer = f"```python\nimport collections\ndef add_all(xs):\n    return {value}\n```"
        scores, _ = judge_humaneval(record, answer)
        assert scores == {"pass": True}


# ---- the parts


def test_fenced_blocks_are_found_with_their_info_strings():
    assert fenced_blocks("no block") == []
    assert fenced_blocks("```\nx\n```") == [Block("", "x\n")]
    titled = fenced_blocks("  ```Python title\n  x = 1\n  ```")
    assert titled == [Block("Python title", "x = 1\n")]
    assert fenced_blocks("a ```x``` b") == [], "code within a line is no block"


def test_a_block_ends_at_its_own_sign_or_with_the_text():
    assert fenced_blocks("```python\nunclosed") == [Block("python", "unclosed\n")]
    # closed by its own sign, as often or more
    longer = fenced_blocks("~~~~\na\n```\n~~~\nb\n~~~~~\nc")
    assert longer == [Block("", "a\n```\n~~~\nb\n")]
    two = fenced_blocks("```\nbroken(\n```\nprose\n```\ngood\n```\n")
    assert [block.code for block in two] == ["broken(\n", "good\n"]


def test_the_names_that_a_program_binds_and_uses_are_found():
    source = "import a.b\nfrom c import d as e\nx, y = 1, 2\nif x:\n    def f(z): return q + z\n"
    assert bound_names(source) == {"a", "e", "x", "y", "f"}
    assert free_names(source) == {"q"}
    assert bound_names("x = (") == set()
    assert free_names("assert f([i for i in g(3)]) == len('a')") == {"f", "g"}


def test_future_imports_come_first():
    source = "import math\nfrom __future__ import (\n    annotations,\n)\nx: y = 1\n"
    assert not compiles(source)
    assert compiles(future_first(source))
    assert future_first(source).count("\n") == source.count("\n") + 1


def test_hostile_texts_are_read_in_time_and_raise_nothing():
    texts = [
        "(" * 5000, "[" * 5000, "x" + ".a" * 20_000, "-" * 20_000 + "1", "```\n" * 3000,
        "```python\n" + '"""\n```\n' * 1500, "def f(\n" * 1500, "'''\n" * 1500, "~~~\n```\n" * 1500,
        "x = 1\n" * 3000, "word\n" * 3000, "\0", "[PYTHON]" * 1000,
        "> " * 5000 + "```", "    x\n" * 3000,
        "1" * 5000, "x = " + "1 + " * 5000 + "1", "if x:\n" * 200, "@" * 5000, "\ud800",
    ]  # fmt: skip
    for text in texts:
        started = time.process_time()
        program_in(text, {"f"})
        assert time.process_time() - started < 5, text[:20]
