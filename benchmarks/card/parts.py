"""The parts of a session on a GPU: their commands, their limits, and how a budget is divided."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MARGIN = 12  # seconds before its limit in which a part ends by itself and writes its records


@dataclass(frozen=True)
class Setting:
    """How the parts of this session run."""

    python: str
    out: Path  # $OUT: records and logs
    work: Path  # files that need not come back: run directories, logs of single tests
    dry: bool = False  # on a CPU: tiny shapes, triton's interpreter


@dataclass(frozen=True)
class Part:
    """A part: one process with its own time limit."""

    name: str
    limit: int  # seconds at most, on a card
    dry_limit: int  # seconds at most with --dry
    least: int  # seconds below which it is not started; its limit where it cannot be cut
    command: Callable[[Setting, int], list[str]]  # (setting, seconds) -> the command
    about: str

    def limit_of(self, dry: bool) -> int:
        """Its time limit in seconds."""
        return self.dry_limit if dry else self.limit

    def least_of(self, dry: bool) -> int:
        """The fewest seconds with which it is worth starting."""
        if self.least == self.limit:
            return self.limit_of(dry)
        return min(self.least, self.limit_of(dry))


def module(setting: Setting, name: str, *flags: object) -> list[str]:
    """`python -m NAME FLAGS`, with --dry where the session is a rehearsal."""
    dry = ["--dry"] if setting.dry else []
    return [setting.python, "-m", name, *map(str, flags), *dry]


def usable(seconds: int) -> int:
    """The seconds after which a part stops by itself, of those that it may take."""
    return max(1, seconds - MARGIN)


def product(setting: Setting, seconds: int) -> list[str]:
    work = setting.work / "product"
    return module(setting, "benchmarks.card.product", "--seconds", usable(seconds), "--work", work)


def measure(setting: Setting, seconds: int) -> list[str]:
    return module(setting, "benchmarks.card.measure", "--seconds", usable(seconds))


def tests(setting: Setting, seconds: int) -> list[str]:
    return module(setting, "benchmarks.card.gpu_tests", "--work", setting.work / "tests")


def decode(setting: Setting, seconds: int) -> list[str]:
    flags = ["--only", "decode", "--seconds", usable(seconds)]
    return module(setting, "benchmarks.card.measure", *flags)


def kernels(setting: Setting, seconds: int) -> list[str]:
    flags = ["--worth", "--graph", "--slot", "0.03", "--seconds", usable(seconds)]
    flags += ["--compile", "no"]  # torch.compile takes seconds for every new shape
    return module(setting, "benchmarks.kernels", *flags)


def tune(setting: Setting, seconds: int) -> list[str]:
    flags = ["--out", setting.work / "tiles", "--jobs", os.cpu_count()]
    flags += ["--seconds", usable(seconds)]
    if setting.dry:
        flags += ["--kernel", "rms_norm"]
    return module(setting, "benchmarks.tuning.tune", *flags)


# In the order in which they run: what a user of the product gains most from comes first.
PARTS = {
    part.name: part
    for part in (
        Part("product", 240, 600, 60, product, "whole jobs, beside a CPU's files"),
        Part("measure", 200, 400, 30, measure, "training and decoding at a 7B model's shapes"),
        Part("tests", 90, 120, 90, tests, "the tests that need a GPU"),
        Part("decode", 70, 200, 25, decode, "the decoding of `measure` alone"),
        Part("kernels", 90, 300, 25, kernels, "every operation, those worth most first"),
        Part("tune", 80, 180, 35, tune, "tile configurations"),
    )
}


def chosen(names: Sequence[str]) -> list[Part]:
    """The parts of these names in the order of PARTS; all for no names. ValueError for others."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ValueError(
            f"unknown part {', '.join(unknown)}; expected parts among {' '.join(PARTS)}, or prepare"
        )
    return [part for name, part in PARTS.items() if not names or name in names]


def seconds_for(part: Part, left: float | None, dry: bool = False) -> int | None:
    """The seconds that a part gets of those that are left; None where it must be skipped.

    left: of the budget; None: there is none. A part that can use less than its limit gets what is
    left, as long as that is worth a start.
    """
    limit = part.limit_of(dry)
    if left is None or left >= limit:
        return limit
    if left >= part.least_of(dry):
        return int(left)
    return None


def budget_of(text: str) -> float | None:
    """The seconds of BUDGET, None where it is empty; ValueError where they are not above 0."""
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"BUDGET={text}: expected seconds above 0, as BUDGET=300")
    return seconds


def why_no_gpu(python: str) -> str | None:
    """Why `python` cannot use a GPU here; None where it can."""
    test = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    done = subprocess.run([python, "-c", test], capture_output=True)
    if done.returncode == 0:
        return None
    return f"{python} has no torch that finds a GPU here; --dry needs none"
