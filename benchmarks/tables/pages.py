"""Pages with marked tables: find the marks, write the tables between them.

    <!-- table: NAME -->
    ... generated ...
    <!-- end -->

A mark stands alone on its line, outside of code blocks. The lines between two marks are replaced;
the rest of a page is left as it is.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

BEGIN = re.compile(r"<!-- table: (\S+) -->")
END = "<!-- end -->"
FENCE = re.compile(r" {0,3}(```|~~~)")


@dataclass(frozen=True)
class Block:
    """A marked table of a page; line numbers count from 1."""

    name: str
    begin: int  # line of the opening mark
    end: int  # line of the closing mark


def pages(root: Path) -> list[Path]:
    """Every Markdown page that git tracks or would track; without git, every one below `root`."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.run(
        [*command, "--exclude-standard", "--", "*.md"], capture_output=True, text=True
    )
    if listed.returncode == 0:
        found = [root / name for name in listed.stdout.split("\0") if name]
        return sorted(path for path in set(found) if path.exists())
    return sorted(path for path in root.rglob("*.md") if ".venv" not in path.parts)


def blocks(text: str, page: str) -> list[Block]:
    """The marked tables. ValueError, with page and line, for a mark without its partner."""
    found: list[Block] = []
    opened: tuple[str, int] | None = None
    in_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        if FENCE.match(line):
            in_code = not in_code
        if in_code:
            continue
        begins = BEGIN.fullmatch(line.strip())
        if begins and opened:
            raise ValueError(f"{page}:{opened[1]}: {END} is missing before line {number}")
        if begins:
            opened = begins[1], number
        elif line.strip() == END:
            if opened is None:
                raise ValueError(f"{page}:{number}: {END} without a table; remove it")
            found.append(Block(*opened, number))
            opened = None
    if opened:
        raise ValueError(f"{page}:{opened[1]}: {END} is missing")
    return found


def filled(text: str, page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with every marked table written anew; `tables` makes a name's Markdown.

    ValueError, with page and line, for a name that is not in `tables`.
    """
    lines = text.splitlines(keepends=True)
    for block in reversed(blocks(text, page)):  # from the end, so that line numbers stay true
        if block.name not in tables:
            known = ", ".join(tables)
            raise ValueError(
                f"{page}:{block.begin}: unknown table {block.name!r}; expected one of {known}"
            )
        lines[block.begin : block.end - 1] = [tables[block.name]()]
    return "".join(lines)


def first_difference(old: str, new: str) -> tuple[int, str, str]:
    """Line number of the page as it is, that line, and the line that should stand there."""
    before, after = old.splitlines(), new.splitlines()
    for number, (is_now, should_be) in enumerate(zip(before, after, strict=False), start=1):
        if is_now != should_be:
            return number, is_now, should_be
    shorter = min(len(before), len(after))
    missing = "(no line)"
    is_now = before[shorter] if shorter < len(before) else missing
    should_be = after[shorter] if shorter < len(after) else missing
    return shorter + 1, is_now, should_be
