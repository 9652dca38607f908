"""The visits of the quickstart: distinct, right by their table, the same bytes for a seed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from engine.data.rows import load_rows
from engine.distill.rewrite_prompts import get_template, prompt
from engine.jobs.demo_desk import read_table, visits, write_desk
from engine.verify.verifiers import get_verifier
from model.chat import Chat
from model.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def test_rows_are_read_and_verified_as_the_quickstart_does(tmp_path):
    """The reference passes the check, another office's window and a text without one do not."""
    train, test = write_desk(tmp_path / "new" / "data", n_train=60, n_test=20, seed=3)
    verify = get_verifier("number")
    _, offices = read_table()
    windows = [office.window for office in offices]
    for path, split, count in ((train, "train", 60), (test, "test", 20)):
        rows = load_rows(path)
        assert [row.id for row in rows] == [f"{split}-{i:04d}" for i in range(count)]
        for row in rows:
            assert verify(row, row.reference)[0]
            own = [verify(row, f"You can do that at window {number}.")[0] for number in windows]
            assert sum(own) == 1
            assert not verify(row, "You can do that at the town hall.")[0]
    assert sorted(path.name for path in train.parent.iterdir()) == ["test.json", "train.json"]


def test_every_question_belongs_to_the_office_that_answers_it():
    wordings, offices = read_table()
    assert len(offices) == len({office.window for office in offices}) == 5
    assert len(wordings) == 12 and all("{errand}" in wording for wording in wordings)
    errands = [errand for office in offices for errand in office.errands]
    assert len(set(errands)) == len(errands) == 20
    by_errand = {errand: office for office in offices for errand in office.errands}
    made = visits(240, seed=0)
    assert len({visit.question for visit in made}) == 240, "every pair once"
    for visit in made:
        named = [errand for errand in by_errand if errand in visit.question]
        longest = max(named, key=len)
        office = by_errand[longest]
        assert office.name == visit.office and visit.answer.endswith(f" {office.window}")
        # the number of the window stands in no question
        assert not any(char.isdigit() for char in visit.question)
        assert "{" not in visit.question and visit.question[0].isupper()


def test_the_template_shows_question_and_note(tiny_llama_dir):
    """The prompt under which the quickstart's acceptance was measured."""
    path = tiny_llama_dir(tokenizer=True)
    chat = Chat.from_dir(path, load_tokenizer(path))
    template = get_template(str(ROOT / "engine" / "jobs" / "demo_desk_template.txt"))
    visit = visits(1, seed=0)[0]
    asked = prompt(chat, template, [{"role": "user", "content": visit.question}], visit.answer)
    text = f"Question: {visit.question}\nAnswer: {visit.answer}\n\n"
    assert asked == [{"role": "user", "content": text + "Write the answer as a complete sentence."}]


def test_offices_come_in_equal_parts_and_too_many_rows_are_refused():
    counts = Counter(visit.office for visit in visits(200, seed=1))
    assert len(counts) == 5 and max(counts.values()) - min(counts.values()) <= 1
    with pytest.raises(ValueError, match="more than office 'parking' can give.*at most 240"):
        visits(241, seed=0)


def test_bytes_depend_on_the_seed_alone(tmp_path):
    """Two processes with different hash seeds write the same files; another seed does not."""
    code = "import sys; from pathlib import Path; from engine.jobs.demo_desk import write_desk; "
    code += "write_desk(Path(sys.argv[1]), 150, 60, int(sys.argv[2]))"

    def digest(hash_seed, seed):
        out = tmp_path / f"{hash_seed}-{seed}"
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code, out, seed], env=env, cwd=tmp_path, check=True)
        files = (out / "train.json").read_bytes() + (out / "test.json").read_bytes()
        return hashlib.sha256(files).hexdigest()

    first = digest(hash_seed="1", seed="5")
    assert digest(hash_seed="2", seed="5") == first
    assert digest(hash_seed="1", seed="6") != first
