"""The hash of a GGUF model's files, and the state of the files by which it stays known.

Hashing tens of gigabytes takes minutes, so an import records the state of the files that it hashed:
size, times of change, inode. Files in that state are not read again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A file may change twice within one step of its file system's clock, and then looks the same: a
# state is recorded only of files that were last changed longer ago. (FAT's clock has 2 seconds.)
SETTLED_NS = 3_000_000_000


def states_of(parts: Sequence[Path]) -> list[dict[str, Any]]:
    """The state of every file, as JSON holds it.

    ctime is the time of any change, and no program can set it: a file that another one of the same
    size was written over is noticed, also where its mtime was put back.
    """
    states = []
    for path in parts:
        found = path.stat()
        state = {
            "name": path.name,
            "size": found.st_size,
            "mtime_ns": found.st_mtime_ns,
            "ctime_ns": found.st_ctime_ns,
            "inode": found.st_ino,
        }
        states.append(state)
    return states


def are_settled(states: Sequence[dict[str, Any]]) -> bool:
    """Whether the files were last changed long enough ago that another change would show."""
    latest = max(max(state["mtime_ns"], state["ctime_ns"]) for state in states)
    return time.time_ns() - latest > SETTLED_NS


def sha256_of(parts: Sequence[Path]) -> str:
    """The hash of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in parts:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
