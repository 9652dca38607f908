"""AlpacaEval (805 instructions): answers for that tool's judge, which is a paid service

Nothing is scored here. OUT/alpaca_eval.ARM.json is what `alpaca_eval --model_outputs` reads. The
paper's win rates are those of AlpacaEval 1, against text_davinci_003; an installation's default
today is AlpacaEval 2 and gives other numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.evaluate.tasks.base import Item, Task, rows_of
from engine.runtime.files import write_json


def judge(item: Item, answer: str) -> tuple[dict[str, bool], str]:
    """No score."""
    return {}, ""


def load(file: Path | None, paper: bool) -> tuple[list[Item], str]:
    """The instructions."""
    return rows_of(file, answers=False)


def export(items: list[Item], lines: dict[str, dict[str, Any]], arm: str, out: Path) -> Path:
    """Write an arm's answers (by item id) in the tool's format, in the data's order."""
    file = out / f"alpaca_eval.{arm}.json"
    outputs = []
    for item in items:
        instruction, answer = item.messages[-1]["content"], lines[item.id]["answer"]
        outputs.append({"instruction": instruction, "output": answer, "generator": arm})
    write_json(file, outputs)
    return file


ALPACA_EVAL = Task("alpaca_eval", (), load, judge, "alpaca_eval.json", export)
