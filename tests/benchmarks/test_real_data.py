"""A study's result becomes a record of the tables, figure by figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import real_data
from benchmarks.tables.__main__ import DEFINITIONS
from benchmarks.tables.records import Record
from engine.jobs.costs import Cost
from engine.jobs.measured import ArmResults, MeasuredRun
from engine.jobs.study_findings import findings
from engine.runtime.run_record import environment

SETTING = "lr0.001-r8-rows4"


def run(right: list[int] | None, nll: float, kl: float) -> MeasuredRun:
    """Four held-out rows of 2 tokens and three prompts of 10."""
    drift = [{"tokens": 10, "kl": kl, "reverse_kl": 2 * kl, "agree": 9}] * 3
    verdicts = None if right is None else [bool(x) for x in right]
    budget = {"response_tokens": 40, "examples": 4, "steps": 2, "tokens": 90, "seconds": 1.0}
    return MeasuredRun(list("abcd"), verdicts, [nll] * 4, [2] * 4, drift, budget)


def write_study(out: Path, judged: bool, mix: str = "", seeds: int = 1) -> None:
    """study.json as engine/jobs/study.py writes it, and the seed's answers."""
    seed = ArmResults("", "seed", [run([0, 0, 0, 1] if judged else None, 3.0, 0.0)])
    seed.runs[0].training = {}
    sft = ArmResults(SETTING, "sft", [run([1, 0, 0, 1] if judged else None, 2.0, 1.0)] * seeds)
    sdft = ArmResults(
        SETTING + mix, "sdft", [run([1, 1, 1, 1] if judged else None, 2.4, 0.5)] * seeds
    )
    # a further arm beside them, which the record leaves out
    dft = ArmResults(SETTING, "dft", sft.runs)
    costs = {"sft": Cost(), "sdft": Cost(), "dft": Cost()}
    found, _ = findings(seed, [[sft, sdft, dft]], "number", costs)
    facts = {"settings": {"lr": "1e-3"}, "environment": environment()}
    facts["distilled"] = {"counts": {"accepted": 3, "mismatch": 1}, "differ": 0.5}
    (out / "study.json").write_text(json.dumps(facts | found))
    (out / "seed").mkdir()
    lines = "".join(json.dumps({"id": name}) + "\n" for name in "abcd")
    (out / "seed" / "evaluation.jsonl").write_text(lines if judged else "")


@pytest.mark.parametrize("mix", ["", "-mix0.3"])
def test_a_study_becomes_a_record_and_tables(tmp_path, mix):
    write_study(tmp_path, judged=True, mix=mix)
    document = real_data.document(tmp_path, "Made", None)
    assert document["setting"] == SETTING + mix and document["rows"] == 4
    records = [Record("real_data", 1, document)]
    text = DEFINITIONS["real-data"].build(records).markdown()
    assert "| Made, 4 rows, 50.0 % of targets differ | seed | 1/4 = 25.0 % (4.6 - 69.9) |" in text
    assert "| SFT | 2/4 = 50.0 % (15.0 - 85.0) | 1.000 | 0.1000 (0.1000 - 0.1000) |" in text
    assert "| SDFT | 4/4 = 100.0 % (51.0 - 100.0) | 1.200 | 0.0500 (0.0500 - 0.0500) |" in text
    assert "| 0.1000 | 90.0 % | 40 |" in text  # SDFT: KL from seed, same top-1, tokens with loss
    text = DEFINITIONS["real-data-differences"].build(records).markdown()
    assert "| no difference seen (+50.0 points, +0.0 to +100.0; p 0.500) |" in text
    assert "| SFT fits better (+0.2000, +0.2000 to +0.2000) |" in text
    assert "| SDFT forgot less (-0.0500, -0.0500 to -0.0500) |" in text
    commit = environment()["commit"]
    assert commit is None or f"commit {commit}" in text


def test_a_set_without_verdicts_has_no_target(tmp_path):
    write_study(tmp_path, judged=False)
    document = real_data.document(tmp_path, "Made", SETTING)
    assert document["differences"]["target"] is None
    assert [arm["target"] for arm in document["arms"].values()] == [None] * 3
    text = DEFINITIONS["what-came-out"].build([Record("real_data", 1, document)]).markdown()
    assert "| Made, 4 rows | - | - | 1.000 | 1.200 | 0.1000 | **0.0500** |" in text


def test_what_makes_no_record_is_refused(tmp_path):
    write_study(tmp_path, judged=True, seeds=2)
    with pytest.raises(ValueError, match=f"no setting 'x'; expected one of {SETTING}"):
        real_data.document(tmp_path, "Made", "x")
    with pytest.raises(ValueError, match="2 training seeds; the tables show one"):
        real_data.document(tmp_path, "Made", None)
