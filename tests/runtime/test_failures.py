"""Errors that a user can cause end in one line: out of memory, damaged lines; escaped output."""

import errno
import importlib
import io
import os
import sys
import weakref

import pytest
import torch
from safetensors import SafetensorError

from engine.runtime import failures, short_memory
from engine.runtime.files import AppendedLines, read_jsonl
from engine.runtime.flags import _Shown, run_main
from engine.runtime.process_memory import is_out_of_memory, memory_for
from engine.runtime.short_memory import attempt, tried_twice
from model.config import read_json


def raiser(error):
    """A main function that raises the error."""

    def main():
        raise error

    return main


def message_of(error, capsys, **names):
    """What a script prints for an error that a user can cause."""
    with pytest.raises(SystemExit) as end:
        run_main(raiser(error), **names)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_errors_of_a_user_end_in_one_line_and_bugs_keep_their_traceback(capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "/x/y")
    for error, expected in (
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
        assert expected in message_of(error, capsys, lower="lower --rows"), error
    bugs = [AssertionError("ours"), KeyError("ours"), TypeError("ours"), RuntimeError("ours")]
    bugs.append(ModuleNotFoundError("No module named 'x'", name="x"))
    for bug in bugs:
        with pytest.raises(type(bug)):
            run_main(raiser(bug))
    assert failures.explain(RecursionError("ours")) is None


def test_out_of_memory_names_the_flags_to_lower_in_each_stage(
    chat_dir, problems, tmp_path, script, monkeypatch
):
    model, train = ["--model", chat_dir], ["--data", problems / "train.json"]
    short = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"

    def fails(*_, **__):
        raise RuntimeError(f"{short}: you tried to allocate 9 bytes\nmore")

    for where, name, stage in (  # the method that fails, the script, its message
        (
            "engine.sampling.sampler.Sampler._decode",
            "distill",
            "distilling ({}): one sequence at a time does not fit; allow fewer new tokens",
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
            patch.setattr(getattr(importlib.import_module(module), cls), attribute, fails)
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
    for line, expected in (
        (b"[1]\n", "lines.jsonl:2 is no object but a list"),
        (b"\0\0\0\n", "lines.jsonl:2 is not JSON"),
        (b"\xff\xfe\n", "lines.jsonl:2 is not JSON"),
        (b"[" * 100_000 + b"\n", "lines.jsonl:2 is not JSON"),
        (b'{"id": "a", "ok": true}\n', "lines.jsonl:2 is damaged: n is missing"),
        (b'{"id": 5, "n": 1, "ok": true}\n', "lines.jsonl:2 is damaged: id is 5"),
        (b'{"id": "a", "n": true, "ok": true}\n', "lines.jsonl:2 is damaged: n is True"),
    ):
        file.write_bytes(good.encode() + line)
        with pytest.raises(ValueError) as error:
            read_jsonl(file, wanted)
        assert expected in str(error.value) and "delete that line" in str(error.value)
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


def test_an_attempt_frees_what_the_work_held_before_memory_is_given_back(monkeypatch):
    held = []
    given_back = []

    def work():
        tensor = torch.zeros(10)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    def give_back(device):
        given_back.append((device, held[-1]() is None))

    monkeypatch.setattr(short_memory, "give_back_freed_memory", give_back)
    assert attempt("cpu", work) == (None, "CUDA out of memory")
    assert given_back == [("cpu", True)]
    assert attempt("cpu", max, 3, 4) == (4, None) and len(given_back) == 1
    with pytest.raises(RuntimeError, match="shapes"):
        attempt("cpu", raising, RuntimeError("shapes"))
    assert len(given_back) == 1


def test_work_that_cannot_be_smaller_is_tried_twice(capsys):
    calls = []

    def fails(times):
        calls.append("work")
        if calls.count("work") <= times:
            raise MemoryError("no more")
        return "done"

    assert tried_twice("the row", "cpu", fails, 1, make_room=lambda: calls.append("room")) == "done"
    assert calls == ["work", "room", "work"]
    assert (
        "the row: out of memory (no more); cached memory is given back" in capsys.readouterr().out
    )
    calls.clear()
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        tried_twice("the row", "cpu", fails, 2)
    assert calls == ["work", "work"]


def raising(error):
    raise error
