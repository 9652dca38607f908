"""The report: findings, escaping, policy; pages without matplotlib or without a part of the run."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import sys
from pathlib import Path

import pytest

from engine.data.subset import evenly_spaced
from engine.measure.intervals import t_interval
from engine.report import plots
from engine.report.findings import findings, norms_table, result_table, tables_over_seeds
from engine.report.load import load_run, load_runs
from engine.report.page import Html, inline_json, report_job, tag, write_report
from engine.runtime.files import read_jsonl, write_json, write_jsonl
from tests.helpers import programs
from tests.helpers.made_run import make_run

ROOT = Path(__file__).resolve().parents[2]


def change(path: Path, edit) -> None:
    """Rewrite a run's summary."""
    summary = json.loads((path / "summary.json").read_text())
    edit(summary)
    write_json(path / "summary.json", summary)


def test_the_script_writes_the_page_again_or_of_several_runs(tmp_path):
    a = make_run(tmp_path / "x" / "run", 12)
    b = make_run(tmp_path / "y" / "run", 12, seed=1)
    command = [sys.executable, str(ROOT / "scripts" / "report.py")]
    said = programs.run([*command, a], check=True, cwd=tmp_path)
    assert f"report: {a / 'report.html'}" in said.stdout and "12 rows" in said.stdout
    programs.run([*command, a, b], check=True, cwd=tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("5ha256") == 2 and "kernels.adamw.adamw_" in page
    assert "x/run" in page and "y/run" in page and "Settings in which the runs differ" in page
    assert "over 2 seeds" in page  # they differ in nothing else
    wrong = programs.run([*command, tmp_path], cwd=tmp_path)
    assert wrong.returncode == 2 and "holds no summary.json; expected the --out" in wrong.stderr


@pytest.mark.parametrize("opens", [True, False])
def test_open_shows_the_page_or_says_where_it_is(tmp_path, monkeypatch, capsys, opens):
    run = make_run(tmp_path / "run", 3)
    shown = []
    monkeypatch.setattr("webbrowser.open", lambda address: shown.append(address) or opens)
    report_job([run], tmp_path / "new" / "page.html", show=True)
    assert shown == [(tmp_path / "new" / "page.html").as_uri()]
    assert ("no browser could be started here" in capsys.readouterr().out) != opens


def test_a_directory_without_a_run_or_with_a_torn_line_is_refused(tmp_path):
    run = make_run(tmp_path / "run", 3)
    with pytest.raises(ValueError, match="nowhere is no directory"):
        load_runs([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="each named once"):
        load_runs([run, tmp_path / "." / "run"])
    with (run / "distilled.jsonl").open("a") as file:
        file.write('{"id": "torn')
    with pytest.raises(ValueError, match="distilled.jsonl:4: bad JSON"):
        report_job([run], None, show=False)
    assert not (run / "report.html").exists()


def test_data_block_and_elements_escape_all_markup():
    value = {"</script>": "<!-- <script> &amp; ]]> \u2028 \ud800"}
    block = inline_json(value)
    assert not set("<>&") & set(block) and json.loads(block) == value
    with pytest.raises(ValueError):
        inline_json(math.nan)
    assert tag("a", "<b>", Html("<i>"), title='"<') == '<a title="&quot;&lt;">&lt;b&gt;<i></a>'


def test_the_policy_allows_the_pages_own_style_and_script_and_nothing_else(tmp_path):
    run = make_run(tmp_path / "run", 3)
    write_report([run], run / "report.html")
    page = (run / "report.html").read_text()

    def source(element: str) -> str:
        (inside,) = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = hashlib.sha256(inside.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    (policy,) = re.findall('Content-Security-Policy" content="(.*?)"', page)
    rules = [rule.strip().split(" ", 1) for rule in html.unescape(policy).split(";")]
    assert dict(rules) == {
        "default-src": "'none'",
        "style-src": source("style"),
        "script-src": source("script"),
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


def test_acceptance_counts_every_try_of_a_cascade(tmp_path):
    run = load_run(make_run(tmp_path / "run", 3), "run")
    fit = {"status": "accepted", "kept": True}
    run.rows[0] |= fit | {"tries": {"unguided": ["banned", "empty"], "guided": ["accepted"]}}
    run.rows[1] |= fit | {"tries": {"unguided": ["accepted", "accepted"]}}
    run.rows[2] |= {"stage": "reference", "status": "not_asked", "kept": False, "tries": {}}
    header, *lines = plots._acceptance(run).table
    assert header == ["Stage", "Status", "Fit", "Tries", "Share"]
    assert sorted(lines) == [
        ["guided", "accepted", "yes", "1", "16.7%"],
        ["reference", "not_asked", "no", "1", "16.7%"],
        ["unguided", "accepted", "yes", "2", "33.3%"],
        ["unguided", "banned", "no", "1", "16.7%"],
        ["unguided", "empty", "no", "1", "16.7%"],
    ]


def test_without_matplotlib_the_page_has_its_tables_and_says_so(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", 12)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = write_report([run], run / "report.html")
    assert "pip install -e '.[report]'" in said and f"python scripts/report.py {run}" in said
    page = (run / "report.html").read_text()
    assert "<svg" not in page and "Training loss: the numbers" in page and "need matplotlib" in page


def test_parts_that_a_run_lacks_are_left_out_of_the_page(tmp_path):
    """Nothing held out, nothing scored, nothing collected; a KL that is no number."""
    run = make_run(tmp_path / "run", 12)
    optional = "evaluation.jsonl distilled.jsonl.scores.jsonl tokens.jsonl answers.jsonl"
    for name in optional.split():
        (run / name).unlink()
    lines = read_jsonl(run / "retention.jsonl")
    lines[0]["kl"] = math.nan
    write_jsonl(run / "retention.jsonl", lines)
    change(run, lambda s: s.update(evaluation={}, likelihood=None))
    change(run, lambda s: s.pop("model"))
    write_report([run], run / "report.html")
    page = (run / "report.html").read_text()
    assert "no held-out rows were given" in page and "Likelihood under the seed" not in page
    assert ", loss " not in page, "the loss is sft, as in all runs of older versions"
    # a run without a verifier has the references' NLL alone
    score = {"n": 0, "right": 0, "truncated": 0, "nll": 1.5, "share": math.nan}
    scores = dict.fromkeys(("seed", "sft", "sdft"), score)
    change(run, lambda s: s.update(evaluation=scores))
    change(run, lambda s: s["settings"]["TrainConfig"].update(loss="stm:2.5"))
    write_report([run], run / "report.html")
    page = (run / "report.html").read_text()
    assert "NLL per token of the held-out references: seed 1.500" in page
    assert ", loss stm:2.5<" in page


def test_a_run_without_held_out_rows_stands_beside_one_that_has_them(tmp_path):
    """Its arms are no points of the overview, and the other run's are, whichever is named first."""
    bare = make_run(tmp_path / "bare", 12)
    change(bare, lambda s: s.update(evaluation={}))
    (bare / "evaluation.jsonl").unlink()
    full = make_run(tmp_path / "full", 12, seed=1)
    for runs in ([bare, full], [full, bare]):
        write_report(runs, tmp_path / "report.html")
        (plot,) = plots.overview(load_runs(runs))
        assert {row[0].split(" · ")[1] for row in plot.table[1:]} == {"full"}
        assert len(plot.table) == 1 + 3


def test_a_difference_is_stated_only_where_it_is_significant(tmp_path):
    run = make_run(tmp_path / "run", 12)
    lines = read_jsonl(run / "evaluation.jsonl")
    for line in lines:
        line["ok"] = line["arm"] == "sft" or line["id"] == "test3"
    write_jsonl(run / "evaluation.jsonl", lines)
    drift = read_jsonl(run / "retention.jsonl")
    for i, line in enumerate(drift):
        line["kl"] = (i // 2 + 1) * {"sft": 2, "sdft": 1}[line["arm"]]
    write_jsonl(run / "retention.jsonl", drift)
    found = dict(findings(load_run(run, "run")))
    assert "SFT is better than seed (p < 0.001). SFT is better than SDFT" in found["Target"]
    assert "No difference is seen between seed and SDFT (p = 1.00)" in found["Target"]
    assert "SDFT forgot less" in found["Retention"]
    write_jsonl(run / "retention.jsonl", [line | {"kl": 3.0} for line in drift])
    found = dict(findings(load_run(run, "run")))
    assert "No difference is seen (SFT − SDFT: +0.0000" in found["Retention"]


def test_drift_on_the_task_and_the_updates_norms_are_shown_where_they_were_measured(tmp_path):
    run = make_run(tmp_path / "run", 12)
    loaded = load_run(run, "run")
    found = dict(findings(loaded))
    kl = loaded.summary["retention_task"]
    expected = (
        "20 held-out prompts of the task, where RL's Razor (2509.04259) expects what predicts"
    )
    assert expected in found["Retention"] and "SDFT moved less" in found["Retention"]
    assert f"SFT {kl['sft']['kl']:.4f}, SDFT {kl['sdft']['kl']:.4f}. " in found["Retention"]
    head, seed, sft, sdft = result_table(loaded)
    assert head[7:9] == ["KL, task", "Update norm"] and seed[7:9] == ["–", "–"]
    assert sft[7:9] == [f"{kl['sft']['kl']:.4f}", "2.000 (4.00%)"] and sdft[8] == "1.000 (2.00%)"
    names = [row[0] for row in norms_table(loaded)[1:]]
    assert names == ["all adapted modules", "self_attn.q_proj", "self_attn.v_proj", "layer 0",
                     "layer 1"]  # fmt: skip
    write_report([run], run / "report.html")
    page = (run / "report.html").read_text()
    assert "How far the weights moved" in page and "self_attn.q_proj" in page
    # a run of an older commit measured neither
    (run / "retention_task.jsonl").unlink()
    change(run, lambda s: (s.pop("retention_task"), s.pop("update_norms")))
    older = load_run(run, "run")
    assert "RL's Razor" not in dict(findings(older))["Retention"]
    assert norms_table(older) is None and result_table(older)[2][7:9] == ["–", "–"]
    write_report([run], run / "report.html")


def test_intervals_over_seeds_only_of_runs_that_differ_in_nothing_else(tmp_path):
    a = make_run(tmp_path / "a", 6, seed=0)
    b = make_run(tmp_path / "b", 6, seed=1)
    c = make_run(tmp_path / "c", 6, seed=2)
    change(c, lambda s: s["settings"]["TrainConfig"].update(lr=1.0))
    ((group, table),) = tables_over_seeds(load_runs([a, b, c]))
    assert [run.name for run in group] == ["a", "b"]
    summaries = [json.loads((path / "summary.json").read_text()) for path in (a, b)]
    mean, low, high = t_interval([s["retention"]["sft"]["kl"] for s in summaries])
    assert table[2][3] == f"{mean:.4f} ({low:.4f} – {high:.4f})"
    assert table[4][0] == "SDFT − SFT" and tables_over_seeds(load_runs([a, c])) == []


def test_figures_obey_the_policy_and_take_the_pages_colours(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra `report`")
    path = make_run(tmp_path / "run", 40)
    run = load_run(path, "$\\frac{a}{ <b> \x1b &")  # a name that is no mathematics and no XML
    made = plots.overview([run])
    made += plots.plots_of_run(run, "0")
    made += plots.plots_of_run(run, "1")
    drawn = "".join(plots.draw_all(made))
    assert len(made) == 11
    assert " style=" not in drawn and "<style" not in drawn and "<metadata" not in drawn
    assert "#00000" not in drawn and "var(--sdft)" in drawn and drawn.count("</text>") > 100
    ids = re.findall(r' id="([^"]+)"', drawn)
    references = re.findall(r'(?:href="|url\()#([^")]+)', drawn)
    assert len(ids) == len(set(ids)) and set(references) == set(ids)
    assert plots.draw_all(made[:1]) == plots.draw_all(made[:1])  # the same run gives the same page
    both = plots.overview([run, load_run(run.path, "other")])
    assert "$\\frac{a}{ &lt;b&gt; \ufffd &amp;" in plots.svg(both[0])


def test_evenly_spaced_takes_every_nth_from_the_first():
    assert evenly_spaced(range(10), 4) == [0, 2, 5, 7] and evenly_spaced([1, 2], 5) == [1, 2]
    assert evenly_spaced([1, 2], 0) == evenly_spaced([], 3) == []


def test_only_a_newline_ends_a_line(tmp_path):
    """A model may write U+2028 or U+0085, which str.splitlines would cut at."""
    lines = [{"text": "a\u2028b\x85c"}, {"text": ""}]
    write_jsonl(tmp_path / "x.jsonl", lines)
    assert read_jsonl(tmp_path / "x.jsonl") == lines
    (tmp_path / "x.jsonl").write_text("")
    assert read_jsonl(tmp_path / "x.jsonl") == []
    (tmp_path / "x.jsonl").write_text("{}\n{\n")
    with pytest.raises(ValueError, match="x.jsonl:2 is not JSON"):
        read_jsonl(tmp_path / "x.jsonl")
