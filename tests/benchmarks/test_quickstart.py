"""A finished quickstart becomes a record and a table, figure by figure; its two forms exist."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import quickstart
from benchmarks.tables.__main__ import DEFINITIONS
from benchmarks.tables.records import Record
from engine.runtime.run_record import environment

ROOT = Path(__file__).resolve().parents[2]


def write_run(out: Path, template: str) -> None:
    """summary.json as engine/jobs/sdft.py writes it, as far as it is read."""
    evaluation = {}
    training, drift, task, norms = {}, {}, {}, {}
    for arm, right, kl in (("seed", 0, 0.0), ("sft", 39, 1.5), ("sdft", 36, 0.25)):
        evaluation[arm] = {"right": right, "n": 40, "interval": [0.0, 0.1], "nll": 1.0}
        if arm != "seed":
            training[arm] = {"first_loss": 6.0, "last_loss": 0.5, "seconds": 31.4}
            drift[arm] = {"kl": kl, "kl_interval": [kl / 2, 2 * kl], "reverse_kl": kl}
            drift[arm] |= {"agreement": 0.75}
            task[arm] = {"kl": 2 * kl}
            norms[arm] = {"norm": 3 * kl}
    summary = {
        "settings": {"DistillConfig": {"template": template}},
        "environment": environment(),
        "evaluation": evaluation,
        "training": training,
        "retention": drift,
        "retention_task": task,
        "update_norms": norms,
        "distilled": {"counts": {"accepted": 80, "no_number": 40}, "differ": 2 / 3},
        "likelihood": None,
        "seconds": {"all": 240.0},
    }
    (out / "summary.json").write_text(json.dumps(summary))


def test_a_run_at_the_desk_becomes_a_record_and_a_table(tmp_path):
    write_run(tmp_path, "engine/jobs/demo_desk_template.txt")
    document = quickstart.document(tmp_path)
    assert document["benchmark"] == "quickstart_desk" and document["rows"] == 120
    assert document["seconds"] == 240 and document["held_out"] == 40
    text = DEFINITIONS["quickstart-desk"].build([Record("quickstart_desk", 1, document)]).markdown()
    assert (
        "| seed | 0/40 = 0.0% | 0.0% - 10.0% | 0.000 | - | 100.0% | 0.000 | 0.00 | - | - |" in text
    )
    assert "| SFT | 39/40 = 97.5% | 0.0% - 10.0% | 1.500 | 0.750 - 3.000 | 75.0% | 3.000 |" in text
    assert "| SDFT | 36/40 = 90.0% | 0.0% - 10.0% | 0.250 | 0.125 - 0.500 | 75.0% | 0.500 |" in text
    assert "0.75 | 6.000 -> 0.500 | 31 |" in text


def test_a_run_of_word_problems_becomes_the_other_record(tmp_path):
    write_run(tmp_path, "gsm8k")
    document = quickstart.document(tmp_path)
    assert document["benchmark"] == "quickstart"
    text = DEFINITIONS["quickstart"].build([Record("quickstart", 1, document)]).markdown()
    assert "| SDFT | 36/40 = 90.0% | 0.0% - 10.0% | 1.000 | 0.2500 | 0.2500 | 75.0% |" in text
    with pytest.raises(ValueError, match="no summary.json; expected the --out of a finished run"):
        quickstart.document(tmp_path / "nothing")


def test_the_script_refuses_other_words():
    """And does nothing: no .venv is made, no model fetched."""
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), "--word-problem"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--word-problem is not known; expected nothing, or --word-problems" in done.stderr
