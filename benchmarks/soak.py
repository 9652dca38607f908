"""A long training run of a tiny model, undisturbed and killed three times: the same in the end?

    python -m benchmarks.soak                       2,000 steps, a minute or two on two cores
    python -m benchmarks.soak --steps 300 --kills 1

Checks that memory stays flat (resident set, last quarter against the second) and speed steady, that
metrics have every step once and in order, and that adapter, optimizer and metrics are bitwise those
of the undisturbed run. Exit code 1 names the checks that failed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import machine, record
from benchmarks.shapes import model_config, random_weights
from engine.data.encode import Example
from engine.runtime.files import read_jsonl
from engine.runtime.process_memory import keep_freed_memory
from engine.train.config import TrainConfig
from engine.train.train import FrozenModel, train
from kernels.select_ops import choose
from model.llama import Llama
from model.lora import LoraConfig

SAME = ("adapter_model.safetensors", "adapter_config.json")
GROWTH, DRIFT = 0.02, 0.25  # of memory and of speed, relative


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def worker(out: Path, steps: int) -> None:
    """Train, or go on training, into `out`."""
    keep_freed_memory()
    config = model_config("tiny")
    model = Llama(config, random_weights(config, "cpu", torch.float32), choose("torch"))
    rng, rows = random.Random(0), []
    for i in range(400):
        ids = [rng.randrange(config.vocab_size) for _ in range(rng.randint(10, 60))]
        rows.append(Example(f"r{i}", ids, rng.randint(1, len(ids) - 1)))
    settings = TrainConfig(lr=1e-3, max_steps=steps, micro_tokens=128, save_every=100, keep=2)
    lora = LoraConfig(rank=4, modules="all", dropout=0.05)
    train(FrozenModel(model, "tiny", "tiny"), rows, lora, settings, out, resume=out.exists())


def run(out: Path, steps: int, kill_at: int | None) -> list[tuple[int, int]]:
    """One process; (steps done, resident bytes) seen from outside until it ends or is killed."""
    command = [sys.executable, "-m", "benchmarks.soak", "--steps", str(steps), "--worker", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics, seen = out / "metrics.jsonl", []
    while process.poll() is None:
        time.sleep(0.25)
        done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        rss = [int(x.split()[1]) * 1024 for x in status if x.startswith("VmRSS")]
        seen += [(done, r) for r in rss]
        if kill_at is not None and done >= kill_at:
            process.kill()
    error = process.stderr.read().decode()
    if process.wait() not in (0, -9):
        sys.exit(f"the run ended with code {process.returncode}:\n{error[-2000:]}")
    return seen


def quarters(pairs: list[tuple[int, float]], steps: int) -> tuple[float, float]:
    """Median of the second and of the last quarter of the steps."""
    second = [value for step, value in pairs if steps // 4 <= step < steps // 2]
    last = [value for step, value in pairs if step >= 3 * steps // 4]
    return statistics.median(second), statistics.median(last)


def main() -> None:
    args = parse_args()
    if args.worker:
        return worker(Path(args.worker), args.steps)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        memory = run(whole, args.steps, None)
        rng = random.Random(0)
        kills = sorted(rng.sample(range(args.steps // 20, args.steps - 5), args.kills))
        for kill_at in (*kills, None):
            run(killed, args.steps, kill_at)
        lines = [read_jsonl(path / "metrics.jsonl") for path in (whole, killed)]
        ends = [sorted((path / "checkpoints").iterdir())[-1] for path in (whole, killed)]
        pairs = [(whole / name, killed / name) for name in SAME]
        pairs += [(ends[0] / name, ends[1] / name) for name in ("optimizer.safetensors",)]
        found["bitwise equal"] = all(a.read_bytes() == b.read_bytes() for a, b in pairs)
    bare = [[{k: v for k, v in x.items() if k != "tokens_s"} for x in run] for run in lines]
    found["metrics equal"] = bare[0] == bare[1]
    found["every step once, in order"] = [x["step"] for x in bare[1]] == [*range(1, args.steps + 1)]
    rss = quarters(memory, args.steps)
    speed = quarters([(x["step"], x["tokens_s"]) for x in lines[0]], args.steps)
    found["memory flat"] = rss[1] <= (1 + GROWTH) * rss[0]
    found["speed steady"] = abs(speed[1] / speed[0] - 1) <= DRIFT
    print(
        f"{args.steps} steps; killed at {kills}; losses {lines[0][0]['loss']:.3f} -> "
        f"{lines[0][-1]['loss']:.3f}"
    )
    print(
        f"resident {rss[0] / 1e6:.1f} -> {rss[1] / 1e6:.1f} MB, {speed[0]:.0f} -> {speed[1]:.0f} "
        "tokens/s (second and last quarter)"
    )
    for name, good in found.items():
        print(f"{'ok' if good else 'FAILED':8s}{name}")
    document = {"benchmark": "soak", "environment": machine("cpu"), "steps": args.steps}
    record(document | {"kills": kills, "found": found, "rss": rss, "tokens_s": speed}, args.record)
    if not all(found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
