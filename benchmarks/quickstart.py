"""Append the result of a quickstart to benchmarks/results/, for the tables in pages.

    bash scripts/quickstart.sh
    python -m benchmarks.quickstart --run runs/quickstart
    python -m benchmarks.quickstart --run runs/quickstart-word-problems

Reads summary.json; trains and samples nothing. Run it in the clone and on the machine of the run:
commit and versions are those that the run wrote down, processor and cores are those of this
machine. The last line is JSON; `python -m benchmarks.tables` then writes the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.clock import machine, record

DESK = "demo_desk_template.txt"  # the template of the questions at the desk


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path, help="directory of the finished run")
    parser.add_argument("--dry", action="store_true", help="print only, record nothing")
    return parser.parse_args()


def arm(summary: dict[str, Any], name: str) -> dict[str, Any]:
    """The seed model or an adapter, in the units of the tables."""
    score = summary["evaluation"][name]
    low, high = score["interval"]
    found: dict[str, Any] = {
        "right": score["right"],
        "items": score["n"],
        "interval": [100 * low, 100 * high],
        "nll": score["nll"],
        "kl_to_seed": 0.0,
        "kl_from_seed": 0.0,
        "same_top1_percent": 100.0,
        "task_kl": 0.0,
        "update_norm": 0.0,
        "train_loss": None,
        "train_seconds": None,
    }
    if name in summary["training"]:
        drift = summary["retention"][name]
        training = summary["training"][name]
        found |= {
            "kl_to_seed": drift["kl"],
            "kl_to_seed_interval": drift["kl_interval"],
            "kl_from_seed": drift["reverse_kl"],
            "same_top1_percent": 100 * drift["agreement"],
            "task_kl": summary["retention_task"][name]["kl"],
            "update_norm": summary["update_norms"][name]["norm"],
            "train_loss": [training["first_loss"], training["last_loss"]],
            "train_seconds": training["seconds"],
        }
    return found


def document(run: Path) -> dict[str, Any]:
    """The record. ValueError for a run without held-out rows, or not finished."""
    file = run / "summary.json"
    if not file.exists():
        raise ValueError(f"{run} holds no summary.json; expected the --out of a finished run")
    summary = json.loads(file.read_text(encoding="utf-8"))
    if not summary["evaluation"]:
        raise ValueError(f"{run} has no held-out rows; expected a run of scripts/quickstart.sh")
    template = summary["settings"]["DistillConfig"]["template"]
    written = datetime.fromtimestamp(file.stat().st_mtime, timezone.utc)
    about = machine("cpu") | summary["environment"]
    counts = summary["distilled"]["counts"]
    return {
        "benchmark": "quickstart_desk" if Path(template).name == DESK else "quickstart",
        "environment": about | {"date": written.isoformat(timespec="seconds")},
        "rows": sum(counts.values()),
        "held_out": summary["evaluation"]["seed"]["n"],
        "seconds": summary["seconds"]["all"],
        "settings": summary["settings"],
        "arms": {name: arm(summary, name) for name in ("seed", "sft", "sdft")},
        "turns": counts | {"targets_that_differ_percent": 100 * summary["distilled"]["differ"]},
        "seed_nll": summary["likelihood"],
    }


def main() -> None:
    args = parse_args()
    try:
        found = document(args.run)
    except ValueError as error:
        sys.exit(str(error))
    record(found, not args.dry)


if __name__ == "__main__":
    main()
