"""The memory plan (engine/train/memory_plan.py) as a table: model size x tokens x recompute policy.

    python -m benchmarks.memory                                    Llama-2-7B and others, and the
                                                                   automatic sizes of three cards
    python -m benchmarks.memory --model MODEL_DIR --tokens 1024,4096   and measured, a process each

By arithmetic: bf16, r 8 on q and v, one packed micro-batch, half of its tokens with loss, no row
longer than 2,048; `weights` are held by the device before the step. Measured: the peak resident set
of a process that does two steps, beside the prediction made before them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import machine, record
from benchmarks.shapes import SHAPES, model_config
from engine.data.encode import Example
from engine.runtime.process_memory import held_memory, keep_freed_memory, peak_memory
from engine.runtime.terminal import table
from engine.sampling.rows_plan import planned_pages, planned_rows
from engine.train.memory_plan import (
    GPU_SHARE,
    Job,
    StepSize,
    micro_batches,
    predict,
    saved_per_token,
)
from engine.train.optim import Optimizer
from engine.train.step import step_gradients, step_update
from kernels.integers import cdiv
from model.layout import parameter_count
from model.llama import Llama
from model.lora import Lora, LoraConfig
from model.tape import POLICIES

ROW = 256  # tokens of a measured row
CARDS = (24, 48, 80)  # GB
CARD_MODELS = ("llama-3.2-1b", "llama-2-7b", "llama-2-13b")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="measure with this checkpoint too")
    parser.add_argument("--modules", default="qv")
    parser.add_argument("--tokens", default="1024,2048", help="measured micro-batches")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--worker", nargs=2, metavar=("POLICY", "TOKENS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def by_arithmetic() -> list[dict[str, Any]]:
    """The plan of every model of benchmarks/shapes.py in bf16 on a GPU."""
    rows = []
    for name in SHAPES:
        config = model_config(name)
        weights = 2 * parameter_count(config)
        for tokens in (2048, 8192, 16384):
            for policy in POLICIES:
                size = StepSize(tokens, 2048, tokens // 2, torch.bfloat16)
                plan = predict(config, LoraConfig(), policy, size, "cuda", weights)
                layer_mb = tokens * saved_per_token(config, policy, torch.bfloat16, 16) / 1e6
                row = {"model": name, "tokens": tokens, "policy": policy, "layer_mb": layer_mb}
                rows.append(row | {"saved": plan.saved, "weights": weights, "peak": plan.total})
    return rows


def automatic() -> list[dict[str, Any]]:
    """What a GPU takes by itself: rows decoded together, tokens of a micro-batch.

    Answers of 150 + 140 tokens; training rows of up to 2,048 tokens, 8 in a step.
    """
    rows = []
    for name in CARD_MODELS:
        config = model_config(name)
        weights = 2 * parameter_count(config)
        job = Job(config, LoraConfig(), torch.bfloat16, 2048, 8, "auto")
        for gigabytes in CARDS:
            total = gigabytes * 10**9
            limit = GPU_SHARE * total
            chosen = micro_batches(job, limit, held=weights)
            pages = planned_pages(config, torch.bfloat16, 64, total, kv_memory=0.0)
            row = {"model": name, "card_gb": gigabytes, "fits": chosen.plan.total <= limit}
            row |= {"rows": planned_rows(pages, [cdiv(150 + 140, 64)]), "tokens": chosen.tokens}
            rows.append(row | {"policy": chosen.plan.policy, "peak": chosen.plan.total})
    return rows


def automatic_table(rows: list[dict[str, Any]]) -> str:
    """A line per model and card."""
    lines = [["", "card GB", "rows", "micro-batch", "recompute", "peak GB"]]
    for r in rows:
        cells = [str(r["rows"]), str(r["tokens"]), r["policy"], f"{r['peak'] / 1e9:.1f}"]
        if not r["fits"]:
            cells = ["-"] * 4
        lines.append([r["model"], str(r["card_gb"]), *cells])
    return table(lines)


def worker(path: str, modules: str, policy: str, tokens: int) -> None:
    """Plan, train two steps, print both peaks as JSON."""
    keep_freed_memory()
    model = Llama.from_pretrained(path)
    config = LoraConfig(modules=modules)
    lora = Lora.init(config, model.config, model.device, model.dtype)
    vocab = model.config.vocab_size
    rows = [
        Example(str(i), [(31 * i + 7 * k) % vocab for k in range(ROW)], ROW // 2)
        for i in range(tokens // ROW)
    ]
    size = StepSize(tokens, ROW, tokens // 2, model.dtype)
    plan = predict(model.config, lora.config, policy, size, "cpu", held_memory("cpu"))
    optimizer = Optimizer.fresh(lora, weight_decay=0.0)
    for _ in range(2):
        gradients = step_gradients(model, lora, rows, optimizer.step + 1, tokens, policy)
        step_update(model, lora, optimizer, gradients, lr=1e-4, clip=1.0)
    answer = {"policy": policy, "tokens": tokens, "predicted": plan.total}
    print(json.dumps(answer | {"measured": peak_memory("cpu")}))


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A process for every policy and size."""
    results = []
    command = [sys.executable, "-m", "benchmarks.memory", "--model", args.model]
    for tokens in args.tokens.split(","):
        for policy in POLICIES:
            worker_command = [*command, "--modules", args.modules, "--worker", policy, tokens]
            done = subprocess.run(worker_command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{policy}, {tokens} tokens:\n{done.stderr[-2000:]}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def main() -> None:
    args = parse_args()
    if args.worker:
        return worker(args.model, args.modules, args.worker[0], int(args.worker[1]))
    rows = by_arithmetic()
    lines = [["", "tokens", "recompute", "MB a layer", "saved GB", "weights GB", "peak GB"]]
    for r in rows:
        sizes = [f"{r[name] / 1e9:.1f}" for name in ("saved", "weights", "peak")]
        lines.append([r["model"], str(r["tokens"]), r["policy"], f"{r['layer_mb']:.0f}", *sizes])
    print("bf16 on a GPU, r 8 on q and v, by arithmetic\n" + table(lines))
    chosen = automatic()
    print("\nautomatic on a GPU: --rows for 150 + 140 tokens; --micro-tokens for 8 rows of 2,048")
    print(automatic_table(chosen))
    document = {"benchmark": "memory", "environment": machine("cpu"), "arithmetic": rows}
    document["automatic"] = chosen
    if args.model:
        document["measured"] = measured(args)
        lines = [["", "tokens", "predicted GB", "measured GB", "off by"]]
        for r in document["measured"]:
            predicted, peak = r["predicted"], r["measured"]
            cells = [f"{predicted / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{predicted / peak - 1:+.1%}"]
            lines.append([r["policy"], str(r["tokens"]), *cells])
        print(f"\n{Path(args.model).name}, r 8 on {args.modules}, fp32, peak RSS\n" + table(lines))
    record(document, args.record)


if __name__ == "__main__":
    main()
