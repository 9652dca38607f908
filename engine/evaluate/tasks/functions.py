"""OpenFunctions (112 requests): is the reference's call made?

call    our verifier: parsed, so that spaces, quotes and the order of keywords do not count
paper   the published scorer (paper_rules.scores_call): the reference's call, letter for letter
        after spaces are joined, quotes made one kind and ", " made ","; it fails on `f(a = 1)`, on
        another order of keywords and on positional arguments, and passes an answer that also makes
        other calls
"""

from __future__ import annotations

from pathlib import Path

from engine.data.rows import Row
from engine.evaluate.tasks.base import Item, Task, rows_of
from engine.verify.paper_rules import scores_call
from engine.verify.verifiers import verify_call


def judge(item: Item, answer: str) -> tuple[dict[str, bool], str]:
    """Right by our rule and by the published one."""
    row = Row(item.id, (*item.messages, {"role": "assistant", "content": item.reference}))
    ok, reason = verify_call(row, answer)
    return {"call": ok, "paper": scores_call(item.reference, answer)}, reason


def load(file: Path | None, paper: bool) -> tuple[list[Item], str]:
    """The requests as they are; they state the form of the answer themselves."""
    return rows_of(file)


OPENFUNCTIONS = Task("openfunctions", ("call", "paper"), load, judge, "openfunction_test.json")
