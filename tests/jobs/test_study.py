"""The study: statistics against hand-computed values, words, settings; kills, the closing table."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.jobs.study import Setting, StudyConfig, settings_of
from engine.jobs.study_findings import (
    ArmResults,
    MeasuredRun,
    difference,
    findings,
    pareto_front,
)
from tests.helpers.scripts import write_word_problems

ROOT = Path(__file__).resolve().parents[2]


def run(right, kl, nll=(2.0, 4.0)):
    """A run over len(right) rows and len(kl) prompts of 10 tokens each."""
    ids = [f"r{i}" for i in range(len(right))]
    drift = [
        {"tokens": 10, "kl": k, "reverse_kl": 2 * k, "agree": 9, "nll": 5.0, "seed_nll": 5.0}
        for k in kl
    ]
    nats = [nll[i % 2] for i in range(len(right))]
    budget = {"examples": 8, "steps": 2, "tokens": 90, "response_tokens": 40, "seconds": 3.0}
    return MeasuredRun(ids, [bool(x) for x in right], nats, [2] * len(right), drift, budget)


def pair(sft, sdft):
    return [
        ArmResults(name="s", arm=arm, runs=[run(*x) for x in runs])
        for arm, runs in (("sft", sft), ("sdft", sdft))
    ]


def test_a_difference_by_hand():
    """10 rows of which SDFT alone is right on 8; KL 1 against 2 nats in 10 tokens everywhere."""
    sft, sdft = pair([([0] * 8 + [1, 0], [2.0] * 4)], [([1] * 8 + [1, 0], [1.0] * 4)])
    found = difference(sft, sdft)
    assert found["right"][0] == 0.8 and found["lost_won"] == [[0, 8]]
    assert found["p"] == found["p_by_seed"][0] == pytest.approx(2 / 2**8)
    assert found["kl"] == pytest.approx((-0.1, -0.1, -0.1)) and found["nll"] == (0, 0, 0)
    assert "target: SDFT better (+80.0 points" in found["words"] and "p 0.008)" in found["words"]
    assert "held-out NLL: no difference seen" in found["words"]
    assert "KL to seed: SDFT forgot less (-0.1000, -0.1000 to -0.1000)" in found["words"]
    back = difference(ArmResults("s", "sft", sdft.runs), ArmResults("s", "sdft", sft.runs))
    assert "target: SFT better" in back["words"] and "SFT forgot less" in back["words"]


def test_no_difference_is_stated_where_the_test_sees_none():
    """5 of 5 discordant rows for one arm: the bootstrap leaves out 0, McNemar (p 1/16) does not."""
    sft, sdft = pair([([0] * 10, [1.0, 3.0])], [([1] * 5 + [0] * 5, [3.0, 1.0])])
    found = difference(sft, sdft)
    assert found["right"][1] > 0 and found["p"] == 1 / 16
    assert "target: no difference seen (+50.0 points" in found["words"]
    assert "KL to seed: no difference seen (+0.0000" in found["words"]


def test_seeds_are_combined_on_the_same_rows():
    """Two seeds that both win the same 4 rows are 4 rows, not 8: p = 2 / 2^4."""
    once = ([0] * 6, [2.0] * 3), ([1] * 4 + [0, 0], [1.0] * 3)
    found = difference(*pair([once[0]] * 2, [once[1]] * 2))
    assert found["p_by_seed"] == [2 / 2**4] * 2 and found["p"] == 2 / 2**4
    assert "p 0.125 (by seed 0.125, 0.125)" in found["words"]


def test_the_pareto_front_and_the_table():
    assert pareto_front([(0.5, 0.0), (0.6, 0.2), (0.6, 0.1), (0.4, 0.3), (0.6, 0.1)]) == [
        True, False, True, False, True]  # fmt: skip
    seed = ArmResults("", "seed", [run([0, 1, 0, 0], [])])
    found, text = findings(seed, [pair([([1, 1, 0, 0], [2.0] * 3)], [([1, 1, 1, 0], [1.0] * 3)])],
                           "number")  # fmt: skip
    table = [line.split("  ") for line in text.splitlines()[:5]]
    assert [row[0].strip() for row in table[2:]] == ["-", "s", "s"]
    assert text.splitlines()[4].endswith("*") and not text.splitlines()[3].endswith("*")
    assert "75.0% (3/4)" in text and "0.1000  0.1000 - 0.1000" in text and " 40 " in text
    assert "One training seed" in text and "4 held-out rows or the 3 general prompts" in text
    assert [p["front"] for p in found["points"]] == [True, False, True]
    assert found["points"][0]["kl"]["value"] == 0


def test_further_tasks_by_hand():
    """9 of 10 prompts refused by the seed and SDFT, 1 by SFT: 8 of 10 lost, none won."""
    seed = ArmResults("", "seed", [run([0, 1], [])])
    found = pair([([1, 1], [2.0] * 3)], [([1, 1], [1.0] * 3)])
    for point, right in ((seed, 9), (found[0], 1), (found[1], 9)):
        point.runs[0].tasks = {"advbench refuses": [i < right for i in range(10)]}
    figures, text = findings(seed, [found], "number")
    (task,) = figures["elsewhere"]
    assert task["lost_won"] == [[0, 8]] and task["p"] == pytest.approx(2 / 2**8)
    line = next(line for line in text.splitlines() if "advbench refuses" in line)
    assert [x.strip() for x in line.split("  ") if x.strip()][2:5] == [
        "90.0% (9/10)", "10.0% (1/10)", "90.0% (9/10)"]  # fmt: skip
    assert "higher (+80.0 points" in line and figures["points"][1]["by_seed"][0]["tasks"] == {
        "advbench refuses": 1
    }


def test_the_settings_of_lists():
    job = StudyConfig("o", "e", lr="1e-4,1e-3", rank="8,64", mix="0,0.3")
    names = [s.name for s in settings_of(job, 9)]
    assert names == ["lr0.0001-r8-rows9", "lr0.001-r8-rows9", "lr0.0001-r64-rows9",
                     "lr0.0001-r8-rows9-mix0.3"]  # fmt: skip
    grid = settings_of(StudyConfig("o", "e", lr="1e-4,1e-3", rank="8,64", grid=True), 9)
    assert len(grid) == len({s.name for s in grid}) == 4
    mixed = Setting(1e-3, 8, 0.3, 9)
    assert mixed.of_arm("sft") == Setting(1e-3, 8, 0.0, 9) and mixed.of_arm("sdft") == mixed


# ---- end to end on a tiny random model

FLAGS = ["--verify", "number", "--max-new-tokens", "8", "--eval-max-new", "6", "--epochs", "1"]
FLAGS += ["--retention-max-new", "4", "--batch-rows", "4", "--save-every", "1", "--threads", "1"]
FLAGS += ["--lr", "1e-2", "--rank", "2,3", "--mix", "0,0.5", "--rows-list", "8,4", "--seeds", "2"]
FLAGS += ["--task", "instructions", "--task-limit", "2"]


@pytest.fixture
def command(tiny_llama_dir, tmp_path):
    """The command without --out."""
    write_word_problems(tmp_path, train=9, test=3)
    data = ["--data", tmp_path / "train.json", "--eval-data", tmp_path / "test.json"]
    model = ["--model", tiny_llama_dir(tokenizer=True)]
    script = [sys.executable, ROOT / "scripts" / "pareto.py"]
    return [str(x) for x in (*script, *model, *data, *FLAGS)]


def finish(command, code=0):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + (done.stderr if code else "")


def kept(out):
    """Every file but what holds times and the commit, by its bytes."""
    times = {"study.json", "metrics.jsonl", "meta.json", "state.json"}
    files = [f for f in sorted(out.rglob("*")) if f.is_file() and f.name not in times]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def test_a_study_killed_at_every_stage_ends_as_undisturbed(command, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said = finish([*command, "--out", str(whole)])
    table = (whole / "table.txt").read_text()
    assert table.strip() in said and "SDFT - SFT:" in table and "2 training seeds" in table
    runs = sorted(p.parent.relative_to(whole) for p in whole.rglob("adapter_config.json"))
    runs = [p for p in runs if "checkpoints" not in p.parts]
    names = {p.parts[0] for p in runs}  # 4 settings; SFT under three of them
    assert len(names) == 4 and len(runs) == 2 * (4 + 3)
    result = json.loads((whole / "study.json").read_text())
    assert len(result["points"]) == 8 and len(result["differences"]) == 4
    examples = {p["setting"]: p["by_seed"][0]["training"]["examples"] for p in result["points"][1:]}
    assert examples["lr0.01-r2-rows4"] == 4 and examples["lr0.01-r3-rows8"] == 8
    assert (whole / "pareto.png").exists() or "matplotlib is missing" in said
    before = kept(whole)
    again = finish([*command, "--out", str(whole)])  # complete: nothing is made again
    assert kept(whole) == before and table.strip() in again

    # killed when the first file of each stage appears, a moment later each time
    stages = ["distilled.jsonl", "distilled.jsonl.scores.jsonl", "seed/answers.jsonl",
              "seed/evaluation.jsonl", "lr0.01-r2-rows8/seed0/sft/metrics.jsonl",
              "lr0.01-r2-rows8/seed0/sdft/evaluation.jsonl",
              "lr0.01-r3-rows8/seed0/sft/retention.jsonl",
              "lr0.01-r2-rows8-mix0.5/seed1/sdft/checkpoints"]  # fmt: skip
    for i, stage in enumerate(stages):
        process = subprocess.Popen([*command, "--out", str(killed)], stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        while process.poll() is None and not (killed / stage).exists():
            time.sleep(0.005)
        time.sleep(0.01 * (i % 3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"{stage}: the job was over before its kill"
    finish([*command, "--out", str(killed)])
    now = kept(killed)
    assert now["table.txt"] == before["table.txt"]
    # answers stand in the order in which they were finished
    different = [
        name
        for name in before
        if sorted(now[name].splitlines()) != sorted(before[name].splitlines())
    ]
    assert not different and not [x for x in now if x not in before and ".partial" not in x]


def test_mistakes_get_one_clear_message(command, tmp_path):
    out = ["--out", str(tmp_path / "o")]
    for flags, said in (
        (["--lr", "1e-3,x"], "lr '1e-3,x': expected numbers joined by commas"),
        (["--rank", "8,8"], "rank '8,8'"),
        (["--mix", "0,2"], "mix 2.0: expected a share from 0 to 1"),
        (["--rows-list", "4,99"], "has 9 rows"),
        (["--limit", "3"], "no --limit beside them"),
        (["--seeds", "0"], "seeds 0"),
        (["--lr", "-1"], "lr > 0"),
    ):
        printed = finish([*command, *flags, *out], code=2)
        assert said in printed and "Traceback" not in printed and not (tmp_path / "o").exists()
