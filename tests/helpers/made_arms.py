"""A made run (made_run.py) with other arms than SFT and SDFT, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path

from engine.evaluate.arm_grammar import title_of
from engine.runtime.files import read_jsonl, write_json, write_jsonl
from tests.helpers.made_run import make_run

ARMS = ["sft", "stm:2.5", "sft@0.5", "self"]  # made of the lines of sft and sdft, in turn


def run_of_four_arms(path: Path) -> Path:
    """A made run whose lines are those of SFT and SDFT under the names of ARMS."""
    make_run(path, 12)
    source = {"sft": "sft", "stm:2.5": "sdft", "sft@0.5": "sdft", "self": "sft"}
    for name in ("evaluation.jsonl", "retention.jsonl", "answers.jsonl"):
        lines = read_jsonl(path / name)
        made = [line for line in lines if line["arm"] == "seed"]
        for arm in ARMS:
            made += [line | {"arm": arm} for line in lines if line["arm"] == source[arm]]
        write_jsonl(path / name, made)
    metrics = read_jsonl(path / "sft" / "metrics.jsonl")
    for folder in ("stm-2.5", "self"):
        (path / folder).mkdir()
        write_jsonl(path / folder / "metrics.jsonl", metrics)
    summary = json.loads((path / "summary.json").read_text())
    for part in ("evaluation", "retention"):
        seed = {"seed": summary[part]["seed"]} if part == "evaluation" else {}
        summary[part] = seed | {arm: summary[part][source[arm]] for arm in ARMS}
    summary["training"] = {arm: summary["training"]["sft"] for arm in ("sft", "stm:2.5", "self")}
    summary["arms"] = {arm: title_of(arm) for arm in ["seed", *ARMS]}
    goal = {"title": "at equal right answers, 50.0% (seed 20.0%):", "table": [["arm"], ["SFT"]]}
    summary["equal_target"] = {"right": goal | {"words": ["Nothing beats <SFT>.", "Its cost."]}}
    summary["cost_table"] = [["arm", "seconds"], ["SFT", "3"]]
    write_json(path / "summary.json", summary)
    return path
