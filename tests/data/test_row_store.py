"""Rows on disk are the rows in memory, with what is said of their file."""

import pytest

from engine.data import row_store
from engine.data.config import DataConfig
from tests.helpers.data_files import bot, jsonl, system, user

TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 0.50, "y": [1, None]}}}


def rows() -> list[dict]:
    weighted = [user("a"), bot("one") | {"weight": 0}, user("b"), bot("two")]
    calling = [user("c"), bot("") | {"tool_calls": [CALL]}, {"role": "tool", "content": "7"}]
    return [
        {"question": "Say x", "answer": "x", "extra": 1},
        {"question": "Say x", "answer": "x"},
        {"messages": [system("s"), *weighted]},
        {"messages": [*calling, bot("It is 7.")], "tools": [TOOL]},
        {"id": "é\u2028", "question": "ü\ud800", "answer": "\U0001f600"},
        {"question": "2 + 2", "answer": "4", "tests": "assert True"},
        {"question": "no answer", "answer": ""},
        *({"question": f"Say {number}", "answer": "y"} for number in range(30)),
    ]


@pytest.mark.parametrize("settings", [{}, {"limit": 3, "system": "s"}, {"thinking": "strip"}])
def test_stored_rows_are_those_in_memory(tmp_path, capsys, monkeypatch, settings):
    monkeypatch.setattr(row_store, "WRITTEN_AT_ONCE", 300)
    data = DataConfig(str(jsonl(tmp_path / "a.jsonl", *rows())), skip_bad=True, **settings)
    expected = data.load()
    printed = capsys.readouterr().out
    stored = data.stored()
    assert capsys.readouterr().out == printed
    assert list(stored) == expected and len(stored) == len(expected)
    assert (stored[0], stored[-1], stored[1:3]) == (expected[0], expected[-1], expected[1:3])
    assert (stored.sha256, stored.path) == (expected.sha256, expected.path)
    assert (stored.unused, stored.inputs) == (expected.unused, expected.inputs)
    assert stored.bad == expected.bad
    with pytest.raises(IndexError):
        stored[len(expected)]


def test_faults_are_those_of_the_rows_in_memory(tmp_path):
    data = DataConfig(str(jsonl(tmp_path / "a.jsonl", *rows())))
    with pytest.raises(ValueError) as of_rows:
        data.load()
    with pytest.raises(ValueError) as of_stored:
        data.stored()
    assert str(of_rows.value) == str(of_stored.value)
    assert "a.jsonl:7 (row 7)" in str(of_stored.value)
