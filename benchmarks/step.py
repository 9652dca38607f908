"""A whole training step and a decode loop at a model's shapes, random weights made on the device.

    python -m benchmarks.step                                        Llama-2-7B, r 8 on q and v
    python -m benchmarks.step --rank 16 --modules all --ops torch,triton,peft --no-decode
    python -m benchmarks.step --model tiny --tokens 64 --row 16      on any machine

A training step is what engine/train/train.py does: forward, loss at every token, backward,
clipping,
AdamW, on rows packed into one micro-batch. The tables of operations take turns, step by step, and
see the same tokens and weights: their losses and gradient norms must agree. `peft` is transformers
with peft in a process of its own, on weights of the same shapes.

MFU counts 4 operations per weight and token (a LoRA step has no weight gradients: forward and
gradient of the activations) and 3.5 times the causal attention's forward, over the rate of a large
product measured on this machine first. Decoding is engine/sampling/sampler.py with no adapter and
no drafts,
a step launched by the host after the other, and on a GPU with captured steps ("graphs") too, eight
between two visits of the host; capturing is timed apart.
The last line is JSON, appended to $OUT/step.jsonl, or with --record to benchmarks/results/.
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
from torch import Tensor

from benchmarks.clock import DTYPES, ceilings, first_line, header, machine, record
from benchmarks.processes import why_it_ended
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
from kernels.spec import MODELS, Widths
from model.config import LlamaConfig
from model.llama import Llama
from model.lora import Lora, LoraConfig
from model.tape import POLICIES
from model.weights import PlainWeights

PEER = Path(__file__).resolve().parent / "peers" / "transformers_step.py"
# name -> widths, layers, rope's theta, longest row, whether the head is the embedding
SHAPES = {
    "llama-2-7b": (MODELS["llama-2-7b"], 32, 1e4, 4096, False),
    "llama-3-8b": (MODELS["llama-3-8b"], 32, 5e5, 8192, False),
    "smollm2-135m": (MODELS["smollm2-135m"], 30, 1e5, 8192, True),
    "tiny": (Widths(64, 96, 4, 2, 16, 320), 2, 1e4, 512, False),
}


def model_config(name: str) -> LlamaConfig:
    w, layers, theta, longest, tied = SHAPES[name]
    return LlamaConfig(
        vocab_size=w.V,
        hidden_size=w.D,
        intermediate_size=w.F,
        num_layers=layers,
        num_heads=w.H,
        num_kv_heads=w.G,
        head_dim=w.d,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        max_position=longest,
        tie_embeddings=tied,
    )


def random_weights(config: LlamaConfig, device: str, dtype: torch.dtype) -> PlainWeights:
    """Matrices that keep the variance, norms of one; named as in model/layout.py."""
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, device=device, dtype=dtype)
        return drawn.mul_(columns**-0.5)

    c, ones = config, torch.ones(config.hidden_size, device=device, dtype=dtype)
    weights = PlainWeights(embed=matrix(c.vocab_size, c.hidden_size), norm=ones)
    for i in range(c.num_layers):
        weights |= {
            f"{i}.attn_norm": ones,
            f"{i}.qkv": matrix(sum(c.qkv_sizes), c.hidden_size),
            f"{i}.o": matrix(c.hidden_size, c.qkv_sizes[0]),
            f"{i}.mlp_norm": ones,
            f"{i}.gate_up": matrix(2 * c.intermediate_size, c.hidden_size),
            f"{i}.down": matrix(c.hidden_size, c.intermediate_size),
        }
    tied = c.tie_embeddings
    weights["head"] = weights["embed"] if tied else matrix(c.vocab_size, c.hidden_size)
    return weights


def row_lengths(args: argparse.Namespace) -> list[int]:
    rest = args.tokens % args.row
    return [args.row] * (args.tokens // args.row) + ([rest] if rest > 1 else [])


# ---- training


class Trainer:
    """One adapter trained with one table of operations."""

    def __init__(self, model: Llama, args: argparse.Namespace) -> None:
        self.model, self.policy = model, args.recompute
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
        result = {"seconds": time.perf_counter() - started, "loss": loss, "grad_norm": norm}
        return result | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None}


def attempt(runs: dict[str, Any], name: str, fn: Callable[[], dict]) -> None:
    """Put the result under `name`, or why there is none: one table's failure is not the other's."""
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
    """Steps of every table, taking turns; the first is compiling and is told apart."""
    trainers = {name: Trainer(model, args) for name, model in models.items()}
    runs: dict[str, Any] = {}
    for _ in range(args.steps + 2):  # two to warm up
        for name, trainer in trainers.items():
            attempt(runs, name, trainer.step)
    return {name: summary(run) for name, run in runs.items()}


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """Median and spread of the steps behind the first two."""
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
    """The same step by transformers and peft, in a process that sees nothing of this clone."""
    missing = [n for n in ("transformers", "peft") if importlib.util.find_spec(n) is None]
    if missing and args.peer_python == sys.executable:
        return {"skipped": f"not installed here: {', '.join(missing)}"}
    modules = LoraConfig(modules=args.modules).module_names()
    asked = {
        "config": dataclasses.asdict(config),
        "lengths": row_lengths(args),
        "rank": args.rank,
        "modules": [m.split(".")[1] for m in modules],
        "steps": args.steps,
        "device": args.device,
        "dtype": str(DTYPES[args.dtype]).removeprefix("torch."),
    }
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [args.peer_python, str(PEER), json.dumps(asked)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        if reason := why_it_ended(done.returncode, done.stderr):
            return {"failed": reason}
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:300]}
    told = json.loads(done.stdout.splitlines()[-1])
    return summary(told) | {"how": told["how"]}


# ---- decoding


def decoding(model: Llama, args: argparse.Namespace) -> dict[str, dict]:
    """Greedy and sampled decoding of `rows` rows that nothing ends early."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(model.config.vocab_size, (args.rows, args.prompt), generator=generator)
    settings = {"greedy": {}, "sampled": {"temperature": 0.7, "top_p": 0.9}}
    if args.invariant:
        try:
            invariant(model.ops)
            settings["greedy, invariant"] = {"invariant": True}
        except ValueError as error:
            print(f"not decoded: {error}")
    off = {name: {**setting, "graphs": False} for name, setting in settings.items()}
    reason = why_not_captured(model.ops) if model.device.type == "cuda" else "it is for GPUs"
    if reason:
        print(f"{model.ops.name}: decoded without graphs only: {reason}")
    on = {} if reason else {f"{name}, graphs": setting for name, setting in settings.items()}
    found = {}
    for name, setting in (off | on).items():
        config = SamplerConfig(rows=args.rows, max_new_tokens=args.new, draft="off", **setting)
        for new in (3, args.new):  # the first run compiles
            requests = [Request(f"r{i}", p, new) for i, p in enumerate(prompts.tolist())]
            with Sampler(model, lambda ids: "", (), config) as sampler:
                answers = {done.id: done.ids for done in sampler.run(requests)}
                stats = sampler.stats
        decoded = stats.new_tokens - args.rows  # prefill gave each row its first
        found[name] = {
            "tokens_s": decoded / stats.decode_seconds,
            "ms_per_step": 1e3 * stats.decode_seconds / stats.steps,
            "prefill_tokens_s": stats.prompt_tokens / stats.prefill_seconds,
            "answers": [answers[r.id] for r in requests],
        }
        if name in on:
            plain = found[name.removesuffix(", graphs")]["answers"]
            found[name] |= {
                "rows_as_without": sum(map(operator.eq, found[name]["answers"], plain)),
                "replayed": stats.replayed / stats.steps,
                "capture_s": stats.capture_seconds,
                "not_captured": stats.why_not_captured or "",
            }
    return found


def compare(runs: dict[str, dict]) -> None:
    """Put the number of rows written as by the first table in place of the texts."""
    done = [forms for forms in runs.values() if "failed" not in forms]
    for kind in dict.fromkeys(kind for forms in done for kind in forms):
        having = [forms for forms in done if kind in forms]
        texts = [forms[kind].pop("answers") for forms in having]
        for forms, text in zip(having, texts, strict=True):
            forms[kind]["rows_as_first"] = sum(map(operator.eq, text, texts[0]))


# ---- report


def report(document: dict[str, Any], args: argparse.Namespace) -> str:
    """Two tables for people."""
    lines = [["training", "tokens/s", "step s", "TFLOP/s", "MFU", "of stated", "peak GiB", "loss"]]
    lines[0] += ["grad norm", "first step s"]
    said = []
    for name, r in document["training"].items():
        if "seconds" not in r:
            said.append(f"{name}: {r.get('skipped') or 'FAILED: ' + r['failed']}")
            continue
        rate = document["operations"] / r["seconds"]
        stated = f"{100 * rate / document['stated']:.1f} %" if document["stated"] else "-"
        peak = "-" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}"
        cells = [f"{sum(row_lengths(args)) / r['seconds']:.0f}", f"{r['seconds']:.3f}"]
        cells += [f"{rate / 1e12:.2f}", f"{100 * rate / document['ceilings']['flops']:.1f} %"]
        cells += [stated, peak, f"{r['first_loss']:.4f}", f"{r['first_grad_norm']:.4f}"]
        lines.append([name, *cells, f"{r['first_seconds']:.1f}"])
        said += [f"{name}: {r['how']}"] if "how" in r else []
    text = [table(lines), *said]
    lines = [["decoding", "tokens/s", "ms a step", "prefill tokens/s", "rows as the first"]]
    for name, forms in document["decoding"].items():
        if "failed" in forms:
            text.append(f"decoding, {name}: FAILED: {forms['failed']}")
            continue
        for kind, r in forms.items():
            rates = [r["tokens_s"], r["ms_per_step"], r["prefill_tokens_s"]]
            same = f"{r['rows_as_first']}/{args.rows}"
            lines.append([f"{name}, {kind}", *(f"{x:.1f}" for x in rates), same])
            if "replayed" in r:
                text.append(
                    f"{name}, {kind}: {r['replayed']:.0%} of the steps replayed, captured in "
                    f"{r['capture_s']:.2f} s {r['not_captured']}; {r['rows_as_without']}/"
                    f"{args.rows} rows as without"
                )
    return "\n".join(text + (["", table(lines)] if len(lines) > 1 else []))


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
    parser.add_argument("--invariant", action="store_true", help="decode so too, where it can be")
    parser.add_argument("--rows", type=int, default=32, help="decoded together")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a decoded row's prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that it writes")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if gpu else "fp32")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config = model_config(args.model)
    about, rates = machine(args.device), ceilings(args.device, DTYPES[args.dtype])
    print(header(about, rates, args.dtype))
    document = {"benchmark": "step", "environment": about, "ceilings": rates, "ask": vars(args)}
    document["operations"] = step_operations(config, row_lengths(args))
    document["stated"] = stated_rate(about["device"])
    document |= {"training": {}, "decoding": {}}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is known by then is recorded
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
    """Train and decode with every table asked for, into the document."""
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
    for name, model in {} if args.no_decode else models.items():
        try:
            document["decoding"][name] = decoding(model, args)
        except Exception as error:
            document["decoding"][name] = {"failed": first_line(error)}


if __name__ == "__main__":
    main()
