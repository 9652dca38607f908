"""Distillation of more rows than are held at a time: the same bytes, in bounded memory."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.distill import seed_likelihoods, turn_feed
from engine.distill import writer as writer_module
from engine.distill.seed_likelihoods import score
from engine.distill.turn_feed import TurnFeed
from tests.helpers import programs
from tests.helpers.distillation import CASCADE, CONFIG, SAMPLING, judge_by_hash, load
from tests.helpers.distillation import run_distillation as run

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = 2 * SAMPLING.rows  # turns: the fewest that are allowed, a quarter of all


@pytest.fixture
def tiny(tiny_llama_dir):
    return tiny_llama_dir(tokenizer=True)


@pytest.mark.parametrize("config", [CONFIG, CASCADE], ids=["guided", "cascade"])
def test_the_number_of_turns_held_does_not_change_the_files(tiny, tmp_path, monkeypatch, config):
    """The lines, and the scores of the seed."""
    monkeypatch.setattr(writer_module, "judge", judge_by_hash)
    model, chat = load(tiny)
    whole = run(tiny, tmp_path / "whole", config)
    score(model, chat, whole.lines, tmp_path / "whole.scores", {})

    held = []
    fill = TurnFeed.fill

    def counted(feed):
        fill(feed)
        held.append(len(feed.writer.sampling))

    monkeypatch.setattr(TurnFeed, "fill", counted)
    monkeypatch.setattr(turn_feed, "TURNS_AT_ONCE", 1)
    monkeypatch.setattr(seed_likelihoods, "REQUESTS_FOR_PREFIX", 3)
    few = run(tiny, tmp_path / "few", config)
    assert max(held) == AT_ONCE and len(few.lines) == 24
    score(model, chat, few.lines, tmp_path / "few.scores", {})
    for ending in ("", ".scores"):
        assert (tmp_path / f"few{ending}").read_bytes() == (
            tmp_path / f"whole{ending}"
        ).read_bytes()
    assert few.text().splitlines()[:-1] == whole.text().splitlines()[:-1], "all but the speed"


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from engine.distill import turn_feed, writer
from tests.helpers.distillation import run_distillation
turn_feed.TURNS_AT_ONCE = 1
decided_line = writer.decided_line
calls = []
def killed_line(*args):
    calls.append(1)
    if len(calls) == {kill}:
        with open({out!r}, "a") as file:
            file.write('{{"id": "r0')
        os.kill(os.getpid(), signal.SIGKILL)
    return decided_line(*args)
writer.decided_line = killed_line
report = run_distillation({model!r}, {out!r}, resume=True)
print(report.before, report.written)
"""


def test_kills_while_further_turns_are_taken_lose_the_turn_in_flight_alone(tiny, tmp_path):
    """SIGKILL and a torn line, when only a part of the turns was started."""
    run(tiny, tmp_path / "whole.jsonl")
    out = tmp_path / "killed.jsonl"
    kept = AT_ONCE + 1  # lines before the one in flight
    for kill in (kept + 1, 0):  # 0: not killed
        script = KILLED.format(root=str(ROOT), model=str(tiny), out=str(out), kill=kill)
        done = programs.run([sys.executable, "-c", script])
        assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr[-2000:]
        if kill:
            assert out.read_bytes().count(b"\n") == kept
    assert done.stdout.splitlines()[-1] == f"{kept} {24 - kept}", "no line was made twice"
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


GROWTH = """
import contextlib, io, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks.rows import distil, session_without_weights, write_rows
from engine.data import data_file, row_store
from engine.distill import turn_feed
from engine.data.config import DataConfig
from engine.runtime import temporary
from engine.runtime.process_memory import peak_memory
from engine.train.config import EncodeConfig
from engine.train.temporary_examples import temporary_examples
# what is held is of a size of its own: a small one, so that few rows show whether it grows
turn_feed.TURNS_AT_ONCE = 64
data_file.CHUNK_BYTES = row_store.WRITTEN_AT_ONCE = 1 << 14
temporary._SETTINGS = ("PRAGMA cache_size = -64", *temporary._SETTINGS[1:])
session = session_without_weights({model!r})
peaks = []
for count in {counts}:
    write_rows(Path({folder!r}) / f"{{count}}.jsonl", count, 8)
    with contextlib.redirect_stdout(io.StringIO()):
        figures = distil(session, Path({folder!r}) / f"{{count}}.jsonl")
    assert figures["rows"] == count
    with contextlib.redirect_stdout(io.StringIO()):
        rows = DataConfig(str(Path({folder!r}) / f"{{count}}.jsonl")).stored()
        examples = temporary_examples(rows, session, DataConfig("d"), EncodeConfig())
    assert len(examples) == count
    peaks.append(peak_memory("cpu"))
print(*peaks)
"""


def test_memory_does_not_grow_with_the_rows(tiny, tmp_path):
    """The whole of distill.py but sampling, and the examples of the main job. With rows, prompts
    and lines in memory it grew by 5,900 bytes a row; the tokenizer's own cache of words takes a
    few hundred."""
    counts = (150, 900)
    script = GROWTH.format(root=str(ROOT), model=str(tiny), folder=str(tmp_path), counts=counts)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = [int(peak) for peak in done.stdout.split()]  # bytes
    growth = (peaks[1] - peaks[0]) / (counts[1] - counts[0])
    assert growth < 2000, f"{growth:.0f} bytes a row; the peaks are {peaks}"
