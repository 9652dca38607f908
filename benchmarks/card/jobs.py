"""Processes of a product run: started, watched, killed on purpose, and what their logs say."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL = 0.02  # seconds
TAIL = 12  # lines of a failed job's log that are shown
PREDICTED = re.compile(r"recompute (\w+): predicted peak ([\d.]+) GB")
CHECKED = re.compile(r"ops: checked in ([\d.]+) s")
LOADED = re.compile(r"loaded in ([\d.]+) s")
# what a job says of memory, preemption and graphs
WORTH_KEEPING = re.compile(
    r"preempted|out of memory|graphs captured|not captured|predicted peak|slower|check failed"
    r"|retry|micro-batches"
)


@dataclass(frozen=True)
class Ended:
    """A process that ended."""

    name: str
    code: int
    seconds: float
    first_s: float | None  # seconds to the first line of the watched file
    killed: bool  # by us, on purpose
    log: Path

    @property
    def failed(self) -> bool:
        return self.code != 0 and not self.killed

    def figures(self) -> dict[str, Any]:
        """Times, and what the log says."""
        figures: dict[str, Any] = {"code": self.code, "seconds": round(self.seconds, 2)}
        if self.first_s is not None:
            figures["first_line_s"] = round(self.first_s, 2)
        figures |= facts_of_log(self.log.read_text(errors="replace"))
        if self.failed:
            figures["tail"] = tail(self.log)
        return figures


def tail(log: Path) -> list[str]:
    """The last lines of a log."""
    lines = re.split(r"[\n\r]+", log.read_text(errors="replace").strip())
    return [line[:300] for line in lines[-TAIL:]]


def facts_of_log(text: str) -> dict[str, Any]:
    """What a job printed of its start, its memory plan, graphs and preempted sequences."""
    facts: dict[str, Any] = {}
    for name, pattern in (("check_s", CHECKED), ("load_s", LOADED)):
        found = pattern.search(text)
        if found:
            facts[name] = float(found[1])
    plans = PREDICTED.findall(text)
    if plans:
        facts["plan"] = [{"policy": policy, "gb": float(gb)} for policy, gb in plans]
    lines = re.split(r"[\n\r]+", text)
    said = [line.strip()[:300] for line in lines if WORTH_KEEPING.search(line)]
    facts["said"] = list(dict.fromkeys(said))[:20]
    return facts


def run_job(
    name: str,
    command: Sequence[str],
    log: Path,
    limit: float,
    *,
    watch: Path | None = None,
    kill_when: Path | None = None,
    threads: int | None = None,
) -> Ended:
    """Run a command for at most `limit` seconds, its output in `log`.

    watch: a file; the seconds to its first line are kept. kill_when: a path; as soon as it exists
    the process is killed (SIGKILL). threads: of OpenMP; None: as the environment has it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    started = time.monotonic()
    first = None
    killed = False
    with log.open("w") as output:
        process = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                taken = time.monotonic() - started
                if first is None and watch is not None and _has_a_line(watch):
                    first = taken
                if kill_when is not None and kill_when.exists():
                    killed = True
                if killed or taken > limit:
                    process.kill()
                    process.wait()
                time.sleep(POLL)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    seconds = time.monotonic() - started
    return Ended(name, process.returncode, seconds, first, killed, log)


def _has_a_line(file: Path) -> bool:
    try:
        with file.open("rb") as content:
            return b"\n" in content.read(1 << 20)
    except OSError:
        return False
