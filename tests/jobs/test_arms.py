"""Arms in the study and the main job: kills, what is made once, what is refused, the findings."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from engine.evaluate.arm_grammar import Arm, parse_arms
from engine.jobs.comparison import compare, comparison_record, comparison_text
from engine.jobs.costs import Cost, StageSeconds, cost_table
from engine.jobs.measured import ArmResults, MeasuredRun
from engine.jobs.study_config import Plan, StudyConfig, run_of, settings_of
from engine.measure.general_prompts import PROMPTS
from engine.runtime.files import read_jsonl
from tests.helpers import programs
from tests.helpers.scripts import run_script, write_word_problems

ROOT = Path(__file__).resolve().parents[2]

# --paper-exact has no guard against the random text of a tiny model: its rewrites are accepted
SMALL = ["--verify", "none", "--paper-exact", "--max-new-tokens", "8", "--eval-max-new", "6"]
SMALL += ["--retention-max-new", "3", "--epochs", "1", "--batch-rows", "4", "--threads", "1"]
SMALL += ["--rank", "2", "--lr", "1e-2", "--replay-max-new", "6"]
# the tokens of a random model have perplexities in the hundreds
SIX = "sft,sdft,stm:400,self,replay:0.3,sdft+k3:0.02@0.5"
WITH_TIMES = {"study.json", "metrics.jsonl", "meta.json", "state.json", "costs.json"}


@pytest.fixture
def inputs(chat_dir, tmp_path):
    """--model, --data and --eval-data: 8 rows to train on, 4 held out."""
    write_word_problems(tmp_path)
    data = ["--data", tmp_path / "train.json", "--eval-data", tmp_path / "test.json"]
    return [str(word) for word in ["--model", chat_dir, *data]]


def contents(out):
    """The bytes of every file that holds no time; hidden files are what a kill left."""
    found = {}
    for file in sorted(out.rglob("*")):
        name = file.relative_to(out)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and file.name not in WITH_TIMES and not is_hidden:
            found[str(name)] = file.read_bytes()
    return found


def test_a_study_of_six_arms_killed_eight_times_ends_byte_for_byte_as_undisturbed(inputs, tmp_path):
    flags = [*inputs, *SMALL, "--arms", SIX, "--checkpoints", "1"]
    command = [sys.executable, "-m", "tests.helpers.killed_study", tmp_path, "8", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = programs.run(command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    places = json.loads(done.stdout.splitlines()[-1])["places"]
    assert len(places) == 8 and len({Path(place).name for place in places}) >= 4, places

    whole, killed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert list(whole) == list(killed)
    assert [name for name in whole if whole[name] != killed[name]] == []
    # six trainings of the same number of steps, from one distillation
    adapters = [name for name in whole if name.endswith("adapter_model.safetensors")]
    trained = {Path(name).parts[2] for name in adapters if "checkpoints" not in name}
    assert trained == {"sft", "sdft", "stm-400", "self", "replay-0.3", "sdft+k3-0.02"}
    study = json.loads((tmp_path / "killed" / "study.json").read_text())
    steps = {point["by_seed"][0]["training"]["steps"] for point in study["points"][1:]}
    examples = {p["arm"]: p["by_seed"][0]["training"]["examples"] for p in study["points"][1:]}
    assert steps == {2} and examples["sft"] == 8 and examples["replay:0.3"] == 11
    # the seed's likelihoods are there once for the references and once for the rewrites
    assert len([name for name in whole if name.startswith("seed-nll") and "meta" not in name]) == 2
    other = json.loads((tmp_path / "whole" / "study.json").read_text())
    for measure, goal in study["equal_target"].items():
        for part in ("seed", "target", "ways", "pairs", "unbeaten", "table"):
            assert goal[part] == other["equal_target"][measure][part]
    # tokens are the same in every run; seconds of a stage that was killed at its end are not known
    for way, cost in study["costs"].items():
        for part in ("generated", "scored", "trained"):
            assert cost[part] == other["costs"][way][part]
        assert cost["train_seconds"] > 0 and other["costs"][way]["seconds"] > 0
    assert study["costs"]["stm:400"]["scored"] > 0 == study["costs"]["sft"]["scored"]
    assert study["costs"]["self"]["generated"] > 0 == study["costs"]["stm:400"]["generated"]


# ---- the main job


def test_a_study_goes_on_in_a_copy_without_adapters(inputs, tmp_path):
    """Ends as one that kept them; a point that was never measured is refused by name."""
    flags = [*inputs, *SMALL, "--arms", "sft,stm:400", "--lr", "1e-2,1e-3"]
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    run_script("pareto", *flags, "--scales", "0.5,1", "--out", whole)
    expected = contents(whole)
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "lr0.001-r2-rows8")  # not trained yet
    (copy / "table.txt").unlink()
    for weights in copy.rglob("adapter_model.safetensors"):
        weights.unlink()
    run_script("pareto", *flags, "--scales", "0.5,1", "--out", copy)
    found = contents(copy)
    assert all(found[name] == expected[name] for name in found) and "table.txt" in found
    # of the first rate nothing came back, the second was trained as usual
    gone = {Path(name).name for name in expected if name not in found}
    assert gone == {"adapter_model.safetensors"}
    assert {Path(name).parts[0] for name in expected if name not in found} == {"lr0.01-r2-rows8"}

    refused = run_script("pareto", *flags, "--scales", "0.25,0.5,1", "--out", copy, code=2)
    assert "sft/update_norms.json: no norm of sft@0.25, and the adapter was deleted" in refused
    measured = copy / "lr0.01-r2-rows8" / "seed0" / "sft" / "retention.jsonl"
    lines = measured.read_text().splitlines(keepends=True)
    measured.write_text("".join(lines[:-1]))
    refused = run_script("pareto", *flags, "--scales", "0.5,1", "--out", copy, code=2)
    assert "retention.jsonl: no measurement of sft" in refused and "on 1 of 64 items" in refused


def test_the_main_job_takes_arms_and_further_ones_join_it(inputs, tmp_path):
    out = tmp_path / "run"
    flags = [*inputs, *SMALL, "--report-rows", "2", "--report-answers", "2", "--out", out]
    first = run_script("sdft", *flags, "--arms", "sft,sft@0.5")
    assert "at equal" not in first  # two scales of one way are no two ways
    before = {name: (out / name).read_bytes() for name in ("sft/adapter_model.safetensors",)}
    lines = read_jsonl(out / "retention.jsonl")
    longer = ["--arms", "sft,dft,sft@0.5,rft%5e-3", "--scales", "0.5"]
    printed = run_script("sdft", *flags, *longer)
    assert {name: (out / name).read_bytes() for name in before} == before
    # the lines of the first arms are kept, and those of the others stand beside them
    after = read_jsonl(out / "retention.jsonl")
    assert [line for line in after if line in lines] == lines and len(after) == 3 * len(lines)
    result = json.loads((out / "summary.json").read_text())
    names = ["sft", "dft", "sft@0.5", "rft%0.005", "dft@0.5", "rft@0.5%0.005"]
    assert list(result["retention"]) == list(result["update_norms"]) == names
    assert list(result["evaluation"]) == ["seed", *names]
    assert list(result["training"]) == list(result["costs"]) == ["sft", "dft", "rft%0.005"]
    titles = ["seed", "SFT", "DFT", "SFT x0.5", "RFT lr 0.005", "DFT x0.5", "RFT x0.5 lr 0.005"]
    assert list(result["arms"].values()) == titles
    halves = [result["update_norms"][arm]["norm"] for arm in ("sft@0.5", "sft")]
    assert halves[0] == pytest.approx(halves[1] / 2)
    metas = [json.loads((out / arm / "meta.json").read_text()) for arm in ("sft", "dft")]
    losses = [meta["settings"]["train"]["loss"] for meta in metas]
    assert losses == ["sft", "dft"] and metas[0]["summary"]["steps"] == metas[1]["summary"]["steps"]
    meta = json.loads((out / "rft-lr0.005" / "meta.json").read_text())
    assert meta["settings"]["train"]["lr"] == 5e-3
    for text in (printed, (out / "table.txt").read_text()):
        assert "RFT lr 0.005" in text and "what each arm costs alone:" in text
        assert "at equal held-out NLL" in text and "10,000 bootstrap draws" in text
    goal = result["equal_target"]["nll"]
    assert [way["way"] for way in goal["ways"]] == ["sft", "dft", "rft"]
    assert [way["points"] for way in goal["ways"]] == [2, 2, 2] and goal["untested"] == []
    page = (out / "report.html").read_text()
    assert "At equal held-out NLL" in page and "What each arm costs alone" in page
    assert '["sft@0.5","SFT x0.5","sft"]' in page and '["dft","DFT","arm1"]' in page
    # an adapter that is another one now is refused by name
    meta = json.loads((out / "retention.jsonl.meta.json").read_text())
    meta["adapters"]["sft"] = "another"
    (out / "retention.jsonl.meta.json").write_text(json.dumps(meta))
    printed = run_script("sdft", *flags, "--arms", "sft,dft", code=2)
    assert "retention.jsonl was begun with other settings" in printed and "adapters.sft" in printed


def test_what_no_arm_can_be_is_refused_before_anything_is_made(inputs, tmp_path):
    general = tmp_path / "general.json"
    general.write_text(json.dumps([{"instruction": PROMPTS[0][1], "output": ""}]))
    held_out = tmp_path / "test.json"  # --eval-data
    flags = [*inputs, *SMALL, "--out", tmp_path / "x"]
    for script, arms, said in (
        ("sdft", ["--arms", "sft,stm:-1"], "arm 'stm:-1': loss 'stm:-1': expected stm:TAU"),
        ("sdft", ["--arms", "sft,sdft,sft+sft"], "'sft+sft' and 'sft' are the same arm"),
        ("sdft", ["--arms", "sft@11"], "scale '11': expected a number above 0 and at most 10"),
        ("pareto", ["--arms", "sft,slow"], "'slow' is no method and no loss"),
        ("pareto", ["--scales", "0,1"], "scale '0'"),
        ("pareto", ["--checkpoints", "-1"], "checkpoints -1"),
        ("pareto", ["--arms", "self", "--cascade", "guided:2"], "paper_exact with cascade"),
        ("pareto", ["--arms", "sft,replay:0.2", "--replay", general], "retention is measured"),
        ("pareto", ["--arms", "sft,replay:0.2", "--replay", held_out], "is the prompt of held-"),
        ("sdft", ["--replay", held_out], "4 of its prompts are those of held-out rows"),
    ):
        printed = run_script(script, *flags, *arms, code=2)
        assert said in printed and "Traceback" not in printed, printed
    assert not (tmp_path / "x").exists()


# ---- what is trained and measured


def test_a_plan_trains_an_arm_once_and_measures_it_at_every_scale_and_checkpoint():
    job = StudyConfig("o", "e", lr="1e-3,1e-4", mix="0,0.5", scales="0.5,1", checkpoints=2)
    arms = parse_arms("sft,sft@0.25,sdft,dft%1e-4")
    plan = Plan(settings_of(job, 9), arms, job, steps={9: 10})
    runs = [(run.setting.name, run.arm.name) for run in plan.runs()]
    assert runs == [
        ("lr0.001-r8-rows9", "sft"),
        ("lr0.001-r8-rows9", "sdft"),
        ("lr0.0001-r8-rows9", "dft"),
        ("lr0.0001-r8-rows9", "sft"),
        ("lr0.0001-r8-rows9", "sdft"),
        ("lr0.001-r8-rows9-mix0.5", "sdft"),  # SFT has no rewrites to mix, dft names its rate
    ]
    names = [point.name for point in plan.points(plan.runs()[0])]
    assert names == ["sft", "sft@0.5", "sft@0.25", "sft step 3", "sft step 6"]
    measured = {point: ["a run"] for run in plan.runs() for point in plan.points(run)}
    first, second, mixed = plan.groups(measured)
    assert [point.arm for point in first if point.listed] == ["sft", "sft@0.25", "sdft", "dft"]
    assert [point.arm for point in first][:5] == names and len(first) == 5 + 4 + 4
    assert {point.name for point in second} == {"lr0.0001-r8-rows9"}
    assert mixed[0].name == "lr0.001-r8-rows9"
    run = run_of(plan.settings[0], Arm("sdft"))
    config = plan.save_every(run.setting)
    assert (
        config == 3
        and Plan(plan.settings, arms, StudyConfig("o", "e"), {}).save_every(run.setting) == 0
    )


def test_the_seconds_of_a_stage_are_those_of_all_its_items_over_kills(tmp_path):
    """3 of 12 items in 2 s, then after a restart 6 more in 7 s: 9 s for 9, so 12 s for 12."""
    stages = StageSeconds(tmp_path / "costs.json")
    assert stages.of("distill") is None
    stages.add("distill", 2.0, 3, 12)
    again = StageSeconds(tmp_path / "costs.json")
    again.add("distill", 7.0, 6, 12)
    again.add("distill", 5.0, 0, 12)  # complete: nothing was done in these seconds
    assert again.of("distill") == 12.0 and again.each("distill") == 1.0


def test_costs_add_up_and_say_what_is_not_known():
    known = Cost(100, 20, 3000, 2.0, 0.5, 30.0)
    unknown = Cost(100, 0, 3000, None, 0.0, 30.0)
    assert known.tokens == 3120 and known.seconds == 32.5 and unknown.seconds is None
    assert known.words(with_seconds=True) == (
        "100 tokens generated, 20 scored, 3,000 trained, 32 s"
    )
    rows = cost_table({"sft": known, "sdft+dft": unknown})
    assert rows[1] == ["SFT", "100", "2.0", "20", "0.5", "3000", "30", "32"]
    assert rows[2] == ["SDFT + DFT", "100", "-", "0", "0.0", "3000", "30", "-"]


# ---- the findings


def point(arm, right, kl, rows=20, prompts=8, name="s"):
    """An arm that has the first `right` rows right, and drifted `kl` nats a token everywhere."""
    verdicts = [i < right for i in range(rows)]
    drift = [{"tokens": 10, "kl": 10 * kl, "reverse_kl": 0.0, "agree": 9}] * prompts
    nll = [3.0 - right / 10] * rows
    return ArmResults(name, arm, [MeasuredRun(list("x" * rows), verdicts, nll, [1] * rows, drift)])


COSTS = {
    "sft": Cost(trained=1000, train_seconds=10.0),
    "sdft": Cost(generated=500, trained=1000, generate_seconds=20.0, train_seconds=10.0),
    "stm:2.5": Cost(scored=900, trained=1000, score_seconds=5.0, train_seconds=10.0),
    "dft": Cost(trained=1000),
    "psft:0.2": Cost(scored=900, trained=1000),
}


def curve(arm, right, kl):
    """An arm at scale 1, and at half of it with half of the goodness and a quarter of the KL."""
    return [point(arm, right, kl), point(f"{arm}@0.5", right // 2, kl / 4)]


def test_the_words_say_what_nothing_beats_what_is_seen_and_what_does_not_reach():
    """Seed 0 of 20. SFT 20 at 0.16; SDFT 10 at 0.04; STM 4 at 0.04 and 12 at 0.36; DFT 4.

    The target is SDFT's 10, where SFT has half of its root, 0.2, and STM is three quarters of the
    way from root 0.2 to 0.6: 0.5. PSFT, 11 at 0.09, was measured at scale 1 alone.
    """
    points = [
        *curve("sft", 20, 0.16),
        *curve("sdft", 10, 0.04),
        point("stm:2.5", 12, 0.36),
        point("stm:2.5@0.5", 4, 0.04),
        *curve("dft", 4, 0.001),
        point("psft:0.2", 11, 0.09),
    ]
    right, nll = compare(point("seed", 0, 0.0), points)
    assert right.measure == "right" and right.found.target == 0.5
    assert right.points == [2, 2, 2, 2, 1]
    drifts = [drift and drift.value for drift in right.found.drifts]
    of_psft = (0.3 * 10 / 11) ** 2
    expected = [pytest.approx(value) for value in (0.04, 0.04, 0.25, 0.0, of_psft)]
    assert drifts == [*expected[:3], None, expected[4]]
    assert set(right.unbeaten()) == {"sft", "sdft", "psft:0.2"}
    # Holm over the 3 tested pairs of both measures: a p is at least that many times the smallest
    assert len(right.pairs) == len(nll.pairs) == 3
    seen = [pair for pair in right.pairs if pair.is_seen]
    assert {(pair.less, pair.more) for pair in seen} == {("sft", "stm:2.5"), ("sdft", "stm:2.5")}
    assert all(3 * 2 / 10_001 < pair.p < 0.05 and pair.drift.high < 0 for pair in seen)
    record = comparison_record([right, nll], COSTS)
    words = " ".join(record["right"]["words"])
    assert "Nothing beats" in words and "STM" not in words.split(".")[0]
    cost = "0 tokens generated, 0 scored, 1,000 trained, 10 s"
    assert f"fewest tokens of these takes SFT: {cost}" in words
    assert "SFT forgets less than STM 2.5 (-0.2100" in words and "p 0.00" in words
    assert "No difference seen between" in words
    assert "different scales: SFT and PSFT 0.2, SDFT and PSFT 0.2, STM 2.5 and PSFT 0.2." in words
    assert "DFT (best 20.0%) does not reach it." in words
    assert record["right"]["ways"][3] == {
        "way": "dft", "points": 2, "best": 0.2, "reaches": False, "kl": None, "interval": None,
    }  # fmt: skip
    text = "\n".join(comparison_text([right, nll], COSTS, with_seconds=False))
    assert "at equal right answers, 50.0% (seed 0.0%):" in text and "10 s" not in text
    assert "at equal held-out NLL, 2.000 (seed 3.000):" in text


def test_an_adapter_is_not_told_apart_from_itself_at_other_scales():
    """The same adapter as two ways: at half strength it has nearly all of its goodness, which a
    line from the seed does not see. At the same scales there is no difference; at different ones
    it is not tested, and at full strength alone the words warn."""
    seed = point("seed", 0, 0.0)
    strong, half = point("sft", 20, 0.16), point("sft@0.5", 16, 0.04)
    other, other_half = point("sdft", 20, 0.16), point("sdft@0.5", 16, 0.04)
    worse = point("dft", 15, 0.5)
    right, _ = compare(seed, [strong, half, other, worse])
    assert right.found.drifts[0].value < right.found.drifts[1].value  # by the line alone
    assert right.untested == [("sft", "sdft"), ("sft", "dft")]
    assert [(pair.less, pair.more) for pair in right.pairs] == [("sdft", "dft")]
    right, _ = compare(seed, [strong, half, other, other_half])
    (pair,) = right.pairs
    assert pair.p == 1 and not pair.is_seen and right.untested == [] and not right.has_one_scale
    goals = compare(seed, [strong, other])
    text = "\n".join(comparison_text(goals, COSTS, with_seconds=False))
    assert "measured at full strength alone" in text and "gives each its own curve" in text


def test_nothing_is_compared_where_no_arm_is_better_than_the_seed_or_there_is_one_way():
    points = [point("sft", 5, 0.1), point("dft", 4, 0.2)]
    right, _ = compare(point("seed", 5, 0.0), points)
    text = "\n".join(comparison_text([right], COSTS, with_seconds=False))
    assert right.found.target is None and right.pairs == []
    assert "at equal right answers: no arm is better than the seed" in text
    assert "Nothing to compare" in text and "does not reach" not in text
    assert compare(point("seed", 5, 0.0), [points[0], point("sft@0.5", 5, 0.05)]) == []
