"""Examples of rows on disk, as the main job makes them: those of the rows in memory."""

import dataclasses

import pytest

from engine.data.config import DataConfig
from engine.data.distilled import load_distilled
from engine.data.encode import Example, encode, fingerprint
from engine.data.example_store import JoinedExamples
from engine.data.subset import FirstItems
from engine.jobs.sdft import same_turns
from engine.session import ModelConfig, Session
from engine.train.config import EncodeConfig
from engine.train.examples import counts_text, encode_rules
from engine.train.temporary_examples import joined, temporary_examples
from model.trained_chat import common_system
from tests.helpers.data_files import jsonl
from tests.train.test_file_examples import distilled_lines, plain_rows


@pytest.fixture
def session(tiny_llama_dir) -> Session:
    return Session.open(ModelConfig(str(tiny_llama_dir(tokenizer=True)), ops="torch"))


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ({}, {}),
        ({"target": "reference"}, {"system": "Be brief."}),
        ({"mix": 0.5}, {}),
        ({"drop_rejected": True}, {}),
        ({"target": "reference", "max_length": 70}, {"drop_long": True}),
        ({"max_length": 90, "truncate": True}, {"drop_long": True}),
    ],
)
def test_temporary_examples_are_those_of_the_rows_in_memory(
    session, tmp_path, capsys, monkeypatch, encoding, data
):
    """Of distilled lines and of plain rows: ids, tokens, order, what is printed, the system
    message. No file stays."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    encoding = EncodeConfig(**{"max_length": 300} | encoding)
    lines = load_distilled(jsonl(tmp_path / "d.jsonl", *distilled_lines()))
    plain = DataConfig(str(jsonl(tmp_path / "a.jsonl", *plain_rows())), skip_bad=True, **data)
    kinds = [(lines, encoding)]
    if not encoding.drop_rejected:
        of_rows = dataclasses.replace(encoding, mix=0.0)
        kinds.append((plain.stored(), of_rows))
    for rows, rules_of in kinds:
        rules = encode_rules(session, plain, rules_of, seed=3)
        expected, counts = encode(list(rows), session.chat, rules)
        capsys.readouterr()
        store = temporary_examples(rows, session, plain, rules_of, seed=3)
        assert capsys.readouterr().out.strip() == counts_text(rules_of.target, counts)
        assert list(store) == expected and len(expected) >= 3
        assert store.fingerprint() == fingerprint(expected)
        assert store.account.system == common_system([row.messages for row in rows])
        assert not list(folder.iterdir())


def test_faults_are_those_of_the_rows_in_memory(session, tmp_path):
    data = DataConfig("d")
    rejected = distilled_lines()[1] | {"status": "no_number"}
    orphan = distilled_lines()[1]
    for line, settings, text in (
        (rejected, {"drop_rejected": True}, "(no_number 1)"),
        (orphan, {"target": "reference"}, "the line of its earlier turn r0/0 is absent"),
        (orphan, {"max_length": 10}, "turns cannot be trained on"),
    ):
        lines = load_distilled(jsonl(tmp_path / "d.jsonl", line))
        encoding = EncodeConfig(**settings)
        with pytest.raises(ValueError) as of_list:
            encode(lines, session.chat, encode_rules(session, data, encoding))
        with pytest.raises(ValueError) as of_disk:
            temporary_examples(lines, session, data, encoding)
        assert str(of_disk.value) == str(of_list.value) and text in str(of_disk.value)


def test_replay_is_joined_to_stored_examples(session, tmp_path):
    lines = load_distilled(jsonl(tmp_path / "d.jsonl", *distilled_lines()))
    store = temporary_examples(lines, session, DataConfig("d"), EncodeConfig(max_length=300))
    assert joined(store, []) is store
    replay = [Example("replay/1", [1, 2, 3], 1)]
    both = joined(store, replay)
    assert isinstance(both, JoinedExamples) and list(both) == [*store, *replay]
    assert fingerprint(both) == fingerprint([*store, *replay])


@pytest.mark.parametrize("count", [0, 1, 4, 50])
def test_the_report_shows_turns_that_both_arms_have(count):
    references = [Example(f"{number}/0", [number, 1], 1) for number in range(9)]
    rewrites = [Example(f"{number}/0", [number, 2, 3], 1) for number in (1, 2, 5, 7, 8)]
    sft, sdft = same_turns(references, rewrites, count)
    assert [example.id for example in sft] == [example.id for example in sdft]
    assert len(sft) == min(count, 5) and all(example in references for example in sft)
    assert all(example in rewrites for example in sdft)
    if count == 4:
        assert [example.id for example in sft] == ["1/0", "2/0", "5/0", "7/0"]


def test_first_items_are_a_view():
    items = list(range(10))
    first = FirstItems(items, 4)
    assert list(first) == items[:4] and (first[-1], first[1:3], len(first)) == (3, [1, 2], 4)
    for outside in (4, -5):
        with pytest.raises(IndexError):
            first[outside]
    with pytest.raises(ValueError, match="first 11 of 10"):
        FirstItems(items, 11)
