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
    """Inside `with`, the locks that this process holds count as those of another process."""
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
    # the system has released the lock; a stage may take the lock of its own job again
    with lock(out), lock(out):
        with as_another_process(), pytest.raises(ValueError, match="in use"), lock(out):
            pass
    assert not list(tmp_path.rglob("*.lock"))
    if kind == "d":
        assert not list(tmp_path.rglob("other")), "an empty directory goes with its lock"


def test_the_second_start_of_a_script_is_refused(chat_dir, problems, tmp_path, script):
    """Before the model is loaded, by every script that writes."""
    out = tmp_path / "out"
    model = ["--model", chat_dir]
    train = ["--data", problems / "train.json"]
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
        ("export_gguf", model),
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


def test_a_job_runs_where_the_system_or_the_directory_has_no_locks(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(locking.fcntl, "flock", no_locks)
        with lock_directory(tmp_path / "a"):
            pass
        printed = capsys.readouterr().out
        assert "cannot be locked (No locks available), so nothing keeps a second job off" in printed

    def read_only(*_):
        raise PermissionError(13, "no")

    monkeypatch.setattr(os, "open", read_only)
    with lock_file(tmp_path / "read-only"):
        pass


def test_the_first_rank_holds_the_lock_for_all_ranks_of_its_job(tmp_path, monkeypatch):
    with lock_directory(tmp_path / "a"):
        monkeypatch.setenv("RANK", "1")
        with as_another_process(), lock_directory(tmp_path / "a"):
            pass
        monkeypatch.setenv("RANK", "0")


def test_leftovers_of_dead_processes_are_removed_and_counted(tmp_path, capsys):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    out = tmp_path / "run"
    checkpoint = out / "sft" / f".step-000003.{dead.pid}.partial"
    checkpoint.mkdir(parents=True)
    (checkpoint / "x").write_bytes(b"1" * 2_000_000)
    # killed while it wrote a file of its checkpoint: a leftover in a leftover
    (checkpoint / f".chat.json.{dead.pid}.partial").write_text("")
    (out / f".summary.json.{dead.pid}.partial").write_text("torn")
    alive = out / f".table.txt.{os.getppid()}.partial"
    alive.write_text("somebody writes it")
    with lock_directory(out):
        pass
    assert "2 leftovers of killed jobs removed (2.0 MB)" in capsys.readouterr().out
    assert sorted(p.name for p in out.rglob("*")) == [alive.name, "sft"]
    same_name = tmp_path / f".d.jsonl.meta.json.{dead.pid}.partial"
    other_name = tmp_path / f".e.jsonl.meta.json.{dead.pid}.partial"
    same_name.write_text("")
    other_name.write_text("")
    with lock_file(tmp_path / "d.jsonl"):
        pass
    assert not same_name.exists() and other_name.exists()
