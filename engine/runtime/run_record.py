"""The record of a run: versions, machine, commit, model fingerprint, differences of settings."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
# settings that files of older versions lack: what they were is not known, so they are not compared
NOT_IN_OLDER_FILES = frozenset({"tool_template"})


def model_fingerprint(path: str | Path) -> str:
    """A hash (hex digits) that tells checkpoints apart, without reading all of their weights.

    It covers config.json and, of every weight file, the name, the size, the first MiB (which holds
    the header) and 64 evenly spaced blocks of 64 KiB. It is no proof against tampering.
    """
    path = Path(path)
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(1 << 20))
            for block in range(64):
                opened.seek(size * block // 64)
                digest.update(opened.read(1 << 16))
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Versions, machine, threads and commit, for the record."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "command": sys.argv,
    }


def _commit() -> str | None:
    """The clone's commit, with a + if the working tree has changes; None without git."""
    try:
        head = subprocess.run(
            ["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() or None


def differing(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """'name: old -> new' for every setting that differs; nested names are joined by dots.

    was: as a file has them, perhaps one of an older version.
    """
    now = json.loads(json.dumps(now))  # tuples become lists, as in `was`, which is from a file
    changes = []
    for name in sorted(was.keys() | now.keys()):
        if name in NOT_IN_OLDER_FILES and name not in was:
            continue
        old = was.get(name)
        new = now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += [f"{name}.{change}" for change in differing(old, new)]
        elif old != new:
            changes.append(f"{name}: {old!r} -> {new!r}")
    return changes
