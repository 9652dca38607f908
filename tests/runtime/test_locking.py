"""Two jobs on one --out; leftovers of killed jobs."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.runtime import locking
from engine.runtime.locking import lock_directory, lock_file

ROOT = Path(__file__).resolve().parents[2]


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
