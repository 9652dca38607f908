"""Progress bars and aligned tables on a terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """tqdm, ten seconds between lines where nobody watches: a log is not a terminal."""
    return tqdm(*args, mininterval=0.1 if sys.stderr.isatty() else 10, **kwargs)


def table(rows: list[list[str]]) -> str:
    """Rows as aligned text, the first being the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for n, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
        if n == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)
