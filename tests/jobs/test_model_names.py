"""Names of models on the command line: directories, GGUF files, hub ids in the local cache."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from engine.jobs import gguf_import, gguf_source, model_names
from engine.jobs.model_names import find_model, hub_cache, with_model_found
from engine.session import ModelConfig
from model.llama import Llama

COMMIT = "0123abc" + "0" * 33
OTHER = "89ef" + "1" * 36
ROOT = Path(__file__).resolve().parents[2]


def in_cache(cache: Path, source: Path, commit: str, *refs: str) -> Path:
    """Put a model into a Hugging Face cache as org/tiny: blobs, links to them, refs."""
    folder = cache / "models--org--tiny"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for n, file in enumerate(sorted(source.iterdir())):
        blob = folder / "blobs" / f"{commit[:8]}{n:032x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    for ref in refs:
        file = folder / "refs" / ref
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_hub_id_in_the_cache_is_its_snapshot_of_main(cache, tiny_llama_dir):
    in_cache(cache, tiny_llama_dir(seed=1), OTHER, "v1", "refs/pr/3")
    snapshot = in_cache(cache, tiny_llama_dir(), COMMIT, "main")
    assert find_model("org/tiny") == snapshot
    assert find_model("org/tiny@v1").name == OTHER
    assert find_model("org/tiny@refs/pr/3").name == OTHER
    assert find_model(f"org/tiny@{COMMIT[:8]}") == snapshot
    assert with_model_found(ModelConfig("org/tiny")).model == str(snapshot)
    Llama.from_pretrained(find_model("org/tiny"))  # links into the cache are read


def test_a_directory_comes_before_the_cache(cache, tiny_llama_dir, tmp_path):
    in_cache(cache, tiny_llama_dir(), COMMIT, "main")
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert find_model("org/tiny") == Path("org/tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/other", "no models--org--other in .*hub; .* download it: hf download org/other$"),
        ("org/tiny", "has no snapshot of main; .* hf download org/tiny$"),
        ("org/tiny@v2", "no snapshot of v2; .* hf download org/tiny --revision v2$"),
        ("org/tiny@../main", "no snapshot of ../main"),
        ("org/tiny@0000000", "no snapshot of 0000000"),
        ("org/tiny@v1", "is not complete .* hf download org/tiny --revision v1$"),
    ],
)
def test_what_is_not_in_the_cache_is_told_with_the_command_that_downloads_it(
    cache, tiny_llama_dir, name, message
):
    snapshot = in_cache(cache, tiny_llama_dir(), COMMIT, "v1")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        find_model(name)


def test_the_cache_lies_where_huggingface_hub_puts_it(monkeypatch):
    """In its order: HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, the home directory."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert hub_cache() == Path("/home/me/.cache/huggingface/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert hub_cache() == Path("/cache/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/hf")
    assert hub_cache() == Path("/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "~/hub")
    assert hub_cache() == Path("/home/me/hub")


SCRIPTS = "sdft distill train evaluate retention generate pareto preflight audit merge".split()


@pytest.mark.parametrize("name", [*SCRIPTS, "export_gguf"])
def test_every_script_finds_its_model_by_name(cache, tmp_path, monkeypatch, capsys, name):
    """Each says what is missing, and how to download it, before any work."""
    others = {
        "sdft": "--data d.json --eval-data e.json --out o",
        "distill": "--data d.json --out o.jsonl",
        "train": "--data d.json --out o",
        "evaluate": "--data d.json --out o.jsonl",
        "retention": "--out o.jsonl --adapter a",
        "generate": "--prompt Hi",
        "pareto": "--data d.json --eval-data e.json --out o",
        "preflight": "--data d.json",
        "audit": "--out o",
        "merge": "--adapter a --out o",
        "export_gguf": "--out o.gguf",
    }
    flags = ["--model", "org/none", *others[name].split()]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr()
    assert end.value.code == 2 and "hf download org/none" in said.err, said.out + said.err
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == []


# GGUF files


@pytest.fixture
def gguf_file(tmp_path, tiny_llama_dir) -> Path:
    pytest.importorskip("gguf", reason="needs the package gguf (extra `gguf`)")
    pytest.importorskip("tokenizers", reason="needs the package tokenizers (extra `gguf`)")
    from tests.helpers.gguf_files import vocabulary, write_gguf

    write_gguf(tmp_path / "m.gguf", tiny_llama_dir(vocab=len(vocabulary())))
    return tmp_path / "m.gguf"


def test_a_gguf_file_is_imported_once_beside_itself(gguf_file, capsys):
    out = find_model(str(gguf_file))
    assert out == gguf_file.with_name("m.gguf.imported")
    assert "importing it into" in capsys.readouterr().out
    stamps = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert find_model(str(gguf_file)) == out
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == stamps
    assert capsys.readouterr().out == ""
    Llama.from_pretrained(out)


def test_another_file_under_the_same_name_is_not_taken_for_the_first(gguf_file):
    find_model(str(gguf_file))
    gguf_file.write_bytes(gguf_file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="is another import: .* delete it"):
        find_model(str(gguf_file))


@pytest.fixture
def settled_file(gguf_file, monkeypatch) -> Path:
    """An imported GGUF file that was last changed long ago, as far as the import can tell."""
    monkeypatch.setattr(gguf_source, "SETTLED_NS", -1)
    find_model(str(gguf_file))
    return gguf_file


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """The files that are hashed from now on."""
    files: list[Path] = []

    def counting(parts):
        files.extend(parts)
        return gguf_source.sha256_of(parts)

    monkeypatch.setattr(gguf_import, "sha256_of", counting)
    return files


def test_a_file_in_the_state_of_its_import_is_not_hashed_again(settled_file, hashed):
    out = find_model(str(settled_file))
    assert hashed == []
    before = settled_file.stat()
    os.utime(settled_file)  # touched: hashed once, and its new state recorded
    assert settled_file.stat().st_mtime_ns != before.st_mtime_ns
    assert find_model(str(settled_file)) == find_model(str(settled_file)) == out
    assert hashed == [settled_file]


def test_an_import_of_an_older_version_is_hashed_once(settled_file, hashed):
    record = settled_file.with_name("m.gguf.imported") / gguf_import.RECORD
    kept = json.loads(record.read_text())
    record.write_text(json.dumps({key: kept[key] for key in kept if key != "source_files"}))
    find_model(str(settled_file))
    find_model(str(settled_file))
    assert hashed == [settled_file] and json.loads(record.read_text()) == kept


def test_a_file_changed_within_its_size_and_put_back_in_time_is_noticed(settled_file, hashed):
    before = settled_file.stat()
    content = bytearray(settled_file.read_bytes())
    content[-1] ^= 1
    settled_file.write_bytes(content)
    os.utime(settled_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = settled_file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size, before.st_mtime_ns, before.st_ino,
    )  # fmt: skip
    with pytest.raises(ValueError, match="is another import: .* delete it"):
        find_model(str(settled_file))


def test_a_file_that_was_just_changed_is_hashed_until_its_clock_has_moved_on(
    gguf_file, hashed, monkeypatch
):
    out = find_model(str(gguf_file))
    find_model(str(gguf_file))
    assert hashed == [gguf_file] * 2
    assert "source_files" not in json.loads((out / gguf_import.RECORD).read_text())
    monkeypatch.setattr(gguf_source, "SETTLED_NS", -1)
    find_model(str(gguf_file))
    find_model(str(gguf_file))
    assert hashed == [gguf_file] * 3


def test_an_import_that_cannot_be_written_is_still_found(settled_file, hashed, monkeypatch):
    os.utime(settled_file)

    def read_only(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gguf_import, "file_beside", read_only)
    find_model(str(settled_file))
    find_model(str(settled_file))
    assert hashed == [settled_file] * 2


def test_of_a_model_in_parts_any_part_names_the_same_import(gguf_file):
    from tests.helpers.gguf_files import split_gguf

    first, second = split_gguf(gguf_file, 2)
    assert find_model(str(second)) == find_model(str(first)) == Path(f"{first}.imported")


def killed_import(gguf_file: Path) -> int:
    """Import in a fork that is killed when the weights are written; returns its exit code."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a fork lacks OpenMP's threads and would wait for them
        gguf_import.write_token_settings = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        try:
            find_model(str(gguf_file))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def test_a_killed_import_leaves_nothing_under_the_name_and_is_done_again(gguf_file):
    assert killed_import(gguf_file) == -signal.SIGKILL
    assert not Path(f"{gguf_file}.imported").exists()
    out = find_model(str(gguf_file))
    assert sorted(file.name for file in gguf_file.parent.iterdir()) == ["m.gguf", out.name]


def test_a_place_that_cannot_be_written_is_told_with_the_way_out(gguf_file, monkeypatch):
    def read_only(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(model_names, "import_gguf", read_only)
    with pytest.raises(ValueError, match="Permission denied.* scripts/import_gguf.py --gguf"):
        find_model(str(gguf_file))


def test_several_processes_do_not_import_at_once(gguf_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run python scripts/import_gguf.py --gguf .* first"):
        find_model(str(gguf_file))
    monkeypatch.delenv("WORLD_SIZE")
    out = find_model(str(gguf_file))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_model(str(gguf_file)) == out


def test_names_that_are_none_of_these_are_left_to_the_checks_of_a_model():
    for name in ("nowhere", "/no/such/dir", "a/b/c"):
        assert find_model(name) == Path(name)
    with pytest.raises(ValueError, match="model dir/x.gguf: there is no such file"):
        find_model("dir/x.gguf")
