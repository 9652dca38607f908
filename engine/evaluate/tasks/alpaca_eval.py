"""AlpacaEval (805 instructions): answers for that tool's judge, which is a paid service

Nothing is scored here: `alpaca_eval --model_outputs` reads OUT/alpaca_eval.ARM.json. The paper's
win rates are those of AlpacaEval 1, against text_davinci_003; a new installation uses AlpacaEval 2
by default and gives other numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.evaluate.tasks.base import Item, Task, Verdict, rows_of
from engine.runtime.files import write_json


def judge(item: Item, answer: str) -> Verdict:
    """No score, no reason."""
    return {}, ""


def load(file: Path | None, paper: bool) -> tuple[list[Item], str]:
    """The instructions."""
    return rows_of(file, answers=False)


def export(items: list[Item], lines: dict[str, dict[str, Any]], arm: str, out: Path) -> Path:
    """Write an arm's answers in the tool's format, in the data's order; returns the file.

    lines    of the file of answers, by item id
    """
    file = out / f"alpaca_eval.{arm}.json"
    outputs = []
    for item in items:
        output = {
            "instruction": item.messages[-1]["content"],
            "output": lines[item.id]["answer"],
            "generator": arm,
        }
        outputs.append(output)
    write_json(file, outputs)
    return file


ALPACA_EVAL = Task(
    name="alpaca_eval",
    scorers=(),
    load=load,
    judge=judge,
    file="alpaca_eval.json",
    export=export,
)
