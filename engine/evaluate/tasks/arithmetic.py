"""GSM8K (1,319 questions) and MultiArith (180): is the last number right?

number  our verifier (verifiers.verify_number): the last number, exactly
paper   the published scorer, mistakes included (paper_rules.scores_number): the last thing that
        looks like an integer; two texts without one are equal

The files are JSON lists of {"question", "answer"}; an answer ends in its number. MultiArith's file
is in no package and not shipped here.
"""

from __future__ import annotations

from pathlib import Path

from engine.evaluate.tasks.base import Item, Task, Verdict, rows_of, with_system
from engine.verify.paper_rules import scores_number
from engine.verify.verifiers import verify_number

PAPER_SYSTEM = (
    "You are an expert in math. Below is a math question. Write a response that appropriately "
    "answers the question. Your final answer should be an integer at the end of your response, "
    "formatted as: The answer is {answer}."
)


def judge(item: Item, answer: str) -> Verdict:
    """Right or wrong by our rule and by the published one; the reason is our rule's."""
    ok, reason = verify_number(item.row_with_reference(), answer)
    scores = {
        "number": ok,
        "paper": scores_number(item.reference, answer),
    }
    return scores, reason


def load(file: Path | None, paper: bool) -> tuple[list[Item], str]:
    """The plain questions, as in training; with `paper` after the paper's system message."""
    items, digest = rows_of(file)
    if paper:
        items = with_system(items, PAPER_SYSTEM)
    return items, digest


GSM8K = Task(
    name="gsm8k",
    scorers=("number", "paper"),
    load=load,
    judge=judge,
    file="gsm8k_test.json",
    paper_format="llama2",
)
MULTIARITH = Task(
    name="multiarith",
    scorers=("number", "paper"),
    load=load,
    judge=judge,
    file="multiarith_test.json",
    paper_format="llama2",
)
