"""Early stopping: by patience and by a budget of drift, decided alike after a kill."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter

import pytest
import torch

from engine.runtime.files import read_jsonl
from engine.train import loop
from engine.train.early_stop import FRESH, after_validation
from engine.train.metrics import summary_text
from engine.train.train import FrozenModel, train
from engine.train.validate import ValidateConfig
from model.llama import Llama
from model.peft_format import load_lora
from tests.helpers.training import LORA, SMALL, examples, metrics_lines


@pytest.fixture
def tiny(tiny_llama_dir):
    return Llama.from_pretrained(tiny_llama_dir())


class Measured:
    """A validator whose values are a script; it keeps the adapters that it saw."""

    def __init__(self, **settings):
        self.values = settings.pop("values")  # name -> values of the validations, in order
        self.config = ValidateConfig(val_every=2, val_data="x", **settings)
        self.config.check()
        self.names = list(self.values)
        self.seen = {}  # step -> the adapter's parameters

    def at(self, step):
        """The value of every name at a step."""
        return [self.values[name][step // 2 - 1] for name in self.names]

    def __call__(self, lora):
        step = 2 * (len(self.seen) + 1)
        self.seen[step] = lora.params.clone()
        return self.at(step)


def run(model, out, validator, resume=False, **changes):
    config = dataclasses.replace(SMALL, **changes)  # 10 steps, a checkpoint every 3
    frozen = FrozenModel(model, "b", "h")
    return train(frozen, examples(), LORA, config, out, validator=validator, resume=resume)


# ---- the decision


def decide(config, measured):
    """(step to publish, step of the stop and why) over a list of measures, a step each."""
    state = dict(FRESH)
    for step, measures in enumerate(measured, 1):
        state |= after_validation(config, state, measures, step).state
        if state["stopped"]:
            return state["best"].get("step"), (step, state["stopped"])
    return state["best"].get("step"), None


def test_patience_counts_validations_since_the_last_better_value():
    config = ValidateConfig(best="nll", patience=2)
    values = [3.0, 2.0, 2.5, 1.5, 1.5, 1.6, 0.1]
    measured = [{"nll": value} for value in values]
    why = "nll has not improved in 2 validations (--patience)"
    assert decide(config, measured) == (4, (6, why)), "an equal value is no improvement"
    assert decide(dataclasses.replace(config, patience=3), measured) == (7, None)
    assert decide(ValidateConfig(best="nll"), measured) == (7, None)


def test_a_budget_of_drift_keeps_the_last_or_the_best_within_it():
    measured = [
        {"nll": 2.0, "kl": 0.01},
        {"nll": 1.0, "kl": 0.02},
        {"nll": 1.5, "kl": 0.05},
        {"nll": 0.5, "kl": 0.051},
        {"nll": 0.1, "kl": 0.01},
    ]
    stop = (4, "its KL to the seed, 0.0510, is above --stop-kl 0.05")
    assert decide(ValidateConfig(stop_kl=0.05), measured) == (3, stop)
    assert decide(ValidateConfig(stop_kl=0.05, best="nll"), measured) == (2, stop)
    assert decide(ValidateConfig(stop_kl=0.05, best="kl"), measured) == (1, stop)
    assert decide(ValidateConfig(stop_kl=0.06), measured) == (5, None)
    assert decide(ValidateConfig(), measured) == (None, None), "nothing is chosen without it"
    lost = [measured[0], {"nll": 1.0, "kl": float("nan")}]
    assert decide(ValidateConfig(stop_kl=0.05), lost)[1][0] == 2, "no number is not within it"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 2}, "patience 2 with --best last"),
        ({"patience": 2, "best": "nll"}, "--best nll needs --val-every and --val-data"),
        ({"stop_kl": 0.1}, "stop_kl 0.1.*give --val-every"),
        ({"stop_kl": 0.1, "val_every": 1, "val_data": "x", "val_prompts": 0}, "stop_kl 0.1"),
        ({"patience": -1}, "patience -1: expected at least 0"),
    ],
)
def test_stopping_without_a_measure_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ValidateConfig(**settings).check()


# ---- whole runs


def test_a_run_over_its_budget_publishes_the_last_adapter_within_it(tiny, tmp_path):
    """It stops at step 6 of 10; its steps are those of the planned run, rate and all."""
    values = {"kl": [0.01, 0.02, 0.04, 0.0, 0.0]}
    validator = Measured(values=values, stop_kl=0.03)
    lora, summary = run(tiny, tmp_path / "a", validator, keep=1)
    assert list(validator.seen) == [2, 4, 6]
    assert torch.equal(load_lora(tmp_path / "a").params, validator.seen[4])
    assert torch.equal(lora.params, validator.seen[4])
    assert not torch.equal(validator.seen[4], validator.seen[6])
    kept = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000006"]
    assert summary["best"] == {"metric": "last", "value": 0.02, "step": 4}
    assert (summary["steps"], summary["planned_steps"]) == (6, 10)
    said = summary_text(summary, tmp_path)
    assert "stopped at step 6 of 10 because its KL to the seed, 0.0400, is above" in said
    assert "adapter: the last within --stop-kl, KL 0.0200 at step 4" in said
    run(tiny, tmp_path / "whole", None)
    whole = metrics_lines(tmp_path / "whole")
    assert metrics_lines(tmp_path / "a") == whole[:6] and len(whole) == 10
    again, _ = run(tiny, tmp_path / "a", validator, resume=True, keep=1)  # finished: only loaded
    assert torch.equal(again.params, lora.params) and len(validator.seen) == 3


def test_no_adapter_within_the_budget_says_what_to_do(tiny, tmp_path):
    validator = Measured(values={"kl": [0.2]}, stop_kl=0.1)
    expected = "step 2: KL to the seed 0.2000 is above --stop-kl 0.1.*smaller --val-every than 2"
    with pytest.raises(ValueError, match=expected):
        run(tiny, tmp_path / "a", validator)
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()


class Killed(BaseException):
    """As if the process had ended here."""


def test_killed_anywhere_and_resumed_it_stops_at_the_same_step(tiny, tmp_path, monkeypatch):
    """Killed before and after every checkpoint; all files end as those of the undisturbed run."""
    values = {"nll": [2.0, 1.0, 1.1, 1.2, 0.0], "kl": [0.01, 0.02, 0.03, 0.03, 0.0]}

    class ByStep(Measured):
        step = 0  # of the run; set by the loop

        def __call__(self, lora):
            return self.at(self.step)

    validator = ByStep(values=values, best="nll", patience=2, stop_kl=0.04)
    train_step, save = loop.Run.train_step, loop.Run.save
    attempts = Counter()  # to save a step

    def counted_step(self, step, *args):
        validator.step = step
        return train_step(self, step, *args)

    monkeypatch.setattr(loop.Run, "train_step", counted_step)
    run(tiny, tmp_path / "whole", validator)

    def killing_save(self, step, epoch):
        attempts[step] += 1
        if attempts[step] == 1:
            raise Killed
        save(self, step, epoch)
        if attempts[step] == 2:
            raise Killed

    monkeypatch.setattr(loop.Run, "save", killing_save)
    out = tmp_path / "killed"
    for _ in range(30):
        try:
            run(tiny, out, validator, resume=out.exists())
            break
        except Killed:
            pass
    assert set(attempts.values()) == {2} and attempts[8] == 2 and len(attempts) >= 4
    whole = tmp_path / "whole"
    assert metrics_lines(out) == metrics_lines(whole) and len(metrics_lines(out)) == 8
    assert read_jsonl(out / "validation.jsonl") == read_jsonl(whole / "validation.jsonl")
    adapter = "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (whole / adapter).read_bytes()
    last = "checkpoints/step-000008/optimizer.safetensors"
    assert (out / last).read_bytes() == (whole / last).read_bytes()
    summaries = [json.loads((path / "meta.json").read_text())["summary"] for path in (out, whole)]
    assert summaries[0]["best"] == summaries[1]["best"] and summaries[0]["best"]["step"] == 4
    assert summaries[0]["stopped"] == summaries[1]["stopped"] != ""


def test_state_that_is_not_what_was_written_is_refused(tiny, tmp_path):
    run(tiny, tmp_path / "a", Measured(values={"kl": [0.01, 0.02]}, stop_kl=0.03), max_steps=4)
    file = tmp_path / "a" / "checkpoints" / "step-000004" / "state.json"
    meta = tmp_path / "a" / "meta.json"
    unfinished = {**json.loads(meta.read_text()), "finished": False}
    meta.write_text(json.dumps({k: v for k, v in unfinished.items() if k != "summary"}))
    file.write_text(re.sub(r'"stopped": ""', '"stopped": 7', file.read_text()))
    validator = Measured(values={"kl": [0.01, 0.02]}, stop_kl=0.03)
    with pytest.raises(ValueError, match="waited or stopped is not what was written"):
        run(tiny, tmp_path / "a", validator, resume=True, max_steps=4)
