"""Resumed JSONL files: finished lines are kept, other settings refused, the order is the data's."""

import json
from operator import itemgetter

import pytest

from engine.runtime.files import read_jsonl
from engine.runtime.resumable import ResumedLines, meta_file

BY_ARM = itemgetter("arm", "n")


def lines_of(arm, *numbers):
    return [{"arm": arm, "n": number} for number in numbers]


def test_finished_lines_are_kept_and_put_in_order(tmp_path):
    file = tmp_path / "x.jsonl"
    with ResumedLines(file, {"a": 1}, key=BY_ARM) as lines:
        for line in lines_of("sft", 2, 1):
            lines.write(line)
    assert read_jsonl(file) == lines_of("sft", 2, 1), "appended as they were finished"
    with file.open("a") as opened:
        opened.write('{"arm": "sft", "n"')  # a line torn by a kill
    with ResumedLines(file, {"a": 1}, key=BY_ARM) as lines:
        assert list(lines.done) == [("sft", 2), ("sft", 1)]
        lines.write({"arm": "sft", "n": 0})
        assert lines.finish([("sft", 0), ("sft", 1)]) == lines_of("sft", 0, 1)
    assert read_jsonl(file) == lines_of("sft", 0, 1, 2), "a line that was not asked for stays"
    before = file.stat().st_mtime_ns
    with ResumedLines(file, {"a": 1}, key=BY_ARM) as lines:
        lines.finish([("sft", 0), ("sft", 1), ("sft", 2)])
    assert file.stat().st_mtime_ns == before, "a complete file is not written again"


def test_other_settings_and_other_files_are_refused(tmp_path):
    file = tmp_path / "x.jsonl"
    with ResumedLines(file, {"a": 1, "b": {"c": 2}}) as lines:
        lines.write({"id": "1"})
    with pytest.raises(ValueError, match="begun with other settings.*\n  b.c: 2 -> 3"):
        ResumedLines(file, {"a": 1, "b": {"c": 3}})
    with pytest.raises(ValueError, match="exists already; choose another --out, or --resume"):
        ResumedLines(file, {"a": 1, "b": {"c": 2}}, resume=False)
    with pytest.raises(ValueError, match="x.jsonl:1 is damaged: n is missing"):
        ResumedLines(file, {"a": 1, "b": {"c": 2}}, wanted={"n": int})
    assert json.loads(meta_file(file).read_text()) == {"a": 1, "b": {"c": 2}}
    meta_file(file).unlink()
    with pytest.raises(ValueError, match="not made by this program"):
        ResumedLines(file, {"a": 1})


def test_lines_that_do_not_count_as_finished_are_written_anew(tmp_path):
    file = tmp_path / "x.jsonl"
    with ResumedLines(file, {}) as lines:
        lines.write({"id": "1", "old": True})
        lines.write({"id": "2"})
    with ResumedLines(file, {}, keep=lambda line: "old" not in line) as lines:
        assert list(lines.done) == ["2"]
        lines.write({"id": "1"})
        lines.finish(["1", "2"])
    assert read_jsonl(file) == [{"id": "1"}, {"id": "2"}]
