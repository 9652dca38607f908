"""A table and its cells, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.tables.records import Record, origin


@dataclass(frozen=True)
class Table:
    """Cells as text, and the records that they were taken from."""

    header: list[str]
    rows: list[list[str]]
    records: list[Record]

    def markdown(self) -> str:
        """The table and, below it, where its figures come from."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
        return f"{text}\n{origin(self.records)}\n"


@dataclass(frozen=True)
class Definition:
    """How a named table is made of the records."""

    summary: str  # one line, for --list
    build: Callable[[list[Record]], Table]


# ---- cells


def fixed(value: float | None, digits: int = 0, unit: str = "") -> str:
    """A number with that many digits behind the point and commas in thousands; "-" for None."""
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def percent(share: float | None, digits: int = 0) -> str:
    """A share of 1 as a percentage."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def gigabytes(count: float | None) -> str:
    """Bytes in GB (10^9)."""
    return "-" if count is None else f"{count / 1e9:.2f}"


def bold(text: str) -> str:
    return f"**{text}**"
