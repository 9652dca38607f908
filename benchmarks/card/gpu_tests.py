"""The tests that need a GPU, side by side: what `scripts/gpu.sh tests` runs.

On a card most of a test's time is compilation, on one core. With pytest-xdist each of 16 processes
takes the next test; without it shares of the tests run side by side.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROCESSES = 16
FILES = (
    "tests/kernels/test_operations.py",
    "tests/model/test_triton_model.py",
    "tests/kernels/test_batch_invariant.py",
    "tests/kernels/test_cached_attention_triton.py",
    "tests/sampling/test_cuda_graphs.py",
)
SHARES = (  # expressions of -k that together select every test of FILES
    "rms_norm or rope or swiglu",
    "adamw or linear_cross_entropy",
    "cached_attention",
    "sample",
    "attention and not cached_attention",
    "lora_linear and bfloat16",
    "test_triton_model",
    "lora_linear and float16 and not bfloat16",
    "lora_linear and not float16",
    "test_cuda_graphs and not whole",
    "test_cuda_graphs and whole",
    "test_batch_invariant",
    "linear and not lora_linear and not cross_entropy and not test_batch_invariant",
)
TAIL = 15  # lines of a share's output that are shown


def command() -> list[str]:
    """pytest on the files, those tests only that are marked as needing a GPU."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    return [*pytest, *FILES]


def run_share(share: str, folder: Path) -> tuple[str, int, str]:
    """Run one share; (its expression, pytest's exit code, the end of its output)."""
    log = folder / f"{share.replace(' ', '_')}.log"
    with log.open("w") as output:
        arguments = [*command(), "-k", share]
        code = subprocess.run(arguments, stdout=output, stderr=subprocess.STDOUT).returncode
    lines = log.read_text(errors="replace").splitlines()
    return share, code, "\n".join(lines[-TAIL:])


def run_shares(folder: Path) -> int:
    """Run all shares side by side; the largest exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = []
    with ThreadPoolExecutor(PROCESSES) as pool:
        for share, code, text in pool.map(lambda share: run_share(share, folder), SHARES):
            print(f"-- {share}\n{text}", flush=True)
            codes.append(code)
    return max(codes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the logs of shares")
    parser.add_argument("--dry", action="store_true", help="one process: without a GPU none runs")
    args = parser.parse_args(argv)
    if args.dry:
        return subprocess.run(command()).returncode
    if importlib.util.find_spec("xdist") is not None:
        return subprocess.run([*command(), "-n", str(PROCESSES)]).returncode
    return run_shares(args.work)


if __name__ == "__main__":
    sys.exit(main())
