"""benchmarks.step: dropout, micro-batches, refill, the paper's sampling, an adapter in decoding."""

import json

import pytest
import torch

from benchmarks import step
from benchmarks.shapes import model_config, random_weights
from benchmarks.step_decoding import (
    SETTINGS,
    DecodeCase,
    card_clock,
    decode,
    random_adapter,
    run_requests,
)
from benchmarks.step_training import StepCase, Trainer, training
from benchmarks.tables import sampling as sampling_tables
from benchmarks.tables import training as training_tables
from benchmarks.tables.records import Record
from engine.presets import get_preset
from engine.sampling.requests import Request, SamplerConfig
from kernels.registry import TORCH
from model.llama import Llama


@pytest.fixture(scope="module")
def tiny():
    config = model_config("tiny")
    return Llama(config, random_weights(config, "cpu", torch.float32), TORCH)


def test_micro_batches_give_the_gradient_of_the_whole(tiny):
    whole = Trainer(tiny, StepCase(24, 8))
    divided = Trainer(tiny, StepCase(24, 8, micro_tokens=8))
    assert (len(whole.batches), len(divided.batches)) == (1, 3)
    one, other = whole.step(), divided.step()
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert one["predicted_gib"] > 0


def test_dropout_reaches_the_step(tiny):
    plain = training({"torch": tiny}, StepCase(24, 8, modules="all"), steps=1)["torch"]
    dropped = training({"torch": tiny}, StepCase(24, 8, modules="all", dropout=0.5), steps=1)
    assert dropped["torch"]["first_loss"] == pytest.approx(plain["first_loss"]), (
        "B is zero at first"
    )
    assert dropped["torch"]["first_grad_norm"] != plain["first_grad_norm"]


def test_with_refill_lengths_differ_and_every_request_is_answered(tiny):
    case = DecodeCase(rows=2, prompt=8, new=4, requests=7)
    lengths = case.lengths()
    assert len(lengths) == 7 and len(set(lengths)) > 3
    assert all(4 <= prompt <= 12 and 2 <= new <= 6 for prompt, new in lengths)
    assert sum(prompt for prompt, _ in lengths) == pytest.approx(7 * 8, abs=4)
    assert DecodeCase(rows=2, prompt=8, new=4).lengths() == [(8, 4), (8, 4)]
    result = decode(tiny, case)
    assert [len(ids) for ids in result["answers"]] == [new for _, new in lengths]
    assert result["new_tokens"] == sum(new for _, new in lengths)
    assert result["useful_tokens_s"] == pytest.approx(result["new_tokens"] / result["seconds"])
    assert 0 < result["useful_tokens_s"] < result["tokens_s"]
    assert 1 < result["mean_rows"] <= 2
    chosen = decode(tiny, DecodeCase(rows=0, prompt=8, new=4, requests=7))
    assert chosen["answers"] == result["answers"] and chosen["mean_rows"] > 2


def test_an_adapter_in_decoding_changes_the_texts(tiny):
    assert random_adapter(tiny, "") is None
    lora = random_adapter(tiny, "all")
    assert all(view.any() for name, view in lora.views(lora.params).items() if "lora_B" in name)
    with_adapter = random_adapter(tiny, "qv")
    assert len(with_adapter.slots) < len(lora.slots)
    plain = decode(tiny, DecodeCase(rows=2, prompt=8, new=12))
    adapted = decode(tiny, DecodeCase(rows=2, prompt=8, new=12, adapter="all"))
    assert plain["answers"] != adapted["answers"]
    assert plain["new_tokens"] == adapted["new_tokens"] == 24


def test_the_papers_sampling_is_that_of_its_presets():
    preset = get_preset("yang2024-alpaca")
    assert {name: preset[name] for name in ("temperature", "top_p", "top_k")} == SETTINGS["paper"]


def test_flags(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(step, "ceilings", lambda *_: {"flops": 1e12, "bytes": 1e11})
    monkeypatch.setenv("OUT", str(tmp_path))
    flags = "--model tiny --steps 0 --device cpu --dtype fp32 --ops torch --prompt 5 --new 3"
    step.main([*flags.split(), "--rows-list", "1,2", "--requests", "3", "--adapter", "qv"])
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document["training"] == {}
    names = [f"{setting}, {rows} rows" for rows in (1, 2) for setting in SETTINGS]
    assert list(document["decoding"]["torch"]) == names
    assert {r["rows_as_first"] for r in document["decoding"]["torch"].values()} == {3}
    figures = (tmp_path / "figures.jsonl").read_text().splitlines()
    assert [json.loads(line)["decoding"] for line in figures] == names
    assert json.loads((tmp_path / "step.jsonl").read_text()) == document


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dropout", "1"], "expected from 0 to below 1"),
        (["--rows-list", "0,2"], "expected numbers above 0"),
        (["--requests", "-1"], "expected 0 or more"),
        (["--adapter", "nothing"], "a Llama layer has no nothing"),
        (["--modules", "nothing"], "a Llama layer has no nothing"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit):
        step.parse_args(flags)
    assert said in capsys.readouterr().err


def test_tables_of_old_shapes_take_no_new_record():
    """A step with dropout, or of 2,304 tokens, is not the step that the table is about."""
    asked = {"model": "llama-2-7b", "rank": 8, "modules": "qv", "tokens": 8192}
    asked |= {"rows": 32, "prompt": 512}
    results = {"training": {"triton": {"seconds": 1.0}}, "decoding": {"triton": {"greedy": {}}}}

    def record(**changes):
        data = {"benchmark": "step", "environment": {}, "ask": asked | changes} | results
        return Record("step", 1, data)

    def steps(*records):
        return len(training_tables.steps_with(list(records), 8, "qv", "triton"))

    def decodings(*records):
        return len(sampling_tables.decodings_with(list(records), "triton", "greedy"))

    assert steps(record(), record(dropout=0.0, micro_tokens=0)) == 2
    assert steps(record(dropout=0.1), record(tokens=2304), record(micro_tokens=1024)) == 0
    assert decodings(record(), record(requests=0, adapter="")) == 2
    assert decodings(record(requests=64), record(adapter="all"), record(rows=64)) == 0


def test_the_cards_time_is_that_of_replays_and_forwards(tiny, monkeypatch):
    """Played on a CPU: events that tell the time of the host's clock, half a second a record."""
    clock = iter(range(10**6))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock) * 500.0

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    plain = Llama.forward
    requests = [Request(f"r{i}", [1, 2, 3], 3) for i in range(2)]
    with card_clock(torch.device("cuda")) as card:
        run_requests(tiny, SamplerConfig(rows=2, draft="off"), None, requests)
    assert card.seconds("forward") == 0.5 * len(card.events["forward"]) > 0.5
    assert card.seconds("replay") == 0 and Llama.forward is plain
    with card_clock(torch.device("cpu")) as card:
        assert card is None
