"""Which way of fine-tuning forgets least on real data: a resumable study a set, and its record

    python -m benchmarks.rivals --set openfunctions --model DIR --data-dir ../shared/data
    python -m benchmarks.rivals --set gsm8k --model DIR --data-dir ../shared/data --seeds 3

Runs scripts/pareto.py in runs/rivals/SET. Whatever was measured is kept: when the study ends or is
stopped, its files except the weights are copied to benchmarks/results/rivals/SET, which git keeps.
A clone without runs/rivals/SET starts from that copy, so a study is continued on any machine with
longer lists (--lr, --arms, --seeds, --limit). Further --scales need the weights of the trainings
that are there, so they are measured where those were made, or the trainings are made again.

A finished study is appended to benchmarks/results/rivals.jsonl, and
`python -m benchmarks.tables` writes the tables.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.clock import RESULTS, machine, record
from engine.runtime.files import read_jsonl
from engine.runtime.published_adapter import WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
ARMS = "sft,sdft,stm:2.5,k3:0.02"
SCALES = "0.25,0.5,0.75,1"
RATES = "3e-4,1e-3"
# files of a study that are not kept: weights, temporary files, the drawing (made again)
LEFT_OUT = ("checkpoints", WEIGHTS, "*.partial*", ".*", "*.png")


@dataclass(frozen=True)
class DataSet:
    """The files and flags of one set."""

    name: str  # in the tables
    train: str  # file of --data-dir
    test: str
    flags: tuple[str, ...]


SETS = {
    "openfunctions": DataSet(
        "OpenFunctions",
        "openfunction_train.json",
        "openfunction_test.json",
        ("--verify", "call", "--template", "refer", "--eval-max-new", "128"),
    ),
    "gsm8k": DataSet(
        "GSM8K",
        "gsm8k_train.json",
        "gsm8k_test.json",
        ("--verify", "number", "--template", "gsm8k", "--eval-limit", "100"),
    ),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rivals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--set", required=True, choices=SETS, help="the data set")
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--data-dir", required=True, type=Path, help="folder of the sets' files")
    parser.add_argument("--arms", default=ARMS, help=f"ways of training [default: {ARMS}]")
    parser.add_argument("--scales", default=SCALES, help=f"strengths [default: {SCALES}]")
    parser.add_argument("--lr", default=RATES, help=f"peak learning rates [default: {RATES}]")
    parser.add_argument("--seeds", default="1", help="training seeds [default: 1]")
    parser.add_argument("--limit", default="120", help="training rows [default: 120]")
    parser.add_argument(
        "--record-only", action="store_true", help="record the study as it is; compute nothing"
    )
    parser.add_argument("--dry", action="store_true", help="print the record, keep nothing")
    return parser.parse_args()


def command_of(args: argparse.Namespace, out: Path) -> list[str]:
    """The study's command."""
    chosen = SETS[args.set]
    command = [sys.executable, "scripts/pareto.py", "--model", args.model]
    command += ["--data", str(args.data_dir / chosen.train)]
    command += ["--eval-data", str(args.data_dir / chosen.test), *chosen.flags]
    command += ["--limit", args.limit, "--arms", args.arms, "--scales", args.scales]
    return [*command, "--lr", args.lr, "--seeds", args.seeds, "--out", str(out.relative_to(ROOT))]


def run_study(command: list[str]) -> int:
    """Run the study to its end; its exit code. Ctrl-C and SIGTERM reach it and end it cleanly."""
    process = subprocess.Popen(command, cwd=ROOT)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the study has had it too: it finishes its step and ends
            continue


def copy_files(source: Path, target: Path) -> None:
    """Copy a study without its weights; files of `target` that `source` lacks stay."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)


def document(study_dir: Path, name: str) -> dict[str, Any]:
    """The record of a finished study: every point, and the comparisons at equal target."""
    study = json.loads((study_dir / "study.json").read_text(encoding="utf-8"))
    written = datetime.fromtimestamp((study_dir / "study.json").stat().st_mtime, timezone.utc)
    items = len(read_jsonl(study_dir / "seed" / "evaluation.jsonl"))
    points = []
    for point in study["points"]:
        first = point["by_seed"][0]
        points.append(
            {
                "setting": point["setting"],
                "arm": point["arm"],
                "right": [run["right"] for run in point["by_seed"]],
                "items": items,
                "interval": [100 * end for end in point["right"]["interval"]],
                "nll": point["nll"]["value"],
                "kl": point["kl"]["value"],
                "kl_interval": point["kl"]["interval"],
                "task_kl": point["task_kl"]["value"],
                "norm": first.get("update_norms", {}).get("norm", 0.0),
                "front": point["front"],
            }
        )
    goals = {}
    for measure, goal in study["equal_target"].items():
        goals[measure] = {key: goal[key] for key in ("title", "table", "words", "scales")}
    about = machine("cpu") | study["environment"]
    return {
        "benchmark": "rivals",
        "environment": about | {"date": written.isoformat(timespec="seconds")},
        "set": name,
        "rows": sum(study["distilled"]["counts"].values()),
        "targets_that_differ_percent": 100 * study["distilled"]["differ"],
        "settings": study["settings"],
        "points": points,
        "costs": study["costs"],
        "equal_target": goals,
    }


def main() -> int:
    args = parse_args()
    out = ROOT / "runs" / "rivals" / args.set
    kept = RESULTS / "rivals" / args.set
    if not out.exists() and kept.exists():
        copy_files(kept, out)
        print(f"{out}: begun from {kept}")
    code = 0
    if not args.record_only:
        code = run_study(command_of(args, out))
    if out.exists() and not args.dry:
        copy_files(out, kept)
    if code:
        print(f"the study is not finished; what it measured is in {kept}", file=sys.stderr)
        return code
    if not (out / "study.json").exists():
        print(f"{out}/study.json: not there; expected a finished study", file=sys.stderr)
        return 2
    record(document(out, SETS[args.set].name), not args.dry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
