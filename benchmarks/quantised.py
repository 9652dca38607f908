"""Decoding from the quantised matrices of a GGUF beside the same matrices in panels of whole bytes

    python -m benchmarks.quantised --model DIR --rows 1,8,32

DIR is an import that has `model.gguf_blocks` (scripts/import_gguf.py). Both forms are in one
process and take turns; their texts are compared first. A line for every number of rows: tokens a
second of both while decoding, and quantised / panels by wall clock and by CPU seconds (medians of
the turns; CPU seconds are those of a whole turn, prompts included). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import torch

from benchmarks.clock import machine
from engine.runtime.process_memory import keep_freed_memory
from engine.runtime.terminal import table
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from model.llama import Llama
from model.weights import PlainWeights

PROMPT = 16  # tokens of a prompt


class Turns:
    """One form of a model, sampling the same requests again and again."""

    def __init__(self, model: Llama, rows: int, new_tokens: int) -> None:
        config = SamplerConfig(rows=rows, max_new_tokens=new_tokens, ignore_eos=True, draft="off")
        self.sampler = Sampler(model, str, (), config)
        draw = random.Random(0)
        self.prompts = []
        for _ in range(rows):
            prompt = [draw.randrange(model.config.vocab_size) for _ in range(PROMPT)]
            self.prompts.append(prompt)
        self.turns = 0
        self.wall: list[float] = []  # seconds of decoding, of every turn
        self.cpu: list[float] = []
        self.texts: dict[str, list[int]] = {}

    def run(self) -> None:
        """Sample every request once; the first turn, which packs the weights, is not timed."""
        stats = self.sampler.stats
        wall_before = stats.decode_seconds
        cpu_before = time.process_time()
        requests = [Request(f"{i}", prompt) for i, prompt in enumerate(self.prompts)]
        self.texts = {c.id: c.ids for c in self.sampler.run(requests)}
        if self.turns > 0:
            self.wall.append(stats.decode_seconds - wall_before)
            self.cpu.append(time.process_time() - cpu_before)
        self.turns += 1


def without_blocks(model: Llama) -> Llama:
    """The same model, the same matrices, without their quantised form."""
    return Llama(model.config, PlainWeights(model.weights), model.ops)


def compare(model: Llama, rows: int, new_tokens: int, turns: int) -> dict[str, Any]:
    """Both forms at so many rows; RuntimeError where their texts differ."""
    quantised = Turns(model, rows, new_tokens)
    panels = Turns(without_blocks(model), rows, new_tokens)
    for _ in range(turns + 1):
        quantised.run()
        panels.run()
        if quantised.texts != panels.texts:
            raise RuntimeError(f"the texts of both forms differ at {rows} rows: nothing is timed")
    decoded = rows * (new_tokens - 1)  # the first token comes from the prompt
    return {
        "rows": rows,
        "quantised": decoded / statistics.median(quantised.wall),
        "panels": decoded / statistics.median(panels.wall),
        "speedup": _median_ratio(panels.wall, quantised.wall),
        "speedup_cpu": _median_ratio(panels.cpu, quantised.cpu),
        "quantised_bytes": quantised.sampler.model.weights.nbytes,
        "panels_bytes": panels.sampler.model.weights.nbytes,
    }


def _median_ratio(seconds: list[float], others: list[float]) -> float:
    """The median over the turns of seconds / others."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="an imported GGUF")
    parser.add_argument("--rows", default="1,8,32", help="sequences that run together")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7, help="of each form, timed")
    args = parser.parse_args()
    keep_freed_memory()
    model = Llama.from_pretrained(args.model, dtype=torch.float32)
    if model.weights.quantised is None:
        raise ValueError(f"{args.model} has no model.gguf_blocks; import its GGUF again")
    results = []
    for rows in args.rows.split(","):
        results.append(compare(model, int(rows), args.new_tokens, args.turns))
    lines = [["rows", "quantised, tokens/s", "panels, tokens/s", "ratio", "ratio of CPU seconds"]]
    for r in results:
        speeds = [f"{r['quantised']:.1f}", f"{r['panels']:.1f}"]
        lines.append([str(r["rows"]), *speeds, f"{r['speedup']:.2f}", f"{r['speedup_cpu']:.2f}"])
    print(table(lines))
    print(json.dumps({"machine": machine("cpu"), "model": args.model, "results": results}))


if __name__ == "__main__":
    main()
