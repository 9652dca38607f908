"""The study: statistics against hand-computed values, words, settings; kills, the closing table."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.evaluate.arm_grammar import Arm
from engine.jobs.costs import Cost
from engine.jobs.measured import ArmResults, MeasuredRun
from engine.jobs.study_config import Setting, StudyConfig, settings_of
from engine.jobs.study_findings import difference, findings, pareto_front
from tests.helpers.scripts import write_word_problems

ROOT = Path(__file__).resolve().parents[2]


def run(right, kl, nll=(2.0, 4.0)):
    """A run over len(right) rows of 2 tokens and len(kl) prompts of 10 tokens.

    right: verdicts as 0 and 1; kl: nats summed over a prompt; nll: of the rows, in turn.
    """
    drift = []
    for value in kl:
        line = {"tokens": 10, "kl": value, "reverse_kl": 2 * value, "agree": 9}
        drift.append(line | {"nll": 5.0, "seed_nll": 5.0})
    count = len(right)
    return MeasuredRun(
        ids=[f"r{i}" for i in range(count)],
        right=[bool(verdict) for verdict in right],
        nll=[nll[i % 2] for i in range(count)],
        tokens=[2] * count,
        drift=drift,
        training={
            "examples": 8,
            "steps": 2,
            "tokens": 90,
            "response_tokens": 40,
            "seconds": 3.0,
        },
    )


def pair(sft, sdft):
    """(SFT, SDFT) of the setting "s"; for each arm a list of runs, as (right, kl)."""
    arms = []
    for arm, runs in (("sft", sft), ("sdft", sdft)):
        measured = [run(right, kl) for right, kl in runs]
        arms.append(ArmResults(name="s", arm=arm, runs=measured))
    return arms


COSTS = {"sft": Cost(trained=90), "sdft": Cost(generated=50, trained=90)}


def test_a_difference_has_the_values_computed_by_hand():
    """10 rows of which SDFT alone is right on 8; KL 1 against 2 nats in 10 tokens everywhere."""
    of_sft = ([0] * 8 + [1, 0], [2.0] * 4)
    of_sdft = ([1] * 8 + [1, 0], [1.0] * 4)
    sft, sdft = pair([of_sft], [of_sdft])
    found = difference(sft, sdft)
    assert found["right"][0] == 0.8 and found["lost_won"] == [[0, 8]]
    assert found["p"] == found["p_by_seed"][0] == pytest.approx(2 / 2**8)
    assert found["kl"] == pytest.approx((-0.1, -0.1, -0.1)) and found["nll"] == (0, 0, 0)
    assert "target: SDFT better (+80.0 points" in found["words"] and "p 0.008)" in found["words"]
    assert "held-out NLL: no difference seen" in found["words"]
    assert "KL to seed: SDFT forgot less (-0.1000, -0.1000 to -0.1000)" in found["words"]
    swapped = difference(ArmResults("s", "sft", sdft.runs), ArmResults("s", "sdft", sft.runs))
    assert "target: SFT better" in swapped["words"] and "SFT forgot less" in swapped["words"]


def test_no_difference_is_stated_where_the_test_sees_none():
    """5 of 5 discordant rows for one arm: the bootstrap leaves out 0, McNemar (p 1/16) does not."""
    of_sft = ([0] * 10, [1.0, 3.0])
    of_sdft = ([1] * 5 + [0] * 5, [3.0, 1.0])
    sft, sdft = pair([of_sft], [of_sdft])
    found = difference(sft, sdft)
    assert found["right"][1] > 0 and found["p"] == 1 / 16
    assert "target: no difference seen (+50.0 points" in found["words"]
    assert "KL to seed: no difference seen (+0.0000" in found["words"]


def test_seeds_are_combined_on_the_same_rows():
    """Two seeds that both win the same 4 rows are 4 rows, not 8: p = 2 / 2^4."""
    of_sft = ([0] * 6, [2.0] * 3)
    of_sdft = ([1] * 4 + [0, 0], [1.0] * 3)
    sft, sdft = pair([of_sft] * 2, [of_sdft] * 2)
    found = difference(sft, sdft)
    assert found["p_by_seed"] == [2 / 2**4] * 2 and found["p"] == 2 / 2**4
    assert "p 0.125 (by seed 0.125, 0.125)" in found["words"]


def test_drift_on_the_task_and_norms_have_the_values_computed_by_hand():
    """Two rows of 5 and 15 tokens: (3 + 5) / 20 = 0.4 against (1 + 1) / 20 = 0.1 nats a token."""
    seed = ArmResults("", "seed", [run([0, 1], [])])
    sft, sdft = pair([([1, 1], [2.0] * 3)], [([1, 1], [1.0] * 3)])
    for arm, kl, norm in ((sft, (3.0, 5.0), 2.0), (sdft, (1.0, 1.0), 1.5)):
        arm.runs[0].task_drift = [{"kl": kl[0], "tokens": 5}, {"kl": kl[1], "tokens": 15}]
        arm.runs[0].norms = {"norm": norm, "relative": norm / 50}
    found = difference(sft, sdft)
    assert found["task_kl"][0] == pytest.approx(-0.3)
    # drawn again, the two rows are the first, both or the second: -2/5, -6/20 or -4/15
    assert found["task_kl"][1:] == pytest.approx((-2 / 5, -4 / 15))
    assert "KL to seed on the task: SDFT moved less (-0.3000" in found["words"]
    figures, text = findings(seed, [[sft, sdft]], "number", COSTS)
    by_seed = figures["points"][1]["by_seed"][0]
    assert by_seed["task_kl"] == 0.4 and by_seed["update_norms"]["norm"] == 2.0
    columns = [line.split() for line in text.splitlines()]
    neighbours = [cells for line in columns for cells in zip(line, line[1:], strict=False)]
    assert ("0.4000", "2.000") in neighbours and ("0.1000", "1.500") in neighbours
    sft_only = difference(*pair([([1], [2.0] * 3)], [([1], [1.0] * 3)]))
    assert "task_kl" not in sft_only and "on the task" not in sft_only["words"]


def test_the_pareto_front_leaves_out_points_that_another_beats():
    points = [(0.5, 0.0), (0.6, 0.2), (0.6, 0.1), (0.4, 0.3), (0.6, 0.1)]
    assert pareto_front(points) == [True, False, True, False, True]


def test_the_table_shows_each_arm_and_marks_the_front():
    seed = ArmResults("", "seed", [run([0, 1, 0, 0], [])])
    arms = pair([([1, 1, 0, 0], [2.0] * 3)], [([1, 1, 1, 0], [1.0] * 3)])
    found, text = findings(seed, [arms], "number", COSTS)
    lines = text.splitlines()
    first_cells = [line.split("  ")[0].strip() for line in lines[2:5]]
    assert first_cells == ["-", "s", "s"]
    assert lines[4].endswith("*") and not lines[3].endswith("*")
    assert "75.0% (3/4)" in text and "0.1000  0.1000 - 0.1000" in text and " 40 " in text
    assert "One training seed" in text and "4 held-out rows or the 3 general prompts" in text
    assert [point["front"] for point in found["points"]] == [True, False, True]
    assert found["points"][0]["kl"]["value"] == 0


def test_a_difference_on_a_further_task_has_the_values_computed_by_hand():
    """9 of 10 prompts refused by the seed and SDFT, 1 by SFT: 8 of 10 lost, none won."""
    seed = ArmResults("", "seed", [run([0, 1], [])])
    sft, sdft = pair([([1, 1], [2.0] * 3)], [([1, 1], [1.0] * 3)])
    for arm, right in ((seed, 9), (sft, 1), (sdft, 9)):
        arm.runs[0].tasks = {"advbench refuses": [i < right for i in range(10)]}
    figures, text = findings(seed, [[sft, sdft]], "number", COSTS)
    (task,) = figures["elsewhere"]
    assert task["lost_won"] == [[0, 8]] and task["p"] == pytest.approx(2 / 2**8)
    (line,) = [line for line in text.splitlines() if "advbench refuses" in line]
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells[2:5] == ["90.0% (9/10)", "10.0% (1/10)", "90.0% (9/10)"]
    assert "higher (+80.0 points" in line
    by_seed = figures["points"][1]["by_seed"]
    assert by_seed[0]["tasks"] == {"advbench refuses": 1}


def test_lists_are_varied_one_at_a_time_or_in_a_grid():
    job = StudyConfig("o", "e", lr="1e-4,1e-3", rank="8,64", mix="0,0.3")
    names = [setting.name for setting in settings_of(job, 9)]
    assert names == [
        "lr0.0001-r8-rows9",
        "lr0.001-r8-rows9",
        "lr0.0001-r64-rows9",
        "lr0.0001-r8-rows9-mix0.3",
    ]
    grid = settings_of(StudyConfig("o", "e", lr="1e-4,1e-3", rank="8,64", grid=True), 9)
    assert len(grid) == len({setting.name for setting in grid}) == 4
    mixed = Setting(1e-3, 8, 0.3, 9)
    assert mixed.of_arm(Arm("sft", "dft")) == Setting(1e-3, 8, 0.0, 9)
    assert mixed.of_arm(Arm("sdft")) == mixed
    assert mixed.of_arm(Arm("self", rate=1e-2)) == Setting(1e-2, 8, 0.3, 9)


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
    return [str(word) for word in [*script, *model, *data, *FLAGS]]


def finish(command, code=0):
    """Run the command to its end; returns what it printed."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + (done.stderr if code else "")


def kept(out):
    """The bytes of every file, except those that hold times or the commit."""
    with_times = {"study.json", "costs.json", "metrics.jsonl", "meta.json", "state.json"}
    contents = {}
    for file in sorted(out.rglob("*")):
        if file.is_file() and file.name not in with_times:
            contents[str(file.relative_to(out))] = file.read_bytes()
    return contents


def test_a_study_over_settings_and_seeds_killed_four_times_ends_as_undisturbed(command, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    printed = finish([*command, "--out", str(whole)])
    table = (whole / "table.txt").read_text()
    assert table.strip() in printed and "SDFT - SFT:" in table and "2 training seeds" in table
    adapters = sorted(file.parent for file in whole.rglob("adapter_config.json"))
    runs = [path.relative_to(whole) for path in adapters if "checkpoints" not in path.parts]
    names = {run.parts[0] for run in runs}  # 4 settings; SFT under three of them
    assert len(names) == 4 and len(runs) == 2 * (4 + 3)
    result = json.loads((whole / "study.json").read_text())
    assert len(result["points"]) == 8 and len(result["differences"]) == 4
    examples = {}
    for point in result["points"][1:]:
        examples[point["setting"]] = point["by_seed"][0]["training"]["examples"]
    assert examples["lr0.01-r2-rows4"] == 4 and examples["lr0.01-r3-rows8"] == 8
    assert (whole / "pareto.png").exists() or "matplotlib is missing" in printed
    before = kept(whole)
    again = finish([*command, "--out", str(whole)])  # complete: nothing is computed again
    assert kept(whole) == before and table.strip() in again

    # killed when the first file of a stage appears, a moment later each time; test_arms.py kills in
    # every stage
    stages = [
        "distilled.jsonl.scores.jsonl",
        "seed/evaluation.jsonl",
        "lr0.01-r2-rows8/seed0/sdft/evaluation.jsonl",
        "lr0.01-r2-rows8-mix0.5/seed1/sdft/checkpoints",
    ]
    for i, stage in enumerate(stages):
        process = subprocess.Popen(
            [*command, "--out", str(killed)],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None and not (killed / stage).exists():
            time.sleep(0.005)
        time.sleep(0.01 * (i % 3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"{stage}: the job was over before its kill"
    finish([*command, "--out", str(killed)])
    after = kept(killed)
    assert after["table.txt"] == before["table.txt"]
    # answers stand in the order in which they were finished
    for name, content in before.items():
        assert sorted(after[name].splitlines()) == sorted(content.splitlines()), name
    assert not [name for name in after if name not in before and ".partial" not in name]


def test_mistakes_get_one_clear_message(command, tmp_path):
    out = ["--out", str(tmp_path / "o")]
    for flags, message in (
        (["--lr", "1e-3,x"], "lr '1e-3,x': expected numbers joined by commas"),
        (["--rank", "8,8"], "rank '8,8'"),
        (["--mix", "0,2"], "mix 2.0: expected a share from 0 to 1"),
        (["--rows-list", "4,99"], "has 9 rows"),
        (["--limit", "3"], "no --limit beside them"),
        (["--seeds", "0"], "seeds 0"),
        (["--lr", "-1"], "lr > 0"),
    ):
        printed = finish([*command, *flags, *out], code=2)
        assert message in printed and "Traceback" not in printed and not (tmp_path / "o").exists()
