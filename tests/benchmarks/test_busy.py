"""The benchmark of a busy machine runs, and its neighbours end with it."""

from __future__ import annotations

import json
import os
import sys

import pytest

from benchmarks import busy


def test_jobs_take_turns_quiet_and_beside_a_busy_process(tiny_llama_dir, monkeypatch, capsys):
    path = tiny_llama_dir(tokenizer=True, max_position_embeddings=2048)
    flags = "--jobs sample,train --neighbours none,process --rows 3 --new 2 --repeats 2"
    monkeypatch.setattr(sys, "argv", ["busy", "--model", str(path), *flags.split()])
    busy.main()
    *table, last = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in table[1:]] == ["sample", "train"]
    found = json.loads(last)["found"]
    for job in found.values():
        assert job["all"].keys() == {"none", "process"}
        assert all(len(rates) == 2 and min(rates) > 0 for rates in job["all"].values())


@pytest.mark.parametrize("kind", ["process", "torch"])
def test_a_neighbour_ends(kind):
    with busy.neighbour(kind) as process:
        assert process.poll() is None
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
