"""GSM8K (1,319 questions) and MultiArith (180): is the last number right?

number  our verifier: the last number, exactly (verifiers.verify_number)
paper   the published scorer, mistakes included: the last thing that looks like an integer, "no
        number" and "no integer" being the same sentinel, so that two of them are equal

Files are JSON of {"question", "answer"}, the answer ending in its number. MultiArith's is in no
package and not shipped here.
"""

from __future__ import annotations

import re
from pathlib import Path

from engine.data.rows import Row
from engine.evaluate.tasks.base import Item, Task, rows_of, with_system
from engine.verify.verifiers import verify_number

PAPER_SYSTEM = (
    "You are an expert in math. Below is a math question. Write a response that appropriately "
    "answers the question. Your final answer should be an integer at the end of your response, "
    "formatted as: The answer is {answer}."
)
INVALID = "-999999999"
_PAPER_NUMBER = re.compile(r"-?\d+(?:[,\s]\d+)*(?:\.\d+)?")


def paper_integer(text: str) -> str:
    """The last integer by the published rule: digits that only a space or comma parts are one
    number; INVALID where there is none or it has decimals (paper.md 1.3)."""
    found = _PAPER_NUMBER.findall(text)
    if not found:
        return INVALID
    whole, _, decimals = found[-1].replace(",", "").replace(" ", "").partition(".")
    return INVALID if decimals.strip("0") else whole


def paper_right(reference: str, answer: str) -> bool:
    """The published comparison: as integers; a number over a line break is none and never right."""
    try:
        return int(paper_integer(reference)) == int(paper_integer(answer.strip()))
    except ValueError:
        return False


def judge(item: Item, answer: str) -> tuple[dict[str, bool], str]:
    """Right by our rule and by the published one."""
    row = Row(item.id, (*item.messages, {"role": "assistant", "content": item.reference}))
    ok, reason = verify_number(row, answer)
    return {"number": ok, "paper": paper_right(item.reference, answer)}, reason


def load(file: Path | None, paper: bool) -> tuple[list[Item], str]:
    """The plain questions, as training shows them; under `paper` behind its system message."""
    items, digest = rows_of(file)
    return (with_system(items, PAPER_SYSTEM) if paper else items), digest


GSM8K, MULTIARITH = (
    Task(name, ("number", "paper"), load, judge, file, paper_format="llama2")
    for name, file in (("gsm8k", "gsm8k_test.json"), ("multiarith", "multiarith_test.json"))
)
