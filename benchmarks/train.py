"""Training steps of ours and of transformers + peft: same rows, same adapter, same machine.

    python -m benchmarks.train --model MODEL_DIR --data ../shared/data/gsm8k_train.json
    python -m benchmarks.train ... --modules qv --batches 2 --steps 8 --peer-python OTHER/bin/python

Every engine is a process of its own that waits for orders: they take turns, step by step, on the
same rows from the same adapter. The peer's micro-batches are padded (2 rows, as the paper's scripts
have it, and what else --batches names); ours are packed. Before any speed is printed the losses
and gradient norms of every step must agree with the peer's to 1e-3.

Real tokens a second: those of the rows, padding not counted. The floor is measured beside them, by
one more process: all products of a step with the frozen weights, forward and backward, and with the
head at the response tokens, each at the micro-batches' own shapes, and nothing else. A peer that
runs out of memory is named so, and the others continue. The last line is JSON, with --record also
appended to benchmarks/results/train.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import machine, record
from benchmarks.processes import OutOfMemory, why_out_of_memory
from engine.data.encode import EncodeRules, Example, encode
from engine.data.pack import MicroBatch, pack
from engine.data.rows import load_rows
from engine.runtime.cores import set_here
from engine.runtime.process_memory import keep_freed_memory, peak_memory
from engine.runtime.terminal import table
from engine.train.optim import Optimizer
from engine.train.step import step_gradients, step_update
from model.chat import Chat
from model.config import LlamaConfig
from model.layout import GROUPS
from model.llama import Llama
from model.lora import Lora, LoraConfig, adapter_shapes
from model.peft_format import load_lora, save_lora
from model.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent
AGREE = 1e-3  # relative, loss and gradient norm


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data")
    parser.add_argument("--modules", default="qv,all", help="adapted modules, one table each")
    parser.add_argument("--batches", default="2,4,8", help="the peer's rows in a micro-batch")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="of an optimizer step")
    parser.add_argument("--steps", type=int, default=4, help="timed, after one to warm up")
    parser.add_argument("--micro-tokens", type=int, default=1024, help="ours")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- ours, in its own process


def worker(job: dict[str, Any]) -> None:
    """For each number of a step read from stdin, train on it and print one line of JSON."""
    keep_freed_memory()
    model = Llama.from_pretrained(job["model"])
    lora = load_lora(job["adapter"])
    model.bind(lora)
    optimizer = Optimizer.fresh(lora, weight_decay=0.0)
    steps = []
    for rows in job["steps"]:
        steps.append([Example(str(i), row["ids"], row["n_prompt"]) for i, row in enumerate(rows)])
    packing = (job["micro_tokens"], job["policy"])
    for line in sys.stdin:
        if line.startswith("floor"):
            answer = {"seconds": floor(model, steps[int(line.split()[1])], job["micro_tokens"])}
        else:
            started = time.perf_counter()
            number = optimizer.step + 1
            gradients = step_gradients(model, lora, steps[int(line)], number, *packing)
            done = step_update(model, lora, optimizer, gradients, job["lr"], job["clip"])
            answer = {"loss": done.loss.item(), "grad_norm": done.norm.item()}
            answer |= {"seconds": time.perf_counter() - started, "rss": peak_memory("cpu")}
        print(json.dumps(answer), flush=True)


def floor(model: Llama, examples: list[Example], micro_tokens: int) -> float:
    """Seconds of a step's products with frozen weights, into buffers made before."""
    packed = pack([len(example.ids) for example in examples], micro_tokens)
    groups = [[examples[i] for i in indices] for indices in packed]
    batches = [MicroBatch.build(group, 1, model.device, share=True) for group in groups]
    most = max(len(batch.tokens) for batch in batches)
    widest = 0
    for name, weight in model.weights.items():
        if "." in name and weight.dim() == 2:  # a matrix of a layer
            widest = max(widest, *weight.shape)
    x = torch.randn(most, widest)  # buffers for every input and output
    y = torch.randn(most, widest)
    head = model.weights["head"]
    logits = torch.randn(160, len(head))
    seconds = 0.0
    for batch in batches:
        tokens, response = len(batch.tokens), len(batch.targets)
        shapes = []
        for i in range(model.config.num_layers):
            for group in GROUPS:
                needs_dx = i > 0 or group != "qkv"  # below the first qkv nothing is trained
                shapes.append((model.weights[f"{i}.{group}"], needs_dx))
        started = time.perf_counter()
        for weight, needs_dx in shapes:
            n, k = weight.shape
            a = x.flatten()[: tokens * k].view(tokens, k)
            b = y.flatten()[: tokens * n].view(tokens, n)
            torch.mm(a, weight.T, out=b)
            if needs_dx:
                torch.mm(b, weight, out=a)
        for begin in range(0, response, len(logits)):
            part = logits[: min(len(logits), response - begin)]
            hidden = x.flatten()[: len(part) * head.shape[1]].view(len(part), -1)
            torch.mm(hidden, head.T, out=part)
            torch.mm(part, head, out=hidden)
        seconds += time.perf_counter() - started
    return seconds


# ---- the orders


class Engine:
    """A process that trains one step per request; its stderr is shown at its end."""

    def __init__(self, name: str, command: list[str], folder: str | None = None) -> None:
        drop = ("PYTHONPATH", *set_here) if folder else ()
        env = {k: v for k, v in os.environ.items() if k not in drop} | {"HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.name, self.steps = name, []
        self.words = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(command, cwd=folder, env=env, stderr=self.words, **pipes)

    def ask(self, order: str) -> dict[str, Any]:
        """Send one line, wait for the answer.

        OutOfMemory where the process has ended for that; another end ends this process too.
        """
        answer = ""
        with contextlib.suppress(BrokenPipeError):  # it may have been killed while it waited
            self.process.stdin.write(order + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if answer:
            return json.loads(answer)
        code = self.process.wait()
        self.words.seek(0)
        words = self.words.read()
        reason = why_out_of_memory(code, words)
        if reason is not None:
            raise OutOfMemory(reason)
        sys.exit(f"{self.name} ended with code {code}:\n{words[-3000:]}")

    def close(self) -> None:
        """End it, and print its stderr."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.words.seek(0)
        print(self.words.read(), end="", file=sys.stderr)
        self.words.close()


def take_turns(engines: list[Engine], products: Engine, count: int) -> tuple[list[float], dict]:
    """Every step on every engine; returns seconds of the products, and engine -> why it was lost.

    The first of the engines is ours: where it is lost, the benchmark ends.
    """
    floors, lost = [], {}
    for number in range(count):
        for engine in engines:
            if engine.name in lost:
                continue
            try:
                engine.steps.append(engine.ask(str(number)))
            except OutOfMemory as error:
                if engine is engines[0]:
                    sys.exit(f"{engine.name}: {error}")
                lost[engine.name] = str(error)
                print(f"{engine.name}: {error}; the others continue", file=sys.stderr, flush=True)
        floors.append(products.ask(f"floor {number}")["seconds"])
    return floors, lost


def write_adapter(path: Path, model: LlamaConfig, rank: int, modules: str) -> None:
    """An adapter whose B is not zero, so that A has a gradient from the first step on."""
    config = LoraConfig(rank=rank, alpha=2.0 * rank, modules=modules)
    lora = Lora(config, adapter_shapes(config, model))
    generator = torch.Generator().manual_seed(0)
    for name, view in lora.views(lora.params).items():
        scale = view.shape[1] ** -0.5 if ".lora_A." in name else 0.01
        view.copy_(torch.randn(view.shape, generator=generator) * scale)
    save_lora(lora, path)


def compare(args: argparse.Namespace, modules: str, steps: list[list[dict]]) -> dict[str, Any]:
    """All engines on one choice of modules, taking turns."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        file = Path(folder) / "job.json"
        write_adapter(adapter, LlamaConfig.from_dir(Path(args.model)), args.rank, modules)
        job = {
            "model": str(Path(args.model).resolve()),
            "adapter": str(adapter),
            "steps": steps,
            "lr": 1e-4,
            "clip": 1.0,
            "policy": args.recompute,
            "micro_tokens": args.micro_tokens,
        }
        file.write_text(json.dumps(job))
        mine = [sys.executable, "-m", "benchmarks.train", "--model", args.model]
        engines = [Engine("ours", [*mine, "--worker", str(file)])]
        script = str(HERE / "peers" / "transformers_train.py")
        for size in args.batches.split(","):
            command = [args.peer_python, script, str(file), size]
            engines.append(Engine(f"peft, {size} rows", command, folder))
        products = Engine("the products", [*mine, "--worker", str(file)])
        try:
            floors, lost = take_turns(engines, products, len(steps))
        finally:
            for engine in (*engines, products):
                engine.close()
    return report(modules, steps, engines, floors[1:], lost)


def report(
    modules: str,
    steps: list[list[dict]],
    engines: list[Engine],
    floors: list[float],
    lost: dict[str, str],
) -> dict[str, Any]:
    """Check, print and return: no speed without agreement. `lost`: engine -> why it has none."""
    engines = [engine for engine in engines if engine.name not in lost]
    if len(engines) == 1:
        print(f"\n{modules}: no peer is left to agree with, so no speed is reported: {lost}")
        return {"engines": {}, "lost": lost}
    counts = [sum(len(row["ids"]) for row in step) for step in steps[1:]]
    tokens = sum(counts)
    truth = engines[1]
    lines = [["", "tokens/s", "slowest..fastest step", "peak RSS", "loss", "gradient norm"]]
    result: dict[str, Any] = {"floor_tokens_s": tokens / sum(floors), "engines": {}}
    worst = 0.0
    for engine in engines:
        for got, want in zip(engine.steps, truth.steps, strict=True):
            for name in ("loss", "grad_norm"):
                worst = max(worst, abs(got[name] / want[name] - 1))
        timed = engine.steps[1:]
        rates = sorted(n / s["seconds"] for n, s in zip(counts, timed, strict=True))
        rate = tokens / sum(s["seconds"] for s in timed)
        last = timed[-1]
        lines.append(
            [
                engine.name,
                f"{rate:.1f}",
                f"{rates[0]:.0f} .. {rates[-1]:.0f}",
                f"{last['rss'] / 1e9:.2f} GB",
                f"{last['loss']:.5f}",
                f"{last['grad_norm']:.5f}",
            ]
        )
        result["engines"][engine.name] = {"tokens_s": rate, "steps": engine.steps}
    print(
        f"\n{modules}: {len(counts)} timed steps, {tokens} tokens; losses and gradient norms agree "
        f"to {worst:.1e}"
    )
    if worst > AGREE:
        sys.exit(f"they differ by more than {AGREE:g}: no speed is reported\n{result}")
    for name, reason in lost.items():
        lines.append([name, reason, "", "", "", ""])
    print(table(lines))
    own_rate = result["engines"]["ours"]["tokens_s"]
    peers = {engine.name: engine for engine in engines[1:]}
    best = max(peers, key=lambda name: result["engines"][name]["tokens_s"])
    rss = engines[0].steps[-1]["rss"] / peers[best].steps[-1]["rss"]
    result |= {
        "lost": lost,
        "agree": worst,
        "ratio": own_rate / result["engines"][best]["tokens_s"],
        "best_peer": best,
        "rss_ratio": rss,
        "share_of_floor": own_rate / result["floor_tokens_s"],
    }
    print(
        f"{result['ratio']:.2f}x {best} (its best), peak RSS {rss:.2f}x; "
        f"{result['share_of_floor']:.0%} of the matrix products alone "
        f"({result['floor_tokens_s']:.0f} tokens/s)"
    )
    return result


def main() -> None:
    args = parse_args()
    if args.worker:
        return worker(json.loads(Path(args.worker).read_text()))
    load = os.getloadavg()[0]
    if load > 0.7:
        print(f"WARNING: the machine is busy (load {load:.1f}); timings will be wrong")
    chat = Chat.from_dir(Path(args.model), load_tokenizer(Path(args.model)))
    rows = load_rows(args.data, limit=args.rows * (args.steps + 1))
    examples, _ = encode(rows, chat, EncodeRules(max_length=2048))
    encoded = [{"ids": e.ids, "n_prompt": e.n_prompt} for e in examples]
    steps = [encoded[i : i + args.rows] for i in range(0, len(encoded), args.rows)]
    about = machine("cpu")
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {about['date']}")
    document = {
        "benchmark": "train",
        "environment": about,
        "load_before": load,
        "data": Path(args.data).name,
        "ask": vars(args),
        "modules": {m: compare(args, m, steps) for m in args.modules.split(",")},
    }
    record(document, args.record)


if __name__ == "__main__":
    main()
