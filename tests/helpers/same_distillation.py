"""Distils the same rows under many settings that must not change a text, and compares the files.

    python -m tests.helpers.same_distillation --model models/smollm2-135m-instruct \\
        --data ../shared/data/alpaca_train.json --rows 200

Not part of the suite: it takes minutes. The suite does it with fewer rows
(tests/sampling/test_sampler.py).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DISTILL = str(ROOT / "scripts" / "distill.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SETTINGS = {  # name -> flags
    "64 rows together": ["--rows", "64"],
    "as it is": [],
    "7 rows, no drafts": ["--rows", "7", "--draft", "off"],
    "24 rows, every draft": ["--rows", "24", "--draft", "always"],
    "3 steps a synchronisation": ["--rows", "16", "--draft", "off", "--steps", "3"],
    "short of memory": ["--kv-memory", "0.1"],
    "short chunks": ["--prefill-tokens", "64"],
    "1 thread": ["--threads", "1"],
    "2 processes": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--ops", default="auto", help="table of operations")
    parser.add_argument("--flags", default="", help="more flags for all, e.g. '--temperature 0.95'")
    args = parser.parse_args()
    common = ["--model", args.model, "--data", args.data, "--limit", str(args.rows), "--no-score"]
    common += ["--ops", args.ops, "--max-new-tokens", "64", *args.flags.split()]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    expected = b""  # the file of the first setting
    differing = []  # names of the settings with another file
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in SETTINGS.items():
            out = Path(folder, f"{name}.jsonl".replace(" ", "_"))
            launcher = TORCHRUN if name == "2 processes" else []
            command = [sys.executable, *launcher, DISTILL, *common, "--out", str(out), *flags]
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=env)
            seconds = time.perf_counter() - started
            text = out.read_bytes()
            if not expected:
                expected = text
            same = text == expected
            if not same:
                differing.append(name)
            print(f"{name}: {seconds:.0f} s, {len(text)} bytes, same: {same}")
    assert expected.count(b"\n") == args.rows, f"expected {args.rows} lines"
    assert not differing, f"other texts with: {differing}"
    print(f"{args.rows} rows, {len(SETTINGS)} settings: byte-identical")


if __name__ == "__main__":
    main()
