"""GSM8K (1,319 questions) and MultiArith (180): is the last number right?

number  our verifier: the last number, exactly (verifiers.verify_number)
paper   the published scorer, mistakes included (paper_rules.scores_number): the last thing that
        looks like an integer; two texts without one are equal

Files are JSON of {"question", "answer"}, the answer ending in its number. MultiArith's is in no
package and not shipped here.
"""

from __future__ import annotations

from pathlib import Path

from engine.data.rows import Row
from engine.evaluate.tasks.base import Item, Task, rows_of, with_system
from engine.verify.paper_rules import scores_number
from engine.verify.verifiers import verify_number

PAPER_SYSTEM = (
    "You are an expert in math. Below is a math question. Write a response that appropriately "
    "answers the question. Your final answer should be an integer at the end of your response, "
    "formatted as: The answer is {answer}."
)


def judge(item: Item, answer: str) -> tuple[dict[str, bool], str]:
    """Right by our rule and by the published one."""
    row = Row(item.id, (*item.messages, {"role": "assistant", "content": item.reference}))
    ok, reason = verify_number(row, answer)
    return {"number": ok, "paper": scores_number(item.reference, answer)}, reason


def load(file: Path | None, paper: bool) -> tuple[list[Item], str]:
    """The plain questions, as training shows them; under `paper` after its system message."""
    items, digest = rows_of(file)
    return (with_system(items, PAPER_SYSTEM) if paper else items), digest


GSM8K = Task("gsm8k", ("number", "paper"), load, judge, "gsm8k_test.json", paper_format="llama2")
MULTIARITH = Task(
    "multiarith", ("number", "paper"), load, judge, "multiarith_test.json", paper_format="llama2"
)
