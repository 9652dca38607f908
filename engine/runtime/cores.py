"""How many cores a process takes, and how its OpenMP threads wait; runs before torch is imported

torch computes with OpenMP threads, which wait for each other by spinning. On a core that another
process needs too, a spinning thread keeps the thread that it waits for from running: beside one
busy process a step takes three times as long, beside a second torch many times. libgomp, torch's
OpenMP library, reads from the environment how long to spin. It does so when it is loaded, so the
variable must be set before torch is imported.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

# Turns that a waiting thread spins before it sleeps; libgomp's default is 300,000, some
# milliseconds. 4000 is as fast on a quiet machine and a quarter faster beside a busy process; 1000
# costs a training step 9 % (benchmarks/busy.py).
SPINS = 4000
# Environment variables by which a user may have set it: libgomp's, OpenMP's, Intel's and LLVM's
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
# State of this process: the variables that the function below set, which only it changes. A
# benchmark removes them from the environment of the programs that it compares with.
set_here: set[str] = set()


def let_waiting_threads_sleep() -> None:
    """Set how long libgomp spins, for this process and its children, unless the user has set it."""
    is_set = any(name in os.environ for name in WAITING)
    if "torch" not in sys.modules and not is_set:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
        set_here.add("GOMP_SPINCOUNT")


def waiting() -> str:
    """The variables of WAITING that are set, as "NAME=VALUE, ..."; "" where none is."""
    return ", ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ)


def _quota(folder: Path) -> float:
    """Cores that the processes of a control group may use together; infinite without a limit.

    The group may compute for `quota` microseconds of every `period`. Its folder has one file with
    both numbers (version 2), or two files (version 1). "max" and -1 are no limit.
    """
    both = folder / "cpu.max"
    try:
        if both.exists():
            quota, period = both.read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        if int(quota) <= 0:
            return math.inf
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _groups(proc: Path, root: Path) -> list[Path]:
    """The folders of this process's control groups, and of the groups that contain them."""
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
            folders.append(group)
            folders += [parent for parent in group.parents if parent.is_relative_to(base)]
    return folders


def cores(proc: Path = Path("/proc/self"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: those it is bound to, at most its container's CPU limit.

    A container limited to the time of one core sees all cores of the machine; threads on each of
    them would use the time up at once, and all stop for the rest of every period.
    """
    if hasattr(os, "sched_getaffinity"):
        bound = len(os.sched_getaffinity(0))
    else:
        bound = os.cpu_count() or 1
    quotas = [_quota(folder) for folder in _groups(proc, root)]
    return max(1, math.ceil(min([float(bound), *quotas])))


def within_limits(threads: int) -> int:
    """`threads`, but at most one for each core, unless the user set them in the environment."""
    if "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ:
        return threads
    return min(threads, cores())
