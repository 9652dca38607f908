"""The study of a data set: its command, what is kept of it, its record and the tables."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from benchmarks import rivals
from benchmarks.tables.__main__ import DEFINITIONS
from benchmarks.tables.records import Record
from engine.evaluate.arm_grammar import parse_arms
from engine.jobs.costs import Cost
from engine.jobs.measured import ArmResults, MeasuredRun
from engine.jobs.study_findings import findings
from engine.runtime.run_record import environment
from scripts import pareto

SETTING = "lr0.001-r8-rows4"


def run(right: list[int], nll: float, kl: float) -> MeasuredRun:
    """Four held-out rows of 2 tokens and three prompts of 10; the same drift on the rows."""
    drift = [{"tokens": 10, "kl": kl, "reverse_kl": 2 * kl, "agree": 9}] * 3
    budget = {"response_tokens": 40, "examples": 4, "steps": 2, "tokens": 90, "seconds": 1.0}
    measured = MeasuredRun(list("abcd"), [bool(x) for x in right], [nll] * 4, [2] * 4, drift)
    measured.training = budget
    measured.task_drift = drift
    measured.norms = {"norm": 2.5}
    return measured


def write_study(out: Path) -> None:
    """A study of SFT at two strengths and STM, as engine/jobs/study.py writes it."""
    seed = ArmResults("", "seed", [run([0, 0, 0, 1], 3.0, 0.0)])
    seed.runs[0].norms = {}
    points = [
        ArmResults(SETTING, "sft", [run([1, 1, 0, 1], 2.0, 1.0)]),
        ArmResults(SETTING, "sft@0.5", [run([1, 0, 0, 1], 2.4, 0.2)], listed=False),
        ArmResults(SETTING, "stm:2.5", [run([1, 1, 0, 1], 2.0, 0.5)]),
        ArmResults(SETTING, "stm:2.5@0.5", [run([1, 0, 0, 1], 2.4, 0.1)], listed=False),
    ]
    costs = {"sft": Cost(trained=90), "stm:2.5": Cost(scored=45, trained=90)}
    found, text = findings(seed, [points], "call", costs)
    facts = {"settings": {"lr": "1e-3"}, "environment": environment()}
    facts["distilled"] = {"counts": {"accepted": 3, "mismatch": 1}, "differ": 0.5}
    (out / "seed").mkdir(parents=True)
    (out / "study.json").write_text(json.dumps(facts | found))
    (out / "table.txt").write_text(text)
    lines = "".join(json.dumps({"id": name}) + "\n" for name in "abcd")
    (out / "seed" / "evaluation.jsonl").write_text(lines)


def test_a_study_becomes_a_record_and_tables(tmp_path):
    write_study(tmp_path)
    document = rivals.document(tmp_path, "Made")
    records = [Record("rivals", 1, json.loads(json.dumps(document)))]
    text = DEFINITIONS["rivals-points"].build(records).markdown()
    assert "| Made, 4 rows | - | seed | 1 of 4 | 4.6 - 69.9 % | 1.500 | **0.0000** |" in text
    line = "|  | 1e-03 | SFT | 3 of 4 | 30.1 - 95.4 % | 1.000 | 0.1000 | 0.1000 - 0.1000 |"
    assert f"{line.replace('1e-03', '1e-3')} 0.1000 | 2.500 |" in text
    assert "| STM 2.5 x0.5 | 2 of 4 |" in text and "| **0.0100** |" in text
    text = DEFINITIONS["rivals-equal-target"].build(records).markdown()
    # at 3 of 4 both are at full strength; each has two points
    assert "| Made: right answers | SFT | 2 | 75.0% | 0.1000 |" in text
    assert "|  | STM 2.5 | 2 | 75.0% | 0.0500 |" in text
    assert "| 0 | 45 | 90 |" in text and "| Made: held-out NLL | SFT | 2 | 1.000 |" in text
    text = DEFINITIONS["rivals-words"].build(records).markdown()
    assert "| Made, at equal right answers, 75.0%" in text and "Nothing beats" in text


def test_what_is_kept_has_no_weights_and_a_clone_begins_from_it(tmp_path):
    study, kept, clone = tmp_path / "study", tmp_path / "kept", tmp_path / "clone"
    write_study(study)
    place = study / SETTING / "seed0" / "sft"
    (place / "checkpoints" / "step-2").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "checkpoints/step-2/state.json", "retention.jsonl"):
        (place / name).write_text("x")
    for name in (".lock", "pareto.png", "x.jsonl.partial-1"):
        (study / name).write_text("x")
    rivals.copy_files(study, kept)
    rivals.copy_files(kept, clone)
    found = sorted(str(file.relative_to(clone)) for file in clone.rglob("*") if file.is_file())
    own = f"{SETTING}/seed0/sft/retention.jsonl"
    assert found == [own, "seed/evaluation.jsonl", "study.json", "table.txt"]
    (kept / "earlier.jsonl").write_text("x")  # of a study that measured more
    rivals.copy_files(study, kept)
    assert (kept / "earlier.jsonl").exists()


@pytest.mark.parametrize("name", rivals.SETS)
def test_the_command_is_one_that_the_study_takes(name, monkeypatch):
    told = argparse.Namespace(
        set=name, model="m", data_dir=Path("d"), arms=rivals.ARMS, scales=rivals.SCALES
    )
    told.lr, told.seeds, told.limit = rivals.RATES, "3", "120"
    command = rivals.command_of(told, rivals.ROOT / "runs" / "x")
    monkeypatch.setattr(sys, "argv", command[1:])
    args = pareto.parse_args()
    assert args.out == "runs/x" and args.scales == "0.25,0.5,0.75,1" and args.seeds == 3
    assert Path(args.data).name == rivals.SETS[name].train
    assert len(parse_arms(args.arms)) == 4


def test_a_study_that_fails_is_no_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rivals, "ROOT", tmp_path)
    monkeypatch.setattr(rivals, "RESULTS", tmp_path / "results")
    flags = ["rivals", "--set", "gsm8k", "--model", "m", "--data-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", flags)
    assert rivals.main() == 2  # no scripts/pareto.py there
    assert "the study is not finished" in capsys.readouterr().err
    assert not list(tmp_path.rglob("rivals.jsonl"))
    write_study(tmp_path / "runs" / "rivals" / "gsm8k")
    monkeypatch.setattr(sys, "argv", [*flags, "--record-only"])
    kept = []
    monkeypatch.setattr(rivals, "record", lambda document, wanted: kept.append((document, wanted)))
    assert rivals.main() == 0
    assert kept[0][1] and kept[0][0]["set"] == "GSM8K"
    assert (tmp_path / "results" / "rivals" / "gsm8k" / "table.txt").exists()
