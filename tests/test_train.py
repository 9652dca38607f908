"""The training loop: micro-batches, accumulation, resume after SIGKILL, guards, a falling loss."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import train as training
from engine.data import Example, encode, load_rows
from engine.demo import write_demo
from engine.optim import cosine_rate
from engine.train import MicroBatch, TrainConfig, micro_step, train
from kernels.adamw import AdamW
from model.chat import Chat
from model.llama import Llama
from model.lora import Lora, LoraConfig
from model.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SMALL = TrainConfig(lr=5e-3, epochs=2, batch_rows=4, micro_tokens=64, save_every=3, seed=5)
LORA = LoraConfig(rank=4, alpha=8, modules="all", dropout=0.1)


def examples(count=20, vocab=300, seed=0):
    rng = random.Random(seed)
    made = []
    for i in range(count):
        n_prompt, n = rng.randint(1, 20), rng.randint(1, 25)
        ids = [rng.randrange(vocab) for _ in range(n_prompt)] + [(7 * k) % 50 for k in range(n)]
        made.append(Example(f"r{i}/0", ids, n_prompt))
    return made


def go(model, out, config=SMALL, rows=None, resume=False, lora=LORA):
    return train(
        model,
        rows or examples(),
        lora,
        config,
        Path(out),
        base="b",
        model_hash="h",
        resume=resume,
    )


def lines(out):
    """The metrics without the speed."""
    text = (Path(out) / "metrics.jsonl").read_text()
    return [{**json.loads(x), "tokens_s": 0} for x in text.splitlines()]


@pytest.fixture
def tiny(tiny_llama_dir):
    return Llama.from_pretrained(tiny_llama_dir())


def test_loss_falls_and_the_run_directory_is_complete(tiny, tmp_path):
    lora, summary = go(tiny, tmp_path / "run", dataclasses.replace(SMALL, epochs=8))
    assert summary["last_loss"] < 0.7 * summary["first_loss"]
    assert summary["linears"] == "14/14" and summary["steps"] == 40
    again = Lora.load(tmp_path / "run")
    assert torch.equal(again.params, lora.params)
    meta = json.loads((tmp_path / "run" / "meta.json").read_text())
    assert meta["finished"] and meta["settings"]["lora"]["rank"] == 4
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == SMALL.keep


def test_loss_falls_on_real_rows_of_the_real_model(smollm2_dir, tmp_path):
    """Eight word problems, two steps an epoch; the paper's modules and rank."""
    tokenizer = load_tokenizer(smollm2_dir)
    (tmp_path / "data").mkdir()
    write_demo(tmp_path / "data", n_train=8, n_test=1)
    rows = load_rows(tmp_path / "data" / "train.json")
    encoded, _ = encode(rows, Chat.from_dir(smollm2_dir, tokenizer), max_length=512)
    config = TrainConfig(lr=2e-3, epochs=5, batch_rows=4, micro_tokens=512)
    model = Llama.from_pretrained(smollm2_dir)
    go(model, tmp_path / "run", config, encoded, lora=LoraConfig())
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2]), losses


def test_micro_batches_change_nothing(tiny_llama_dir):
    """fp64: one forward of all rows = rows in any grouping, loss and every gradient."""
    model = Llama.from_pretrained(tiny_llama_dir(), dtype=torch.float64)
    lora = Lora.init(model, rank=3, modules="all", dropout=0.2, seed=1)
    lora.params.add_(0.05)
    rows, results = examples(9), []
    for groups in ([rows], [[r] for r in rows], [rows[:4], rows[4:]], [rows[::-1]]):
        lora.grads.zero_()
        losses = 0.0
        for group in groups:
            batch = MicroBatch.build(group, step=3, device=model.device)
            losses += micro_step(model, lora, batch, "none").sum()
        results.append((losses, lora.grads.clone()))
    for losses, grads in results[1:]:
        assert abs(losses - results[0][0]) < 1e-9 * losses
        assert (grads - results[0][1]).abs().max() < 1e-9 * grads.abs().max()


def test_loss_is_over_response_tokens_of_the_whole_step(tiny, tmp_path):
    """The first step's loss against the logits themselves, micro-batches of one row."""
    config = dataclasses.replace(SMALL, micro_tokens=1, batch_rows=20, epochs=1)
    rows = examples()
    go(tiny, tmp_path / "run", config, rows, lora=dataclasses.replace(LORA, dropout=0.0))
    total, count = 0.0, 0
    for e in rows:
        logits = tiny.logits(torch.tensor(e.ids))[e.n_prompt - 1 : -1]
        targets = torch.tensor(e.ids[e.n_prompt :])
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
    (line,) = lines(tmp_path / "run")
    assert line["response_tokens"] == count and line["tokens"] == sum(len(e.ids) for e in rows)
    assert line["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_step_is_adamw_on_the_mean_gradient_clipped(tiny, tmp_path):
    """Against torch.optim.AdamW and clip_grad_norm_, two steps, weight decay on."""
    config = TrainConfig(
        lr=1e-2, epochs=2, batch_rows=20, micro_tokens=10**6, clip=0.1, weight_decay=0.1, seed=5
    )
    rows, lora_config = examples(), dataclasses.replace(LORA, dropout=0.0)
    trained, _ = go(tiny, tmp_path / "run", config, rows, lora=lora_config)
    lora = Lora.init(tiny, rank=4, alpha=8, modules="all", seed=5)
    parameter = torch.nn.Parameter(lora.params.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1)
    for step, line in enumerate(lines(tmp_path / "run"), start=1):
        lora.params.copy_(parameter.detach())
        lora.grads.zero_()
        micro_step(tiny, lora, MicroBatch.build(rows, step, tiny.device), "none")
        parameter.grad = lora.grads / sum(len(e.ids) - e.n_prompt for e in rows)
        norm = torch.nn.utils.clip_grad_norm_([parameter], 0.1).item()
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.1
        optimizer.param_groups[0]["lr"] = line["lr"]
        optimizer.step()
    assert (parameter.detach() - trained.params).abs().max() < 2e-6


def test_cosine_rate():
    rates = [cosine_rate(s, 10, 1.0, 0.2) for s in range(1, 11)]
    assert rates[:3] == [0.0, 0.5, 1.0] and rates == sorted(rates[:3]) + sorted(rates[3:])[::-1]
    assert cosine_rate(1, 10, 1.0, 0.0) == 1.0 and 0 < cosine_rate(10, 10, 1.0, 0.0) < 0.03


def test_adamw_scalars_refuse_step_zero():
    with pytest.raises(AssertionError, match="count from 1"):
        AdamW().scalars(1e-3, 0, 1.0, "cpu")


KILLED = """
import sys
sys.path.insert(0, {root!r})
import engine.train as training
from tests.test_train import SMALL, LORA, examples
from model.llama import Llama
from pathlib import Path
import os, signal
step = training.micro_step
def micro_step(*args):
    if {kill} and len(open({out!r} + "/metrics.jsonl").readlines()) == {kill}:
        with open({out!r} + "/metrics.jsonl", "a") as file:
            file.write('{{"step": 99, "torn')
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)
training.micro_step = micro_step
training.train(Llama.from_pretrained({model!r}), examples(), LORA, SMALL, Path({out!r}),
               base="b", model_hash="h", resume=True)
"""


def test_killed_and_resumed_is_the_undisturbed_run_bit_for_bit(tiny_llama_dir, tmp_path):
    """10 steps = 5, SIGKILL (with a torn metrics line), resume, 8, SIGKILL, resume; dropout on."""
    path = tiny_llama_dir()
    whole, _ = go(Llama.from_pretrained(path), tmp_path / "whole")
    out = tmp_path / "killed"
    go_on = {"root": str(ROOT), "model": str(path), "out": str(out)}
    for kill in (5, 8, 0):
        if kill == 5:  # the first start is not a resumption
            script = KILLED.replace("resume=True", "resume=False").format(kill=kill, **go_on)
        else:
            script = KILLED.format(kill=kill, **go_on)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == (-9 if kill else 0), done.stderr[-2000:]
    assert torch.equal(Lora.load(out).params, whole.params)
    assert lines(out) == lines(tmp_path / "whole")
    states = [load_file(sorted(o.glob("checkpoints/*"))[-1] / "optimizer.safetensors")
              for o in (out, tmp_path / "whole")]  # fmt: skip
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_run_is_refused_without_resume_or_under_other_settings(tiny, tmp_path, monkeypatch):
    go(tiny, tmp_path / "run")
    with pytest.raises(ValueError, match="exists already"):
        go(tiny, tmp_path / "run")
    with pytest.raises(ValueError, match="train.lr: 0.005 -> 0.1"):
        go(tiny, tmp_path / "run", dataclasses.replace(SMALL, lr=0.1), resume=True)
    with pytest.raises(ValueError, match="data: "):
        go(tiny, tmp_path / "run", rows=examples(seed=1), resume=True)
    monkeypatch.setattr(training, "micro_step", None)  # a finished run is loaded, not trained
    lora, _ = go(tiny, tmp_path / "run", dataclasses.replace(SMALL, keep=1), resume=True)
    assert len(lines(tmp_path / "run")) == 10
    assert torch.equal(lora.params, Lora.load(tmp_path / "run").params)


def test_rows_without_response_are_named(tiny, tmp_path):
    rows = [*examples(3), Example("empty/0", [1, 2, 3], 3), Example("bare/0", [1], 0)]
    with pytest.raises(ValueError, match=r"empty/0.*bare/0"):
        go(tiny, tmp_path / "run", rows=rows)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="nothing to train on"):
        training.check_examples([])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_and_keeps_the_last_good_state(
    tiny, tmp_path, monkeypatch, where
):
    step, calls = training.micro_step, []

    def broken(model, lora, batch, policy):
        nll = step(model, lora, batch, policy)
        calls.append(batch)
        if batch.packed.step >= 8:
            if where == "loss":
                nll[batch.owners.index(batch.owners[-1])] = torch.nan
            else:
                lora.grads[3] = torch.inf
        return nll

    monkeypatch.setattr(training, "micro_step", broken)
    with pytest.raises(ValueError, match=r"step 8: the (loss|gradient).*step-000006") as error:
        go(tiny, tmp_path / "run")
    assert calls[-1].owners[-1] in str(error.value)
    assert len(lines(tmp_path / "run")) == 7
    monkeypatch.setattr(training, "micro_step", step)
    resumed, _ = go(tiny, tmp_path / "run", resume=True)
    whole, _ = go(tiny, tmp_path / "whole")
    assert torch.equal(resumed.params, whole.params)
