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
    columns = range(len(rows[0]))
    widths = [max(len(row[column]) for row in rows) for column in columns]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *others]).rstrip())
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])
