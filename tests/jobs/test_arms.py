"""Arms in the study and the main job: kills, what is made once, what is refused, the findings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.scripts import write_word_problems

ROOT = Path(__file__).resolve().parents[2]

# --paper-exact has no guard against the random text of a tiny model: its rewrites are accepted
SMALL = ["--verify", "none", "--paper-exact", "--max-new-tokens", "8", "--eval-max-new", "6"]
SMALL += ["--retention-max-new", "3", "--epochs", "1", "--batch-rows", "4", "--threads", "1"]
SMALL += ["--rank", "2", "--lr", "1e-2", "--replay-max-new", "6"]
# the tokens of a random model have perplexities in the hundreds
SIX = "sft,sdft,stm:400,self,replay:0.3,sdft+k3:0.02@0.5"
WITH_TIMES = {"study.json", "metrics.jsonl", "meta.json", "state.json", "costs.json"}


@pytest.fixture
def inputs(chat_dir, tmp_path):
    """--model, --data and --eval-data: 8 rows to train on, 4 held out."""
    write_word_problems(tmp_path)
    data = ["--data", tmp_path / "train.json", "--eval-data", tmp_path / "test.json"]
    return [str(word) for word in ["--model", chat_dir, *data]]


def contents(out):
    """The bytes of every file that holds no time; hidden files are what a kill left."""
    found = {}
    for file in sorted(out.rglob("*")):
        name = file.relative_to(out)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and file.name not in WITH_TIMES and not is_hidden:
            found[str(name)] = file.read_bytes()
    return found


def test_a_study_of_six_arms_killed_eight_times_ends_byte_for_byte_as_undisturbed(inputs, tmp_path):
    flags = [*inputs, *SMALL, "--arms", SIX, "--checkpoints", "1"]
    command = [sys.executable, "-m", "tests.helpers.killed_study", tmp_path, "8", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    places = json.loads(done.stdout.splitlines()[-1])["places"]
    assert len(places) == 8 and len({Path(place).name for place in places}) >= 4, places

    whole, killed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert list(whole) == list(killed)
    assert [name for name in whole if whole[name] != killed[name]] == []
    # six trainings of the same number of steps, from one distillation
    adapters = [name for name in whole if name.endswith("adapter_model.safetensors")]
    trained = {Path(name).parts[2] for name in adapters if "checkpoints" not in name}
    assert trained == {"sft", "sdft", "stm-400", "self", "replay-0.3", "sdft+k3-0.02"}
    study = json.loads((tmp_path / "killed" / "study.json").read_text())
    steps = {point["by_seed"][0]["training"]["steps"] for point in study["points"][1:]}
    examples = {p["arm"]: p["by_seed"][0]["training"]["examples"] for p in study["points"][1:]}
    assert steps == {2} and examples["sft"] == 8 and examples["replay:0.3"] == 11
    # the seed's likelihoods are there once for the references and once for the rewrites
    assert len([name for name in whole if name.startswith("seed-nll") and "meta" not in name]) == 2
    other = json.loads((tmp_path / "whole" / "study.json").read_text())
    for measure, goal in study["equal_target"].items():
        for part in ("seed", "target", "ways", "pairs", "unbeaten", "table"):
            assert goal[part] == other["equal_target"][measure][part]
    # tokens are the same in every run; seconds of a stage that was killed at its end are not known
    for way, cost in study["costs"].items():
        for part in ("generated", "scored", "trained"):
            assert cost[part] == other["costs"][way][part]
        assert cost["train_seconds"] > 0 and other["costs"][way]["seconds"] > 0
    assert study["costs"]["stm:400"]["scored"] > 0 == study["costs"]["sft"]["scored"]
    assert study["costs"]["self"]["generated"] > 0 == study["costs"]["stm:400"]["generated"]
