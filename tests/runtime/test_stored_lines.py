"""JSONL files that may be larger than memory: the same files as with lines in memory."""

import json
import random
from pathlib import Path

import pytest

from engine.runtime import temporary
from engine.runtime.files import BLOCK_BYTES, cut_torn_line
from engine.runtime.resumable import ResumedLines
from engine.runtime.stored_lines import LinesOfFile, ResumedOnDisk
from engine.runtime.temporary import TemporaryNumbers

NAMES = [f"größe {number}" for number in range(40)]


def line_of(name: str) -> dict:
    return {"id": name, "text": name * 3, "n": len(name), "x": 1.5}


def write_some(kind: type[ResumedLines], file: Path, names: list[str]) -> None:
    with kind(file, {"a": 1}, wanted={"n": int}) as lines:
        for name in names:
            if name not in lines.done:
                lines.write(line_of(name))


@pytest.mark.parametrize("asked", [NAMES, NAMES[5:30], NAMES[::-1], []], ids=len)
def test_a_file_has_the_bytes_that_lines_in_memory_give(tmp_path, asked):
    """Written in two runs in a random order, with a torn line between them; not all are asked."""
    shuffled = random.Random(0).sample(NAMES, len(NAMES))
    files = []
    for kind in (ResumedLines, ResumedOnDisk):
        file = tmp_path / kind.__name__
        write_some(kind, file, shuffled[:25])
        with file.open("a") as opened:
            opened.write('{"id": "gr')
        write_some(kind, file, shuffled)
        with kind(file, {"a": 1}, wanted={"n": int}) as lines:
            assert list(lines.done) == shuffled and len(lines.done) == len(NAMES)
            lines.put_in_order(asked) if kind is ResumedOnDisk else lines.finish(asked)
            assert [lines.done[name] for name in asked] == [line_of(name) for name in asked]
        files.append(file.read_bytes())
    assert files[0] == files[1] and files[0].count(b"\n") == len(NAMES)


def test_a_file_in_order_is_not_written_again_and_one_with_an_id_twice_is(tmp_path):
    file = tmp_path / "x.jsonl"
    write_some(ResumedOnDisk, file, NAMES)
    before = file.stat()
    with ResumedOnDisk(file, {"a": 1}) as lines:
        lines.put_in_order(NAMES)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    with file.open("ab") as opened:
        opened.write(file.read_bytes().splitlines(keepends=True)[3])
    with ResumedOnDisk(file, {"a": 1}) as lines:
        assert len(lines.done) == len(NAMES)
        lines.put_in_order(NAMES)
    assert file.stat().st_size == before.st_size, "the second of two lines with one id is gone"
    with ResumedOnDisk(file, {"a": 1}) as lines:
        lines.write({"id": NAMES[3], "text": "new"})  # the later line is the one that counts
        lines.put_in_order(NAMES)
        assert lines.done[NAMES[3]]["text"] == "new"
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert texts[3] == "new" and len(texts) == len(NAMES)


def test_lines_of_a_file_are_a_sequence_that_outlives_its_name(tmp_path):
    file = tmp_path / "x.jsonl"
    write_some(ResumedOnDisk, file, NAMES)
    lines = LinesOfFile(file, 30, lambda record: record["id"])
    with pytest.raises(ValueError, match="x.jsonl has 40 whole lines, expected 41"):
        LinesOfFile(file, 41, dict)
    file.unlink()
    assert list(lines) == NAMES[:30] and len(lines) == 30
    assert (lines[0], lines[-1], lines[3:9:2]) == (NAMES[0], NAMES[29], NAMES[3:9:2])
    for outside in (30, -31):
        with pytest.raises(IndexError):
            lines[outside]


def test_a_line_torn_behind_a_long_one_is_cut_off(tmp_path):
    """Also where the newline before it is more than one block away, and where there is none."""
    file = tmp_path / "x"
    for whole, torn in (
        ("", 7),
        ("ab\n", 3 * BLOCK_BYTES),
        ("ab\n", BLOCK_BYTES - 1),
        ("a\nb\n", 0),
    ):
        file.write_text(whole + "x" * torn)
        cut_torn_line(file)
        assert file.read_text() == whole


def test_temporary_numbers_are_those_that_were_added(monkeypatch):
    monkeypatch.setattr(temporary, "NUMBERS_AT_ONCE", 4)
    numbers = TemporaryNumbers()
    expected = []
    for number in range(11):
        numbers.append(number - (1 << 62))
        expected.append(number - (1 << 62))
        assert [numbers[place] for place in range(len(numbers))] == expected
    assert [numbers[place] for place in (9, 0, 5, 10, 1)] == [expected[i] for i in (9, 0, 5, 10, 1)]
    for outside in (11, -1):
        with pytest.raises(IndexError):
            numbers[outside]
