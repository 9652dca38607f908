"""The rules of the published code (2402.13669), with its defects

It has two sets of rules: verifiers that select rewrites for training, and scorers that judge the
answers of the evaluation. The two read numbers and calls differently.

    selection    paper_number, paper_call, paper_code: verifiers, (row, text) -> (ok, reason)
    evaluation   scores_number, scores_call: (reference, answer) -> whether the answer is right
"""

from __future__ import annotations

import re

from engine.data.rows import Row

# Digits that only a space or a comma separates are one number: "3,4" is 34; "10-5" ends in -5.
_NUMBER = re.compile(r"-?\d+(?:[,\s]\d+)*(?:\.\d+)?")
INVALID = -999999999  # stands for "no integer": two texts without one are equal

# A call at the beginning of a text: name(...) up to the last closing parenthesis of the line.
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
    """Accepts a text that ends in the same integer as the reference, or where both end in none."""
    if selection_integer(text) == selection_integer(row.reference):
        return True, "ok"
    return False, "mismatch"


def paper_call(row: Row, text: str) -> tuple[bool, str]:
    """Accepts a text that holds the reference's `name(args)`; spaces and kind of quotes aside."""

    def standard(part: str) -> str:
        without_spaces = re.sub(r"\s", "", part)
        return without_spaces.replace("'", '"')

    reference = standard(row.reference)
    call = re.search(r"[\w.]+\(.*\)", reference)
    expected = call[0] if call else reference
    if expected in standard(text):
        return True, "ok"
    return False, "mismatch"


def paper_code(row: Row, text: str) -> tuple[bool, str]:
    """Accepts a ```python block behind one of three beginnings; the reference is not read."""
    begins = text.strip().startswith(("I have", "Here is", "I implemented"))
    if begins and "```python" in text:
        return True, "ok"
    return False, "mismatch"


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
    """Whether both end in the same integer, or both in none; one over a line break is wrong."""
    expected = evaluation_integer(reference)
    found = evaluation_integer(answer.strip())
    if expected is None or found is None:
        return False
    return expected == found


def scores_call(reference: str, answer: str) -> bool:
    """Whether the answer holds the reference's call, letter for letter.

    Spaces and kind of quotes are made the same first. Where the reference does not begin with a
    call, no answer is right.
    """

    def standard(text: str) -> str:
        with_single_spaces = re.sub(r"\s+", " ", text.strip())
        return with_single_spaces.replace("'", '"').replace(", ", ",")

    label = _LABEL.match(standard(reference))
    if label is None:
        return False
    expected = r"\b" + re.escape(label[0])
    return re.search(expected, standard(answer)) is not None
