"""The word problems of the quickstart: distinct, solved correctly, the same bytes for a seed."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from engine.jobs.demo import problems, read_table, write_demo

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = re.compile(r"((?:\d+ [-+*/] \d+ = \d+\. ){1,2})The answer is (\d+)\.")
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
EXACT = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def test_rows_have_the_shape_load_rows_reads(tmp_path):
    train, test = write_demo(tmp_path / "new" / "data", n_train=60, n_test=20, seed=3)
    for path, split, count in ((train, "train", 60), (test, "test", 20)):
        rows = json.loads(path.read_text())
        assert [row["id"] for row in rows] == [f"{split}-{i:04d}" for i in range(count)]
        assert all(set(row) == {"id", "question", "answer"} for row in rows)
    assert sorted(path.name for path in train.parent.iterdir()) == ["test.json", "train.json"]


def test_a_thousand_rows_share_neither_text_nor_numbers():
    made = problems(1000, seed=0)
    assert len({p.question for p in made}) == 1000
    assert len({(p.schema, p.numbers) for p in made}) == 1000
    # What is asked differs even where only names were drawn anew.
    without_names = {re.sub(r"\b[A-Z]\w+", "", problem.question) for problem in made}
    assert len(without_names) > 990


@pytest.mark.parametrize("seed", [0, 1])
def test_every_reference_is_right(seed):
    """Each step is evaluated; the second starts from the first's result; every number is used."""
    for problem in problems(600, seed):
        match = REFERENCE.fullmatch(problem.answer)
        assert match, problem.answer
        results, used = [], []
        for left, sign, right, stated in re.findall(STEP, match[1]):
            p = int(left)
            q = int(right)
            result = int(stated)
            assert result == EXACT[sign](p, q) and 0 < result <= 200, problem.answer
            if results:
                assert results[-1] in (p, q)
            results.append(result)
            used += [p, q]
        assert int(match[2]) == results[-1]
        assert set(problem.numbers) <= set(used)


def test_every_question_states_its_numbers_and_nothing_else():
    for problem in problems(600, seed=2):
        stated = sorted(int(n) for n in re.findall(r"\d+", problem.question))
        assert stated == sorted(problem.numbers), problem.question
        assert not re.search(r"[{}]|  ", problem.question)
        assert problem.question[0].isupper() or problem.question[0].isdigit()
        assert problem.question.endswith("?")


def test_all_schemas_and_wordings_are_drawn():
    schemas, words = read_table()
    assert len(schemas) >= 30 and all(len(s.wordings) >= 3 for s in schemas)
    assert len({s.name for s in schemas}) == len(schemas)
    for schema in schemas:
        letters = set(re.findall(r"\b[a-d]\b", " ".join(schema.steps)))
        assert letters == set(schema.ranges), schema.name
        for wording in schema.wordings:
            placeholders = set(re.findall(r"{(\w+)}", wording))
            numbers = {name for name in placeholders if len(name) == 1}
            kinds = {name.rstrip("123").lower() for name in placeholders - numbers}
            assert numbers == letters, wording
            assert kinds <= set(words), wording
    made = problems(600, seed=0)
    counts = Counter(problem.schema for problem in made)
    assert set(counts) == {schema.name for schema in schemas}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_too_many_rows_name_the_schema_that_is_used_up():
    with pytest.raises(ValueError, match="more than schema '.*' can give"):
        problems(20_000, seed=0)


def test_bytes_depend_on_the_seed_alone(tmp_path):
    """Two processes with different hash seeds write the same files; another seed does not."""
    code = "import sys; from pathlib import Path; from engine.jobs.demo import write_demo; "
    code += "write_demo(Path(sys.argv[1]), 300, 60, int(sys.argv[2]))"

    def digest(hash_seed, seed):
        out = tmp_path / f"{hash_seed}-{seed}"
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code, out, seed], env=env, cwd=tmp_path, check=True)
        train = (out / "train.json").read_bytes()
        test = (out / "test.json").read_bytes()
        return hashlib.sha256(train + test).hexdigest()

    first = digest(hash_seed="1", seed="5")
    assert digest(hash_seed="2", seed="5") == first
    assert digest(hash_seed="1", seed="6") != first
