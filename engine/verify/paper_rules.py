"""The verifiers of the published code, with its defects."""

from __future__ import annotations

import re

from engine.data.rows import Row

# ---- the published rules

_PAPER_NUMBER = re.compile(r"-?\d+(?:[,\s]\d+)*(?:\.\d+)?")
INVALID = -999999999


def _paper_integer(text: str) -> int:
    numbers = _PAPER_NUMBER.findall(text)
    try:
        return int(re.sub(r"[,\s]", "", numbers[-1])) if numbers else INVALID
    except ValueError:  # it has decimals
        return INVALID


def paper_number(row: Row, text: str) -> tuple[bool, str]:
    """The last number as an integer, INVALID where there is none: two INVALIDs are equal."""
    same = _paper_integer(text) == _paper_integer(row.reference)
    return (True, "ok") if same else (False, "mismatch")


def paper_call(row: Row, text: str) -> tuple[bool, str]:
    """The reference's `name(args)`, without spaces and with one kind of quotes, as a substring."""

    def normal(said: str) -> str:
        return re.sub(r"\s", "", said).replace("'", '"')

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
