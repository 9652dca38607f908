"""How a process shares a machine's cores with others: settled before torch is imported

OpenMP's threads, which torch computes with, wait for each other by spinning. On a core that another
process wants too, a thread that spins keeps the very thread that it waits for from running: beside
one busy process a step takes three times as long, beside a second torch many times. libgomp reads
how long to spin from the environment when it is loaded, which importing torch does.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

# Turns that a waiting thread spins before it sleeps; libgomp's own number is 300,000, some
# milliseconds. 4000 is as fast on a quiet machine and a quarter faster beside a busy process; 1000
# costs a training step 9 % (benchmarks/busy.py).
SPINS = 4000
# What a user may have set: libgomp's, every OpenMP's, that of Intel and LLVM
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
set_here: set[str] = set()  # what of the environment was set below


def let_waiting_threads_sleep() -> None:
    """Set libgomp's spinning for this process and its children, unless the user has."""
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
        set_here.add("GOMP_SPINCOUNT")


def waiting() -> str:
    """The settings of waiting in force, as NAME=VALUE."""
    return ", ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ)


def _quota(folder: Path) -> float:
    """Cores that a control group's processes may take together; infinite without a limit."""
    files = [folder / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    try:
        if files[0].exists():
            quota, period = files[0].read_text().split()
        else:
            quota, period = (file.read_text().strip() for file in files[1:])
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no such file
        return math.inf


def _groups(proc: Path, root: Path) -> list[Path]:
    """The folders of this process's control groups, and of those around them."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for base in (root, root / "cpu", root / "cpu,cpuacct"):
            group = Path(os.path.normpath(f"{base}/{path}"))
            folders += [group, *(p for p in group.parents if p.is_relative_to(base))]
    return folders


def cores(proc: Path = Path("/proc/self"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: those it is bound to, at most what its container has.

    A container that may take one core's time sees all of the machine's; threads on each of them
    would use the time up at once, and stand still together for the rest of every period.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [float(bound or 1), *map(_quota, _groups(proc, root))]
    return max(1, math.ceil(min(limits)))


def within_limits(threads: int) -> int:
    """So many threads, or as many as there are cores for; what the user set in the environment
    stays."""
    named = any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    return threads if named else min(threads, cores())
