"""Append the result of a study to benchmarks/results/real_data.jsonl, for the tables in pages.

    python scripts/pareto.py ... --out runs/gsm8k                       the study itself
    python -m benchmarks.real_data --study runs/gsm8k --set GSM8K
    python -m benchmarks.real_data --study runs/gsm8k --set GSM8K --setting lr0.001-r8-rows120

Reads study.json and the counts of the seed's answers beside it; trains and samples nothing. Run it
in the clone and on the machine of the study: commit and versions are those that the study wrote
down, processor and cores are those of this machine.
The last line is JSON; `python -m benchmarks.tables` then writes the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.clock import machine, record
from engine.runtime.files import read_jsonl

LABELS = {"target": "target", "nll": "held-out NLL", "kl_to_seed": "KL to seed"}
NAMES = {"target": "right", "nll": "nll", "kl_to_seed": "kl"}  # of the same in study.json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", required=True, type=Path, help="directory of the study")
    parser.add_argument("--set", required=True, help="name of the data set in the tables")
    parser.add_argument("--setting", help="one of the study's settings (default: its first)")
    parser.add_argument("--dry", action="store_true", help="print only, record nothing")
    return parser.parse_args()


def arm(point: dict[str, Any], items: int) -> dict[str, Any]:
    """A seed model or adapter, in the units of the tables."""
    right = None
    if "right" in point:
        low, high = point["right"]["interval"]
        right = {
            "right": point["by_seed"][0]["right"],
            "items": items,
            "percent": 100 * point["right"]["value"],
            "interval": [100 * low, 100 * high],
        }
    is_seed = point["arm"] == "seed"
    return {
        "target": right,
        "nll": point["nll"]["value"],
        "kl_to_seed": point["kl"]["value"],
        "kl_to_seed_interval": None if is_seed else point["kl"]["interval"],
        "kl_from_seed": point["reverse_kl"]["value"],
        "same_top1_percent": 100 * point["agree"]["value"],
        "tokens_with_loss": point["by_seed"][0]["training"].get("response_tokens"),
    }


def differences(found: dict[str, Any]) -> dict[str, Any]:
    """SDFT - SFT with its verdicts, which the study wrote in words."""
    said = dict(part.split(": ", 1) for part in found["words"].split("; "))
    result: dict[str, Any] = {}
    for name, label in LABELS.items():
        if label not in said:  # nothing was judged
            result[name] = None
            continue
        scale = 100 if name == "target" else 1
        value, low, high = found[NAMES[name]]
        verdict = said[label].split(" (")[0]
        result[name] = {
            "difference": scale * value,
            "interval": [scale * low, scale * high],
            "verdict": verdict,
        }
    if result["target"]:
        result["target"]["p"] = found["p"]
    return result


def document(folder: Path, name: str, setting: str | None) -> dict[str, Any]:
    """The record. ValueError for a study with several training seeds or without the setting."""
    study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    by_setting = {}  # older studies have no other arms
    for found in study["differences"]:
        if (found.get("arm", "sdft"), found.get("reference", "sft")) == ("sdft", "sft"):
            by_setting[found["setting"]] = found
    if not by_setting:
        raise ValueError(f"{folder}: no difference SDFT - SFT; expected --arms sft,sdft,...")
    chosen = setting or next(iter(by_setting))
    if chosen not in by_setting:
        known = ", ".join(by_setting)
        raise ValueError(f"{folder}: no setting {chosen!r}; expected one of {known}")
    without_mix = chosen.split("-mix")[0]  # SFT knows no mix
    wanted = {"seed": "", "sft": without_mix, "sdft": chosen}
    points = {p["arm"]: p for p in study["points"] if p["setting"] == wanted.get(p["arm"])}
    if points["sdft"]["runs"] > 1:
        raise ValueError(f"{folder}: {points['sdft']['runs']} training seeds; the tables show one")
    judged = folder / "seed" / "evaluation.jsonl"
    items = len(read_jsonl(judged)) if judged.exists() else 0
    written = datetime.fromtimestamp((folder / "study.json").stat().st_mtime, timezone.utc)
    about = machine("cpu") | study["environment"]
    return {
        "benchmark": "real_data",
        "environment": about | {"date": written.isoformat(timespec="seconds")},
        "set": name,
        "setting": chosen,
        "rows": sum(study["distilled"]["counts"].values()),
        "targets_that_differ_percent": 100 * study["distilled"]["differ"],
        "settings": study["settings"],
        "arms": {name: arm(points[name], items) for name in wanted},
        "differences": differences(by_setting[chosen]),
    }


def main() -> None:
    args = parse_args()
    try:
        found = document(args.study, args.set, args.setting)
    except ValueError as error:
        sys.exit(str(error))
    record(found, not args.dry)


if __name__ == "__main__":
    main()
