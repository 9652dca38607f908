"""Examples on disk: the same sequence as a list of them; damage is seen; ids are exact."""

import dataclasses
import json
from pathlib import Path

import pytest

from engine.data import example_store
from engine.data.disk_tables import SeenIds, TextsById
from engine.data.encode import Example, ExampleSize, check_examples, fingerprint, names, sizes
from engine.data.example_store import (
    ExampleStore,
    ExampleWriter,
    JoinedExamples,
    read_account,
    why_damaged,
)
from engine.data.sources import Place
from engine.runtime import temporary
from tests.helpers.training import examples as made_examples

MORE = [Example("größe\ud800/0", [65_535, 0, 7], 1), Example("", [5], 0)]


def stored(directory: Path, examples: list[Example], vocabulary: int = 65_536) -> ExampleStore:
    """The examples in a new directory."""
    directory.mkdir()
    writer = ExampleWriter(directory, vocabulary)
    for example in examples:
        writer.add(example)
    writer.finish({"data": "d"}, ["3 rows"], None)
    return ExampleStore(directory)


def test_a_store_is_the_sequence_of_its_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(example_store, "LINES_READ", 3)  # 25 lines of the index
    made = [*made_examples(22), *MORE]
    store = stored(tmp_path / "s", made)
    assert list(store) == made and len(store) == 24 and store
    assert store[-1] == made[-1] and store[3:23:7] == made[3:23:7]
    for outside in (24, -25):
        with pytest.raises(IndexError):
            store[outside]
    assert list(sizes(store)) == list(sizes(made))
    assert next(store.sizes()) == ExampleSize(len(made[0].ids), made[0].n_prompt)
    assert list(names(store)) == [example.id for example in made]
    assert fingerprint(store) == fingerprint(made)
    assert store.account.key == {"data": "d"} and store.account.token_bytes == 2
    with pytest.raises(ValueError, match="1 rows have no prompt or no response token: \\[''\\]"):
        check_examples(store)
    store.close()


def test_ids_of_large_vocabularies_take_four_bytes(tmp_path):
    large = [Example("a/0", [65_536, 128_255], 1)]
    with stored(tmp_path / "s", large, vocabulary=128_256) as store:
        assert list(store) == large and store.account.token_bytes == 4
        assert (tmp_path / "s" / "tokens.bin").stat().st_size == 8


def test_joined_examples_are_one_sequence(tmp_path):
    made = [*made_examples(5), *MORE]
    with stored(tmp_path / "s", made[:5]) as store:
        joined = JoinedExamples(store, made[5:])
        assert list(joined) == made and joined[-7] == made[0] and joined[4:6] == made[4:6]
        assert list(sizes(joined)) == list(sizes(made)) and list(names(joined)) == list(names(made))
        assert fingerprint(joined) == fingerprint(made)
        with pytest.raises(IndexError):
            joined[-8]


@pytest.mark.parametrize("name", example_store.FILES)
def test_files_that_are_not_what_was_written_are_seen(tmp_path, name):
    store = stored(tmp_path / "s", made_examples(5))
    account = store.account
    assert why_damaged(tmp_path / "s", account) is None
    file = tmp_path / "s" / name
    whole = file.read_bytes()
    changed = bytes([whole[0] ^ 1]) + whole[1:]
    file.write_bytes(changed)
    assert why_damaged(tmp_path / "s", account) == f"{file} is not what was written"
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{name} has {len(whole) - 1} bytes, expected"):
        ExampleStore(tmp_path / "s")
    with pytest.raises(ValueError, match=f"{name} was cut while it was read; delete"):
        store[4]
    file.unlink()
    assert why_damaged(tmp_path / "s", account) == f"{file} is missing"
    store.close()


def test_a_store_of_another_version_or_of_somebody_else_is_none_of_ours(tmp_path, monkeypatch):
    stored(tmp_path / "s", made_examples(2)).close()
    monkeypatch.setattr(example_store, "FORMAT", 2)
    assert read_account(tmp_path / "s") is None
    with pytest.raises(ValueError, match="not what this version writes"):
        ExampleStore(tmp_path / "s")
    monkeypatch.undo()
    meta = tmp_path / "s" / "meta.json"
    record = json.loads(meta.read_text())
    for name in record.keys() - {"format"}:
        meta.write_text(json.dumps(record | {name: 3.5}))
        assert read_account(tmp_path / "s") is None, name
    meta.write_text(json.dumps(record | {"count": 3}))
    assert read_account(tmp_path / "s") is None
    meta.write_text("{}")
    with pytest.raises(ValueError, match="something else than examples"):
        read_account(tmp_path / "s")


def test_seen_ids_are_exact_and_leave_the_memory(monkeypatch):
    """More ids than the cache holds, among them such as differ in one character."""
    monkeypatch.setattr(temporary, "_SETTINGS", ("PRAGMA cache_size = -64",))
    seen = SeenIds()
    first, second = Path("a"), Path("b")
    for number in range(3000):
        assert seen.place_of(f"id {number}\0") is None
        seen.add(f"id {number}\0", Place(first if number < 1000 else second, number))
    assert seen.place_of("id 999\0") == Place(first, 999)
    assert seen.place_of("id 2999\0") == Place(second, 2999)
    assert seen.place_of("id 999") is None and seen.place_of("\ud800") is None
    assert [seen.copies_of(text) for text in ("x", "y", "x", "x\ud800", "x")] == [1, 1, 2, 1, 3]
    seen.close()
    texts = TextsById()
    texts.add("a/0", "größe \ud800")
    assert texts.get("a/0") == "größe \ud800" and texts.get("a/1") is None
    texts.close()


def test_a_full_temporary_folder_is_named(monkeypatch):
    limited = (*temporary._SETTINGS, "PRAGMA max_page_count = 8")
    monkeypatch.setattr(temporary, "_SETTINGS", limited)
    seen = SeenIds()
    with pytest.raises(OSError, match="temporary files .*TMPDIR=FOLDER"):
        for number in range(10_000):
            seen.add(str(number), Place(Path("a"), number))
    seen.close()


def test_every_field_of_the_account_is_kept(tmp_path):
    with stored(tmp_path / "s", made_examples(3)) as store:
        again = read_account(tmp_path / "s")
        assert dataclasses.asdict(again) == dataclasses.asdict(store.account)
        assert again.size == {
            name: (tmp_path / "s" / name).stat().st_size for name in example_store.FILES
        }
