"""Micro-batches that are chosen by themselves: recorded, printed, kept, halved where they do not
fit."""

import dataclasses
import json

import pytest
import torch

from engine.runtime.distributed import World
from engine.train import checkpoint, memory_plan
from engine.train.train import FrozenModel, with_micro_tokens
from model.llama import Llama
from tests.helpers.training import LORA, SMALL, examples, run_training

AUTOMATIC = dataclasses.replace(SMALL, micro_tokens=0, epochs=1)


@pytest.fixture
def tiny(tiny_llama_dir):
    return Llama.from_pretrained(tiny_llama_dir())


def recorded(out):
    return json.loads((out / "meta.json").read_text())["settings"]["train"]["micro_tokens"]


def test_the_automatic_size_is_recorded_and_printed(tiny, tmp_path, capsys):
    """On a CPU it is 1,024, and the run is that of --micro-tokens 1024."""
    lora, summary = run_training(tiny, tmp_path / "run", AUTOMATIC)
    assert "micro-batches of up to 1024 tokens (automatic on a CPU)" in capsys.readouterr().out
    assert recorded(tmp_path / "run") == 1024 and summary["halved"] == []
    typed = dataclasses.replace(AUTOMATIC, micro_tokens=1024)
    same, _ = run_training(tiny, tmp_path / "typed", typed)
    assert torch.equal(lora.params, same.params)
    assert "automatic" not in capsys.readouterr().out
    metas = [json.loads((tmp_path / name / "meta.json").read_text()) for name in ("run", "typed")]
    assert metas[0]["settings"] == metas[1]["settings"]


def test_a_resumed_run_keeps_its_size_on_another_device(tiny, tmp_path, monkeypatch, capsys):
    """A run begun with 1,024 (by an older version, which had no other default) is continued on a
    card that would take 8,192; a typed size must be the recorded one."""
    out = tmp_path / "run"
    run_training(tiny, out, dataclasses.replace(AUTOMATIC, micro_tokens=1024))
    frozen = FrozenModel(tiny, directory="b", fingerprint="h")
    card = (8192, "automatic: as on a card")
    monkeypatch.setattr("engine.train.train.automatic_micro_tokens", lambda *_: card)
    capsys.readouterr()
    assert with_micro_tokens(AUTOMATIC, frozen, examples(), LORA).micro_tokens == 8192
    assert "up to 8192 tokens (automatic: as on a card)" in capsys.readouterr().out
    run_training(tiny, out, AUTOMATIC, resume=True)
    said = capsys.readouterr().out
    assert f"up to 1024 tokens (as {out} was begun; 8192 would be automatic here)" in said
    with pytest.raises(ValueError, match="micro_tokens: 1024 -> 512"):
        run_training(tiny, out, dataclasses.replace(AUTOMATIC, micro_tokens=512), resume=True)


def test_processes_take_the_smallest_size_of_all(tiny, tmp_path, capsys):
    class Pair(World):
        """This process and another one, which would take 512."""

        def max_over_ranks(self, count):
            return max(count, -512) if count < 0 else count

    frozen = FrozenModel(tiny, directory="b", fingerprint="h", world=Pair(size=2))
    assert with_micro_tokens(AUTOMATIC, frozen, examples(), LORA).micro_tokens == 512


def test_a_size_that_does_not_fit_what_is_free_is_halved_before_the_run(
    tiny, tmp_path, monkeypatch, capsys
):
    """Another program holds the memory: the size is lowered until a policy fits, and recorded."""
    planned = memory_plan.predict
    config = dataclasses.replace(AUTOMATIC, batch_rows=20, micro_tokens=512)
    tokens = []

    def less_is_free(model, lora, policy, size, *rest):
        tokens.append(size.tokens)
        plan = planned(model, lora, policy, size, *rest)
        return dataclasses.replace(plan, held=0 if size.tokens <= 200 else 10**15)

    monkeypatch.setattr(memory_plan, "predict", less_is_free)
    lora, summary = run_training(tiny, tmp_path / "run", config)
    said = capsys.readouterr().out
    assert "micro-batches of 512 tokens do not fit the memory that is free; taking 256" in said
    assert "micro-batches of 256 tokens do not fit the memory that is free; taking 128" in said
    assert summary["halved"] == [[1, 256], [1, 128]] and recorded(tmp_path / "run") == 512
    newest = checkpoint.checkpoints(tmp_path / "run")[-1]
    state = json.loads((newest / "state.json").read_text())
    assert state["micro_tokens"] == 128 and state["halved"] == [[1, 256], [1, 128]]
    monkeypatch.setattr(memory_plan, "predict", planned)
    plain, _ = run_training(tiny, tmp_path / "plain", config)
    torch.testing.assert_close(lora.params, plain.params, rtol=0, atol=1e-4)

    state["halved"] = [[1, "256"]]
    (newest / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="halved is not what was written"):
        checkpoint._read_state(newest)
