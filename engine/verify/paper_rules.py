"""The verifiers of the published code (paper.md 1.3), with its mistakes: for `--paper-exact`."""

from __future__ import annotations

import re

from engine.data.rows import Row

_PAPER_NUMBER = re.compile(r"-?\d+(?:[,\s]\d+)*(?:\.\d+)?")
INVALID = -999999999  # the published code's value for a text without an integer


def paper_number(row: Row, text: str) -> tuple[bool, str]:
    """Accepts the same last number as an integer; two texts without an integer are equal."""
    same = _paper_integer(text) == _paper_integer(row.reference)
    return (True, "ok") if same else (False, "mismatch")


def _paper_integer(text: str) -> int:
    """The last number of a text without its commas and spaces; INVALID if it is no integer."""
    numbers = _PAPER_NUMBER.findall(text)
    if not numbers:
        return INVALID
    try:
        return int(re.sub(r"[,\s]", "", numbers[-1]))
    except ValueError:  # it has decimals
        return INVALID


def paper_call(row: Row, text: str) -> tuple[bool, str]:
    """Accepts the reference's `name(args)` as a substring, spaces and kind of quotes aside."""
    reference = _without_spaces(row.reference)
    call = re.search(r"[\w.]+\(.*\)", reference)
    expected = call[0] if call else reference
    same = expected in _without_spaces(text)
    return (True, "ok") if same else (False, "mismatch")


def _without_spaces(text: str) -> str:
    """The text without white space, every quote a double one."""
    return re.sub(r"\s", "", text).replace("'", '"')


def paper_code(row: Row, text: str) -> tuple[bool, str]:
    """Accepts a ```python block after one of three beginnings; the reference is not read."""
    begins = text.strip().startswith(("I have", "Here is", "I implemented"))
    return (True, "ok") if begins and "```python" in text else (False, "mismatch")


# our verifier -> the published code's verifier for the same data
PUBLISHED = {"number": "paper_number", "call": "paper_call", "code": "paper_code"}
