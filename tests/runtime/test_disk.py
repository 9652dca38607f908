"""Whole files are synced before they are renamed; a full disk loses nothing."""

import contextlib
import os
import resource
import signal
from pathlib import Path

import pytest

from engine.runtime.files import AppendedLines, write_json, write_text
from engine.train import checkpoint as checkpoint_module
from model.durable import directory_beside


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
    for name in checkpoint_module.ADAPTER_FILES:
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
            before, after = seen[:i], seen[i:]
            for path in Path(target).rglob("*"):
                assert ("sync", f"{source}/{path.relative_to(target)}") in before
            assert ("sync", source) in before
            assert ("sync", str(Path(target).parent)) in after


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
    args = ["--model", chat_dir, "--data", problems / "train.json"]
    args += ["--epochs", "1", "--save-every", "1", "--rank", "2"]
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
    # an error about a file elsewhere is passed on unchanged
    with pytest.raises(FileNotFoundError), directory_beside(tmp_path / "copy"):
        (tmp_path / "absent").read_text()
