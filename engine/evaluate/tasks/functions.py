"""OpenFunctions (112 requests): is the reference's call made?

call    our verifier (verifiers.verify_call): calls are parsed, so that spaces, quotes and the order
        of keywords do not count
paper   the published scorer (paper_rules.scores_call): the answer must contain the reference's call
        letter for letter, after spaces are joined, quotes made one kind and ", " made ",". It fails
        on `f(a = 1)`, on another order of keywords and on positional arguments, and passes an
        answer that also makes other calls
"""

from __future__ import annotations

from pathlib import Path

from engine.evaluate.tasks.base import Item, Task, Verdict, rows_of
from engine.verify.paper_rules import scores_call
from engine.verify.verifiers import verify_call


def judge(item: Item, answer: str) -> Verdict:
    """Right or wrong by our rule and by the published one; the reason is our rule's."""
    ok, reason = verify_call(item.row_with_reference(), answer)
    scores = {
        "call": ok,
        "paper": scores_call(item.reference, answer),
    }
    return scores, reason


def load(file: Path | None, paper: bool) -> tuple[list[Item], str]:
    """The requests as they are: each states itself which form the answer must have."""
    return rows_of(file)


OPENFUNCTIONS = Task(
    name="openfunctions",
    scorers=("call", "paper"),
    load=load,
    judge=judge,
    file="openfunction_test.json",
)
