"""The seed model answers the task instructions_900: what it costs to measure an arm with it.

    python -m benchmarks.instructions --model MODEL_DIR --record
    python -m benchmarks.instructions --model MODEL_DIR --items 90        three of every kind

Seconds are of the wall and of all processors together, from the first prompt to the scores; loading
the weights is not counted. An answer has 64 tokens at most. The last line is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.clock import machine, record
from engine.evaluate.tasks.generated_instructions import INSTRUCTIONS_900
from engine.evaluate.tasks.run import TaskConfig, run_tasks
from engine.runtime.files import read_jsonl
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig, Session


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of the seed model")
    parser.add_argument("--items", type=int, help="only the first N, as --task-limit [900]")
    parser.add_argument("--threads", type=int, default=0, help="as of the scripts [0: automatic]")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    return parser.parse_args()


def document(session: Session, items: int | None) -> dict[str, Any]:
    """The record of one arm, the seed model, over the first `items`."""
    name = INSTRUCTIONS_900.name
    config = TaskConfig(task=(name,), task_limit=items)
    greedy = SamplerConfig().greedy(SamplerConfig.max_new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        processors = time.process_time()
        wall = time.perf_counter()
        scores = run_tasks(session, config, {"seed": None}, out, greedy)
        wall = time.perf_counter() - wall
        processors = time.process_time() - processors
        lines = read_jsonl(out / f"{name}.jsonl")
    tokens = sum(line["tokens"] for line in lines)
    return {
        "benchmark": "instructions",
        "environment": machine(session.model.device.type),
        "model": session.facts(),
        "items": len(lines),
        "tokens": tokens,
        "cut_short": sum(line["finish"] == "length" for line in lines),
        "scores": scores[name]["seed"],
        "seconds": wall,
        "processor_seconds": processors,
        "items_s": len(lines) / wall,
        "tokens_s": tokens / wall,
    }


def main() -> None:
    args = parse_args()
    session = Session.open(ModelConfig(args.model, threads=args.threads))
    found = document(session, args.items)
    print(
        f"{found['items']} items, {found['tokens']} tokens in {found['seconds']:.0f} s "
        f"({found['processor_seconds']:.0f} s of processors): {found['items_s']:.1f} items/s"
    )
    record(found, args.record)


if __name__ == "__main__":
    main()
