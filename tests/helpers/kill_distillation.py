"""Kills a distillation at random moments, resumes it each time, and compares it with a whole run.

    python -m tests.helpers.kill_distillation --model models/smollm2-135m-instruct \\
        --data ../shared/data/alpaca_train.json --rows 200 --kills 20

Not part of the suite: it takes minutes. The suite kills at chosen lines
(tests/distill/test_distill.py).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--most",
        type=float,
        default=9,
        help="the most seconds after which a run is killed; the fewest are a third of it",
    )
    args = parser.parse_args()
    rng = random.Random(args.seed)
    command = [sys.executable, str(ROOT / "scripts" / "distill.py"), "--model", args.model]
    command += ["--data", args.data, "--limit", str(args.rows), "--max-new-tokens", "24"]
    command += ["--resume", "--no-score"]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.jsonl"
        killed = Path(folder) / "killed.jsonl"
        subprocess.run([*command, "--out", str(whole)], check=True, stderr=subprocess.DEVNULL)
        lines_after_kill: list[int] = []
        has_ended = False
        while not has_ended:
            rows = str(rng.choice((4, 8, 16, 32)))
            seconds = None  # after the last kill: until it ends
            if len(lines_after_kill) < args.kills:
                seconds = rng.uniform(args.most / 3, args.most)
            has_ended = run_for([*command, "--rows", rows, "--out", str(killed)], seconds)
            if not has_ended:
                lines_after_kill.append(line_count(killed))
        ids = [json.loads(line)["id"] for line in killed.read_text().splitlines()]
        same = killed.read_bytes() == whole.read_bytes()
    kills = len(lines_after_kill)
    print(f"{kills} kills, lines in the file after each: {lines_after_kill}")
    print(f"{len(ids)} lines, {len(set(ids))} ids, byte-identical to the whole run: {same}")
    assert same
    assert len(set(ids)) == len(ids) == args.rows
    assert kills == args.kills, "it ended before the last kill: give more rows or fewer kills"


def run_for(command: list[str], seconds: float | None) -> bool:
    """Run a command, and kill it after so many seconds; whether it has ended by itself."""
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        code = job.wait(seconds)
    except subprocess.TimeoutExpired:
        job.kill()
        job.wait()
        return False
    assert code == 0, f"it failed with exit code {code}"
    return True


def line_count(file: Path) -> int:
    """The number of lines of a file, 0 where it does not exist."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
