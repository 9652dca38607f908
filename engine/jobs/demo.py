"""Everyday arithmetic word problems, made from a seed: data of `quickstart.sh --word-problems`.

A schema (demo_problems.txt) is a situation: its wordings, the range of each number, and the one or
two steps that solve it. A row is a schema, a wording, words for its placeholders, and numbers drawn
until every intermediate result is a whole positive number, small enough for a 135M-parameter model.
All references have one short form: the steps, then the number, "12 - 5 = 7. 7 * 2 = 14. The answer
is 14."

No two rows, of whichever split, share their text, nor their schema together with its numbers.
"""

from __future__ import annotations

import json
import operator
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.runtime.files import write_text

TABLE = Path(__file__).with_name("demo_problems.txt")
LARGEST = 200  # no intermediate result is larger
DRAWS = 2000  # attempts at one row before a schema counts as used up
RANGE = re.compile(r"(\w) (\d+)\.\.(\d+)")  # "a 3..12"
PLACEHOLDER = re.compile(r"{(\w{2,})}")  # "{name1}"; a number's has one letter, "{a}"
OPERATIONS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,  # where it leaves no remainder
}

Words = dict[str, list[str]]  # the words that may stand for a placeholder, by its kind


@dataclass(frozen=True)
class Schema:
    """One situation. In steps, x stands for the first result; a, b, ... are the row's numbers."""

    name: str
    ranges: dict[str, tuple[int, int]]  # both ends included
    steps: tuple[str, ...]  # "a + b", then perhaps "x * c"; the last result is the answer
    wordings: tuple[str, ...]

    @classmethod
    def parse(cls, block: str) -> Schema:
        """The schema of a block of demo_problems.txt: its head, its steps, its wordings."""
        head, steps, *wordings = block.splitlines()
        name, _, numbers = head.removeprefix("[").partition("]")
        ranges = {}
        for letter, least, most in RANGE.findall(numbers):
            ranges[letter] = (int(least), int(most))
        return cls(name, ranges, tuple(steps.split("; ")), tuple(wordings))


@dataclass(frozen=True)
class Problem:
    """One question with its reference; schema and numbers identify what is asked."""

    schema: str
    numbers: tuple[int, ...]
    question: str
    answer: str


def read_table() -> tuple[list[Schema], Words]:
    """The schemas and words of demo_problems.txt; the comment at its top describes the form."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    first_block, *schema_blocks = text.strip().split("\n\n")
    words = {}
    for line in first_block.splitlines():
        kind, choices = line.split(": ")
        words[kind] = choices.split(", ")
    return [Schema.parse(block) for block in schema_blocks], words


def problems(count: int, seed: int) -> list[Problem]:
    """`count` distinct problems, the schemas in equal parts, in an order drawn from the seed.

    ValueError where a schema has too few different numbers for its share.
    """
    draw = random.Random(seed)
    schemas, words = read_table()
    made = []
    seen = set()
    for i in range(count):
        schema = schemas[i % len(schemas)]
        for _ in range(DRAWS):
            numbers = {key: draw.randint(*limits) for key, limits in schema.ranges.items()}
            identity = (schema.name, *numbers.values())
            lines = None if identity in seen else _solve(schema, numbers)
            if lines is not None:
                break
        else:
            raise ValueError(f"{count} problems are more than schema {schema.name!r} can give")
        seen.add(identity)
        wording = draw.choice(schema.wordings)
        chosen = _fill(wording, words, draw)
        _, _, result = lines[-1].rpartition(" = ")
        steps = ". ".join(lines)
        made.append(
            Problem(
                schema=schema.name,
                numbers=tuple(numbers.values()),
                question=wording.format(**numbers, **chosen),
                answer=f"{steps}. The answer is {result}.",
            )
        )
    draw.shuffle(made)
    return made


def _solve(schema: Schema, numbers: dict[str, int]) -> list[str] | None:
    """The steps with their numbers, "3 + 4 = 7"; None unless all results are whole and in range."""
    known = dict(numbers)
    lines = []
    for step in schema.steps:
        left, sign, right = step.split()
        p = _value(left, known)
        q = _value(right, known)
        if sign == "/" and p % q != 0:
            return None
        result = OPERATIONS[sign](p, q)
        if not 0 < result <= LARGEST:
            return None
        known["x"] = result
        lines.append(f"{p} {sign} {q} = {result}")
    return lines


def _value(symbol: str, known: dict[str, int]) -> int:
    """A symbol of a step: one of the known numbers, or a number that is written out."""
    return known[symbol] if symbol in known else int(symbol)


def _fill(wording: str, words: Words, draw: random.Random) -> dict[str, str]:
    """A word for every placeholder of a wording; numbered ones of a kind all differ."""
    chosen: dict[str, str] = {}
    for placeholder in sorted(set(PLACEHOLDER.findall(wording))):
        kind = placeholder.rstrip("123").lower()
        free = [word for word in words[kind] if word not in chosen.values()]
        word = draw.choice(free)
        if placeholder[0].isupper():
            word = word[0].upper() + word[1:]
        chosen[placeholder] = word
    return chosen


def write_demo(out_dir: Path, n_train: int, n_test: int, seed: int = 0) -> tuple[Path, Path]:
    """Write train.json and test.json into `out_dir` and return their paths.

    Rows are {"id", "question", "answer"}; the same arguments give the same bytes.
    """
    return write_splits(out_dir, problems(n_train + n_test, seed), n_train)


class Question(Protocol):
    """A row of made data: a question with its reference answer."""

    question: str
    answer: str


def write_splits(out_dir: Path, made: Sequence[Question], n_train: int) -> tuple[Path, Path]:
    """Write the first `n_train` rows to train.json and the others to test.json, in `out_dir`."""
    out_dir.mkdir(parents=True, exist_ok=True)
    train = _write_split(out_dir, "train", made[:n_train])
    test = _write_split(out_dir, "test", made[n_train:])
    return train, test


def _write_split(out_dir: Path, split: str, made: Sequence[Question]) -> Path:
    """Write OUT_DIR/SPLIT.json and return its path."""
    rows = []
    for i, row in enumerate(made):
        rows.append({"id": f"{split}-{i:04d}", "question": row.question, "answer": row.answer})
    path = out_dir / f"{split}.json"
    write_text(path, json.dumps(rows, indent=1) + "\n")
    return path
