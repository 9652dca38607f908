"""Progress bars and aligned tables on a terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """tqdm; it writes ten times a second on a terminal, and every ten seconds into a log."""
    seconds = 0.1 if sys.stderr.isatty() else 10
    return tqdm(*args, mininterval=seconds, **kwargs)


def table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text: the first row is the header, the first column flush left."""
    widths = []
    for column in zip(*rows, strict=True):
        widths.append(max(len(cell) for cell in column))
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    header, *others = lines
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([header, rule, *others])
