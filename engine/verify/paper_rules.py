"""The rules of the published code (2402.13669), with its defects

It has two sets of rules: verifiers that select rewrites for training, and scorers of the
evaluation. They read numbers and calls differently.

    selection    paper_number, paper_call, paper_code: verifiers, (row, text) -> (ok, reason)
    evaluation   scores_number, scores_call: (reference, answer) -> right or wrong
"""

from __future__ import annotations

import re

from engine.data.rows import Row

# digits that only a space or a comma parts are one number: "3, 4" is 34, "10-5" ends in -5
_NUMBER = re.compile(r"-?\d+(?:[,\s]\d+)*(?:\.\d+)?")
INVALID = -999999999  # stands for "no integer": two texts without one are equal

_LABEL = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*\(.*\)", re.ASCII)


def _last_number(text: str) -> str | None:
    """The last number as it is written."""
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


# ---- selection of rewrites


def selection_integer(text: str) -> int:
    """The last number as an integer; INVALID where there is none or it has decimals."""
    number = _last_number(text)
    if number is None:
        return INVALID
    try:
        return int(re.sub(r"[,\s]", "", number))
    except ValueError:  # it has decimals
        return INVALID


def paper_number(row: Row, text: str) -> tuple[bool, str]:
    """Both end in the same integer, or both in none."""
    same = selection_integer(text) == selection_integer(row.reference)
    return (True, "ok") if same else (False, "mismatch")


def paper_call(row: Row, text: str) -> tuple[bool, str]:
    """The reference's `name(args)`, without spaces and with one kind of quotes, as a substring."""

    def normal(part: str) -> str:
        return re.sub(r"\s", "", part).replace("'", '"')

    label = normal(row.reference)
    call = re.search(r"[\w.]+\(.*\)", label)
    same = (call[0] if call else label) in normal(text)
    return (True, "ok") if same else (False, "mismatch")


def paper_code(row: Row, text: str) -> tuple[bool, str]:
    """A ```python block behind one of three beginnings; the reference is not looked at."""
    begins = text.strip().startswith(("I have", "Here is", "I implemented"))
    return (True, "ok") if begins and "```python" in text else (False, "mismatch")


# our verifier -> the published code's for the same data
PUBLISHED = {"number": "paper_number", "call": "paper_call", "code": "paper_code"}


# ---- evaluation


def evaluation_integer(text: str) -> int | None:
    """The last number as an integer; INVALID where there is none or its decimals are not zero.

    None for a number over a line break, which the published code cannot convert.
    """
    number = _last_number(text)
    if number is None:
        return INVALID
    whole, _, decimals = number.replace(",", "").replace(" ", "").partition(".")
    if decimals.strip("0"):
        return INVALID
    try:
        return int(whole)
    except ValueError:
        return None


def scores_number(reference: str, answer: str) -> bool:
    """The same integer at the end of both, or none in both; a number over a line break is wrong."""
    expected, found = evaluation_integer(reference), evaluation_integer(answer.strip())
    return expected is not None and found is not None and expected == found


def scores_call(reference: str, answer: str) -> bool:
    """The reference's call in the answer, letter for letter once spaces and quotes are standard.

    A reference that does not begin with a call cannot be met.
    """

    def standard(text: str) -> str:
        return re.sub(r"\s+", " ", text.strip()).replace("'", '"').replace(", ", ",")

    label = _LABEL.match(standard(reference))
    return bool(label and re.search(r"\b" + re.escape(label[0]), standard(answer)))
