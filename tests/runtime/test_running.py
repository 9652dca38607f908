"""Running it badly: signals in every stage, two jobs on one --out, full disks, short memory,
numbers that are none, hostile bytes in messages, a run that goes on the next day."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from engine.data.config import DataConfig
from engine.distill.config import DistillConfig
from engine.evaluate.lm_eval_harness import HarnessConfig
from engine.evaluate.tasks.run import TaskConfig
from engine.jobs.preflight import PreflightConfig
from engine.jobs.sdft import SdftConfig
from engine.jobs.study import StudyConfig
from engine.runtime import failures, locking, stopping
from engine.runtime.files import AppendedLines, read_jsonl, write_json, write_text
from engine.runtime.flags import _Shown, run_main
from engine.runtime.locking import lock_directory, lock_file
from engine.runtime.process_memory import is_out_of_memory, memory_for
from engine.runtime.stopping import Stopped, Stopping, catch_signals
from engine.sampling.requests import SamplerConfig
from engine.sampling.sampler import Sampler
from engine.session import ModelConfig, Session
from engine.train import checkpoint as checkpoint_module
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.validate import ValidateConfig
from model import merge as merge_module
from model.config import read_json
from model.durable import directory_beside
from model.llama import Llama
from model.lora import LoraConfig
from model.peft_format import save_lora
from tests.helpers.adapters import new_lora

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch, capsys):
    """`script("sdft", *args)` runs scripts/sdft.py in this process: exit code, and what it said."""

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out + err

    return run


@pytest.fixture
def signals():
    """Ctrl-C has its own handler, also where a shell started this behind itself; the same after."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    mine = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is mine and stopping._signals.by is None
    signal.signal(signal.SIGINT, before)


FLAGS = ["--max-new-tokens", "8", "--eval-max-new", "6", "--retention-max-new", "4"]
FLAGS += ["--epochs", "1", "--batch-rows", "4", "--rank", "2", "--report-rows", "3"]
FLAGS += ["--report-answers", "2", "--verify", "number"]


# ---- signals


def test_asked_to_stop_in_every_stage_the_same_command_goes_on(
    chat_dir, problems, tmp_path, script, signals, monkeypatch
):
    """The main job is asked once in each of its stages, by Ctrl-C and SIGTERM in turn; each time it
    ends, says so, and does not begin what comes behind. Its files come out as undisturbed."""
    args = [
        "--model",
        chat_dir,
        "--data",
        problems / "train.json",
        "--eval-data",
        problems / "test.json",
    ]
    args += ["--val-every", "1", "--val-prompts", "1", "--micro-tokens", "64"]
    whole, out = tmp_path / "whole", tmp_path / "asked"
    assert script("sdft", *args, *FLAGS, "--out", whole)[0] == 0
    stages = [  # where it happens, what is not begun any more
        (sys.modules["engine.distill.writer"], "decided_line", "distilled.jsonl.scores.jsonl"),
        (sys.modules["engine.distill.seed_likelihoods"], "_score_record", "sft"),
        (sys.modules["engine.train.validate"], "compare", "sdft"),
        (sys.modules["engine.train.step"], "micro_step", "evaluation.jsonl"),
        (sys.modules["engine.evaluate.target_task"], "nll", "evaluation.jsonl"),
        (Sampler, "_decode", "seed_answers.jsonl"),
        (sys.modules["engine.evaluate.retention"], "compare", "tokens.jsonl"),
        (sys.modules["engine.report.collect"], "nll", "answers.jsonl"),
    ]
    for number, (place, name, behind) in enumerate(stages):
        made, by = getattr(place, name), (signal.SIGINT, signal.SIGTERM)[number % 2]
        calls = []

        def second_asks(*args, made=made, by=by, calls=calls, **names):
            calls.append(args)
            if len(calls) == 2:
                signal.raise_signal(by)
            return made(*args, **names)

        monkeypatch.setattr(place, name, second_asks)
        code, said = script("sdft", *args, *FLAGS, "--out", out)
        monkeypatch.setattr(place, name, made)
        where = f"{place.__name__}.{name}"
        assert code == 128 + by and "Traceback" not in said, (where, said[-2000:])
        last = said.strip().splitlines()[-1]
        assert last.startswith({2: "Ctrl-C: ", 15: "SIGTERM: "}[by]), last
        assert last.endswith("; the same command goes on") and "--resume" not in last
        assert not (out / behind).exists(), where
        assert not list(out.rglob(".lock")), "given back, and gone"
    code, said = script("sdft", *args, *FLAGS, "--out", out)
    assert code == 0, said[-2000:]
    assert "seconds since the last start" in said
    files = ["distilled.jsonl", "evaluation.jsonl", "retention.jsonl", "seed_answers.jsonl"]
    files += ["tokens.jsonl", "answers.jsonl", "sdft/adapter_model.safetensors"]
    for name in files:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name

    # answers that are finished in another order stand in the same one
    made, other = Sampler.run, tmp_path / "backwards"
    monkeypatch.setattr(Sampler, "run", lambda *args: reversed(list(made(*args))))
    assert script("sdft", *args, *FLAGS, "--out", other)[0] == 0
    for name in files:
        assert (other / name).read_bytes() == (whole / name).read_bytes(), name


def test_each_script_says_how_it_goes_on(
    chat_dir, problems, tmp_path, script, signals, monkeypatch
):
    """What is kept, and the command: --resume is named where it is a flag, and only there."""
    adapter = tmp_path / "adapter"
    save_lora(new_lora(Llama.from_pretrained(chat_dir)), adapter)

    def asks(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    model, train = ["--model", chat_dir], ["--data", problems / "train.json"]
    short = ["--max-new-tokens", "4"]
    for name, args, kept, goes_on in (
        ("distill", [*model, *train, *short, "--out", tmp_path / "d.jsonl"], "kept", "--resume"),
        ("train", [*model, *train, "--out", tmp_path / "t"], "kept", "--resume"),
        ("evaluate", [*model, *train, *short, "--out", tmp_path / "e.jsonl"], "kept", "goes on"),
        ("retention", [*model, "--adapter", adapter, "--out", tmp_path / "r.jsonl"], "kept",
         "goes on"),
        ("generate", [*model, "--prompt", "Hi", *short], "--out", "does not go on"),
        ("preflight", [*model, *train, *short], "nothing is kept", "begins again"),
        ("merge", [*model, "--adapter", adapter, "--out", tmp_path / "m"], "nothing was written",
         "begins again"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(Session, "open", asks)
            patch.setattr(merge_module, "merge", asks)
            code, said = script(name, *args)
        said = said.strip().splitlines()[-1]
        assert code == 143 and said.startswith("SIGTERM: "), (name, said)
        assert kept in said and goes_on in said, (name, said)
        assert ("--resume" in said) == (name in ("distill", "train"))


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


def test_stopping_and_catch_signals(signals, capfd):
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
    # a signal that comes behind the last look at `asked` is not lost
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


# ---- two jobs, leftovers


@contextlib.contextmanager
def as_another_process():
    """Inside `with`, this process does not know what it holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locking, "_held", {})
        yield


HOLDING = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from engine.runtime.locking import lock_directory, lock_file
with (lock_directory if sys.argv[1] == "d" else lock_file)(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["d", "f"])
def test_a_second_job_on_an_out_is_refused_until_the_first_has_ended(tmp_path, kind):
    out = tmp_path / "new" / "run"
    lock = lock_directory if kind == "d" else lock_file
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDING, kind, str(out)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        said = f"run is in use by process {other.pid} on .*choose another --out"
        with pytest.raises(ValueError, match=said), lock(out):
            pass
        with lock(tmp_path / "new" / "other"):
            pass
    finally:
        other.kill()
        other.wait()
    with lock(out), lock(out):  # given back by the system; a stage may take what its job holds
        with as_another_process(), pytest.raises(ValueError, match="in use"), lock(out):
            pass
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".lock")]
    if kind == "d":
        assert not list(tmp_path.rglob("other")), "an empty directory goes with its lock"


def test_the_second_start_of_a_script_is_refused(chat_dir, problems, tmp_path, script):
    """Before the model is loaded, by every script that writes."""
    out, model, train = tmp_path / "out", ["--model", chat_dir], ["--data", problems / "train.json"]
    for name, args in (
        ("sdft", [*model, *train]),
        ("train", [*model, *train]),
        ("distill", [*model, *train]),
        ("evaluate", [*model, *train]),
        ("evaluate", [*model, "--lm-eval", "arc_easy"]),
        ("retention", [*model, "--adapter", "x"]),
        ("pareto", [*model, *train, "--eval-data", problems / "test.json"]),
        ("generate", [*model, *train]),
        ("merge", [*model, "--adapter", "x"]),
        ("import_gguf", ["--gguf", "x"]),
    ):
        for lock in (lock_directory, lock_file):
            shutil.rmtree(out, ignore_errors=True)
            with lock(out), as_another_process():
                code, said = script(name, *args, "--out", out)
            if "is in use by process" in said:
                assert code == 2 and "loaded in" not in said
                break
        else:
            raise AssertionError(f"{name} started beside another: {said[-500:]}")


def test_a_system_without_locks_and_the_ranks_of_one_job(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:

        def unable(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        patch.setattr(locking.fcntl, "flock", unable)
        with lock_directory(tmp_path / "a"):
            pass
        said = capsys.readouterr().out
        assert "cannot be locked (No locks available), so nothing keeps a second job off" in said
    with lock_directory(tmp_path / "a"):
        monkeypatch.setenv("RANK", "1")  # the first process of the job holds it for all
        with as_another_process(), lock_directory(tmp_path / "a"):
            pass
        monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
    with lock_file(tmp_path / "read-only"):  # a directory that may only be read: nothing is written
        pass


def test_leftovers_of_dead_processes_are_removed_and_counted(tmp_path, capsys):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    out = tmp_path / "run"
    (out / "sft" / f".step-000003.{dead.pid}.partial").mkdir(parents=True)
    (out / "sft" / f".step-000003.{dead.pid}.partial" / "x").write_bytes(b"1" * 2_000_000)
    (out / f".summary.json.{dead.pid}.partial").write_text("torn")
    alive = out / f".table.txt.{os.getppid()}.partial"
    alive.write_text("somebody writes it")
    with lock_directory(out):
        pass
    assert "2 leftovers of killed jobs removed (2.0 MB)" in capsys.readouterr().out
    assert sorted(p.name for p in out.rglob("*")) == [alive.name, "sft"]
    mine, other = (tmp_path / f".{n}.meta.json.{dead.pid}.partial" for n in ("d.jsonl", "e.jsonl"))
    mine.write_text("")
    other.write_text("")
    with lock_file(tmp_path / "d.jsonl"):
        pass
    assert not mine.exists() and other.exists(), "those of the same name only"


# ---- disks


def test_files_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    """The content is synced, then the name appears, then the directory is synced: for every helper
    that writes whole files."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        seen.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source, target):
        seen.append(("rename", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)

    def directory():
        with directory_beside(tmp_path / "dir") as beside:
            (beside / "inner").mkdir()
            (beside / "inner" / "a").write_text("a")

    place = tmp_path / "checkpoints" / "step-000001"
    place.mkdir(parents=True)
    for name in checkpoint_module.ADAPTER:
        (place / name).write_text(name)
    write_json(place / "state.json", {"sha256": {}})
    for write, count in (
        (lambda: write_text(tmp_path / "text", "x"), 1),
        (lambda: write_json(tmp_path / "json", {}), 1),
        (directory, 1),
        (lambda: checkpoint_module.publish(tmp_path, place), 2),
    ):
        seen.clear()
        write()
        renames = [i for i, event in enumerate(seen) if event[0] == "rename"]
        assert len(renames) == count
        for i in renames:
            source, target = seen[i][1:]
            if Path(target).is_dir():
                inside = [f"{source}/{p.relative_to(target)}" for p in Path(target).rglob("*")]
                assert {("sync", name) for name in (source, *inside)} <= set(seen[:i])
            assert ("sync", source) in seen[:i] and ("sync", str(Path(target).parent)) in seen[i:]


@pytest.fixture
def small_files():
    """`with small_files(bytes)`: no file may grow beyond, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def limited(size):
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)

    return limited


def test_a_full_disk_is_one_line_with_the_file_and_nothing_is_lost(
    chat_dir, problems, tmp_path, script, small_files
):
    """While a checkpoint, a merged model, a page of text, a line is written."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    args = [
        "--model",
        chat_dir,
        "--data",
        problems / "train.json",
        "--epochs",
        "1",
        "--save-every",
        "1",
    ]
    args += ["--rank", "2"]
    assert script("train", *args, "--out", whole)[0] == 0
    with small_files(5_000):
        code, said = script("train", *args, "--out", out)
    last = said.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in said
    assert f"error: {out}/checkpoints/step-000001 cannot be written: File too large" in last
    assert not list(out.rglob("*.partial"))
    assert script("train", *args, "--out", out, "--resume")[0] == 0
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    merged = ["--model", chat_dir, "--adapter", out, "--out", tmp_path / "merged"]
    with small_files(50_000):
        code, said = script("merge", *merged)
    assert code == 2 and f"{tmp_path}/merged cannot be written: File too large" in said
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob("*.partial"))
    with small_files(10), pytest.raises(OSError, match="text cannot be written: File too large"):
        write_text(tmp_path / "text", "x" * 100)
    with small_files(100), pytest.raises(OSError, match="29 bytes of finished lines are kept"):
        with AppendedLines(tmp_path / "lines.jsonl") as file:
            file.write({"id": "x" * 18})
            file.write({"id": "x" * 100})
    assert (tmp_path / "lines.jsonl").stat().st_size == 29
    # what lies elsewhere is not ours to name
    with pytest.raises(FileNotFoundError), directory_beside(tmp_path / "copy"):
        (tmp_path / "absent").read_text()


# ---- what a user can cause is one line; a fault of ours keeps its traceback


def said_by(error, capsys, **names):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(main, **names)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_messages_of_failures(capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "/x/y")
    for error, said in (
        (ValueError("two words"), "error: two words\n"),
        (full, "error: /x/y: No space left on device; make room and start again\n"),
        (PermissionError(13, "Permission denied", "/x/y"), "error: /x/y: Permission denied\n"),
        (SafetensorError("Error while serializing"), "error: Error while serializing\n"),
        (MemoryError(), "error: out of memory (MemoryError): lower --rows\n"),
        (RuntimeError("could not create a primitive"), "(could not create a primitive): lower"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory (CUDA out of memory."),
        (ImportError("libx.so: failed to map segment from shared object"), "out of memory"),
        (ImportError("tokenizer.json needs the package tokenizers"), "needs the package"),
        (BrokenPipeError(32, "Broken pipe"), "error: [Errno 32] Broken pipe\n"),
        (ValueError("\x1b[2J\x07in a \u202efile\u009b\r\nof\ttwo lines é ␣ 😀"),
         r"\x1b[2J\x07in a \u202efile\x9b\r" + "\nof\ttwo lines é ␣ 😀\n"),
    ):  # fmt: skip
        assert said in said_by(error, capsys, lower="lower --rows"), error
    for fault in (AssertionError("ours"), KeyError("ours"), TypeError("ours"), RuntimeError("ours"),
                  ModuleNotFoundError("No module named 'x'", name="x")):  # fmt: skip
        with pytest.raises(type(fault)):
            run_main(lambda fault=fault: (_ for _ in ()).throw(fault))
    assert failures.explain(RecursionError("ours")) is None


def test_short_memory_says_what_to_lower_in_this_stage(
    chat_dir, problems, tmp_path, script, monkeypatch
):
    model, train = ["--model", chat_dir], ["--data", problems / "train.json"]
    short = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"

    def fails(*_, **__):
        raise RuntimeError(f"{short}: you tried to allocate 9 bytes\nmore")

    for where, name, stage in (
        (
            "engine.sampling.sampler.Sampler._decode",
            "distill",
            "distilling ({}): lower --rows or --kv-",
        ),
        (
            "engine.measure.likelihood.Scorer.losses",
            "distill",
            "scoring ({}): --no-score leaves it out",
        ),
        ("model.llama.Llama.from_pretrained", "distill", "loading the weights ({}): --dtype bf"),
        ("engine.train.train.Run.plan_memory", "train", "training ({}): lower --micro-tokens"),
    ):
        place, attribute = where.rsplit(".", 1)
        module, _, cls = place.rpartition(".")
        with monkeypatch.context() as patch:
            patch.setattr(getattr(sys.modules[module], cls), attribute, fails)
            code, said = script(name, *model, *train, "--out", tmp_path / f"{attribute}.jsonl")
        first = f"{short}: you tried to allocate 9 bytes"
        assert code == 2 and "Traceback" not in said
        assert f"error: out of memory while {stage.format(first)}" in said
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"), memory_for("x", "y"):
        raise RuntimeError("shapes do not fit")


def test_a_damaged_line_is_named(tmp_path):
    file = tmp_path / "lines.jsonl"
    wanted = {"id": str, "n": (int, float), "ok": bool}
    good = '{"id": "a", "n": 1, "ok": true}\n'
    for line, said in (
        ("[1]\n", "lines.jsonl:2 is no object but a list"),
        ("\0\0\0\n", "lines.jsonl:2 is not JSON"),
        (b"\xff\xfe\n", "lines.jsonl:2 is not JSON"),
        ("[" * 100_000 + "\n", "lines.jsonl:2 is not JSON"),
        ('{"id": "a", "ok": true}\n', "lines.jsonl:2 is damaged: n is missing"),
        ('{"id": 5, "n": 1, "ok": true}\n', "lines.jsonl:2 is damaged: id is 5"),
        ('{"id": "a", "n": true, "ok": true}\n', "lines.jsonl:2 is damaged: n is True"),
    ):
        file.write_bytes(good.encode() + (line if isinstance(line, bytes) else line.encode()))
        with pytest.raises(ValueError) as error:
            read_jsonl(file, wanted)
        assert said in str(error.value) and "delete that line" in str(error.value)
    file.write_text(good)
    assert read_jsonl(file, wanted) == [{"id": "a", "n": 1, "ok": True}]
    deep = tmp_path / "deep.json"
    deep.write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(ValueError, match="deep.json is nested too deeply"):
        read_json(deep)
    os.mkfifo(tmp_path / "pipe")
    for read in (read_jsonl, read_json, AppendedLines):
        with pytest.raises(ValueError, match="pipe or a device"):
            read(tmp_path / "pipe")


def test_output_is_escaped_for_ascii_streams_and_for_terminals(monkeypatch, tmp_path):
    """A stdout of ASCII gets escapes, and ESC bytes do not reach a terminal."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    run_main(lambda: print("a sign: ␣, é"))
    sys.stdout.flush()
    assert raw.getvalue() == b"a sign: \\u2423, \\xe9\n"
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", _Shown(terminal))
    print("\x1b]0;title\x07 é", flush=True)
    assert raw.getvalue().decode() == "\\x1b]0;title\\x07 é\n" and sys.stdout.encoding == "utf-8"


# ---- numbers

BASE = {
    SdftConfig: {"out": "x"},
    StudyConfig: {"out": "x", "eval_data": "y"},
    ModelConfig: {"model": "x"},
    DataConfig: {"data": "x"},
}
CONFIGS = [
    *(ModelConfig, DataConfig, DistillConfig, SamplerConfig, EncodeConfig, TrainConfig, LoraConfig),
    *(ValidateConfig, SdftConfig, StudyConfig, PreflightConfig, TaskConfig, HarnessConfig),
]
NUMBERS = [
    (cls, field.name, "float" if "float" in str(field.type) else "int")
    for cls in CONFIGS
    for field in dataclasses.fields(cls)
    if str(field.type).split(" ")[0] in ("int", "float")
]


def test_every_flag_that_is_a_number_is_tested():
    named = {cls.__name__ for cls in CONFIGS}
    used = set()
    for file in (ROOT / "scripts").glob("*.py"):
        used |= set(re.findall(r"\b(\w+Config)\b", file.read_text()))
    assert used == named and len(NUMBERS) > 40


@pytest.mark.parametrize(("cls", "name", "kind"), NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_invalid_numbers_are_refused_by_name(cls, name, kind):
    base = BASE.get(cls, {})
    cls(**base).check()
    odd = [10**30, -(10**30)] if name == "seed" else [10**30, -1]
    odd += [float("nan"), float("inf"), float("-inf"), 1e300, -1.0] if kind == "float" else []
    for value in odd:
        with pytest.raises(ValueError) as error:
            cls(**{**base, name: value}).check()
        said = str(error.value)
        assert re.search(rf"\b{name}\b", said) and "expected" in said and "\n" not in said


def test_bad_numbers_stop_before_anything_is_loaded(tmp_path, script):
    common = ["--model", "/nowhere", "--data", "/nowhere", "--out", tmp_path / "x"]
    for name, flags, said in (
        ("sdft", ["--threads", "-1"], "threads -1"),
        ("sdft", ["--threads", "100000"], "threads 100000"),
        ("sdft", ["--temperature", "nan"], "temperature nan: expected a finite number"),
        ("sdft", ["--lr", "nan"], "lr nan"),
        ("sdft", ["--clip", "inf"], "clip inf"),
        ("sdft", ["--alpha", "nan"], "rank 8, alpha nan"),
        ("sdft", ["--weight-decay", "nan"], "weight_decay nan"),
        ("sdft", ["--mix", "2"], "mix 2.0: expected a share from 0 to 1"),
        ("sdft", ["--kv-memory", "nan"], "kv_memory nan"),
        ("sdft", ["--limit", "-1"], "limit -1: expected at least 1"),
        ("sdft", ["--eval-limit", "0"], "eval_limit 0: expected at least 1"),
        ("train", ["--max-length", "0"], "max_length 0: expected at least 1"),
        ("pareto", ["--eval-data", "x", "--alpha", "inf"], "alpha inf"),
        ("distill", ["--temperature", "1e-30"], "temperature 1e-30"),
        ("evaluate", ["--kv-memory", "inf"], "kv_memory inf"),
    ):
        code, printed = script(name, *common, *flags)
        assert code == 2 and f"error: {said}" in printed, printed
    assert not list(tmp_path.iterdir())


# ---- the next day


def test_a_run_that_goes_on_the_next_day_keeps_its_date(
    chat_dir, problems, tmp_path, script, monkeypatch
):
    """A template that tells the date: the same command on another day goes on with the first one's,
    in every stage; a date that is typed is refused, as before."""
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
        assert code == 0 and "going on with" not in said, said[-1000:]
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
from engine.train.train import train
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
            distill.distill(model, chat, rows(), out / "d.jsonl", CONFIG, SAMPLING, settings={{}},
                            world=world)
        else:
            step.micro_step = second_call(step.micro_step, 1)
            train(model, examples(), LORA, SMALL, out / "t", base="b", model_hash="h", world=world)
    except Stopped as stopped:
        (out / f"{{stage}}{{world.rank}}").write_text(f"{{stopped.code}} {{stopped}}")
"""


def test_all_processes_of_a_job_stop_when_one_is_asked(chat_dir, tmp_path):
    """torchrun, gloo; rank 1 alone gets SIGTERM, while it distils and while it trains."""
    job = tmp_path / "job.py"
    job.write_text(AGREEING.format(root=str(ROOT), model=str(chat_dir), out=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(job)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        said = (tmp_path / f"distill{rank}").read_text()
        assert said == f"143 what was finished is in {tmp_path}/d.jsonl and its parts"
        assert re.fullmatch(
            r"143 step \d of 10 is in .*/t", (tmp_path / f"train{rank}").read_text()
        )
    # rank 0 went on to the end of its share, rank 1 ended what was in flight
    parts = [len(read_jsonl(tmp_path / f"d.jsonl.part{rank}")) for rank in (0, 1)]
    assert parts[0] == 13 and 2 <= parts[1] < 11
