"""Everyday arithmetic word problems, made from a seed: the quickstart's data.

A schema (demo_problems.txt) is a situation: its wordings, the range of each number, and the one or
two steps that solve it. A row is a schema, a wording, words for its placeholders, and numbers drawn
until every intermediate result is a whole positive number, small enough for a 135M-parameter model.
The reference is terse, in one house style: the steps, then the number, "12 - 5 = 7. 7 * 2 = 14. The
answer is 14."

No two rows, of whichever split, share their text, nor their schema together with its numbers.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from engine.runtime.files import write_text

TABLE = Path(__file__).with_name("demo_problems.txt")
LARGEST = 200  # no intermediate result is larger
DRAWS = 2000  # attempts at one row before a schema counts as used up


@dataclass(frozen=True)
class Schema:
    """One situation. In steps, x stands for the first result; a, b, ... are the row's numbers."""

    name: str
    ranges: dict[str, tuple[int, int]]  # both ends included
    steps: tuple[str, ...]  # "a + b", then perhaps "x * c"; the last result is the answer
    wordings: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """One question with its reference; schema and numbers identify what is asked."""

    schema: str
    numbers: tuple[int, ...]
    question: str
    answer: str


def read_table() -> tuple[list[Schema], dict[str, list[str]]]:
    """The schemas of demo_problems.txt and its words by kind; its first lines describe the form."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    words, *blocks = "\n".join(x for x in lines if not x.startswith("#")).strip().split("\n\n")
    schemas = []
    for block in blocks:
        head, steps, *wordings = block.splitlines()
        name, _, numbers = head.removeprefix("[").partition("]")
        ranges = {k: (int(p), int(q)) for k, p, q in re.findall(r"(\w) (\d+)\.\.(\d+)", numbers)}
        schemas.append(Schema(name, ranges, tuple(steps.split("; ")), tuple(wordings)))
    kinds = (line.split(": ") for line in words.splitlines())
    return schemas, {kind: choices.split(", ") for kind, choices in kinds}


def _solve(schema: Schema, numbers: dict[str, int]) -> list[str] | None:
    """The steps with their numbers, "3 + 4 = 7"; None unless all results are whole and in range."""
    known, lines = dict(numbers), []
    for step in schema.steps:
        left, op, right = step.split()
        p, q = (known[s] if s in known else int(s) for s in (left, right))
        if op == "/" and p % q:
            return None
        result = {"+": p + q, "-": p - q, "*": p * q, "/": p // q}[op]
        if not 0 < result <= LARGEST:
            return None
        known["x"] = result
        lines.append(f"{p} {op} {q} = {result}")
    return lines


def _fill(wording: str, words: dict[str, list[str]], draw: random.Random) -> dict[str, str]:
    """A word for every placeholder of a wording; numbered ones of a kind all differ."""
    chosen: dict[str, str] = {}
    for field in sorted(set(re.findall(r"{(\w{2,})}", wording))):
        kind = field.rstrip("123").lower()
        free = [word for word in words[kind] if word not in chosen.values()]
        word = draw.choice(free)
        chosen[field] = word[0].upper() + word[1:] if field[0].isupper() else word
    return chosen


def problems(count: int, seed: int) -> list[Problem]:
    """`count` distinct problems, the schemas in equal parts, in an order drawn from the seed.

    Raises ValueError when a schema has too few different numbers for its share.
    """
    draw, (schemas, words) = random.Random(seed), read_table()
    made, seen = [], set()
    for i in range(count):
        schema = schemas[i % len(schemas)]
        for _ in range(DRAWS):
            numbers = {key: draw.randint(*limits) for key, limits in schema.ranges.items()}
            identity = (schema.name, *numbers.values())
            lines = None if identity in seen else _solve(schema, numbers)
            if lines:
                break
        else:
            raise ValueError(f"{count} problems are more than schema {schema.name!r} can give")
        seen.add(identity)
        wording = draw.choice(schema.wordings)
        result = lines[-1].rpartition(" = ")[2]
        question = wording.format(**numbers, **_fill(wording, words, draw))
        answer = f"{'. '.join(lines)}. The answer is {result}."
        made.append(Problem(schema.name, tuple(numbers.values()), question, answer))
    draw.shuffle(made)
    return made


def write_demo(out_dir: Path, n_train: int, n_test: int, seed: int = 0) -> tuple[Path, Path]:
    """Write train.json and test.json into `out_dir` and return their paths.

    Rows are {"id", "question", "answer"}; the same arguments give the same bytes.
    """
    made = problems(n_train + n_test, seed)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, part in (("train", made[:n_train]), ("test", made[n_train:])):
        rows = [
            {"id": f"{split}-{i:04d}", "question": p.question, "answer": p.answer}
            for i, p in enumerate(part)
        ]
        path = out_dir / f"{split}.json"
        write_text(path, json.dumps(rows, indent=1) + "\n")
        paths.append(path)
    return paths[0], paths[1]
