"""Progress bars and aligned tables on a terminal."""

from __future__ import annotations

import functools
import sys
from typing import Any

from tqdm import tqdm


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """tqdm; it writes ten times a second on a terminal, and every ten seconds into a log."""
    seconds = 0.1 if sys.stderr.isatty() else 10
    return tqdm(*args, mininterval=seconds, **kwargs)


@functools.cache
def print_once(line: str) -> None:
    """Print a line, unless this process has printed it before."""
    print(line)


def aligned(rows: list[list[str]]) -> tuple[list[str], list[int]]:
    """A line for each row of cells, and the columns' widths; the first column is flush left."""
    widths = []
    for column in zip(*rows, strict=True):
        widths.append(max(len(cell) for cell in column))
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return lines, widths


def table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text, the first of them as a header over a rule."""
    lines, widths = aligned(rows)
    header, *others = lines
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([header, rule, *others])
