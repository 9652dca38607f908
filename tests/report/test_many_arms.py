"""The page of a run with other arms than SFT and SDFT: names, colours, words, lines of scales."""

from __future__ import annotations

import json
import re

import pytest

from engine.report import plots
from engine.report.findings import findings, result_table
from engine.report.load import load_run
from engine.report.page import write_report
from engine.runtime.files import read_jsonl, write_jsonl
from tests.helpers.made_arms import run_of_four_arms


def test_the_page_names_and_colours_every_arm_and_says_what_nothing_beats(tmp_path):
    path = run_of_four_arms(tmp_path / "run")
    write_report([path], path / "report.html")
    page = (path / "report.html").read_text()
    run = load_run(path, "run")
    assert [row[0] for row in result_table(run)[1:]] == [
        "seed", "SFT", "STM 2.5", "SFT x0.5", "self-output",
    ]  # fmt: skip
    assert run.inks() == {
        "seed": "seed", "sft": "sft", "stm:2.5": "arm1", "sft@0.5": "sft", "self": "arm2",
    }  # fmt: skip
    for ink, name in (("seed", "seed"), ("arm1", "STM 2.5"), ("sft", "SFT x0.5")):
        assert f'<th scope="row" class="ink {ink}">{name}</th>' in page
        assert f".ink.{ink} {{ color: var(--{ink}); }}" in page and f"--{ink}:" in page
    assert "At equal right answers, 50.0% (seed 20.0%)" in page
    assert "Nothing beats &lt;SFT&gt;. Its cost." in page and "What each arm costs alone" in page
    assert "of all tuned models" in page
    arms = re.search(r'"arms":(\[\[.*?\]\])', page)[1]
    assert json.loads(arms)[2] == ["stm:2.5", "STM 2.5", "arm1"]
    # the training of a scale is that of its arm
    steps = {row[0]: row[10] for row in result_table(run)[1:]}
    assert steps["SFT x0.5"] == steps["SFT"] == "60" and steps["seed"] == "–"


def test_differences_are_corrected_for_their_number(tmp_path):
    """7 of 20 questions won by one arm over the seed: p = 2 / 2^7, times the 7 pairs 0.11."""
    path = run_of_four_arms(tmp_path / "run")
    lines = read_jsonl(path / "evaluation.jsonl")
    for line in lines:
        line["ok"] = line["arm"] == "self" and int(line["id"].removeprefix("test")) < 7
    write_jsonl(path / "evaluation.jsonl", lines)
    target = dict(findings(load_run(path, "run")))["Target"]
    assert "seed and self-output (p = 0.11)" in target and "is better" not in target
    assert "Holm's correction for 7 pairs" in target
    for line in lines:
        line["ok"] = line["arm"] == "self" and int(line["id"].removeprefix("test")) < 12
    write_jsonl(path / "evaluation.jsonl", lines)
    target = dict(findings(load_run(path, "run")))["Target"]
    assert "self-output is better than seed (p = 0.003)" in target


def test_drift_is_told_of_every_arm_against_the_first(tmp_path):
    path = run_of_four_arms(tmp_path / "run")
    lines = read_jsonl(path / "retention.jsonl")
    per_token = {"sft": 0.2, "stm:2.5": 0.1, "sft@0.5": 0.2, "self": 0.3}
    for line in lines:
        line["kl"] = per_token[line["arm"]] * line["tokens"]
    write_jsonl(path / "retention.jsonl", lines)
    retention = dict(findings(load_run(path, "run")))["Retention"]
    assert "STM 2.5 forgot less than SFT (SFT − STM 2.5: +0.1000 to +0.1000)" in retention
    assert "SFT forgot less than self-output (SFT − self-output: −0.1000 to −0.1000)" in retention
    assert "No difference is seen between SFT and SFT x0.5." in retention


def test_every_way_has_a_marker_and_scales_of_a_training_are_joined(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra `report`")
    run = load_run(run_of_four_arms(tmp_path / "run"), "run")
    (overview,) = plots.overview([run])
    assert [row[0] for row in overview.table[1:]] == [
        "seed", "SFT", "STM 2.5", "SFT x0.5", "self-output",
    ]  # fmt: skip
    drawn = plots.svg(overview)
    assert "var(--arm1)" in drawn and "var(--arm2)" in drawn and "#00001" not in drawn
    calls = []

    class Axes:
        def plot(self, x, y, **how):
            calls.append((len(x), how["color"]))

    plots._join_scales(Axes(), plots._points(run, several=False))
    assert calls == [(2, plots.INK["sft"])]
    by_name = {plot.name: plot for plot in plots.plots_of_run(run, "0")}
    assert by_name["loss-0"].table[0] == ["Step", "SFT", "STM 2.5", "self-output"]
    assert by_name["drift-0"].table[0][1:] == ["SFT", "STM 2.5", "self-output"]
