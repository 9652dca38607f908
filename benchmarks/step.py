"""A training step and a decode loop at a model's shapes, random weights made on the device

    python -m benchmarks.step                                        Llama-2-7B, r 8 on q and v
    python -m benchmarks.step --rank 16 --modules all --ops torch,triton,peft --no-decode
    python -m benchmarks.step --model tiny --tokens 64 --row 16      on any machine
    python -m benchmarks.step --tokens 2304 --row 288 --modules all --dropout 0.1 --no-decode
    python -m benchmarks.step --steps 0 --rows-list 64,128,256 --prompt 150 --new 140 \\
        --requests 512 --adapter all                                 decoding alone, with refill

A training step is that of engine/train/step.py: forward, loss at every token, backward, clipping,
AdamW, on packed rows, in one micro-batch unless --micro-tokens divides them. The tables of
operations take turns, step by step, on the same tokens and weights: their losses and gradient
norms must agree. `peft` is transformers with peft in a process of its own, on weights of the same
shapes.

MFU counts 4 operations per weight and token (a LoRA step has no weight gradients: forward and
gradient of the activations) and 3.5 times the causal attention's forward, over the rate of a large
product measured on this machine first.

Decoding is engine/sampling/sampler.py without draft tokens: every step launched by the host, and
on a GPU also captured ("graphs"), eight steps per host synchronisation; capturing is timed apart.
"useful" tokens/s are all new tokens over all seconds, prefill included. Settings: greedy; sampled
at temperature 0.7, top-p 0.9; and the paper's sampling. With --requests above --rows, sequences
that end are replaced by others, and lengths vary from a half to three halves.

The last line is JSON, appended to $OUT/step.jsonl, or with --record to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import DTYPES, ceilings, figure, first_line, header, machine, record
from benchmarks.processes import why_out_of_memory
from benchmarks.shapes import SHAPES, model_config, random_weights
from benchmarks.step_decoding import SETTINGS, DecodeCase, decode, equal_rows
from benchmarks.step_training import StepCase, summary, training
from engine.runtime.terminal import table
from engine.sampling.cuda_graphs import why_not_captured
from engine.train.mfu import stated_rate, step_operations
from kernels.registry import invariant
from kernels.select_ops import choose
from model.config import LlamaConfig
from model.llama import Llama
from model.lora import LoraConfig
from model.tape import POLICIES

PEER = Path(__file__).resolve().parent / "peers" / "transformers_step.py"


def step_case(args: argparse.Namespace) -> StepCase:
    """The training step that the flags ask for."""
    return StepCase(
        tokens=args.tokens,
        row=args.row,
        rank=args.rank,
        modules=args.modules,
        dropout=args.dropout,
        micro_tokens=args.micro_tokens,
        policy=args.recompute,
    )


def peer(args: argparse.Namespace, config: LlamaConfig) -> dict[str, Any]:
    """The same step by transformers and peft, in a process that imports nothing of this clone."""
    missing = [n for n in ("transformers", "peft") if importlib.util.find_spec(n) is None]
    if missing and args.peer_python == sys.executable:
        return {"skipped": f"not installed here: {', '.join(missing)}"}
    modules = LoraConfig(modules=args.modules).module_names()
    job = {
        "config": dataclasses.asdict(config),
        "lengths": step_case(args).row_lengths(),
        "rank": args.rank,
        "modules": [m.split(".")[1] for m in modules],
        "dropout": args.dropout,
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


def decode_cases(args: argparse.Namespace) -> dict[str, DecodeCase]:
    """What is decoded without graphs, by name; with --rows-list the names end in the rows."""
    counts = args.rows_list or [args.rows]
    cases = {}
    for rows in counts:
        case = DecodeCase(rows, args.prompt, args.new, args.requests, adapter=args.adapter)
        suffix = f", {rows} rows" if args.rows_list else ""
        for setting in SETTINGS:
            cases[setting + suffix] = dataclasses.replace(case, setting=setting, graphs=False)
        if args.invariant:
            name = f"greedy, invariant{suffix}"
            cases[name] = dataclasses.replace(case, invariant=True, graphs=False)
    return cases


def decoding(model: Llama, args: argparse.Namespace) -> dict[str, dict]:
    """Decoding of sequences that end at their last new token only, in every setting."""
    cases = decode_cases(args)
    if args.invariant:
        try:
            invariant(model.ops)
        except ValueError as error:
            print(f"not decoded: {error}")
            cases = {name: case for name, case in cases.items() if not case.invariant}
    results = {}
    for name, case in cases.items():
        results[name] = decode(model, case)
        note(model.ops.name, name, results[name])
    reason = why_not_captured(model.ops) if model.device.type == "cuda" else "it is for GPUs"
    if reason:
        print(f"{model.ops.name}: decoded without graphs only: {reason}")
        return results
    for name, case in cases.items():
        captured = decode(model, dataclasses.replace(case, graphs=True))
        stats = captured["stats"]
        captured |= {
            "rows_as_without": equal_rows(captured["answers"], results[name]["answers"]),
            "replayed": stats.replayed / stats.steps,
            "capture_s": stats.capture_seconds,
            "not_captured": stats.why_not_captured or "",
        }
        with_graphs = f"{name}, graphs"
        results[with_graphs] = captured
        note(model.ops.name, with_graphs, captured)
    return results


def note(ops: str, name: str, result: dict[str, Any]) -> None:
    """Keep a decoding's figures at once, without the answers."""
    figures = {k: v for k, v in result.items() if k not in ("answers", "stats")}
    figure("step", {"decoding": name, "ops": ops} | figures)


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
    columns = "training,tokens/s,step s,TFLOP/s,MFU,of stated,peak GiB,by the plan,loss,grad norm"
    lines = [[*columns.split(","), "first step s"]]
    tokens = sum(step_case(args).row_lengths())
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
                f"{r['predicted_gib']:.1f}" if "predicted_gib" in r else "-",
                f"{r['first_loss']:.4f}",
                f"{r['first_grad_norm']:.4f}",
                f"{r['first_seconds']:.1f}",
            ]
        )
        if "how" in r:
            notes.append(f"{name}: {r['how']}")
    text = [table(lines), *notes]
    columns = "decoding,tokens/s,useful tokens/s,ms a step,card s,rest s,prefill tokens/s"
    lines = [[*columns.split(","), "rows as the first"]]
    for name, forms in document["decoding"].items():
        if "failed" in forms:
            text.append(f"decoding, {name}: FAILED: {forms['failed']}")
            continue
        for kind, r in forms.items():
            lines.append(
                [
                    f"{name}, {kind}",
                    f"{r['tokens_s']:.1f}",
                    f"{r['useful_tokens_s']:.1f}",
                    f"{r['ms_per_step']:.1f}",
                    f"{r['replay_s'] + r['forward_s']:.2f}" if "rest_s" in r else "-",
                    f"{r['rest_s']:.2f}" if "rest_s" in r else "-",
                    f"{r['prefill_tokens_s']:.1f}",
                    f"{r['rows_as_first']}",
                ]
            )
            if "replayed" in r:
                text.append(
                    f"{name}, {kind}: {r['replayed']:.0%} of the steps replayed, captured in "
                    f"{r['capture_s']:.2f} s {r['not_captured']}; {r['rows_as_without']} rows as "
                    "without"
                )
    if len(lines) > 1:
        text += ["", table(lines)]
    return "\n".join(text)


def count(text: str) -> int:
    """A number that is not negative."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return number


def counts(text: str) -> list[int]:
    """Numbers above 0, separated by commas."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected numbers above 0 as 64,128,256")
    return numbers


def share(text: str) -> float:
    """A number from 0 to below 1."""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected from 0 to below 1")
    return number


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--ops", default="torch,triton", help="tables, or peft, joined by commas")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--row", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--modules", default="qv", help="qv, attention, all or names")
    parser.add_argument("--dropout", type=share, default=0.0, help="of the adapter's inputs")
    parser.add_argument(
        "--micro-tokens", type=count, default=0, help="of a micro-batch; 0: all in one"
    )
    parser.add_argument("--recompute", choices=POLICIES, default="none")
    parser.add_argument("--steps", type=count, default=5, help="timed, after two; 0: no training")
    parser.add_argument("--no-decode", action="store_true")
    parser.add_argument("--invariant", action="store_true", help="decode with --invariant too")
    parser.add_argument("--rows", type=int, default=32, help="decoded together")
    parser.add_argument("--rows-list", type=counts, help="instead of --rows, as 64,128,256")
    parser.add_argument("--requests", type=count, default=0, help="in all; 0: as many as --rows")
    parser.add_argument("--adapter", default="", help="decode with one: qv, attention, all, names")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a decoded prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of a decoded sequence")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if gpu else "fp32")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    args = parser.parse_args(argv)
    try:
        LoraConfig(args.rank, 1.0, modules=args.modules).check()
        if args.adapter:
            LoraConfig(modules=args.adapter).check()
    except ValueError as error:
        parser.error(str(error))
    return args


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
        "operations": step_operations(config, step_case(args).row_lengths()),
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
    if "peft" in names and args.steps:  # before our weights are on the device
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
    if args.steps:
        document["training"] |= training(models, step_case(args), args.steps)
        figure("step", {"ask": vars(args), "training": document["training"]})
    if args.no_decode:
        return
    for name, model in models.items():
        try:
            document["decoding"][name] = decoding(model, args)
        except Exception as error:
            document["decoding"][name] = {"failed": first_line(error)}


if __name__ == "__main__":
    main()
