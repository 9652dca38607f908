"""Several processes on gloo, whole and sharded weights: same gradients, same losses, killed and
resumed."""

import itertools
import json
import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from engine.data.config import DataConfig
from engine.distill.seed_likelihoods import score
from engine.runtime import distributed
from engine.runtime.distributed import Heartbeat, World, discard_stdout, shares, start
from engine.runtime.files import read_jsonl
from engine.session import ModelConfig, Session
from engine.train.loop import Run
from engine.train.metrics import Metrics, PendingStep
from engine.train.step import SINGLE_PROCESS, step_gradients
from engine.train.train import FrozenModel, train
from engine.train.validate import ValidateConfig, Validator
from model.chat import Chat
from model.llama import Llama
from model.peft_format import load_lora
from model.tape import POLICIES
from model.tokenizer import load_tokenizer
from tests.helpers.adapters import new_lora
from tests.helpers.distributed_job import lines
from tests.helpers.sessions import session_of
from tests.helpers.training import LORA, SMALL, examples

ROOT = Path(__file__).resolve().parents[2]


def test_shares_are_balanced_by_tokens_and_complete():
    lengths = [5, 100, 7, 60, 55, 1]
    for size in (1, 2, 3, 7):
        places = shares(lengths, size)
        assert len(places) == size and sorted(sum(places, [])) == list(range(6))
        loads = [sum(lengths[i] for i in place) for place in places]
        assert max(loads) - min(loads) <= max(lengths)
    assert [sum(lengths[i] for i in p) for p in shares(lengths, 2)] == [113, 115]
    assert shares([3], 2) == [[0], []], "a process may have nothing to do"


def test_a_single_process_joins_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = start()
    assert (
        world == World() and world.is_rank0 and world.any_rank(True) and not world.any_rank(False)
    )
    tensor = torch.ones(3)
    assert world.all_reduce_sum_(tensor) is tensor and tensor.tolist() == [1, 1, 1]


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_two_and_three_processes_equal_one(tiny_llama_dir, tmp_path, shard):
    """Two processes, rank 1 killed in step 8; three go on from step 6: all as one process.

    With sharded weights rank 1 of the three is killed in step 10, and one process, which holds
    them whole, does that step.
    """
    sizes = {"tied": False, "intermediate": 16} if shard else {}  # embedding and head in two parts
    path, out = tiny_llama_dir(tokenizer=True, **sizes), tmp_path / "run"
    model = Llama.from_pretrained(path, dtype=torch.float64)
    lora = new_lora(model, rank=3, modules="all", dropout=0.2, seed=1)
    lora.params.add_(0.05)
    alone = {}
    for count in (9, 1):
        loss = step_gradients(model, lora, examples(count), 3, 64, "none", SINGLE_PROCESS).nll.sum()
        alone[count] = loss, lora.grads.clone()
    one = Llama.from_pretrained(path)
    single, _ = train(FrozenModel(one, "b", "h"), examples(), LORA, SMALL, tmp_path / "one")
    held_out, scores = tmp_path / "held_out.json", tmp_path / "scores.jsonl"
    held_out.write_text(json.dumps([{"instruction": f"Say {w}", "output": w} for w in "abc"]))

    for size, kill in ((2, 8), (3, 10 if shard else 0)):
        job = {"model": str(path), "out": str(out), "kill": kill, "shard": shard}
        job |= {"found": str(tmp_path / "found"), "held_out": str(held_out), "scores": str(scores)}
        (tmp_path / "job.json").write_text(json.dumps(job))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = [
            str(ROOT / "tests" / "helpers" / "distributed_job.py"),
            str(tmp_path / "job.json"),
        ]
        done = subprocess.run(
            [*torchrun, "--nproc-per-node", str(size), *script],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=ROOT,
        )
        assert (tmp_path / "found").exists(), done.stderr[-3000:]
        found = load_file(tmp_path / "found")
        for policy, (count, (loss, grads)) in itertools.product(POLICIES, alone.items()):
            assert (found[f"loss {policy} {count}"] - loss).abs() < 1e-9 * loss
            error = (found[f"grads {policy} {count}"] - grads).abs().max()
            assert error < 1e-9 * grads.abs().max()
        if kill:
            assert done.returncode != 0
            # torchrun asks rank 0 to stop as soon as it sees the death: either may come first
            gone = f"rank 0 of {size}: another process of the job is gone"
            assert gone in done.stderr or "SIGTERM: " in done.stderr, done.stderr[-3000:]
            assert "--resume" in done.stderr
            kept = sorted(p.name for p in (out / "checkpoints").iterdir())
            want = [3, 6] if kill == 8 else [6, 9]
            assert kept == [f"step-{n:06d}" for n in want], "whole, and written once"
        else:
            assert done.returncode == 0, done.stderr[-3000:]
        if shard:
            assert_sharded_is_whole(path, model, lora, size, found, held_out, scores)
            scores.unlink()
    if shard:
        frozen = FrozenModel(Llama.from_pretrained(path), "b", "h")
        train(frozen, examples(), LORA, SMALL, out, resume=True)
    losses = [
        [json.loads(line)["loss"] for line in (p / "metrics.jsonl").read_text().splitlines()]
        for p in (out, tmp_path / "one")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 10
    summary = json.loads((out / "meta.json").read_text())["summary"]
    assert summary["processes"] == (1 if shard else 3)
    assert (load_lora(out).params - single.params).abs().max() < 1e-4


def assert_sharded_is_whole(path, model, lora, size, found, held_out, scores):
    """Rank 0's share of the weights, validation and scores, beside one process with all of it."""
    count = sum(w.numel() for w in model.weights.values())
    norm = model.config.hidden_size
    assert count / size - 1 < found["held"] < count / size + 5 * norm + 40 * size
    chat = Chat.from_dir(path, load_tokenizer(path))
    config = ValidateConfig(val_every=1, val_data=str(held_out), val_prompts=2)
    data = DataConfig(str(held_out))
    want = Validator(config, data, session_of(model, chat))(lora)
    assert found["validation"].tolist() == pytest.approx(want, rel=1e-6)
    beside = scores.with_name("whole.jsonl")
    score(model, chat, lines(7), beside, {})
    got, want = read_jsonl(scores), read_jsonl(beside)
    assert len(got) == 7
    for name in got[0]:
        values = [[line[name] for line in file if line[name] is not None] for file in (got, want)]
        near = values[1] if name == "id" else pytest.approx(values[1], rel=1e-9)
        assert values[0] == near and len(values[0]) in (4, 7), name
    beside.unlink()


def test_scripts_with_sharded_weights(tiny_llama_dir, tmp_path):
    """train.py validates and publishes; distill.py scores what is distilled, samples nothing."""
    path, data, out = tiny_llama_dir(tokenizer=True), tmp_path / "rows.json", tmp_path / "run"
    data.write_text(json.dumps([{"instruction": f"Say {i}", "output": f"{i}"} for i in range(6)]))

    def script(name, *flags, processes=2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else [])]
        command += [ROOT / "scripts" / name, "--model", path, "--data", data, *flags]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)

    looking = ["--val-every", "1", "--val-data", data, "--val-prompts", "1", "--best", "nll"]
    done = script("train.py", "--shard", "--out", out, "--max-steps", "2", *looking)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "shared out over 2 processes" in done.stdout and "best nll" in done.stdout
    assert [x["step"] for x in read_jsonl(out / "validation.jsonl")] == [1, 2]

    distilled = ["--out", tmp_path / "distilled.jsonl", "--max-new-tokens", "4"]
    done = script("distill.py", "--shard", *distilled)
    assert done.returncode != 0 and "sampling needs all weights in every process" in done.stderr
    alone = script("distill.py", "--resume", *distilled, processes=1)
    assert alone.returncode == 0, alone.stderr[-3000:]
    scores = tmp_path / "distilled.jsonl.scores.jsonl"
    whole = read_jsonl(scores)
    scores.unlink()
    done = script("distill.py", "--shard", "--resume", *distilled)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(whole) == 6
    for a, b in zip(read_jsonl(scores), whole, strict=True):
        assert a["id"] == b["id"]
        assert a["reference_nll"] == pytest.approx(b["reference_nll"], rel=1e-5)


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("busy", ""),
        ("stopped", r"is gone \(.*[Tt]imed out"),
        ("stopped in a sum", r"is gone \(.*[Tt]imed out"),
        ("killed", r"is gone \(.*onnection"),
        ("ended", r"is gone \(rank 1 has ended\)"),
    ],
)
def test_waiting_for_a_process(deed, said):
    """A busy one is waited for beyond every time-out; one that is stopped, or dead, is not."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    here = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "waiting_job.py"), deed]
    pair = [
        subprocess.Popen(command, env=here | {"RANK": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        _, heard = pair[0].communicate(timeout=120)
    finally:
        pair[1].kill()
    _, other = pair[1].communicate()
    assert "joined" in heard and "joined" in other, heard + other
    if deed == "busy":
        assert "through" in heard and pair[0].returncode == 0, heard
        return
    assert pair[0].returncode == 2 and "through" not in heard, heard
    assert re.search("rank 0 of 2: another process of the job " + said, heard), heard
    assert "--resume" in heard and "Traceback" not in heard


class Clock:
    """An event of a GPU that is done when it was asked `asks` times."""

    def __init__(self, asks):
        self.left = asks

    def record(self):
        pass

    def query(self):
        self.left -= 1
        return self.left < 0


def test_waiting_for_a_gpu_ends_when_a_rank_is_lost(monkeypatch):
    """all_reduce on NCCL returns at once; who then asks for the numbers hangs if a peer is gone."""
    heartbeat = SimpleNamespace(lost="", check=lambda: Heartbeat.check(heartbeat))
    world, card = World(0, 2, heartbeat), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Event", lambda: Clock(3))
    world.wait_for_device(card)
    heartbeat.lost = "Timed out waiting for rank 1"
    monkeypatch.setattr(torch.cuda, "Event", lambda: Clock(0))
    world.wait_for_device(card)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Clock(10**9))
    with pytest.raises(ValueError, match="rank 0 of 2: another process.*Timed out.*--resume"):
        world.wait_for_device(card)
    world.wait_for_device(torch.device("cpu"))
    World().wait_for_device(card)


def test_flags_of_a_job_on_gpus_travel_on_gloo(monkeypatch):
    """Flags never touch the device; sums within a step give up, waiting between stages does not."""
    made = {}
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda b, **k: made.update(k, b=b))
    monkeypatch.setattr(distributed.dist, "new_group", lambda **k: made.setdefault("beat", k))
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: made.update(card=index))
    monkeypatch.setattr(Heartbeat, "start", lambda self: None)
    monkeypatch.setattr(distributed.atexit, "register", lambda *_: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    distributed._join.cache_clear()
    world = start("cuda")
    distributed._join.cache_clear()
    assert made["b"] == "cpu:gloo,cuda:nccl" and made["card"] == 1
    assert made["timeout"] == timedelta(minutes=30) and made["beat"]["backend"] == "gloo"
    assert made["beat"]["timeout"] < timedelta(minutes=30)
    summed = []
    monkeypatch.setattr(distributed.dist, "all_reduce", summed.append)
    world.any_rank(True), world.max_over_ranks(3)
    assert [t.device.type for t in summed] == ["cpu", "cpu"]


def test_no_sum_is_read_before_its_device_is_waited_for(tmp_path):
    """Metrics wait for the device before they read a loss; ranks wait for a long validation."""
    asked = []

    class Number:
        device = torch.device("cuda")

        def item(self):
            asked.append("item")
            return 1.0

    class Recorded(World):
        def wait_for_device(self, device):
            asked.append(f"wait {device}")

        def barrier(self):
            asked.append("barrier")

        def all_reduce_sum_(self, tensor):
            asked.append(f"sum on {tensor.device}")
            return tensor

    world = Recorded(1, 2)
    with Metrics(tmp_path / "m.jsonl", "m", [], 1, world) as metrics:
        line = {"step": 2, "tokens": 3}
        result = SimpleNamespace(loss=Number(), norm=Number(), gradients=None)
        metrics.pending.append(PendingStep(line, result, []))
        metrics.flush()
    assert asked == ["wait cuda", "item", "item"]
    asked.clear()
    looking = SimpleNamespace(names=["nll"], config=SimpleNamespace(best="last"))
    model = SimpleNamespace(is_sharded=False)
    run = Run(
        model=model,
        lora=None,
        optimizer=None,
        examples=[],
        config=None,
        out=tmp_path,
        base="b",
        validator=looking,
        world=world,
        state={"best": {}},
    )
    run.validate(step=1, epoch=0)
    assert asked == ["barrier", "sum on cpu"]


def test_other_ranks_print_nothing_until_they_end(capsys):
    before = sys.stdout
    discarding = discard_stdout()
    print("of rank 1")
    print("an error of rank 1", file=sys.stderr)
    discarding.close()
    print("of rank 0")
    assert sys.stdout is before
    assert capsys.readouterr() == ("of rank 0\n", "an error of rank 1\n")


def test_shard_needs_several_processes(tiny_llama_dir, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="--shard shares the weights out.*torchrun"):
        Session.open(ModelConfig(model=str(tiny_llama_dir(tokenizer=True)), shard=True))
