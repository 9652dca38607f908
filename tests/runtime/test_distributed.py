"""Several processes on gloo, whole and sharded weights: same gradients, same losses, killed and
resumed."""

import contextlib
import itertools
import json
import os
import re
import socket
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
from engine.train import loop
from engine.train.loop import Run
from engine.train.metrics import Metrics, PendingStep
from engine.train.step import SINGLE_PROCESS, step_gradients
from engine.train.train import FrozenModel, train
from engine.train.validate import ValidateConfig, Validator
from model.chat import Chat
from model.llama import Llama
from model.peft_format import load_lora
from model.sharded import carries_by_gloo
from model.tape import POLICIES
from model.tokenizer import load_tokenizer
from tests.helpers import programs
from tests.helpers.adapters import new_lora
from tests.helpers.distributed_job import lines, weighted_steps
from tests.helpers.sessions import session_of
from tests.helpers.training import LORA, SMALL, examples

ROOT = Path(__file__).resolve().parents[2]


def test_shares_are_balanced_by_tokens_and_complete():
    lengths = [5, 100, 7, 60, 55, 1]

    def tokens_of(share):
        return sum(lengths[i] for i in share)

    for size in (1, 2, 3, 7):
        of_ranks = shares(lengths, size)
        assert len(of_ranks) == size
        assert sorted(itertools.chain(*of_ranks)) == list(range(6))
        loads = [tokens_of(share) for share in of_ranks]
        assert max(loads) - min(loads) <= max(lengths)
    assert [tokens_of(share) for share in shares(lengths, 2)] == [113, 115]
    assert shares([3], 2) == [[0], []], "a process may have nothing to do"


def test_a_single_process_joins_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = start()
    assert world == World() and world.is_rank0
    assert world.any_rank(True) and not world.any_rank(False)
    tensor = torch.ones(3)
    assert world.all_reduce_sum_(tensor) is tensor and tensor.tolist() == [1, 1, 1]


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_two_and_three_processes_equal_one(tiny_llama_dir, tmp_path, shard):
    """Two processes, rank 1 killed in step 8; three go on from step 6: all as one process.

    With sharded weights rank 1 of the three is killed in step 10, and one process, which holds
    them whole, does that step.
    """
    sizes = {}
    if shard:  # embedding and head in two parts, and norms of heads
        sizes = {"model_type": "qwen3", "tied": False, "intermediate": 16}
    path, out = tiny_llama_dir(tokenizer=True, **sizes), tmp_path / "run"
    model = Llama.from_pretrained(path, dtype=torch.float64)
    lora = new_lora(model, rank=3, modules="all", dropout=0.2, seed=1)
    lora.params.add_(0.05)
    alone = {}
    for count in (9, 1):
        loss = step_gradients(model, lora, examples(count), 3, 64, "none", SINGLE_PROCESS).nll.sum()
        alone[count] = loss, lora.grads.clone()
    weighted = weighted_steps(model, lora, tmp_path / "seed 1", SINGLE_PROCESS)
    one = Llama.from_pretrained(path)
    single, _ = train(FrozenModel(one, "b", "h"), examples(), LORA, SMALL, tmp_path / "one")
    held_out, scores = tmp_path / "held_out.json", tmp_path / "scores.jsonl"
    held_out.write_text(json.dumps([{"instruction": f"Say {w}", "output": w} for w in "abc"]))

    for size, kill in ((2, 8), (3, 10 if shard else 0)):
        job = {"model": str(path), "out": str(out), "kill": kill, "shard": shard}
        job |= {"found": str(tmp_path / "found"), "held_out": str(held_out), "scores": str(scores)}
        job["seed_nll"] = str(tmp_path / f"seed {size}")
        (tmp_path / "job.json").write_text(json.dumps(job))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = [
            str(ROOT / "tests" / "helpers" / "distributed_job.py"),
            str(tmp_path / "job.json"),
        ]
        done = programs.run(
            [*torchrun, "--nproc-per-node", str(size), *script],
            kind="sharded",
            timeout=240,
            cwd=ROOT,
        )
        assert (tmp_path / "found").exists(), done.stderr[-3000:]
        found = load_file(tmp_path / "found")
        for policy, (count, (loss, grads)) in itertools.product(POLICIES, alone.items()):
            assert (found[f"loss {policy} {count}"] - loss).abs() < 1e-9 * loss
            error = (found[f"grads {policy} {count}"] - grads).abs().max()
            assert error < 1e-9 * grads.abs().max()
        for name, tensor in weighted.items():
            assert (found[name] - tensor).abs().max() < 1e-9 * tensor.abs().max(), name
        for file in (tmp_path / "seed 1").glob("*.jsonl"):  # the seed's likelihoods
            of_one_process = read_jsonl(file)
            of_processes = read_jsonl(tmp_path / f"seed {size}" / file.name)
            for line, other in zip(of_one_process, of_processes, strict=True):
                assert line["id"] == other["id"]
                # torchrun gives each process one thread, which may round sums otherwise
                assert other["nll"] == pytest.approx(line["nll"], rel=1e-12)
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
    losses = [line["loss"] for line in read_jsonl(out / "metrics.jsonl")]
    of_one = [line["loss"] for line in read_jsonl(tmp_path / "one" / "metrics.jsonl")]
    assert losses == pytest.approx(of_one, rel=1e-5) and len(losses) == 10
    summary = json.loads((out / "meta.json").read_text())["summary"]
    assert summary["processes"] == (1 if shard else 3)
    assert (load_lora(out).params - single.params).abs().max() < 1e-4


def assert_sharded_is_whole(path, model, lora, size, found, held_out, scores):
    """Rank 0's share of the weights, validation and scores, beside one process with all of it."""
    count = sum(weight.numel() for weight in model.weights.values())
    norm = model.config.hidden_size
    assert count / size - 1 < found["held"] < count / size + 5 * norm + 40 * size

    chat = Chat.from_dir(path, load_tokenizer(path))
    config = ValidateConfig(val_every=1, val_data=str(held_out), val_prompts=2)
    validator = Validator(config, DataConfig(str(held_out)), session_of(model, chat))
    assert found["validation"].tolist() == pytest.approx(validator(lora), rel=1e-6)

    scores_of_whole = scores.with_name("whole.jsonl")
    score(model, chat, lines(7), scores_of_whole, {})
    sharded, whole = read_jsonl(scores), read_jsonl(scores_of_whole)
    assert len(sharded) == 7
    for name in sharded[0]:
        values = [line[name] for line in sharded if line[name] is not None]
        expected = [line[name] for line in whole if line[name] is not None]
        if name != "id":
            expected = pytest.approx(expected, rel=1e-9)
        assert values == expected and len(values) in (4, 7), name
    scores_of_whole.unlink()


def test_scripts_with_sharded_weights(tiny_llama_dir, tmp_path):
    """train.py validates and publishes; distill.py scores what is distilled, samples nothing.

    The model is a Qwen2, whose layers have a bias too.
    """
    path = tiny_llama_dir(tokenizer=True, model_type="qwen2")
    data, out = tmp_path / "rows.json", tmp_path / "run"
    data.write_text(json.dumps([{"instruction": f"Say {i}", "output": f"{i}"} for i in range(6)]))

    def script(name, *flags, processes=2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else [])]
        command += [ROOT / "scripts" / name, "--model", path, "--data", data, *flags]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return programs.run(command, kind="sharded", env=env, timeout=120)

    looking = ["--val-every", "1", "--val-data", data, "--val-prompts", "1", "--best", "nll"]
    done = script("train.py", "--shard", "--out", out, "--max-steps", "2", *looking)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "split over 2 processes" in done.stdout and "best nll" in done.stdout
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
def test_a_busy_process_is_waited_for_and_a_lost_one_is_not(deed, said, tmp_path):
    """A busy one is waited for beyond every time-out; one that is stopped, or dead, is not."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        _, port = any_port.getsockname()
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "waiting_job.py"), deed]

    spoken = [tmp_path / "rank 0", tmp_path / "rank 1"]  # their standard error

    def start_rank(rank):
        env = os.environ | job | {"RANK": str(rank)}
        with spoken[rank].open("w") as stderr:
            return programs.start(command, kind="sharded", env=env, stderr=stderr)

    waiting, other = start_rank(0), start_rank(1)
    try:
        waiting.wait(timeout=120)
    finally:
        other.kill()
    other.wait()
    errors, other_errors = spoken[0].read_text(), spoken[1].read_text()
    assert "joined" in errors and "joined" in other_errors, errors + other_errors
    if deed == "busy":
        assert "through" in errors and waiting.returncode == 0, errors
        return
    assert waiting.returncode == 2 and "through" not in errors, errors
    assert re.search("rank 0 of 2: another process of the job " + said, errors), errors
    assert "--resume" in errors and "Traceback" not in errors


class Clock:
    """An event of a GPU that is done after `asks` queries."""

    def __init__(self, asks):
        self.left = asks

    def record(self):
        pass

    def query(self):
        self.left -= 1
        return self.left < 0


def test_waiting_for_a_gpu_ends_when_a_rank_is_lost(monkeypatch):
    """all_reduce on NCCL returns at once; reading its result would hang if a rank is gone."""
    heartbeat = SimpleNamespace(why_ended=None, check=lambda: Heartbeat.check(heartbeat))
    world, card = World(0, 2, heartbeat), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Event", lambda: Clock(3))
    world.wait_for_device(card)
    heartbeat.why_ended = "Timed out waiting for rank 1"
    monkeypatch.setattr(torch.cuda, "Event", lambda: Clock(0))
    world.wait_for_device(card)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Clock(10**9))
    with pytest.raises(ValueError, match="rank 0 of 2: another process.*Timed out.*--resume"):
        world.wait_for_device(card)
    world.wait_for_device(torch.device("cpu"))
    World().wait_for_device(card)


def gpu_job(monkeypatch, cards, rank):
    """`start("cuda")` of one rank, on a machine whose ranks have these (host, card, local rank).

    Returns the world and what torch was asked for.
    """
    asked, store = {}, torch.distributed.HashStore()
    names = sorted({card for host, card, _ in cards if host == cards[rank][0]})
    for other, (host, card, _) in enumerate(cards):
        on_host = sorted({c for h, c, _ in cards if h == host})
        store.set(f"device of rank {other}", json.dumps([host, card, on_host.index(card)]))

    def init_process_group(backend, **settings):
        asked.update(settings, backend=backend)

    def properties(index):
        return SimpleNamespace(uuid=names[index], name="a card")

    def rendezvous(url, timeout):
        return [(store, rank, len(cards))]

    monkeypatch.setattr(distributed.dist, "init_process_group", init_process_group)
    monkeypatch.setattr(distributed.dist, "rendezvous", rendezvous)
    monkeypatch.setattr(distributed.dist, "new_group", lambda **how: asked.update(heartbeat=how))
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: len(cards))
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(distributed.socket, "gethostname", lambda: cards[rank][0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: asked.update(card=index))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(Heartbeat, "start", lambda self: None)
    monkeypatch.setattr(distributed, "discard_stdout", contextlib.ExitStack)
    monkeypatch.setattr(distributed.atexit, "register", lambda *_: None)
    monkeypatch.setenv("WORLD_SIZE", str(len(cards)))
    monkeypatch.setenv("LOCAL_RANK", str(cards[rank][2]))
    distributed._join.cache_clear()
    try:
        return start("cuda"), asked
    finally:
        distributed._join.cache_clear()


TWO_CARDS = [("a", "G0", 0), ("a", "G1", 1)]


def test_booleans_and_counts_of_a_gpu_job_are_summed_on_gloo(monkeypatch):
    """They never touch the device. A sum times out after half an hour, a heartbeat earlier."""
    world, asked = gpu_job(monkeypatch, TWO_CARDS, rank=1)
    assert asked["backend"] == "cpu:gloo,cuda:nccl" and asked["card"] == 1
    assert asked["timeout"] == timedelta(minutes=30)
    assert asked["heartbeat"]["backend"] == "gloo"
    assert asked["heartbeat"]["timeout"] < timedelta(minutes=30)
    summed = []
    monkeypatch.setattr(distributed.dist, "all_reduce", summed.append)
    world.any_rank(True)
    world.max_over_ranks(3)
    assert [tensor.device.type for tensor in summed] == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("cards", "backend", "own_card", "sharing"),
    [
        ([("a", "G0", 0), ("a", "G0", 1)], "gloo", 0, 2),
        ([("a", f"G{i}", i) for i in range(4)], "cpu:gloo,cuda:nccl", 0, 1),
        ([("a", f"G{i % 2}", i) for i in range(4)], "gloo", 0, 2),
        # the same number on two machines, and one of two machines that shares: all take gloo
        ([("a", "G0", 0), ("b", "G1", 0)], "cpu:gloo,cuda:nccl", 0, 1),
        ([("a", "G0", 0), ("b", "G1", 0), ("b", "G1", 1)], "gloo", 0, 1),
    ],
    ids=["1 card 2 ranks", "4 and 4", "2 and 4", "2 machines", "2 machines, 1 shared"],
)
def test_ranks_that_share_a_card_take_gloo(monkeypatch, capsys, cards, backend, own_card, sharing):
    """NCCL refuses two ranks on one card; every rank comes to the same decision."""
    world, asked = gpu_job(monkeypatch, cards, rank=0)
    assert (asked["backend"], asked["card"]) == (backend, own_card)
    assert world.placement.ranks_on_device(0) == sharing
    said = capsys.readouterr().out
    assert said.startswith(f"processes: {len(cards)}, tensors on ") and said.count("\n") == 1
    assert ("NCCL;" in said) == ("nccl" in backend)
    assert ("gloo through host memory" in said) == (backend == "gloo")
    for rank, (host, card, _) in enumerate(cards):
        assert re.search(rf"rank {rank} on {host} cuda:\d \({card}\)", said), said


def test_a_rank_takes_the_card_of_its_local_rank():
    """Modulo the number of cards that its process sees."""
    taken = [distributed.local_gpu({"LOCAL_RANK": str(rank)}, 2) for rank in range(4)]
    assert taken == [0, 1, 0, 1]
    assert distributed.local_gpu({"LOCAL_RANK": "1"}, 1) == 0
    assert distributed.local_gpu({"LOCAL_RANK": "3"}, 4) == 3


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo,cuda:nccl"])
def test_a_sum_on_a_card_goes_through_the_host_only_on_gloo(monkeypatch, backend):
    ways = []
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda _: ways.append("direct"))
    monkeypatch.setattr(distributed, "sum_through_host_", lambda _: ways.append("host"))
    card = distributed.Device("a", "G0", 0)
    world = World(0, 2, None, distributed.Placement((card, card), backend))
    world.all_reduce_sum_(torch.ones(3))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    world.all_reduce_sum_(torch.ones(3))
    assert ways == ["direct", "host" if backend == "gloo" else "direct"]


def test_which_backend_carries_the_tensors_of_a_device():
    assert carries_by_gloo("cpu:gloo,cuda:gloo", "cuda")
    assert carries_by_gloo("cpu:gloo,cuda:nccl", "cpu")
    assert not carries_by_gloo("cpu:gloo,cuda:nccl", "cuda")


def test_metrics_wait_for_the_device_and_ranks_wait_for_a_long_validation(tmp_path, monkeypatch):
    """No sum is read before the device has finished it."""
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
        result = SimpleNamespace(loss=Number(), norm=Number(), gradients=None, weighted=None)
        metrics.pending.append(PendingStep(line, result, []))
        metrics.flush()
    assert asked == ["wait cuda", "item", "item"]
    asked.clear()
    monkeypatch.setattr(loop, "has_learned", lambda lora: True)
    looking = SimpleNamespace(names=["nll"], config=ValidateConfig())
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
    with pytest.raises(ValueError, match="--shard splits the weights over.*torchrun"):
        Session.open(ModelConfig(model=str(tiny_llama_dir(tokenizer=True)), shard=True))
