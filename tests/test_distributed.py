"""Data parallel on gloo, 2 and 3 processes: same gradients, same losses, killed and resumed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.distributed import World, shares, start
from engine.step import ALONE, step_gradients
from engine.train import train
from model.llama import Llama
from model.lora import Lora
from tests.test_train import LORA, SMALL, examples

ROOT = Path(__file__).resolve().parent.parent


def test_shares_are_balanced_by_tokens_and_complete():
    lengths = [5, 100, 7, 60, 55, 1]
    for size in (1, 2, 3, 7):
        places = shares(lengths, size)
        assert len(places) == size and sorted(sum(places, [])) == list(range(6))
        loads = [sum(lengths[i] for i in place) for place in places]
        assert max(loads) - min(loads) <= max(lengths)
    assert [sum(lengths[i] for i in p) for p in shares(lengths, 2)] == [113, 115]
    assert shares([3], 2) == [[0], []], "a process may have nothing to do"


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = start()
    assert world == World() and world.first and world.any(True) and not world.any(False)
    tensor = torch.ones(3)
    assert world.sum_(tensor) is tensor and tensor.tolist() == [1, 1, 1]


def test_two_and_three_processes_are_one(tiny_llama_dir, tmp_path):
    """Two processes, rank 1 killed in step 8; three go on from step 6: all as one process."""
    path, out = str(tiny_llama_dir()), tmp_path / "run"
    model = Llama.from_pretrained(path, dtype=torch.float64)
    lora = Lora.init(model, rank=3, modules="all", dropout=0.2, seed=1)
    lora.params.add_(0.05)
    loss = step_gradients(model, lora, examples(9), 3, 64, "none", ALONE).nll.sum()
    alone = Llama.from_pretrained(path)
    single, _ = train(alone, examples(), LORA, SMALL, tmp_path / "one", base="b", model_hash="h")

    for size, kill in ((2, 8), (3, 0)):
        job = {"model": path, "out": str(out), "kill": kill, "gradients": str(tmp_path / "g")}
        (tmp_path / "job.json").write_text(json.dumps(job))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = [str(ROOT / "tests" / "distributed_job.py"), str(tmp_path / "job.json")]
        done = subprocess.run(
            [*torchrun, "--nproc-per-node", str(size), *script],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=ROOT,
        )
        found = load_file(tmp_path / "g")
        assert (found["loss"] - loss).abs() < 1e-9 * loss
        assert (found["grads"] - lora.grads).abs().max() < 1e-9 * lora.grads.abs().max()
        if kill:
            assert done.returncode != 0
            assert "rank 0 of 2: another process of the job is gone" in done.stderr
            assert "--resume" in done.stderr
            kept = sorted(p.name for p in (out / "checkpoints").iterdir())
            assert kept == ["step-000003", "step-000006"], "whole, and written once"
        else:
            assert done.returncode == 0, done.stderr[-3000:]
    losses = [
        [json.loads(line)["loss"] for line in (p / "metrics.jsonl").read_text().splitlines()]
        for p in (out, tmp_path / "one")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 10
    assert json.loads((out / "meta.json").read_text())["summary"]["processes"] == 3
    assert (Lora.load(out).params - single.params).abs().max() < 1e-4
