"""The training loop: micro-batches, gradients, resuming, guards, validation, a falling loss."""

import dataclasses
import hashlib
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.data.config import DataConfig
from engine.data.encode import EncodeRules, Example, check_examples, encode
from engine.data.pack import MicroBatch, shared_prompt_prefix
from engine.data.rows import load_rows
from engine.evaluate.target_task import reference_nll
from engine.jobs.demo import write_demo
from engine.runtime import published_adapter as published_adapter_module
from engine.runtime.files import read_jsonl
from engine.train import checkpoint as checkpoint_module
from engine.train import loop as loop_module
from engine.train import mfu as mfu_module
from engine.train import step as step_module
from engine.train.config import TrainConfig
from engine.train.loop import batches, has_learned
from engine.train.metrics import summary_text
from engine.train.optim import learning_rate
from engine.train.step import micro_step
from engine.train.train import FrozenModel, finished_summary, train
from engine.train.validate import ValidateConfig, Validator
from kernels.adamw import AdamW
from kernels.registry import TORCH, TRITON
from model.chat import Chat
from model.llama import Llama
from model.lora import Lora, LoraConfig
from model.peft_format import load_lora
from model.tokenizer import load_tokenizer
from tests.helpers import programs
from tests.helpers.adapters import new_lora
from tests.helpers.sessions import session_of
from tests.helpers.training import LORA, SMALL, examples, metrics_lines, run_training

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny(tiny_llama_dir):
    return Llama.from_pretrained(tiny_llama_dir())


def test_loss_falls_and_the_run_directory_is_complete(tiny, tmp_path):
    lora, summary = run_training(tiny, tmp_path / "run", dataclasses.replace(SMALL, epochs=8))
    assert summary["last_loss"] < 0.7 * summary["first_loss"]
    assert summary["linears"] == "14/14" and summary["steps"] == 40
    again = load_lora(tmp_path / "run")
    assert torch.equal(again.params, lora.params)
    meta = json.loads((tmp_path / "run" / "meta.json").read_text())
    assert meta["finished"] and meta["settings"]["lora"]["rank"] == 4
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == SMALL.keep


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_training_twice_and_resuming_give_the_same_bytes(
    tiny_llama_dir, tmp_path, device, monkeypatch
):
    """Nothing in a training step is atomic, so this holds on a GPU too, in either dtype."""
    ops = TRITON if device == "cuda" else TORCH
    path = tiny_llama_dir(heads=4, kv_heads=2, head_dim=16)
    step = loop_module.step_update

    def failing(model, lora, optimizer, *rest):
        if optimizer.step == 7:
            raise KeyError("killed")
        return step(model, lora, optimizer, *rest)

    for dtype in (torch.bfloat16, torch.float32):
        model = Llama.from_pretrained(path, device=device, dtype=dtype, ops=ops)
        once = tmp_path / f"once {dtype}"
        twice = tmp_path / f"twice {dtype}"
        resumed = tmp_path / f"resumed {dtype}"
        run_training(model, once)
        run_training(model, twice)
        monkeypatch.setattr(loop_module, "step_update", failing)
        with pytest.raises(KeyError):
            run_training(model, resumed)
        monkeypatch.setattr(loop_module, "step_update", step)
        run_training(model, resumed, resume=True)
        weights = (once / "adapter_model.safetensors").read_bytes()
        assert (twice / "adapter_model.safetensors").read_bytes() == weights
        assert (resumed / "adapter_model.safetensors").read_bytes() == weights
        assert metrics_lines(once) == metrics_lines(twice) == metrics_lines(resumed)


def test_loss_falls_on_real_rows_of_the_real_model(smollm2_dir, tmp_path):
    """Eight word problems, two steps an epoch; the paper's modules and rank."""
    tokenizer = load_tokenizer(smollm2_dir)
    (tmp_path / "data").mkdir()
    write_demo(tmp_path / "data", n_train=8, n_test=1)
    rows = load_rows(tmp_path / "data" / "train.json")
    encoded, _ = encode(rows, Chat.from_dir(smollm2_dir, tokenizer), EncodeRules(max_length=512))
    config = TrainConfig(lr=2e-3, epochs=5, batch_rows=4, micro_tokens=512)
    model = Llama.from_pretrained(smollm2_dir)
    run_training(model, tmp_path / "run", config, encoded, lora=LoraConfig())
    losses = [line["loss"] for line in metrics_lines(tmp_path / "run")]
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2]), losses


def test_loss_and_gradients_do_not_depend_on_the_micro_batches(tiny_llama_dir):
    """fp64: one forward of all rows = rows in any grouping, loss and every gradient."""
    model = Llama.from_pretrained(tiny_llama_dir(), dtype=torch.float64)
    lora = new_lora(model, rank=3, modules="all", dropout=0.2, seed=1)
    lora.params.add_(0.05)
    rows = examples(9)
    groupings = ([rows], [[row] for row in rows], [rows[:4], rows[4:]], [rows[::-1]])
    results = []
    for groups in groupings:
        lora.grads.zero_()
        losses = 0.0
        for group in groups:
            batch = MicroBatch.build(group, step=3, device=model.device)
            losses += micro_step(model, lora, batch, "none").sum()
        results.append((losses, lora.grads.clone()))
    whole_losses, whole_grads = results[0]
    for losses, grads in results[1:]:
        assert abs(losses - whole_losses) < 1e-9 * losses
        assert (grads - whole_grads).abs().max() < 1e-9 * grads.abs().max()


@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_shared_prompt_prefix_is_computed_once_with_equal_gradients(tiny_llama_dir, policy):
    """fp64: loss and every gradient, prompts equal but for their last token among them."""
    model = Llama.from_pretrained(tiny_llama_dir(), dtype=torch.float64)
    lora = new_lora(model, rank=3, modules="all", seed=1)
    lora.params.add_(0.05)
    begin = [(11 * k) % 300 for k in range(40)]
    rows = [Example(e.id, begin + e.ids, 40 + e.n_prompt) for e in examples(5)]
    rows.append(Example("short/0", [*begin, 7, 8], 41))
    results = []
    for share in (False, True):
        lora.grads.zero_()
        batch = MicroBatch.build(rows, 1, model.device, share)
        nll = micro_step(model, lora, batch, policy)
        results.append((nll, lora.grads.clone(), len(batch.tokens)))
    (nll, grads, many), (nll_shared, grads_shared, few) = results
    assert many - few == 40 * 5 and len(nll) == sum(len(e.ids) - e.n_prompt for e in rows)
    assert (nll - nll_shared).abs().max() < 1e-9
    assert (grads - grads_shared).abs().max() < 1e-9 * grads.abs().max()


@pytest.mark.parametrize(
    ("ops", "dropout", "shared"),
    [
        (TORCH, 0.0, True),
        (dataclasses.replace(TORCH, name="torch with another name"), 0.0, True),
        (TORCH, 0.1, False),
        (dataclasses.replace(TORCH, shares_prefix=()), 0.0, False),
    ],
)
def test_prefixes_are_shared_where_the_table_says_so(
    tiny_llama_dir, monkeypatch, ops, dropout, shared
):
    model = Llama.from_pretrained(tiny_llama_dir(), ops=ops)
    lora = new_lora(model, dropout=dropout)
    begin = [(11 * k) % 300 for k in range(40)]
    rows = [Example(e.id, begin + e.ids, 40 + e.n_prompt) for e in examples(5)]
    seen = []
    step = step_module.micro_step

    def watched(model, lora, batch, *rest):
        seen.append(batch.packed.prefix)
        return step(model, lora, batch, *rest)

    monkeypatch.setattr(step_module, "micro_step", watched)
    step_module.step_gradients(model, lora, rows, 1, 1000, "none")
    assert seen == [40 if shared else 0]
    assert TRITON.shares_prefix == (), "its attention refuses a prefix"


def test_the_shared_prefix_ends_before_the_last_prompt_token_and_has_8_tokens_or_none():
    a = Example("a", [*range(20), 1, 2], 15)
    b = Example("b", [*range(12), 99, 3], 13)
    c = Example("c", [*range(5), 99, 3], 6)
    d = Example("d", list(range(12)), 11)
    assert shared_prompt_prefix([a, b]) == 12
    assert shared_prompt_prefix([a]) == 0
    assert shared_prompt_prefix([a, a]) == 14
    assert shared_prompt_prefix([a, c]) == 0, "five tokens are fewer than MIN_SHARED"
    assert shared_prompt_prefix([b, d]) == 10, "the last prompt token is not shared"


def test_loss_is_over_response_tokens_of_the_whole_step(tiny, tmp_path):
    """The first step's loss against the logits themselves, micro-batches of one row."""
    config = dataclasses.replace(SMALL, micro_tokens=1, batch_rows=20, epochs=1)
    rows = examples()
    run_training(tiny, tmp_path / "run", config, rows, lora=dataclasses.replace(LORA, dropout=0.0))
    total = 0.0  # nats
    count = 0  # response tokens
    for example in rows:
        logits = tiny.logits(torch.tensor(example.ids))  # (tokens, vocabulary)
        predicting = logits[example.n_prompt - 1 : -1]
        targets = torch.tensor(example.ids[example.n_prompt :])
        total += torch.nn.functional.cross_entropy(predicting, targets, reduction="sum").item()
        count += len(targets)
    (line,) = metrics_lines(tmp_path / "run")
    assert line["response_tokens"] == count
    assert line["tokens"] == sum(len(example.ids) for example in rows)
    assert line["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_step_is_adamw_on_the_mean_gradient_clipped(tiny, tmp_path):
    """Against torch.optim.AdamW and clip_grad_norm_, two steps, weight decay on."""
    config = TrainConfig(
        lr=1e-2, epochs=2, batch_rows=20, micro_tokens=10**6, clip=0.1, weight_decay=0.1, seed=5
    )
    rows = examples()
    n_response = sum(len(example.ids) - example.n_prompt for example in rows)
    lora_config = dataclasses.replace(LORA, dropout=0.0)
    trained, _ = run_training(tiny, tmp_path / "run", config, rows, lora=lora_config)
    lora = new_lora(tiny, rank=4, alpha=8, modules="all", seed=5)
    parameter = torch.nn.Parameter(lora.params.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1)
    for step, line in enumerate(metrics_lines(tmp_path / "run"), start=1):
        lora.params.copy_(parameter.detach())
        lora.grads.zero_()
        micro_step(tiny, lora, MicroBatch.build(rows, step, tiny.device), "none")
        parameter.grad = lora.grads / n_response
        norm = torch.nn.utils.clip_grad_norm_([parameter], 0.1).item()
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.1
        optimizer.param_groups[0]["lr"] = line["lr"]
        optimizer.step()
    assert (parameter.detach() - trained.params).abs().max() < 2e-6


def test_mfu_is_operations_by_hand_over_the_stated_rate(tiny, tmp_path, monkeypatch):
    """P = 2 layers of 64 x (128 qkv + 64 o + 3 x 96 mlp) and a head of 320 x 64."""
    rows = examples()
    config = dataclasses.replace(SMALL, batch_rows=20, epochs=2)
    _, summary = run_training(tiny, tmp_path / "run", config, rows)
    assert "MFU" not in summary_text(summary, tmp_path), "no rate is stated for a CPU"
    monkeypatch.setitem(mfu_module.STATED, "cpu", 2e9)
    lengths = [len(e.ids) for e in rows]
    weights = 2 * (8192 + 4096 + 3 * 6144) + 20480
    products = 4 * weights * sum(lengths)
    attention = sum(7 * n * n * 4 * 16 * 2 for n in lengths)
    operations = 2 * (products + attention)  # of two steps
    operations_s = operations / summary["seconds"]
    share = operations_s / 2e9
    assert summary["operations_s"] == pytest.approx(operations_s)
    text = summary_text(summary, tmp_path)
    assert f"(4 P a token + 7 L^2 H d a row and layer), MFU {share:.1%};" in text
    two = summary_text(summary | {"processes": 2}, tmp_path)
    assert f", MFU {share / 2:.1%};" in two, "two devices have twice the rate"


def test_learning_rates_rise_over_the_warm_up_and_then_follow_the_schedule():
    rates = [learning_rate("cosine", s, 10, 1.0, 0.2) for s in range(1, 11)]
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert learning_rate("cosine", 1, 10, 1.0, 0.0) == 1.0
    assert 0 < learning_rate("cosine", 10, 10, 1.0, 0.0) < 0.03
    linear = [learning_rate("linear", s, 4, 2.0, 0.0) for s in range(1, 5)]
    assert linear == [2.0, 1.5, 1.0, 0.5]
    constant = [learning_rate("constant", s, 4, 2.0, 0.5) for s in range(1, 5)]
    assert constant == [0.0, 1.0, 2.0, 2.0]


def test_adamw_scalars_refuse_step_zero():
    with pytest.raises(AssertionError, match="count from 1"):
        AdamW().scalars(1e-3, 0, 1.0, "cpu")


KILLED = """
import sys
sys.path.insert(0, {root!r})
import engine.train.step as step_module
from engine.train.train import FrozenModel, train
from tests.helpers.training import SMALL, LORA, examples
from model.llama import Llama
from pathlib import Path
import os, signal
step = step_module.micro_step
asked = []  # once: on a slow machine a step's micro-batches would ask seconds apart
def micro_step(*args):
    if {kill} and not asked and len(open({out!r} + "/metrics.jsonl").readlines()) == {kill}:
        asked.append(True)
        with open({out!r} + "/metrics.jsonl", "a") as file:
            file.write('{{"step": 99, "torn')
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)
step_module.micro_step = micro_step
train(FrozenModel(Llama.from_pretrained({model!r}), "b", "h"), examples(), LORA, SMALL,
      Path({out!r}), resume=True)
"""


def test_killed_and_resumed_is_the_undisturbed_run_bit_for_bit(tiny_llama_dir, tmp_path):
    """10 steps = 5, SIGKILL (with a torn metrics line), resume, 8, SIGKILL, resume; dropout on."""
    path = tiny_llama_dir()
    whole, _ = run_training(Llama.from_pretrained(path), tmp_path / "whole")
    out = tmp_path / "killed"
    go_on = {"root": str(ROOT), "model": str(path), "out": str(out)}
    for kill in (5, 8, 0):
        if kill == 5:  # the first start is not a resumption
            script = KILLED.replace("resume=True", "resume=False").format(kill=kill, **go_on)
        else:
            script = KILLED.format(kill=kill, **go_on)
        done = programs.run([sys.executable, "-c", script])
        assert done.returncode == (-9 if kill else 0), done.stderr[-2000:]
    assert torch.equal(load_lora(out).params, whole.params)
    assert metrics_lines(out) == metrics_lines(tmp_path / "whole")
    killed_state = last_optimizer_state(out)
    whole_state = last_optimizer_state(tmp_path / "whole")
    for name, tensor in killed_state.items():
        assert torch.equal(tensor, whole_state[name])


def last_optimizer_state(out):
    """The tensors m, v and params of the newest checkpoint."""
    newest = checkpoint_module.checkpoints(out)[-1]
    return load_file(newest / "optimizer.safetensors")


def test_a_run_is_refused_without_resume_or_under_other_settings(tiny, tmp_path, monkeypatch):
    run_training(tiny, tmp_path / "run")
    with pytest.raises(ValueError, match="exists already"):
        run_training(tiny, tmp_path / "run")
    with pytest.raises(ValueError, match="train.lr: 0.005 -> 0.1"):
        run_training(tiny, tmp_path / "run", dataclasses.replace(SMALL, lr=0.1), resume=True)
    with pytest.raises(ValueError, match="data: "):
        run_training(tiny, tmp_path / "run", rows=examples(seed=1), resume=True)
    monkeypatch.setattr(step_module, "micro_step", None)  # a finished run is loaded, not trained
    lora, _ = run_training(tiny, tmp_path / "run", dataclasses.replace(SMALL, keep=1), resume=True)
    assert len(metrics_lines(tmp_path / "run")) == 10
    assert torch.equal(lora.params, load_lora(tmp_path / "run").params)


def test_the_summary_of_a_run_without_weights_is_of_these_settings_and_rows_alone(tiny, tmp_path):
    """The adapter and the checkpoints may be gone; what was trained, and how, must be the same."""
    out, rows = tmp_path / "run", examples()
    _, summary = run_training(tiny, out)
    for weights in out.rglob("*.safetensors"):
        weights.unlink()
    frozen = FrozenModel(tiny, directory="b", fingerprint="h")
    assert finished_summary(frozen, rows, LORA, SMALL, out) == summary
    other_model = dataclasses.replace(frozen, fingerprint="i")
    for name, asked in (
        ("train.lr", (frozen, rows, LORA, dataclasses.replace(SMALL, lr=4e-3))),
        ("train.epochs", (frozen, rows, LORA, dataclasses.replace(SMALL, epochs=3))),
        ("train.seed", (frozen, rows, LORA, dataclasses.replace(SMALL, seed=6))),
        ("lora.alpha", (frozen, rows, dataclasses.replace(LORA, alpha=9), SMALL)),
        ("data", (frozen, rows[:-1], LORA, SMALL)),
        ("model", (other_model, rows, LORA, SMALL)),
    ):
        with pytest.raises(ValueError, match=rf"other settings(?s:.)*\n  {re.escape(name)}: "):
            finished_summary(*asked, out)

    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps(meta | {"finished": False, "summary": None}))
    with pytest.raises(ValueError, match="run is not finished; expected a run that wrote its"):
        finished_summary(frozen, rows, LORA, SMALL, out)


def test_rows_without_response_are_named(tiny, tmp_path):
    rows = [*examples(3), Example("empty/0", [1, 2, 3], 3), Example("bare/0", [1], 0)]
    with pytest.raises(ValueError, match=r"empty/0.*bare/0"):
        run_training(tiny, tmp_path / "run", rows=rows)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="nothing to train on"):
        check_examples([])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_and_keeps_the_last_good_state(
    tiny, tmp_path, monkeypatch, where
):
    step = step_module.micro_step
    calls = []

    def broken(model, lora, batch, *rest):
        nll = step(model, lora, batch, *rest)
        calls.append(batch)
        if batch.packed.step >= 8:
            if where == "loss":
                nll[batch.owners.index(batch.owners[-1])] = torch.nan
            else:
                lora.grads[3] = torch.inf
        return nll

    monkeypatch.setattr(step_module, "micro_step", broken)
    with pytest.raises(ValueError, match=r"step 8: the (loss|gradient).*step-000006") as error:
        run_training(tiny, tmp_path / "run")
    assert calls[-1].owners[-1] in str(error.value)
    assert len(metrics_lines(tmp_path / "run")) == 7
    monkeypatch.setattr(step_module, "micro_step", step)
    resumed, _ = run_training(tiny, tmp_path / "run", resume=True)
    whole, _ = run_training(tiny, tmp_path / "whole")
    assert torch.equal(resumed.params, whole.params)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_the_run_is_resumed(tiny_llama_dir, tmp_path, by):
    """At step 5; then at the last step, after which the adapter is finished and the job must end
    all the same (a job that goes on trains its other arm); then undisturbed."""
    path, out = tiny_llama_dir(), tmp_path / "asked"
    whole, _ = run_training(Llama.from_pretrained(path), tmp_path / "whole")
    torn = KILLED[KILLED.index("        with open") : KILLED.index("        os.kill")]
    begin = KILLED.index("train(FrozenModel")
    script = KILLED[:begin].replace(torn, "").replace("SIGKILL", by.name) + STOPPED
    last = ((9, True), (0, True)) if by == signal.SIGTERM else ((0, True),)
    for kill, resume in ((4, False), *last):
        names = {"root": str(ROOT), "model": str(path), "out": str(out)}
        text = script.format(kill=kill, resume=resume, **names)
        done = programs.run([sys.executable, "-c", text])
        assert done.returncode == (128 + by if kill else 0), done.stderr[-2000:]
        assert ("went on" in done.stdout) == (not kill)
        assert "Traceback" not in done.stderr
        if kill == 4:
            assert "step 5 of 10 is in" in done.stderr and "--resume" in done.stderr
            assert (out / "checkpoints" / "step-000005").is_dir()
        assert json.loads((out / "meta.json").read_text())["finished"] == (kill != 4)
    assert torch.equal(load_lora(out).params, whole.params)
    assert metrics_lines(out) == metrics_lines(tmp_path / "whole")


STOPPED = """
signal.signal(signal.SIGINT, signal.default_int_handler)
from engine.runtime.flags import run_main
def main():
    train(FrozenModel(Llama.from_pretrained({model!r}), "b", "h"), examples(), LORA, SMALL,
          Path({out!r}), resume={resume})
    print("went on")
run_main(main, "the same command with --resume goes on")
"""


def test_a_damaged_published_adapter_is_restored_or_refused(tiny, tmp_path, capsys):
    """It is written again from the checkpoint, or refused without one; the returned adapter is the
    finished one, also where all checkpoints are gone."""
    out = tmp_path / "run"
    lora, _ = run_training(tiny, out)
    file = out / "adapter_model.safetensors"
    right = file.read_bytes()
    file.write_bytes(b"\0" * 1000)
    with pytest.raises(ValueError, match="not what its run wrote"):
        published_adapter_module.refuse_damaged(out)
    again, _ = run_training(tiny, out, resume=True)
    assert file.read_bytes() == right and torch.equal(again.params, lora.params)
    assert "damaged or gone; it is written again from step-000010" in capsys.readouterr().out
    published_adapter_module.refuse_damaged(out)
    shutil.rmtree(out / "checkpoints")
    again, _ = run_training(tiny, out, resume=True)
    assert torch.equal(again.params, lora.params), "a fresh adapter was returned for a finished run"
    file.write_bytes(right[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match="is not what the run wrote, and .*step-000010 cannot"):
        run_training(tiny, out, resume=True)


def test_a_checkpoint_names_the_part_of_metrics_that_it_needs(tiny, tmp_path, monkeypatch):
    """It has no copy of the file; one of an older version does, and is resumed from it."""
    _, whole = run_training(tiny, tmp_path / "whole")
    out = tmp_path / "run"
    step = step_module.micro_step

    def failing(*args):
        if args[2].packed.step == 8:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(step_module, "micro_step", failing)
    with pytest.raises(KeyboardInterrupt):
        run_training(tiny, out)
    monkeypatch.undo()
    saved = checkpoint_module.checkpoints(out)[-1]
    assert not (saved / "metrics.jsonl").exists()
    metrics = (out / "metrics.jsonl").read_bytes()
    assert metrics.count(b"\n") == 7
    state_file = saved / "state.json"
    state = json.loads(state_file.read_text())
    part = metrics[: state["metrics"]["bytes"]]
    assert part.count(b"\n") == state["step"] == 6

    for damaged in (metrics.replace(b'"epoch"', b'"epocj"', 1), metrics[: len(part) - 1], None):
        other = shutil.copytree(out, tmp_path / "damaged")
        (other / "metrics.jsonl").unlink()
        if damaged is not None:
            (other / "metrics.jsonl").write_bytes(damaged)
        with pytest.raises(ValueError, match="not what was written up to step 000006"):
            run_training(tiny, other, resume=True)
        shutil.rmtree(other)

    old = shutil.copytree(out, tmp_path / "old") / saved.relative_to(out)
    (old / "metrics.jsonl").write_bytes(part)
    del state["metrics"]
    state["sha256"]["metrics.jsonl"] = hashlib.sha256(part).hexdigest()
    (old / "state.json").write_text(json.dumps(state))
    (tmp_path / "old" / "metrics.jsonl").write_text("")
    for folder in (out, tmp_path / "old"):
        _, summary = run_training(tiny, folder, resume=True)
        assert metrics_lines(folder) == metrics_lines(tmp_path / "whole")
        assert summary["last_loss"] == whole["last_loss"]


def test_the_summary_covers_the_whole_run(tiny, tmp_path, monkeypatch):
    """Seconds and speed of a run that was stopped and went on, and of one of an older version,
    whose checkpoints kept no account."""
    out = tmp_path / "run"
    step = step_module.micro_step

    def failing(*args):
        if args[2].packed.step == 8:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(step_module, "micro_step", failing)
    with pytest.raises(KeyboardInterrupt):
        run_training(tiny, out)
    monkeypatch.setattr(step_module, "micro_step", step)
    place = checkpoint_module.checkpoints(out)[-1]
    state = json.loads((place / "state.json").read_text())
    assert state["step"] == 6
    lines = (out / "metrics.jsonl").read_bytes()[: state["metrics"]["bytes"]].splitlines()
    assert state["spent"]["tokens"] == sum(json.loads(line)["tokens"] for line in lines)
    shutil.copytree(out, tmp_path / "old")
    _, summary = run_training(tiny, out, resume=True)
    assert summary["since_step"] == 0 and summary["seconds"] > state["spent"]["seconds"]
    assert summary["tokens_s"] == pytest.approx(summary["tokens"] / summary["seconds"])
    old = tmp_path / "old" / "checkpoints" / place.name / "state.json"
    del state["spent"], state["since_step"]
    old.write_text(json.dumps(state))
    _, summary = run_training(tiny, tmp_path / "old", resume=True)
    assert summary["since_step"] == 6 and "s since step 6, " in summary_text(summary, out)


def test_out_of_memory_halves_the_micro_batches(tiny, tmp_path, monkeypatch, capsys):
    """A step that does not fit with 64 tokens is done with 32; a row that does not fit alone is
    named."""
    step = step_module.micro_step
    sizes = []  # tokens of each micro-batch that was tried
    most = 60  # tokens that fit

    def small_machine(model, lora, batch, *rest):
        sizes.append(len(batch.tokens))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return step(model, lora, batch, *rest)

    monkeypatch.setattr(step_module, "micro_step", small_machine)
    lora, _ = run_training(tiny, tmp_path / "run")
    said = capsys.readouterr().out
    assert "out of memory with micro-batches of 64 tokens; continuing with 32" in said
    too_large = [size for size in sizes if size > most]
    assert len(too_large) == 1, "a larger one is not tried again"
    monkeypatch.setattr(step_module, "micro_step", step)
    plain, _ = run_training(tiny, tmp_path / "plain")
    assert (lora.params - plain.params).abs().max() < 1e-4
    newest = checkpoint_module.checkpoints(tmp_path / "run")[-1]
    state = json.loads((newest / "state.json").read_text())
    assert state["micro_tokens"] == 32
    most = 10
    monkeypatch.setattr(step_module, "micro_step", small_machine)
    with pytest.raises(ValueError, match=r"one row at a time; the longest is r\d+/0 of \d+ tokens"):
        run_training(tiny, tmp_path / "never")


def test_other_errors_are_not_out_of_memory(tiny, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(step_module, "micro_step", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        run_training(tiny, tmp_path / "run")


def test_recompute_policies_give_the_same_bits(tiny, tmp_path):
    results = []
    for policy in ("none", "selective", "full", "auto"):
        config = dataclasses.replace(SMALL, recompute=policy, epochs=1)
        lora, _ = run_training(tiny, tmp_path / policy, config)
        results.append(lora.params)
    for params in results[1:]:
        assert torch.equal(params, results[0])


def test_a_loss_that_explodes_stops_the_run(tiny, tmp_path, monkeypatch):
    step = step_module.micro_step
    calls = []

    def growing(*args):
        calls.append(1)
        return step(*args) + 0.4 * len(calls)

    monkeypatch.setattr(step_module, "micro_step", growing)
    config = dataclasses.replace(SMALL, epochs=40, micro_tokens=10**6)
    with pytest.raises(ValueError, match=r"the loss has exploded.*step-0000"):
        run_training(tiny, tmp_path / "run", config)


def test_a_run_that_learns_nothing_is_an_error(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "micro_step", lambda m, lora, b, *_: torch.ones(len(b.owners)))
        with pytest.raises(ValueError, match="gradient is exactly zero"):
            run_training(tiny, tmp_path / "run")

    def only_a(model, lora, batch, *_):
        for name, view in lora.views(lora.grads).items():
            view.fill_(float(".lora_A." in name))
        return torch.ones(len(batch.owners))

    monkeypatch.setattr(step_module, "micro_step", only_a)
    with pytest.raises(ValueError, match="B is zero everywhere"):
        run_training(tiny, tmp_path / "zero")


def test_max_steps_ends_the_batches_in_the_middle_of_an_epoch():
    schedule = list(batches(10, dataclasses.replace(SMALL, max_steps=7)))
    assert [len(batch.indices) for batch in schedule] == [4, 4, 2, 4, 4, 2, 4]
    assert [batch.epoch for batch in schedule] == [0, 0, 0, 1, 1, 1, 2]
    by_epochs = list(batches(10, SMALL))
    assert schedule[:6] == by_epochs and len(by_epochs) == 6
    first_epoch = [index for batch in schedule[:3] for index in batch.indices]
    assert sorted(first_epoch) == list(range(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "step"}, "schedule 'step'.*cosine, linear, constant"),
        ({"recompute": "some"}, "recompute 'some'"),
        ({"max_steps": -1}, "max_steps -1"),
        ({"memory_gb": -1.0}, "memory_gb -1"),
        ({"keep": 0}, "keep 0"),
    ],
)
def test_settings_that_cannot_train_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change).check()


def test_the_best_checkpoint_is_kept_and_published(tiny, tmp_path):
    """Step 4 has the lowest loss: its checkpoint outlives --keep 1 and becomes the adapter."""

    class BestAtStep4:
        config = ValidateConfig(val_every=2, best="nll", val_data="x")
        names = ("nll",)

        def __call__(self, lora):
            seen.append(lora.params.clone())
            return [abs(len(seen) - 2.0)]

    seen = []
    config = dataclasses.replace(SMALL, keep=1)
    frozen = FrozenModel(tiny, "b", "h")
    lora, summary = train(
        frozen, examples(), LORA, config, tmp_path / "run", validator=BestAtStep4()
    )
    assert len(seen) == 5 and summary["best"] == {"metric": "nll", "value": 0.0, "step": 4}
    assert torch.equal(load_lora(tmp_path / "run").params, seen[1])
    assert torch.equal(lora.params, seen[1]) and not torch.equal(seen[1], seen[4])
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000010"]
    noted = read_jsonl(tmp_path / "run" / "validation.jsonl")
    assert [(x["step"], x["nll"]) for x in noted] == [(2, 1), (4, 0), (6, 1), (8, 2), (10, 3)]


def test_an_adapter_that_does_nothing_yet_is_not_the_best(tiny, tmp_path):
    """A warm-up begins at rate 0: after that step the drift is 0, and B is zero everywhere."""

    class Drift:
        config = ValidateConfig(val_every=1, best="kl", val_data="x")
        names = ("kl",)

        def __call__(self, lora):
            views = lora.views(lora.params).items()
            return [sum(float(view.norm()) for name, view in views if "lora_B" in name)]

    untrained = Lora.init(LORA, tiny.config, tiny.device, tiny.dtype)
    config = dataclasses.replace(SMALL, warmup=0.3)
    frozen = FrozenModel(tiny, "b", "h")
    lora, summary = train(frozen, examples(), LORA, config, tmp_path / "run", validator=Drift())
    noted = read_jsonl(tmp_path / "run" / "validation.jsonl")
    assert noted[0]["kl"] == 0 < noted[1]["kl"]
    assert summary["best"]["step"] == 2 and summary["best"]["value"] == noted[1]["kl"]
    assert has_learned(lora) and not has_learned(untrained)


def test_validation_measures_held_out_loss_and_drift(tiny_llama_dir, tmp_path):
    """nll is evaluate's; kl is 0 for an adapter that does nothing and above 0 for one that does."""
    path = tiny_llama_dir(tokenizer=True)
    model, chat = Llama.from_pretrained(path), Chat.from_dir(path, load_tokenizer(path))
    held_out = tmp_path / "held_out.json"
    rows = [{"instruction": f"Say {w}", "output": w} for w in ("a", "bb", "c c")]
    held_out.write_text(json.dumps(rows))
    config = ValidateConfig(val_every=1, val_data=str(held_out), val_prompts=2)
    validator = Validator(config, DataConfig(str(held_out)), session_of(model, chat))
    assert validator.names == ["nll", "kl", "agreement"]
    lora = new_lora(model, modules="all")
    nll, kl, agreement = validator(lora)
    rows = load_rows(held_out)
    (want,) = reference_nll(model, chat, rows, {"x": None}, tmp_path / "nll", {}).values()
    assert nll == pytest.approx(want, rel=1e-6) and abs(kl) < 1e-6 and agreement == 1.0
    lora.params.add_(0.1)
    nll, kl, agreement = validator(lora)
    assert kl > 0.01 and agreement < 1 and abs(nll - want) > 1e-3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ValidateConfig(best="nll"), "--best nll needs --val-every and --val-data"),
        (ValidateConfig(val_every=1, best="kl", val_prompts=0), "--val-every needs --val-data"),
        (ValidateConfig(best="loss"), "best 'loss'"),
        (ValidateConfig(val_prompts=65), "val_prompts 65"),
    ],
)
def test_validation_settings_that_measure_nothing_or_are_unknown_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config.check()


def test_the_script_shows_trains_validates_and_publishes_the_best(tiny_llama_dir, tmp_path):
    """scripts/train.py from another directory: rows shown with their loss, then two steps."""
    path = tiny_llama_dir(tokenizer=True)
    data, out = tmp_path / "rows.json", tmp_path / "run"
    data.write_text(json.dumps([{"instruction": f"Say {i}", "output": f"{i}"} for i in range(6)]))
    script = [sys.executable, str(ROOT / "scripts" / "train.py"), "--model", path, "--data", data]

    def run(*flags):
        done = programs.run([*script, *flags], cwd=tmp_path, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert " nats each" in run("--show", "1")
    flags = ["--out", out, "--max-steps", "2", "--schedule", "linear", "--modules", "all"]
    flags += ["--val-every", "1", "--val-data", data, "--val-prompts", "1", "--best", "nll"]
    said = run(*flags)
    assert "recompute none: predicted peak" in said and "LoRA on 14/14 linears" in said
    assert "TFLOP/s" in said and "best nll" in said and "peak memory" in said
    noted = read_jsonl(out / "validation.jsonl")
    assert [sorted(x) for x in noted] == [["agreement", "epoch", "kl", "nll", "step"]] * 2
    summary = json.loads((out / "meta.json").read_text())["summary"]
    assert summary["best"]["value"] == min(x["nll"] for x in noted)
    assert [x["lr"] for x in read_jsonl(out / "metrics.jsonl")] == [3e-4, 1.5e-4]
