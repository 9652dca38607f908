"""Runs each engine in a process of its own, and checks that no other work disturbs the timing."""

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
# Parts of the messages of torch (CPU, GPU), Python, C++ and llama.cpp when memory is short.
NO_MEMORY = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "not enough memory",
    "OutOfMemoryError",
    "CUDA out of memory",
    "MemoryError",
    "std::bad_alloc",
    "failed to allocate",
)


class OutOfMemory(Exception):
    """A process ended because memory was short; the text is printed in place of its figures."""


def why_out_of_memory(code: int, stderr: str) -> str | None:
    """ "out of memory" and the evidence for it; None when the process ended for another reason.

    The operating system ends a process with SIGKILL (-9; 137 behind a shell) when memory is short.
    """
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "out of memory (killed)"
    messages = [line for line in stderr.splitlines() if any(part in line for part in NO_MEMORY)]
    if not messages:
        return None
    return f"out of memory ({messages[-1].strip()[:200]})"


def worked_seconds() -> float:
    """Core-seconds since boot that this machine has worked, or that its host took from it."""
    first_line = Path("/proc/stat").read_text().split("\n", 1)[0]  # "cpu user nice system ..."
    ticks = [int(field) for field in first_line.split()[1:9]]
    idle, iowait = ticks[3], ticks[4]
    return (sum(ticks) - idle - iowait) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Core-seconds of this process and of its children that have ended."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


class Quiet:
    """Measures how many cores other processes use while a block runs.

    Ends the program where they use more than BUSY cores, unless that is `allowed`.
    """

    def __init__(self, what: str, allowed: bool) -> None:
        self.what = what
        self.allowed = allowed
        self.others = 0.0  # cores used by others, known when the block has ended

    def __enter__(self) -> Quiet:
        self.wall_before = time.perf_counter()
        self.machine_before = worked_seconds()
        self.own_before = own_seconds()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        wall = time.perf_counter() - self.wall_before
        machine = worked_seconds() - self.machine_before
        own = own_seconds() - self.own_before
        self.others = max(0.0, (machine - own) / wall)
        if kind is None and self.others > BUSY:
            message = f"the machine is busy: others took {self.others:.2f} cores {self.what}"
            if not self.allowed:
                sys.exit(f"{message}; no times are printed (--busy prints them all the same)")
            print(f"WARNING: {message}; its times are wrong", file=sys.stderr)


def run(command: Sequence[str], job: Job, malloc: bool) -> dict[str, Any]:
    """Run a command that reads the job and writes JSON as its last line; returns that JSON.

    Raises OutOfMemory where the process ended for that; any other failure ends this process too.
    """
    is_ours = command[1] == "-m"
    left_out = set(MALLOC)
    if not is_ours:  # a peer's process must find neither our modules nor our thread settings
        left_out |= {"PYTHONPATH", *set_here}
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    env["HF_HUB_OFFLINE"] = "1"
    if malloc:
        env |= MALLOC
    done = subprocess.run(
        command,
        input=json.dumps(job),
        cwd=ROOT if is_ours else "/",
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = why_out_of_memory(done.returncode, done.stderr)
        if reason is not None:
            raise OutOfMemory(reason)
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
