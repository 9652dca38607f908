"""A training step and a decode loop at a model's shapes, random weights made on the device

    python -m benchmarks.step                                        Llama-2-7B, r 8 on q and v
    python -m benchmarks.step --rank 16 --modules all --ops torch,triton,peft --no-decode
    python -m benchmarks.step --model tiny --tokens 64 --row 16      on any machine

A training step is that of engine/train/step.py: forward, loss at every token, backward, clipping,
AdamW, on rows packed into one micro-batch. The tables of operations take turns, step by step, on
the same tokens and weights: their losses and gradient norms must agree. `peft` is transformers with
peft in a process of its own, on weights of the same shapes.

MFU counts 4 operations per weight and token (a LoRA step has no weight gradients: forward and
gradient of the activations) and 3.5 times the causal attention's forward, over the rate of a large
product measured on this machine first.

Decoding is engine/sampling/sampler.py without adapter and draft tokens: every step launched by the
host, and on a GPU also captured ("graphs"), eight steps per host synchronisation; capturing is
timed apart. The last line is JSON, appended to $OUT/step.jsonl, or with --record to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import operator
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import DTYPES, ceilings, first_line, header, machine, record
from benchmarks.processes import why_out_of_memory
from benchmarks.shapes import SHAPES, model_config, random_weights
from engine.data.encode import Example
from engine.data.pack import MicroBatch
from engine.runtime.terminal import table
from engine.sampling.cuda_graphs import why_not_captured
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.train.mfu import stated_rate, step_operations
from engine.train.optim import Optimizer
from engine.train.step import micro_step
from kernels.registry import invariant
from kernels.select_ops import choose
from model.config import LlamaConfig
from model.llama import Llama
from model.lora import Lora, LoraConfig
from model.tape import POLICIES

PEER = Path(__file__).resolve().parent / "peers" / "transformers_step.py"


def row_lengths(args: argparse.Namespace) -> list[int]:
    """Rows of --row tokens, --tokens together; a last row of one token is left out."""
    lengths = [args.row] * (args.tokens // args.row)
    rest = args.tokens % args.row
    if rest > 1:
        lengths.append(rest)
    return lengths


# ---- training


class Trainer:
    """One adapter trained with one table of operations."""

    def __init__(self, model: Llama, args: argparse.Namespace) -> None:
        self.model = model
        self.policy = args.recompute
        config = LoraConfig(args.rank, 2.0 * args.rank, modules=args.modules)
        self.lora = Lora.init(config, model.config, model.device, model.dtype)
        self.optimizer = Optimizer.fresh(self.lora, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1)
        vocab = model.config.vocab_size
        rows = [torch.randint(vocab, (n,), generator=generator) for n in row_lengths(args)]
        examples = [Example(f"row-{i}", ids.tolist(), 1) for i, ids in enumerate(rows)]
        self.batch = MicroBatch.build(examples, 1, model.device)

    def step(self) -> dict[str, float]:
        """One step: its seconds, loss, gradient norm and peak memory."""
        gpu = self.model.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        self.lora.grads.zero_()
        nll = micro_step(self.model, self.lora, self.batch, self.policy)
        scale = 1 / len(nll)
        norm = self.optimizer.update(self.model.ops, self.lora, 1e-4, scale, clip=1.0).item()
        loss = nll.mean().item()  # waits for the device
        if gpu:
            torch.cuda.synchronize()
        return {
            "seconds": time.perf_counter() - started,
            "loss": loss,
            "grad_norm": norm,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        }


def attempt(runs: dict[str, Any], name: str, fn: Callable[[], dict]) -> None:
    """Add a result to the steps of `name`, or record why there is none; the others continue."""
    if "failed" in runs.get(name, {}):
        return
    try:
        result = fn()
    except Exception as error:
        runs[name] = {"failed": first_line(error)}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return
    runs.setdefault(name, {"steps": []})["steps"].append(result)


def training(models: dict[str, Llama], args: argparse.Namespace) -> dict[str, dict]:
    """Steps of every table, taking turns; the first compiles and is reported apart."""
    trainers = {name: Trainer(model, args) for name, model in models.items()}
    runs: dict[str, Any] = {}
    for _ in range(args.steps + 2):  # two to warm up
        for name, trainer in trainers.items():
            attempt(runs, name, trainer.step)
    return {name: summary(run) for name, run in runs.items()}


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """Median and spread of the steps after the first two."""
    if "failed" in run:
        return run
    steps = run["steps"][2:]
    seconds = sorted(s["seconds"] for s in steps)
    last = {k: v for k, v in steps[-1].items() if k != "seconds"}
    first = run["steps"][0]
    return last | {
        "seconds": statistics.median(seconds),
        "spread": [seconds[0], seconds[-1]],
        "first_seconds": first["seconds"],
        "first_loss": first["loss"],
        "first_grad_norm": first["grad_norm"],
    }


def peer(args: argparse.Namespace, config: LlamaConfig) -> dict[str, Any]:
    """The same step by transformers and peft, in a process that imports nothing of this clone."""
    missing = [n for n in ("transformers", "peft") if importlib.util.find_spec(n) is None]
    if missing and args.peer_python == sys.executable:
        return {"skipped": f"not installed here: {', '.join(missing)}"}
    modules = LoraConfig(modules=args.modules).module_names()
    job = {
        "config": dataclasses.asdict(config),
        "lengths": row_lengths(args),
        "rank": args.rank,
        "modules": [m.split(".")[1] for m in modules],
        "steps": args.steps,
        "device": args.device,
        "dtype": str(DTYPES[args.dtype]).removeprefix("torch."),
    }
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [args.peer_python, str(PEER), json.dumps(job)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        reason = why_out_of_memory(done.returncode, done.stderr)
        if reason is not None:
            return {"failed": reason}
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    answer = json.loads(done.stdout.splitlines()[-1])
    return summary(answer) | {"how": answer["how"]}


# ---- decoding


def decoding(model: Llama, args: argparse.Namespace) -> dict[str, dict]:
    """Greedy and sampled decoding of --rows sequences that end at --new tokens only."""
    settings: dict[str, dict] = {"greedy": {}, "sampled": {"temperature": 0.7, "top_p": 0.9}}
    if args.invariant:
        try:
            invariant(model.ops)
            settings["greedy, invariant"] = {"invariant": True}
        except ValueError as error:
            print(f"not decoded: {error}")
    results = {}
    for name, setting in settings.items():
        results[name] = decode(model, args, setting | {"graphs": False})
    reason = why_not_captured(model.ops) if model.device.type == "cuda" else "it is for GPUs"
    if reason:
        print(f"{model.ops.name}: decoded without graphs only: {reason}")
        return results
    for name, setting in settings.items():
        captured = decode(model, args, setting)
        stats = captured["stats"]
        captured |= {
            "rows_as_without": equal_rows(captured["answers"], results[name]["answers"]),
            "replayed": stats.replayed / stats.steps,
            "capture_s": stats.capture_seconds,
            "not_captured": stats.why_not_captured or "",
        }
        results[f"{name}, graphs"] = captured
    return results


def decode(model: Llama, args: argparse.Namespace, setting: dict[str, Any]) -> dict[str, Any]:
    """Speeds and answers of one kind of decoding, with the sampler's counts as `stats`."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(model.config.vocab_size, (args.rows, args.prompt), generator=generator)
    config = SamplerConfig(rows=args.rows, max_new_tokens=args.new, draft="off", **setting)
    for new in (3, args.new):  # the first run compiles
        requests = [Request(f"r{i}", p, new) for i, p in enumerate(prompts.tolist())]
        with Sampler(model, lambda ids: "", (), config) as sampler:
            answers = {done.id: done.ids for done in sampler.run(requests)}
            stats = sampler.stats
    decoded = stats.new_tokens - args.rows  # prefill gave each sequence its first token
    return {
        "tokens_s": decoded / stats.decode_seconds,
        "ms_per_step": 1e3 * stats.decode_seconds / stats.steps,
        "prefill_tokens_s": stats.prompt_tokens / stats.prefill_seconds,
        "answers": [answers[request.id] for request in requests],
        "stats": stats,
    }


def equal_rows(answers: list[list[int]], others: list[list[int]]) -> int:
    """Number of sequences with the same tokens in both."""
    return sum(map(operator.eq, answers, others))


def compare(runs: dict[str, dict]) -> None:
    """In place of the answers the number of sequences equal to those of the first table."""
    tables = [results for results in runs.values() if "failed" not in results]
    for kind in dict.fromkeys(kind for results in tables for kind in results):
        results_of_kind = [results[kind] for results in tables if kind in results]
        answers = [result.pop("answers") for result in results_of_kind]
        for result, own in zip(results_of_kind, answers, strict=True):
            del result["stats"]
            result["rows_as_first"] = equal_rows(own, answers[0])


# ---- report


def report(document: dict[str, Any], args: argparse.Namespace) -> str:
    """A table of training and one of decoding, with notes."""
    columns = "training,tokens/s,step s,TFLOP/s,MFU,of stated,peak GiB,loss,grad norm,first step s"
    lines = [columns.split(",")]
    tokens = sum(row_lengths(args))
    notes = []
    for name, r in document["training"].items():
        if "seconds" not in r:
            notes.append(f"{name}: {r.get('skipped') or 'FAILED: ' + r['failed']}")
            continue
        rate = document["operations"] / r["seconds"]
        stated = f"{100 * rate / document['stated']:.1f} %" if document["stated"] else "-"
        peak = "-" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}"
        lines.append(
            [
                name,
                f"{tokens / r['seconds']:.0f}",
                f"{r['seconds']:.3f}",
                f"{rate / 1e12:.2f}",
                f"{100 * rate / document['ceilings']['flops']:.1f} %",
                stated,
                peak,
                f"{r['first_loss']:.4f}",
                f"{r['first_grad_norm']:.4f}",
                f"{r['first_seconds']:.1f}",
            ]
        )
        if "how" in r:
            notes.append(f"{name}: {r['how']}")
    text = [table(lines), *notes]
    lines = [["decoding", "tokens/s", "ms a step", "prefill tokens/s", "rows as the first"]]
    for name, forms in document["decoding"].items():
        if "failed" in forms:
            text.append(f"decoding, {name}: FAILED: {forms['failed']}")
            continue
        for kind, r in forms.items():
            lines.append(
                [
                    f"{name}, {kind}",
                    f"{r['tokens_s']:.1f}",
                    f"{r['ms_per_step']:.1f}",
                    f"{r['prefill_tokens_s']:.1f}",
                    f"{r['rows_as_first']}/{args.rows}",
                ]
            )
            if "replayed" in r:
                text.append(
                    f"{name}, {kind}: {r['replayed']:.0%} of the steps replayed, captured in "
                    f"{r['capture_s']:.2f} s {r['not_captured']}; {r['rows_as_without']}/"
                    f"{args.rows} rows as without"
                )
    if len(lines) > 1:
        text += ["", table(lines)]
    return "\n".join(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--ops", default="torch,triton", help="tables, or peft, joined by commas")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--row", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--modules", default="qv", help="qv, attention, all or names")
    parser.add_argument("--recompute", choices=POLICIES, default="none")
    parser.add_argument("--steps", type=int, default=5, help="timed, after two to warm up")
    parser.add_argument("--no-decode", action="store_true")
    parser.add_argument("--invariant", action="store_true", help="decode with --invariant too")
    parser.add_argument("--rows", type=int, default=32, help="decoded together")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a decoded prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of a decoded sequence")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if gpu else "fp32")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config = model_config(args.model)
    about = machine(args.device)
    rates = ceilings(args.device, DTYPES[args.dtype])
    print(header(about, rates, args.dtype))
    document = {
        "benchmark": "step",
        "environment": about,
        "ceilings": rates,
        "ask": vars(args),
        "operations": step_operations(config, row_lengths(args)),
        "stated": stated_rate(about["device"]),
        "training": {},
        "decoding": {},
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the results so far are recorded
    try:
        measure(args, config, document)
    finally:
        compare(document["decoding"])
        print(f"{args.model}, r {args.rank} on {args.modules}, rows of {args.row} packed")
        print(report(document, args))
        record(document, args.record)
    runs = [*document["training"].values(), *document["decoding"].values()]
    if any("failed" in r for r in runs):
        sys.exit(1)


def measure(args: argparse.Namespace, config: LlamaConfig, document: dict[str, Any]) -> None:
    """Train and decode with every table of --ops, into the document."""
    names = args.ops.split(",")
    if "peft" in names:  # before our weights are on the device
        document["training"]["peft"] = peer(args, config)
    ours = [name for name in names if name != "peft"]
    weights = random_weights(config, args.device, DTYPES[args.dtype]) if ours else {}
    models = {}
    for name in ours:
        try:
            ops = choose(name, args.device, DTYPES[args.dtype], config.widths)
        except ValueError as error:
            document["training"][name] = {"skipped": str(error)}
            continue
        print(f"{name}: ops {ops.name}")
        models[name] = Llama(config, weights, ops)
    document["training"] |= training(models, args)
    if args.no_decode:
        return
    for name, model in models.items():
        try:
            document["decoding"][name] = decoding(model, args)
        except Exception as error:
            document["decoding"][name] = {"failed": first_line(error)}


if __name__ == "__main__":
    main()
