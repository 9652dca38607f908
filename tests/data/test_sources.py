"""Tables and directories as data files: the rows of the same rows as JSONL."""

from __future__ import annotations

import gzip
import json
import shutil
import sys

import pytest

from engine.data.config import DataConfig
from engine.data.rows import load_rows
from tests.helpers.data_files import bot, jsonl, user, write
from tests.helpers.tool_templates import TOOLS, call, calling, result

RECORDS = [
    {"question": "q é", "answer": "a"},
    {"question": "q2", "answer": "a2"},
    {"question": "q3", "answer": "a3"},
]


@pytest.fixture
def pyarrow():
    return pytest.importorskip("pyarrow", reason="the extra `tables` is not installed")


def write_parquet(pyarrow, path, records):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def write_stream(pyarrow, path, records):
    """An Arrow stream, as `datasets` writes them."""
    table = pyarrow.Table.from_pylist(records)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    return path


def write_arrow_file(pyarrow, path, records):
    table = pyarrow.Table.from_pylist(records)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    return path


@pytest.mark.parametrize("write_table", [write_parquet, write_stream, write_arrow_file])
def test_a_table_has_the_rows_of_the_same_rows_as_jsonl(pyarrow, tmp_path, write_table):
    plain = load_rows(jsonl(tmp_path / "a.jsonl", *RECORDS))
    path = write_table(pyarrow, tmp_path / "a.table", RECORDS)
    rows = load_rows(path)
    assert list(rows) == list(plain) and rows.path == path
    assert [row.id for row in load_rows(path, limit=2)] == [row.id for row in plain[:2]]
    assert load_rows(path, limit=2).sha256 == rows.sha256 != plain.sha256
    numbered = write_table(pyarrow, tmp_path / "b.table", [{"question": "q", "answer": 0.5}])
    assert load_rows(numbered)[0].reference == "0.5"


def test_bad_rows_of_a_table_are_named_by_their_number(pyarrow, tmp_path):
    path = write_parquet(pyarrow, tmp_path / "a.parquet", [RECORDS[0], {"question": "q"}])
    with pytest.raises(ValueError, match="a.parquet:2 .row 2.: 'answer' is null, expected text"):
        load_rows(path)


def test_tools_in_a_table_have_no_keys_of_other_calls(pyarrow, tmp_path, capsys):
    """A table gives every object the keys of all: those without a value are left out."""
    calls = calling(call("f", city="Oslo")), calling(call("g", zone="CET"))
    turns = [user("x"), calls[0], result("1"), calls[1], result("2"), bot("y")]
    record = {"messages": turns, "tools": json.dumps(TOOLS)}
    (plain,) = load_rows(jsonl(tmp_path / "a.jsonl", record))
    (row,) = load_rows(write_parquet(pyarrow, tmp_path / "a.parquet", [record]))
    assert row.messages == plain.messages
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    for path in (tmp_path / "a.parquet", tmp_path):  # the directory has the same row twice
        DataConfig(str(path)).load()
        assert "keys without a value left out in messages\n" in capsys.readouterr().out


def test_a_saved_data_set_is_read_file_after_file(pyarrow, tmp_path):
    """The layout of Dataset.save_to_disk, written here by hand."""
    folder = tmp_path / "saved"
    folder.mkdir()
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    write_stream(pyarrow, folder / names[0], RECORDS[:2])
    write_stream(pyarrow, folder / names[1], RECORDS[2:])
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x"}
    write(folder / "state.json", json.dumps(state))
    write(folder / "dataset_info.json", "{}")
    rows = load_rows(folder)
    assert [row.messages[0]["content"] for row in rows] == ["q é", "q2", "q3"]
    splits = tmp_path / "splits"
    splits.mkdir()
    shutil.copytree(folder, splits / "train")
    write(splits / "dataset_dict.json", '{"splits": ["train"]}')
    with pytest.raises(ValueError, match="several splits .train.: give one"):
        load_rows(splits)
    write(folder / "state.json", json.dumps({"_data_files": [{"filename": "../a.arrow"}]}))
    with pytest.raises(ValueError, match="state.json lists '?a.arrow|not in"):
        load_rows(folder)


def test_datasets_own_directory_is_read(pyarrow, tmp_path):
    """Written by the package itself, in a process of its own."""
    import importlib.util
    import subprocess

    if importlib.util.find_spec("datasets") is None:
        pytest.skip("the package datasets is not installed")
    code = (
        "import json, sys, datasets; rows = json.loads(sys.argv[1]); "
        "datasets.Dataset.from_list(rows).shuffle(seed=1).save_to_disk(sys.argv[2])"
    )
    out = tmp_path / "saved"
    command = [sys.executable, "-c", code, json.dumps(RECORDS), str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    rows = load_rows(out)
    assert {row.reference for row in rows} == {"a", "a2", "a3"} and len(rows) == 3


def test_a_directory_is_its_files_in_the_order_of_their_names(tmp_path, capsys):
    folder = tmp_path / "rows"
    folder.mkdir()
    jsonl(folder / "b.jsonl", RECORDS[2])
    write(folder / "a.json.gz", gzip.compress(json.dumps(RECORDS[:2]).encode()))
    write(folder / "README.md", "about")
    write(folder / ".hidden.json", "nonsense")
    rows = DataConfig(str(folder)).load()
    assert [row.messages[0]["content"] for row in rows] == ["q é", "q2", "q3"]
    assert "3 rows from" in (said := capsys.readouterr().out)
    assert "of 2 files (not read: README.md)" in said
    first = load_rows(folder, limit=1)
    assert len(first) == 1 and first.sha256 == rows.sha256
    write(folder / "c.csv", "question,answer\nq4,\n")
    with pytest.raises(ValueError, match=r"c.csv:2 \(row 4\): 'answer' is empty"):
        load_rows(folder)
    skipped = load_rows(folder, skip_bad=True)
    assert len(skipped) == 3 and skipped.sha256 != rows.sha256
    jsonl(folder / "c.csv", {})
    (folder / "c.csv").unlink()
    jsonl(folder / "c.jsonl", {"id": "x", **RECORDS[0]})
    jsonl(folder / "d.jsonl", {"id": "x", **RECORDS[1]})
    with pytest.raises(ValueError, match=r"d.jsonl:1 .*id 'x' is taken by .*c.jsonl:1"):
        load_rows(folder)


def test_a_directory_without_rows_says_what_is_in_it(tmp_path):
    (tmp_path / "repo" / "data").mkdir(parents=True)
    write(tmp_path / "repo" / "README.md", "about")
    with pytest.raises(ValueError, match="without a data file.*the directories data: give one"):
        load_rows(tmp_path / "repo")


@pytest.mark.parametrize("beginning", [b"PAR1\x15\x04", b"ARROW1\0\0", b"\xff\xff\xff\xff\x10"])
def test_a_damaged_table_is_named(pyarrow, tmp_path, beginning):
    path = write(tmp_path / "a.json", beginning + bytes(range(256)))
    with pytest.raises(ValueError, match="a.json cannot be read as a table"):
        load_rows(path)
    packed = write(tmp_path / "b.parquet.gz", gzip.compress(beginning + bytes(range(256))))
    with pytest.raises(ValueError, match="b.parquet.gz is a"):
        load_rows(packed)


def test_without_pyarrow_a_table_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / "a.parquet", b"PAR1" + bytes(99))
    with pytest.raises(ValueError, match="needs pyarrow: pip install"):
        load_rows(path)
