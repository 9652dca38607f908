"""Engines in processes of their own, on a machine that nobody else uses meanwhile."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.runtime.cores import set_here
from engine.runtime.run_record import ROOT

# 32 MiB is the largest threshold that glibc takes for mmap; freed pages stay with the process
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
BUSY = 0.2  # cores that others may take
Job = dict[str, Any]
# What torch (CPU, GPU), Python, C++ and llama.cpp say where memory cannot be had.
NO_MEMORY = (
    *("DefaultCPUAllocator", "can't allocate memory", "not enough memory", "OutOfMemoryError"),
    *("CUDA out of memory", "MemoryError", "std::bad_alloc", "failed to allocate"),
)


class OutOfMemory(Exception):
    """A process ended for want of memory; the text is what to print in place of its figures."""


def why_it_ended(code: int, words: str) -> str:
    """ "out of memory", and how that is known, where this is why; else "".

    SIGKILL (-9; 137 behind a shell) is what the kernel ends a process with when memory is short.
    """
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "out of memory (killed)"
    said = [line for line in words.splitlines() if any(w in line for w in NO_MEMORY)]
    return f"out of memory ({said[-1].strip()[:200]})" if said else ""


def worked_seconds() -> float:
    """Core-seconds that this machine has worked, or been kept from working by its host."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # less idle, iowait


def own_seconds() -> float:
    """Core-seconds of this process and of its children that have ended."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Quiet:
    """Watches what others take of the machine while a block runs."""

    def __init__(self, what: str, allowed: bool) -> None:
        self.what, self.allowed, self.others = what, allowed, 0.0

    def __enter__(self) -> Quiet:
        self.began = time.perf_counter(), worked_seconds(), own_seconds()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        wall, all_cores, own = time.perf_counter(), worked_seconds(), own_seconds()
        work = (all_cores - self.began[1]) - (own - self.began[2])
        self.others = max(0.0, work / (wall - self.began[0]))
        if kind is None and self.others > BUSY:
            message = f"the machine is busy: others took {self.others:.2f} cores {self.what}"
            if not self.allowed:
                sys.exit(f"{message}; no times are printed (--busy prints them all the same)")
            print(f"WARNING: {message}; its times are wrong", file=sys.stderr)


def run(command: Sequence[str], job: Job, malloc: bool) -> dict[str, Any]:
    """A process that reads the job and writes JSON as its last line.

    OutOfMemory where it ended for that; any other failure ends this process too.
    """
    ours = command[1] == "-m"
    left_out = {*MALLOC, *(() if ours else ("PYTHONPATH", *set_here))}
    env = {k: v for k, v in os.environ.items() if k not in left_out} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        input=json.dumps(job),
        cwd=ROOT if ours else "/",
        env=env | (MALLOC if malloc else {}),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        if reason := why_it_ended(done.returncode, done.stderr):
            raise OutOfMemory(reason)
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
