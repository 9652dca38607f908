"""Ctrl-C and SIGTERM in every stage of every script; a job continued the next day; ranks that stop
together."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.runtime.files import read_jsonl
from engine.runtime.stopping import Stopped, Stopping, catch_signals
from engine.sampling.sampler import Sampler
from engine.session import Session
from model import merge as merge_module
from model.llama import Llama
from model.peft_format import save_lora
from tests.helpers import programs
from tests.helpers.adapters import new_lora

ROOT = Path(__file__).resolve().parents[2]


FLAGS = ["--max-new-tokens", "8", "--eval-max-new", "6", "--retention-max-new", "4"]
FLAGS += ["--epochs", "1", "--batch-rows", "4", "--rank", "2", "--report-rows", "3"]
FLAGS += ["--report-answers", "2", "--verify", "number"]


def test_a_job_stopped_in_any_stage_is_continued_by_the_same_command(
    chat_dir, problems, tmp_path, script, signals, monkeypatch
):
    """The main job gets one signal in each of its stages, Ctrl-C and SIGTERM in turn; each time it
    ends with a message and does not begin the next stage. Its files equal those of a run without
    signals."""
    args = ["--model", chat_dir, "--data", problems / "train.json"]
    args += ["--eval-data", problems / "test.json"]
    args += ["--val-every", "1", "--val-prompts", "1", "--micro-tokens", "64"]
    whole, out = tmp_path / "whole", tmp_path / "asked"
    assert script("sdft", *args, *FLAGS, "--out", whole)[0] == 0
    stages = [  # module or class, its function, a file of the next stage
        (sys.modules["engine.distill.writer"], "decided_line", "distilled.jsonl.scores.jsonl"),
        (sys.modules["engine.distill.seed_likelihoods"], "_score_record", "sft"),
        (sys.modules["engine.train.validate"], "compare", "sdft"),
        (sys.modules["engine.train.step"], "micro_step", "evaluation.jsonl"),
        (sys.modules["engine.evaluate.target_task"], "_total_nll", "evaluation.jsonl"),
        (Sampler, "_decode", "seed_answers.jsonl"),
        (sys.modules["engine.evaluate.retention"], "drift_of_rows", "tokens.jsonl"),
        (sys.modules["engine.report.collect"], "nll", "answers.jsonl"),
    ]
    for number, (place, name, next_file) in enumerate(stages):
        function = getattr(place, name)
        by = signal.SIGINT if number % 2 == 0 else signal.SIGTERM
        calls = []

        def signal_in_second_call(*args, function=function, by=by, calls=calls, **names):
            calls.append(args)
            if len(calls) == 2:
                signal.raise_signal(by)
            return function(*args, **names)

        monkeypatch.setattr(place, name, signal_in_second_call)
        code, said = script("sdft", *args, *FLAGS, "--out", out)
        monkeypatch.setattr(place, name, function)
        where = f"{place.__name__}.{name}"
        assert code == 128 + by and "Traceback" not in said, (where, said[-2000:])
        last = said.strip().splitlines()[-1]
        assert last.startswith("Ctrl-C: " if by == signal.SIGINT else "SIGTERM: "), last
        assert last.endswith("; run the same command again to continue") and "--resume" not in last
        assert not (out / next_file).exists(), where
        assert not list(out.rglob(".lock")), "the lock is released and its file removed"
    code, said = script("sdft", *args, *FLAGS, "--out", out)
    assert code == 0, said[-2000:]
    assert "seconds since the last start" in said
    files = ["distilled.jsonl", "evaluation.jsonl", "retention.jsonl", "seed_answers.jsonl"]
    files += ["tokens.jsonl", "answers.jsonl", "sdft/adapter_model.safetensors"]
    for name in files:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name

    # answers that are finished in reverse order are written in the order of the rows
    sample = Sampler.run
    backwards = tmp_path / "backwards"
    monkeypatch.setattr(Sampler, "run", lambda *args: reversed(list(sample(*args))))
    assert script("sdft", *args, *FLAGS, "--out", backwards)[0] == 0
    for name in files:
        assert (backwards / name).read_bytes() == (whole / name).read_bytes(), name


def test_each_script_says_how_to_continue(
    chat_dir, problems, tmp_path, script, signals, monkeypatch
):
    """The kept results, and the command: --resume is named where it is a flag, and only there."""
    adapter = tmp_path / "adapter"
    save_lora(new_lora(Llama.from_pretrained(chat_dir)), adapter)

    def asks(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    model, train = ["--model", chat_dir], ["--data", problems / "train.json"]
    short = ["--max-new-tokens", "4"]
    again = "run the same command again"
    cases = {  # script -> its flags, and what the message holds
        "distill": ([*model, *train, *short, "--out", tmp_path / "d.jsonl"], "kept", "--resume"),
        "train": ([*model, *train, "--out", tmp_path / "t"], "kept", "--resume"),
        "evaluate": (
            [*model, *train, *short, "--out", tmp_path / "e.jsonl"],
            "kept",
            f"{again} to continue",
        ),
        "retention": (
            [*model, "--adapter", adapter, "--out", tmp_path / "r.jsonl"],
            "kept",
            f"{again} to continue",
        ),
        "generate": ([*model, "--prompt", "Hi", *short], "--out", "cannot be continued"),
        "preflight": ([*model, *train, *short], "nothing is kept", again),
        "merge": (
            [*model, "--adapter", adapter, "--out", tmp_path / "m"],
            "nothing was written",
            again,
        ),
    }
    for name, (args, kept, next_step) in cases.items():
        with monkeypatch.context() as patch:
            patch.setattr(Session, "open", asks)
            patch.setattr(merge_module, "merge", asks)
            code, printed = script(name, *args)
        last = printed.strip().splitlines()[-1]
        assert code == 143 and last.startswith("SIGTERM: "), (name, last)
        assert kept in last and next_step in last, (name, last)
        assert ("--resume" in last) == (name in ("distill", "train"))


def test_a_second_signal_ends_at_once(tmp_path):
    """The first lets the unit end; the second, a moment later, does not wait for it. Two that come
    together (a process and its group) are one."""
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
from engine.runtime.flags import run_main
from engine.runtime.stopping import Stopping
def main():
    with Stopping("the unit is finished") as stop:
        print("ready", flush=True)
        for _ in range(200):
            time.sleep(0.05)
    print("it was finished", flush=True)
run_main(main)
"""
    job = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert job.stdout.readline() == "ready\n"
    started = time.monotonic()
    job.send_signal(signal.SIGINT)
    job.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert job.poll() is None, "two together are one"
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=8)
    assert job.returncode == 130 and time.monotonic() - started < 5 and "finished" not in out
    assert "Ctrl-C: the unit is finished; a second one stops at once" in err
    assert "Traceback" not in err


def test_the_first_signal_lets_the_unit_finish_and_is_never_lost(signals, capfd):
    with catch_signals(), pytest.raises(Stopped) as stopped:
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 143
    called = []
    with pytest.raises(Stopped, match="all of it") as stopped, Stopping("it ends") as stop:
        stop.finish = lambda: called.append(1)
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.asked and called == [1]
        stop.end("all of it")
    assert stopped.value.code == 130
    # a signal after the last look at `asked` is not lost
    with pytest.raises(Stopped, match="the last of it") as stopped, Stopping("late") as stop:
        stop.kept = "the last of it"
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 143
    assert capfd.readouterr().err.count("Ctrl-C: it ends; a second one stops at once") == 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as behind `nohup` and `&`
    with Stopping("it ends") as stop:
        signal.raise_signal(signal.SIGINT)
    assert not stop.asked
    signal.signal(signal.SIGINT, signal.default_int_handler)


# ---- the next day


def test_a_run_continued_the_next_day_keeps_its_date(
    chat_dir, problems, tmp_path, script, monkeypatch
):
    """A template that tells the date: the same command on another day keeps the first day's date,
    in every stage; another typed date is refused."""
    settings = json.loads((chat_dir / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ strftime_now('%d %b %Y') }}\n" + settings["chat_template"]
    (chat_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    model, train = ["--model", chat_dir], ["--data", problems / "train.json"]
    short, old = ["--max-new-tokens", "4"], ["--date", "2020-02-29"]
    out = tmp_path / "run"
    for name, args in (
        ("distill", [*model, *train, *short, "--out", tmp_path / "d.jsonl", "--resume"]),
        ("evaluate", [*model, *train, *short, "--out", tmp_path / "e.jsonl"]),
        ("train", [*model, *train, "--epochs", "1", "--rank", "2", "--out", tmp_path / "t"]),
        ("retention", [*model, "--adapter", tmp_path / "t", *short, "--out", tmp_path / "r.jsonl"]),
        ("sdft", [*model, *train, "--eval-data", problems / "test.json", *FLAGS, "--out", out]),
    ):
        code, said = script(name, *args, *old)
        assert code == 0 and "continuing with" not in said, said[-1000:]
        again = [*args, "--resume"] if name == "train" else args
        code, said = script(name, *again)
        assert code == 0, said[-1000:]
        assert "was begun with: date 2020-02-29" in said
        code, said = script(name, *again, "--date", "2020-03-01")
        assert code == 2 and ("date: '2020-02-29' -> '2020-03-01'" in said or "data: " in said)
    assert json.loads((tmp_path / "t" / "meta.json").read_text())["date"] == "2020-02-29"


# ---- several processes

AGREEING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
from pathlib import Path
from engine.distill import distill, writer
from engine.train import step
from engine.runtime.distributed import start
from engine.runtime.stopping import Stopped
from engine.sampling.chat_generator import ChatGenerator
from engine.train.train import FrozenModel, train
from tests.helpers.distillation import CONFIG, SAMPLING, load, rows
from tests.helpers.training import LORA, SMALL, examples
torch.set_num_threads(1)
world, out = start(), Path({out!r})
count = []

def second_call(made, rank):
    def asks(*args):
        count.append(1)
        if world.rank == rank and len(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return made(*args)
    count.clear()
    return asks

model, chat = load({model!r})
for stage in ("distill", "train"):
    try:
        if stage == "distill":
            writer.decided_line = second_call(writer.decided_line, 1)
            generator = ChatGenerator(model, chat, SAMPLING)
            distill.distill(generator, rows(), out / "d.jsonl", CONFIG, settings={{}}, world=world)
        else:
            step.micro_step = second_call(step.micro_step, 1)
            frozen = FrozenModel(model, "b", "h", world=world)
            train(frozen, examples(), LORA, SMALL, out / "t")
    except Stopped as stopped:
        (out / f"{{stage}}{{world.rank}}").write_text(f"{{stopped.code}} {{stopped}}")
"""


def test_all_processes_of_a_job_stop_when_one_is_asked(chat_dir, tmp_path):
    """torchrun, gloo; rank 1 alone gets SIGTERM, while it distils and while it trains."""
    job = tmp_path / "job.py"
    job.write_text(AGREEING.format(root=str(ROOT), model=str(chat_dir), out=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = programs.run([*command, job], timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        said = (tmp_path / f"distill{rank}").read_text()
        assert said == f"143 the finished turns are in {tmp_path}/d.jsonl and its parts"
        assert re.fullmatch(
            r"143 step \d of 10 is in .*/t", (tmp_path / f"train{rank}").read_text()
        )
    # rank 0 went on to the end of its share, rank 1 ended what was in flight
    parts = [len(read_jsonl(tmp_path / f"d.jsonl.part{rank}")) for rank in (0, 1)]
    assert parts[0] == 13 and 2 <= parts[1] < 11
