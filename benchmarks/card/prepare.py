"""Write .gpu/: what a session on a card carries. Runs without a GPU, and may use the network.

    bash scripts/gpu.sh prepare
    bash scripts/gpu.sh prepare --no-cpu          the model alone; the CPU's files stay as they are

The CPU's files are those of scripts/sdft.py in fp32 on this machine, with the flags that the card's
job has: 100 word problems, 40 held out, greedy. They take some minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.card.checkpoint import (
    HALVES,
    MODEL,
    PACKAGE,
    PREPARED,
    ROOT,
    place_data,
    split_file,
)
from benchmarks.card.product import JOB, KEPT, ROWS
from engine.jobs.gguf_import import demo_gguf, import_gguf
from engine.runtime.run_record import environment


def wheel(folder: Path) -> None:
    """Download the wheel of the installed `gguf`, pip's cache permitting without a network."""
    folder.mkdir(exist_ok=True)
    name = f"{PACKAGE}=={version(PACKAGE)}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "-d", str(folder), name], check=True)


def cpu_files(folder: Path) -> None:
    """Run the job on this CPU and keep the files that are compared.

    What was begun at this commit goes on; another commit may write other texts.
    """
    import_gguf(demo_gguf(), MODEL)
    run = PREPARED / f"cpu-run-{environment()['commit']}"
    data = place_data(PREPARED, *ROWS[False])
    command = [sys.executable, "scripts/sdft.py", "--model", MODEL, "--device", "cpu"]
    command += ["--dtype", "float32", "--data", data / "train.json"]
    command += ["--eval-data", data / "test.json", *JOB, "--out", run]
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)
    for name in KEPT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, folder / name)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-cpu", action="store_true", help="do not run the job on this CPU")
    args = parser.parse_args(argv)
    PREPARED.mkdir(exist_ok=True)
    digest = split_file(demo_gguf(), PREPARED)
    wheel(PREPARED / "wheels")
    manifest = {"sha256": digest, "environment": environment(), "job": JOB}
    (PREPARED / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    if not args.no_cpu:
        cpu_files(PREPARED / "cpu")
    for name in (*HALVES, "wheels", "cpu"):
        size = sum(file.stat().st_size for file in _files(PREPARED / name))
        print(f"{PREPARED / name}: {size / 2**20:.1f} MiB")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for file in path.rglob("*") if file.is_file()]


if __name__ == "__main__":
    main()
