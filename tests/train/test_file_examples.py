"""The examples of a file on disk: those of its rows in memory, made once, in bounded memory."""

import dataclasses
import json
import os
import signal
import tracemalloc
from pathlib import Path

import pytest
import torch

from engine.data.config import DataConfig
from engine.data.distilled import load_distilled
from engine.data.encode import EncodeRules, encode, template_takes
from engine.data.example_store import ExampleStore, ExampleWriter
from engine.session import ModelConfig, Session
from engine.train import file_examples
from engine.train.checkpoint import EXAMPLES
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.file_examples import FileExamples, stored_examples
from engine.train.loop import Run, batches
from engine.train.replay import ReplayConfig
from engine.train.train import FrozenModel, TrainJobConfig, train, train_job
from engine.train.validate import ValidateConfig
from kernels.philox import mix
from model.lora import LoraConfig
from model.trained_chat import common_system
from tests.helpers.data_files import bot, jsonl, system, user, write
from tests.helpers.training import metrics_lines

TRAIN = TrainConfig(lr=5e-3, epochs=2, batch_rows=4, micro_tokens=128, save_every=2, seed=5)
ENCODE = EncodeConfig(max_length=200)
LORA = LoraConfig(rank=2, alpha=4)


@pytest.fixture
def session(tiny_llama_dir) -> Session:
    return Session.open(ModelConfig(str(tiny_llama_dir(tokenizer=True)), ops="torch"))


def job(data: DataConfig, **changes) -> TrainJobConfig:
    """A small training on the file; `changes` are those of its settings."""
    config = TrainJobConfig(data, ENCODE, TRAIN, LORA, ValidateConfig())
    return dataclasses.replace(config, **changes)


def questions(path: Path, count: int) -> Path:
    """A file of short rows, no two of them alike."""
    rows = [{"question": f"Say {i}", "answer": f"{i % 7} " * (i % 5 + 1)} for i in range(count)]
    return jsonl(path, *rows)


# ---- files of every kind


def plain_rows() -> list[dict]:
    conversation = [user("a"), bot("one") | {"weight": 0}, user("b"), bot("two")]
    return [
        {"question": "Say x", "answer": "x", "extra": 1},
        {"question": "Say x", "answer": "x"},  # a copy: its id ends with -2
        {"messages": conversation},
        {"messages": [system("s"), user("a longer question"), bot("<think>\nhm\n</think>\n\nok")]},
        {"id": "x", "question": "no answer", "answer": ""},
        {"id": "y", "question": "é\u2028<|im_end|>", "answer": "ü"},
        {"id": "y", "question": "its id is taken", "answer": "so it is left out"},
        {"question": "Say much", "answer": "much " * 20},
    ]


def distilled_lines() -> list[dict]:
    """Turns with every status; every third row is a conversation of two turns."""
    statuses = ("accepted", "no_number", "identical", "context_only")
    lines = []
    for row in range(12):
        context = [user(f"first {row}")]
        turns = [context]
        if row % 3 == 0:
            turns.append([*context, bot(f"answer {row}"), user("And then?")])
        for turn, messages in enumerate(turns):
            status = statuses[(row + turn) % 4]
            kept = status in ("accepted", "identical")
            response = "" if status == "context_only" else f"answer {row} {'y' * 8 * row}"
            line = {
                "id": f"r{row}/{turn}",
                "messages": messages,
                "reference": f"reference {row} {turn}",
                "response": response,
                "response_ids": list(response.encode()),
                "target": response if kept else f"reference {row} {turn}",
                "status": status,
                "stage": "unguided" if kept else "reference",
                "finish": "length" if row == 4 else "stop",
                "prompt_tokens": 5,
                "response_tokens": len(response),
            }
            lines.append(line)
    return lines


@pytest.mark.parametrize(
    ("data", "rules"),
    [
        ({}, {}),
        ({"limit": 3, "system": "Be brief."}, {"truncate": True, "max_length": 67}),
        ({"drop_long": True}, {"drop_long": True, "max_length": 60}),
        ({"thinking": "answer-only"}, {"answer_only": True}),
        ({"thinking": "strip"}, {"in_proportion": True, "max_length": 60}),
    ],
)
def test_examples_of_a_file_are_those_of_its_rows_in_memory(session, tmp_path, data, rules):
    """Ids, tokens, order, counts, system message, the printed lines."""
    rules = EncodeRules(**{"max_length": 300} | rules)
    of_text = jsonl(tmp_path / "a.jsonl", *plain_rows())
    of_array = write(tmp_path / "b.json", json.dumps(plain_rows(), indent=1))
    for path in (of_text, of_array):
        config = DataConfig(str(path), skip_bad=True, **data)
        rows = config.load(check=template_takes(session.chat))
        expected, counts = encode(rows, session.chat, rules)
        of_file = FileExamples(session, config, rules)
        assert list(of_file) == expected and len(expected) >= 3
        assert of_file.system == common_system([row.messages for row in rows])
        assert len(rows.bad) == (0 if "limit" in data else 2)
        assert f"data: {len(rows)} rows from {path}" in of_file.text[0]
        assert f"examples {counts.examples}, tokens {counts.tokens}" in of_file.text[-1]


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"target": "reference"},
        {"target": "response"},
        {"mix": 0.5, "seed": 3},
        {"drop_rejected": True},
        {"drop_long": True, "max_length": 90},
        {"in_proportion": True, "max_length": 70},
        {"target": "reference", "drop_long": True, "max_length": 70},
    ],
)
@pytest.mark.parametrize("order", [1, -1])  # of the lines: as distillation writes them, reversed
def test_examples_of_distilled_data_are_those_of_its_lines_in_memory(
    session, tmp_path, rules, order
):
    rules = EncodeRules(**{"max_length": 300} | rules)
    path = jsonl(tmp_path / "d.jsonl", *distilled_lines()[::order])
    expected, counts = encode(load_distilled(path), session.chat, rules)
    of_file = FileExamples(session, DataConfig(str(path), columns="id="), rules)
    assert list(of_file) == expected and counts.examples == len(expected) >= 6
    assert of_file.text[0] == (
        f"data: 16 distilled turns from {path}; --columns do not change distilled data"
    )
    assert of_file.system is None


def test_faults_of_a_file_are_those_of_its_rows_in_memory(session, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *plain_rows()[:3], *plain_rows()[:3], {"x": 1})
    rows_refused = DataConfig(str(path))
    distilled = jsonl(tmp_path / "d.jsonl", *distilled_lines(), {"id": "r"})
    rejected = [line | {"status": "no_number"} for line in distilled_lines()[1:2]]
    all_rejected = jsonl(tmp_path / "r.jsonl", *rejected)

    def message(config: DataConfig, in_memory, **rules) -> str:
        rules = EncodeRules(**{"max_length": 300} | rules)
        with pytest.raises(ValueError) as of_rows:
            encode(in_memory(), session.chat, rules)
        with pytest.raises(ValueError) as of_file:
            list(FileExamples(session, config, rules))
        assert str(of_file.value) == str(of_rows.value)
        return str(of_file.value)

    def load():
        return rows_refused.load(check=template_takes(session.chat))

    assert "a.jsonl:7 (row 7): fields 'x' fit no known shape" in message(rows_refused, load)
    skipping = dataclasses.replace(rows_refused, skip_bad=True)
    assert "turns cannot be trained on" in message(skipping, skipping.load, max_length=20)
    assert "no rewrites that could" in message(skipping, skipping.load, drop_rejected=True)
    assert "has no response" in message(skipping, skipping.load, target="response")
    assert "mix=0.5 with" in message(skipping, skipping.load, mix=0.5)
    config = DataConfig(str(distilled))
    assert "1 lines are no distilled data" in message(config, lambda: load_distilled(distilled))
    config = DataConfig(str(all_rejected))
    all_lines = load_distilled(all_rejected)
    assert "(no_number 1)" in message(config, lambda: all_lines, drop_rejected=True)
    orphan = jsonl(tmp_path / "o.jsonl", distilled_lines()[1])
    config = DataConfig(str(orphan))
    lines = load_distilled(orphan)
    text = message(config, lambda: lines, target="reference")
    assert "r0/1: the line of its earlier turn r0/0 is absent" in text


# ---- a run


def test_a_run_is_the_one_over_the_rows_in_memory(session, tmp_path):
    """The same bytes as `train` with a list of examples, also where replay is joined to them."""
    data = DataConfig(str(jsonl(tmp_path / "d.jsonl", *distilled_lines())))
    train_job(session, job(data), tmp_path / "file")
    rules = EncodeRules(max_length=200, model_limit=512, seed=5)
    examples, _ = encode(load_distilled(data.data), session.chat, rules)
    train(FrozenModel.of(session), examples, LORA, TRAIN, tmp_path / "memory")
    assert same_run(tmp_path / "file", tmp_path / "memory")

    replay = ReplayConfig("own", replay_share=0.2, replay_max_new=2)
    one_epoch = dataclasses.replace(TRAIN, max_steps=2)
    train_job(session, job(data, replay=replay, train=one_epoch), tmp_path / "replay")
    meta = json.loads((tmp_path / "replay" / "meta.json").read_text())
    assert meta["settings"]["replay"]["rows"] == 3 and meta["summary"]["examples"] == 15


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs have the same adapters, metrics and settings."""
    settings = []
    for run in (one, other):
        settings.append(json.loads((run / "meta.json").read_text())["settings"])
    adapters = [(run / "adapter_model.safetensors").read_bytes() for run in (one, other)]
    same_metrics = metrics_lines(one) == metrics_lines(other)
    return same_metrics and adapters[0] == adapters[1] and settings[0] == settings[1]


def test_a_resumed_run_takes_the_examples_that_are_there(session, tmp_path, monkeypatch, capsys):
    data = DataConfig(str(questions(tmp_path / "q.jsonl", 20)))
    train_job(session, job(data), tmp_path / "whole")
    out = tmp_path / "killed"
    do_step = Run.train_step

    def killed(run, step, *rest):
        if step == 4:
            raise KeyboardInterrupt  # after the checkpoint of step 2
        do_step(run, step, *rest)

    monkeypatch.setattr(Run, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train_job(session, job(data), out)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="killed exists already"):
        train_job(session, job(data), out)
    monkeypatch.setattr(FileExamples, "__iter__", None)  # the file is not encoded again
    capsys.readouterr()
    train_job(session, job(data), out, resume=True)
    assert f"as they were encoded before, in {out / EXAMPLES}" in capsys.readouterr().out
    assert same_run(out, tmp_path / "whole")
    train_job(session, job(data), out, resume=True)  # a finished run


def test_a_run_of_an_older_version_gets_its_examples(session, tmp_path):
    data = DataConfig(str(questions(tmp_path / "q.jsonl", 8)))
    out = tmp_path / "run"
    first_step = dataclasses.replace(TRAIN, max_steps=2)
    train_job(session, job(data, train=first_step), out)
    file_examples.remove_directory(out / EXAMPLES)
    train_job(session, job(data, train=first_step), out, resume=True)
    with ExampleStore(out / EXAMPLES) as store:
        assert len(store) == 8


@pytest.mark.parametrize("when", ["encoding", "renaming", "removing"])
def test_a_kill_while_examples_are_written_loses_nothing(session, tmp_path, monkeypatch, when):
    """The same command makes them again, without --resume, and no leftover stays."""
    data = DataConfig(str(questions(tmp_path / "q.jsonl", 12)))
    config = job(data, train=dataclasses.replace(TRAIN, max_steps=3))
    train_job(session, config, tmp_path / "whole")
    out = tmp_path / "killed"
    if when == "removing":  # examples of another file are there
        other = DataConfig(str(questions(tmp_path / "other.jsonl", 3)))
        stored_examples(session, other, EncodeRules(max_length=200), out).close()

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_where_it_exists(path, **_):
        if path.exists():
            die()

    def die_at_the_fifth(writer, example):
        die() if writer.count == 5 else add(writer, example)

    if os.fork() == 0:
        add = ExampleWriter.add
        monkeypatch.setattr(ExampleWriter, "add", die_at_the_fifth)
        if when == "renaming":
            monkeypatch.setattr(ExampleWriter, "add", add)
            monkeypatch.setattr(ExampleWriter, "finish", die)
        elif when == "removing":
            monkeypatch.setattr("shutil.rmtree", die_where_it_exists)
        try:
            train_job(session, config, out)
        finally:
            os._exit(1)
    _, status = os.wait()
    assert os.WTERMSIG(status) == signal.SIGKILL
    leftovers = [path.name for path in out.iterdir()]
    assert f".{EXAMPLES}" in " ".join(leftovers) and EXAMPLES not in leftovers
    train_job(session, config, out)
    assert same_run(out, tmp_path / "whole")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_examples_of_another_file_tokenizer_or_setting_are_made_again(session, tmp_path, capsys):
    path = questions(tmp_path / "q.jsonl", 8)
    data = DataConfig(str(path))
    rules = EncodeRules(max_length=200)
    run = tmp_path / "run"

    def made(data=data, rules=rules) -> str:
        """What is printed of examples that are made or taken."""
        capsys.readouterr()
        with stored_examples(session, data, rules, run) as store:
            assert list(store) == list(FileExamples(session, data, rules))
        return capsys.readouterr().out

    assert "made again" not in made() and "before" in made()
    moved = path.rename(tmp_path / "moved.jsonl")
    assert "before" in made(DataConfig(str(moved)))
    moved.rename(path)
    with path.open("a") as file:
        file.write('{"question": "Say more", "answer": "more"}\n')
    assert "q.jsonl has changed" in made() and "before" in made()
    shorter = dataclasses.replace(data, limit=5)
    assert "read.limit: None -> 5" in made(shorter) and "read.limit: 5 -> None" in made()
    answer_only = dataclasses.replace(rules, truncate=True)
    assert "rules.truncate: False -> True" in made(rules=answer_only)
    tokenizer_file = Path(session.config.model) / "tokenizer_config.json"
    tokenizer_file.write_text(tokenizer_file.read_text() + "\n")
    assert "tokenizer: '" in made(rules=answer_only) and "before" in made(rules=answer_only)
    tokens = run / EXAMPLES / "tokens.bin"
    tokens.write_bytes(bytes(tokens.stat().st_size))
    assert "tokens.bin is not what was written" in made(rules=answer_only)


def test_a_run_is_refused_over_another_file_or_beside_what_is_not_ours(session, tmp_path):
    path = questions(tmp_path / "q.jsonl", 8)
    config = job(DataConfig(str(path)), train=dataclasses.replace(TRAIN, max_steps=2))
    train_job(session, config, tmp_path / "run")
    path.write_text(path.read_text().replace("Say 3", "Say three"))
    with pytest.raises(ValueError, match="started with other settings.*\n  data: "):
        train_job(session, config, tmp_path / "run", resume=True)
    theirs = tmp_path / "theirs" / EXAMPLES
    theirs.mkdir(parents=True)
    write(theirs / "a.txt", "theirs")
    with pytest.raises(ValueError, match="examples holds something else than examples"):
        train_job(session, config, tmp_path / "theirs")
    assert (theirs / "a.txt").read_text() == "theirs"


# ---- order and memory


def test_batches_are_slices_of_a_seeded_permutation_from_any_step_on():
    config = dataclasses.replace(TRAIN, max_steps=8)  # 10 examples: steps of 4, 4 and 2
    expected = []
    for epoch in range(3):
        generator = torch.Generator().manual_seed(mix("order", 5, epoch) >> 1)
        order = torch.randperm(10, generator=generator).tolist()
        expected += [(epoch, order[start : start + 4]) for start in (0, 4, 8)]
    for done in range(9):
        assert list(batches(10, config, done)) == expected[done:8]


def test_a_training_holds_less_than_200_bytes_a_row(session, tmp_path, monkeypatch):
    """Python's memory at the peak of a whole training, with two sizes of file.

    Rows in memory with their token lists take far more. (SQLite's cache and the order of
    an epoch, 8 MB and 8 bytes a row, are not Python's: benchmarks/rows.py measures the process.)
    Files are read in pieces, which are made small here so that both sizes have many.
    """
    monkeypatch.setattr("engine.data.data_file.CHUNK_BYTES", 2048)
    monkeypatch.setattr("engine.data.data_file.HEAD_CHARACTERS", 2048)
    monkeypatch.setattr("engine.data.example_store.LINES_READ", 64)
    config = dataclasses.replace(TRAIN, max_steps=1)

    def peak(count: int) -> int:
        data = DataConfig(str(questions(tmp_path / f"{count}.jsonl", count)))
        tracemalloc.start()
        train_job(session, job(data, train=config), tmp_path / str(count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(50)  # what is made once: templates, caches
    small, large = peak(100), peak(1000)
    assert (large - small) / 900 < 200  # noise: garbage that waits for its collection
