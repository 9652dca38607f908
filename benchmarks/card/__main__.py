"""Run parts of a session on a GPU, each in its own process: what scripts/gpu.sh calls.

python -m benchmarks.card [--dry] [PART...]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.card.parts import (
    PARTS,
    Part,
    Setting,
    budget_of,
    chosen,
    seconds_for,
    why_no_gpu,
)

ROOT = Path(__file__).resolve().parent.parent.parent
WIDTH = 400  # characters of an output line that are shown
KILL_AFTER = 10  # seconds between asking a part to end and ending it
NOTHING_SELECTED = 5  # pytest's exit code


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    seconds: float
    text: str
    failed: bool = False


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu.sh", description=__doc__.splitlines()[0])
    listed = ", ".join(f"{part.name} ({part.about})" for part in PARTS.values())
    parser.add_argument("--dry", action="store_true", help="rehearse on a CPU")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{listed}; default all")
    args = parser.parse_args(argv)
    try:
        args.parts = chosen(args.parts)
        args.budget = budget_of(os.environ.get("BUDGET", ""))
    except ValueError as error:
        parser.error(str(error))
    return args


def make_setting(dry: bool) -> Setting:
    """The folders of this session, made."""
    python = os.environ.get("PYTHON") or sys.executable
    default_out = ROOT / "benchmarks" / "results" / "gpu"
    default_work = ROOT / ".gpu" / "work"
    if dry:
        scratch = Path(tempfile.mkdtemp(prefix="gpu-dry-"))
        default_out, default_work = scratch / "out", scratch / "work"
    out = Path(os.environ.get("OUT") or default_out).resolve()
    work = Path(os.environ.get("WORK") or default_work).resolve()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    return Setting(python, out, work, dry)


def environment(setting: Setting) -> dict[str, str]:
    """The environment of the parts."""
    names = dict(os.environ)
    names["OUT"] = str(setting.out)
    if setting.dry:
        names["TRITON_INTERPRET"] = "1"
        names.setdefault("OMP_NUM_THREADS", "1")
    return names


def run_part(part: Part, seconds: int, setting: Setting) -> Outcome:
    """Run a part for at most so many seconds; its output is shown and added to $OUT/gpu.log."""
    command = part.command(setting, seconds)
    title = f"\n== {part.name} (at most {seconds} s): {' '.join(command)}"
    print(title, flush=True)
    started = time.monotonic()
    with (setting.out / "gpu.log").open("a") as log:
        log.write(title + "\n")
        process = subprocess.Popen(
            ["timeout", f"--kill-after={KILL_AFTER}", str(seconds), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(setting),
            cwd=ROOT,
        )
        for line in process.stdout:
            text = line.decode(errors="replace")
            log.write(text)
            log.flush()
            print(text.rstrip("\n")[:WIDTH], flush=True)
        code = process.wait()
    return outcome(part, code, time.monotonic() - started, seconds, setting.dry)


def outcome(part: Part, code: int, taken: float, limit: int, dry: bool) -> Outcome:
    """The outcome of a part that ended with this exit code."""
    if code == 0:
        return Outcome(part.name, taken, "ok")
    if part.name == "tests" and dry and code == NOTHING_SELECTED:
        return Outcome(part.name, taken, "ok: no GPU, so no test to run")
    if code in (124, 137, -signal.SIGKILL):
        text = f"FAILED: ran past {limit} s; its figures so far are in figures.jsonl"
        return Outcome(part.name, taken, text, failed=True)
    return Outcome(part.name, taken, f"FAILED ({code})", failed=True)


def pack_tiles(setting: Setting) -> None:
    """Put the tiles that tuning found into one file of $OUT: few files come back from a card."""
    tiles = setting.work / "tiles"
    if not tiles.is_dir():
        return
    with tarfile.open(setting.out / "tiles.tar", "w") as archive:
        archive.add(tiles, arcname="tiles")


def run_parts(parts: Sequence[Part], budget: float | None, setting: Setting) -> list[Outcome]:
    """Run the parts one after the other, as far as the budget goes."""
    started = time.monotonic()
    outcomes = []
    for part in parts:
        left = None if budget is None else budget - (time.monotonic() - started)
        seconds = seconds_for(part, left, setting.dry)
        if seconds is None:
            text = f"skipped: {left:.0f} s of BUDGET={budget:.0f} are left"
            outcomes.append(Outcome(part.name, 0.0, text))
            print(f"\n== {part.name}: {text}", flush=True)
            continue
        outcomes.append(run_part(part, seconds, setting))
        if part.name == "tune":
            pack_tiles(setting)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    setting = make_setting(args.dry)
    if not args.dry:
        reason = why_no_gpu(setting.python)
        if reason is not None:
            print(f"gpu.sh: {reason}", file=sys.stderr)
            return 2
    outcomes = run_parts(args.parts, args.budget, setting)
    print("\n== summary")
    for o in outcomes:
        print(f"{o.name:10} {o.seconds:8.0f}  {o.text}")
    print(f"\nrecords, figures and gpu.log: {setting.out}")
    return int(any(o.failed for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
