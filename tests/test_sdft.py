"""The main job and the scripts a person types, end to end on a tiny random model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.evaluate import Score
from engine.log import read_jsonl
from model.llama import Llama
from model.lora import Lora

ROOT = Path(__file__).resolve().parent.parent


def script(name, *args, code=0):
    """Run scripts/NAME.py from another directory; returns what it printed."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout + (done.stderr if code else "")


@pytest.fixture
def tiny(tiny_llama_dir):
    return tiny_llama_dir(tokenizer=True)


@pytest.fixture
def data(tmp_path):
    """Files of word problems: train.json and test.json."""
    for name, first, count in (("train", 1, 8), ("test", 50, 4)):
        rows = [
            {"question": f"What is {i} plus {i}?", "answer": f"The answer is {2 * i}."}
            for i in range(first, first + count)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


FLAGS = ["--max-new-tokens", "8", "--eval-max-new", "6", "--retention-max-new", "4"]
FLAGS += ["--epochs", "1", "--batch-rows", "4", "--rank", "2", "--report-rows", "5"]
FLAGS += ["--report-answers", "3"]


def test_the_main_job(tiny, data, tmp_path):
    out = tmp_path / "run"
    args = ["--model", tiny, "--data", data / "train.json", "--eval-data", data / "test.json"]
    args += ["--verify", "number", "--out", out, *FLAGS]
    printed = script("sdft", *args)
    result = json.loads((out / "summary.json").read_text())
    assert set(result["evaluation"]) == {"seed", "sft", "sdft"} and "KL to seed" in printed
    assert result["evaluation"]["seed"]["n"] == 4
    assert all(0 <= result["retention"][arm]["kl"] < 1 for arm in ("sft", "sdft"))
    assert result["training"]["sft"]["steps"] == result["training"]["sdft"]["steps"] == 2
    assert sum(result["distilled"]["counts"].values()) == 8
    for arm in ("sft", "sdft"):
        Lora.load(out / arm).bind(Llama.from_pretrained(tiny))
    _what_the_report_shows(out, printed)
    # the same command again does nothing again
    files = ["distilled.jsonl", "evaluation.jsonl", "retention.jsonl", "sft/metrics.jsonl"]
    files += ["tokens.jsonl", "answers.jsonl"]
    before = [(out / f).read_bytes() for f in files]
    script("sdft", *args)
    assert [(out / f).read_bytes() for f in files] == before
    again = json.loads((out / "summary.json").read_text())
    assert {k: again[k] for k in ("evaluation", "retention")} == {
        k: result[k] for k in ("evaluation", "retention")
    }
    # and under another setting it is refused, naming it
    said = script("sdft", *args, "--template", "refer", code=2)
    assert "distill.template: 'using' -> 'refer'" in said and "Traceback" not in said


def test_both_arms_are_validated_and_keep_their_best(tiny, data, tmp_path):
    out = tmp_path / "run"
    args = ["--model", tiny, "--data", data / "train.json", "--no-score", "--out", out, *FLAGS]
    looking = ["--val-every", "1", "--val-data", data / "test.json", "--val-prompts", "1"]
    script("sdft", *args, *looking, "--best", "kl")
    result = json.loads((out / "summary.json").read_text())
    for arm in ("sft", "sdft"):
        noted = read_jsonl(out / arm / "validation.jsonl")
        assert [x["step"] for x in noted] == [1, 2] and all(x["nll"] > 0 for x in noted)
        best = result["training"][arm]["best"]
        assert best["metric"] == "kl" and best["value"] == min(x["kl"] for x in noted)
    said = script("sdft", *args, code=2)  # not the same run without it
    assert "validate" in said and "Traceback" not in said
    assert "--best nll needs" in script("sdft", *args, "--best", "nll", code=2)


def _what_the_report_shows(out, printed):
    """The page, the training texts with the likelihoods that score.py found, the tuned answers."""
    assert f"report: {out}/report.html" in printed and "8 rows" in printed
    assert f'"name":"{out.name}"' in (out / "report.html").read_text()
    scores = {s["id"]: s for s in read_jsonl(out / "distilled.jsonl.scores.jsonl")}
    tokens = read_jsonl(out / "tokens.jsonl")
    assert len(tokens) == 5 and len({line["id"] for line in tokens}) == 5
    for line in tokens:
        sft, score = line["sft"], scores[line["id"]]
        assert len(sft["pieces"]) == sft["prompt"] + len(sft["nll"])
        assert sum(sft["nll"]) / len(sft["nll"]) == pytest.approx(score["reference_nll"], abs=1e-3)
        assert "".join(sft["pieces"][sft["prompt"] : -1]).startswith("The answer is")
    lines = read_jsonl(out / "answers.jsonl")
    general = [line for line in lines if "prompt" in line]
    assert {arm: sum(x["arm"] == arm for x in general) for arm in ("sft", "sdft")} == {
        "sft": 3, "sdft": 3}  # fmt: skip
    drift = {}
    for line in read_jsonl(out / "retention.jsonl"):
        kl = line["kl"] / line["tokens"]
        drift[line["prompt"]] = max(kl, drift.get(line["prompt"], 0))
    assert {line["prompt"] for line in general} == set(sorted(drift, key=drift.get)[-3:])
    held_out = [line for line in lines if "id" in line]
    assert len(held_out) == 6 and all(0 <= x["kl"] < x["tokens"] for x in held_out)
    seed = {x["id"]: x for x in read_jsonl(out / "evaluation.jsonl") if x["arm"] == "seed"}
    assert all(x["tokens"] - len(seed[x["id"]]["ids"]) in (0, 1) for x in held_out)


def test_held_out_rows_must_not_be_trained_on(tiny, data, tmp_path):
    train = data / "train.json"
    args = ["--model", tiny, "--data", train, "--eval-data", train, "--out", tmp_path / "x"]
    assert "8 held-out rows are also trained on" in script("sdft", *args, code=2)


def test_the_stages_one_by_one(tiny, data, tmp_path):
    model, train = ["--model", tiny], ["--data", data / "train.json"]
    distilled = tmp_path / "d.jsonl"
    said = script("distill", *model, *train, "--out", distilled, "--max-new-tokens", "8")
    assert "targets that differ" in said and "NLL per token" in said
    run = tmp_path / "sft"
    said = script("train", *model, "--data", distilled, "--target", "reference", "--out", run,
                  "--epochs", "1", "--modules", "all")  # fmt: skip
    assert "LoRA on 14/14 linears" in said
    raw = tmp_path / "raw"  # plain rows give the same adapter as their references
    script("train", *model, *train, "--out", raw, "--epochs", "1", "--modules", "all")
    torch.testing.assert_close(Lora.load(raw).params, Lora.load(run).params, rtol=0, atol=0)
    shown = script("train", *model, "--data", distilled, "--target", "reference", "--show", "1")
    assert "with loss (*)" in shown and "  * " in shown
    test = ["--data", data / "test.json", "--verify", "number"]
    said = script("evaluate", *model, "--adapter", run, *test, "--max-new-tokens", "6",
                  "--out", tmp_path / "e.jsonl")  # fmt: skip
    assert "seed" in said and "sft" in said and "0/4" in said
    said = script("retention", *model, "--adapter", run, "--max-new-tokens", "3",
                  "--out", tmp_path / "r.jsonl")  # fmt: skip
    assert "KL careful" in said and "KL from seed" in said
    said = script("generate", *model, "--prompt", "Hi", "--max-new-tokens", "3", "--adapter", run)
    script("generate", *model, *train, "--samples", "2", "--temperature", "1",
           "--max-new-tokens", "3", "--out", tmp_path / "g.jsonl")  # fmt: skip
    answers = [json.loads(x) for x in (tmp_path / "g.jsonl").read_text().splitlines()]
    assert len(answers) == 16 and {a["sample"] for a in answers} == {0, 1}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "/nowhere", "--data", "x"], "/nowhere"),
        (["--model", "TINY", "--data", "/nowhere.json"], "/nowhere.json"),
        (["--model", "TINY", "--data", "DATA", "--ops", "fast"], "--ops 'fast' is not known"),
        (["--model", "TINY", "--data", "DATA", "--lr", "-1"], "lr > 0"),
        (["--model", "TINY", "--data", "DATA", "--modules", "q_proj,x"], "['x']"),
        (["--model", "TINY", "--data", "DATA", "--verify", "magic"], "magic"),
        (["--model", "TINY", "--data", "DATA", "--columns", "prompt"], "--columns"),
        (["--model", "TINY", "--data", "DATA", "--chat-format", "llama3"], "llama3"),
        (["--model", "TINY", "--data", "DATA", "--rows", "-1"], "rows -1"),
        (["--model", "TINY", "--data", "DATA", "--report-rows", "-1"], "report_rows -1"),
    ],
)
def test_mistakes_get_one_clear_message_before_work_starts(tiny, data, tmp_path, args, said):
    names = {"TINY": str(tiny), "DATA": str(data / "train.json")}
    args = [names.get(a, a) for a in args]
    printed = script("sdft", *args, "--out", tmp_path / "run", code=2)
    assert said in printed and "Traceback" not in printed and "error: " in printed
    assert not (tmp_path / "run").exists()


def test_wilson_interval():
    """Wilson (1927): 8 of 10 gives 0.490 to 0.943."""
    low, high = Score(10, 8, 0, 1.0).interval()
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    low, high = Score(20, 0, 0, 1.0).interval()
    assert low == 0 and 0.15 < high < 0.17
    assert math.isnan(Score(0, 0, 0, 1.0).share)
