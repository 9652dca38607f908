"""Distillation of real text with draft tokens and without: the same texts, and how fast?

    python -m benchmarks.card.drafts --model DIR --data train.json --work DIR

One process distils the same rows with --draft off, auto and always: first as the sampler does by
default, then batch-invariant, where every text must be the same. A line of JSON each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.clock import figure
from engine.data.config import DataConfig
from engine.distill.config import DistillConfig
from engine.distill.distill import can_be_asked, distill, distill_settings
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import SamplerConfig
from engine.session import DTYPES, ModelConfig, Session

DRAFTS = ("off", "auto", "always")


def distil_once(session: Session, args: argparse.Namespace, name: str, **sampling: Any) -> dict:
    """Distil all rows into WORK/NAME.jsonl; the seconds, counts and texts by row."""
    config = SamplerConfig(rows=args.rows, **sampling)
    settings = DistillConfig(template="gsm8k", verify="number", max_new_tokens=str(args.max_new))
    data = DataConfig(data=str(args.data), limit=args.limit)
    rows = data.load(check=can_be_asked(session.chat, settings))
    out = args.work / f"{name}.jsonl"
    generator = ChatGenerator(session.model, session.chat, config)
    started = time.perf_counter()
    report = distill(
        generator,
        rows,
        out,
        settings,
        settings=distill_settings(session, rows, settings, config),
    )
    stats = report.stats
    return {
        "seconds": time.perf_counter() - started,
        "new_tokens": stats.new_tokens,
        "decode_s": stats.decode_seconds,
        "steps": stats.steps,
        "draft_tokens": stats.draft_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "preempted": stats.preempted,
        "graphs": stats.captured,
        "not_captured": stats.why_not_captured or "",
        "texts": {line.id: line.response_ids for line in report.lines},
    }


def compared(session: Session, args: argparse.Namespace, invariant: bool) -> list[dict[str, Any]]:
    """Every kind of draft, with the rows whose text is the one without drafts."""
    results = []
    without: dict[str, list[int]] = {}
    suffix = "-invariant" if invariant else ""
    for draft in DRAFTS:
        name = f"draft-{draft}{suffix}"
        result = distil_once(session, args, name, draft=draft, invariant=invariant)
        texts = result.pop("texts")
        without = without or texts
        same = sum(without[row] == ids for row, ids in texts.items())
        result |= {"draft": draft, "invariant": invariant, "rows": len(texts), "rows_equal": same}
        figure("product", {"what": "drafts"} | result)
        print(json.dumps(result), flush=True)
        results.append(result)
    return results


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--rows", type=int, default=8, help="decoded together: drafts pay at few")
    parser.add_argument("--limit", type=int, default=40, help="rows of the data")
    parser.add_argument("--max-new", type=int, default=160)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    session = Session.open(ModelConfig(args.model, device=args.device, dtype=args.dtype))
    results = compared(session, args, invariant=False)
    results += compared(session, args, invariant=True)
    wrong = [r for r in results if r["invariant"] and r["rows_equal"] != r["rows"]]
    if wrong:
        raise SystemExit(f"texts differ with drafts although batch-invariant: {wrong}")


if __name__ == "__main__":
    main()
