"""Kills a distillation at random moments, goes on each time, and compares with an undisturbed run.

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
        "--most", type=float, default=9, help="seconds a run may live; a third: least"
    )
    args = parser.parse_args()
    rng = random.Random(args.seed)
    command = [sys.executable, str(ROOT / "scripts" / "distill.py"), "--model", args.model]
    command += ["--data", args.data, "--limit", str(args.rows), "--max-new-tokens", "24"]
    command += ["--resume", "--no-score"]
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole.jsonl", Path(folder) / "killed.jsonl"
        subprocess.run([*command, "--out", str(whole)], check=True, stderr=subprocess.DEVNULL)
        kills, had = 0, []
        while True:
            job = subprocess.Popen(
                [*command, "--rows", str(rng.choice((4, 8, 16, 32))), "--out", str(killed)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                assert (
                    job.wait(rng.uniform(args.most / 3, args.most) if kills < args.kills else None)
                    == 0
                )
            except subprocess.TimeoutExpired:
                job.kill()
                job.wait()
                kills += 1
                had.append(killed.read_bytes().count(b"\n") if killed.exists() else 0)
                continue
            break
        ids = [json.loads(line)["id"] for line in killed.read_text().splitlines()]
        same = killed.read_bytes() == whole.read_bytes()
    print(f"{kills} kills, lines there after each: {had}")
    print(f"{len(ids)} lines, {len(set(ids))} ids, byte-identical to the undisturbed run: {same}")
    assert same and len(set(ids)) == len(ids) == args.rows
    assert kills == args.kills, "it was over before: give more rows or fewer kills"


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
