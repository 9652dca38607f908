"""How much speed is left beside other processes: sampling, scoring and training on a CPU.

    python -m benchmarks.busy --model models/smollm2-135m-instruct
    python -m benchmarks.busy ... --jobs sample --new 128 --repeats 5
    python -m benchmarks.busy ... --set default --set GOMP_SPINCOUNT=300000     environments
    python -m benchmarks.busy ... --against ../other/clone                      another commit

Each job under each setting is a process of its own, which loads the model once and waits for
orders. They take turns: every job once on the quiet machine, once beside each neighbour, again
from the start, --repeats times or until --seconds are over; medians are printed. The neighbours
are one process that never stops counting ("process") and one in which torch multiplies matrices
with all its threads ("torch").

sample: --rows prompts decoded together, greedy, --new tokens each; tokens a second, prompts not
counted. score: answer tokens a second. train: tokens of the rows a second, LoRA r 8 on q and v.
All of them on the word problems of the quickstart. What is sampled must be the same every time.
The last line is JSON. No other work should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
NEIGHBOURS = {
    "process": "print(flush=True)\nwhile True: pass",
    "torch": "import torch\na = torch.randn(1024, 1024)\nprint(flush=True)\nwhile True: a @ a",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="models/smollm2-135m-instruct", help="model directory")
    add("--jobs", default="sample,score,train", help="what is timed")
    add("--neighbours", default="none,process,torch", help="beside what")
    add("--rows", type=int, default=64, help="sequences decoded together, when sampling")
    add("--new", type=int, default=64, help="new tokens of a row, when sampling")
    add("--repeats", type=int, default=3, help="times of each; the median is printed")
    add("--seconds", type=float, default=600, help="after so many nothing is begun")
    add("--set", action="append", help="NAME=VALUE[,NAME=VALUE] in the environment, or default")
    add("--against", help="the root of another clone, which takes turns with this one")
    add("--record", action="store_true", help="append to benchmarks/results")
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- a job, in a process of its own


def work(args: argparse.Namespace) -> None:
    """Do the job once for every line on stdin, and answer with one line of JSON."""
    from engine.jobs.demo import problems
    from engine.session import ModelConfig, Session

    session = Session.open(ModelConfig(args.model, device="cpu", dtype="float32"))
    made = problems(24, seed=0)
    job = {"sample": sampling, "score": scoring, "train": training}[args.worker]
    job(session, made, args)


def answer(tokens: int, seconds: float, result: object) -> None:
    digest = hashlib.sha256(repr(result).encode()).hexdigest()[:16]
    print(json.dumps({"rate": tokens / seconds, "result": digest}), flush=True)


def sampling(session: Any, made: list, args: argparse.Namespace) -> None:
    from engine.sampling.requests import Request, SamplerConfig
    from engine.sampling.sampler import Sampler

    config = SamplerConfig(
        rows=args.rows, max_new_tokens=args.new, ignore_eos=True, draft="off", page_size=64
    )
    asked = [f"Write a story of the number {i}." for i in range(args.rows)]
    prompts = [session.chat.prompt_ids([{"role": "user", "content": text}]) for text in asked]
    with Sampler(session.model, session.chat.tokenizer.decode, (), config) as sampler:
        for _ in sys.stdin:
            stats = sampler.stats
            before = stats.new_tokens, stats.decode_seconds
            requests = [Request(str(i), prompt) for i, prompt in enumerate(prompts)]
            texts = {c.id: c.ids for c in sampler.run(requests)}
            new, seconds = stats.new_tokens - before[0], stats.decode_seconds - before[1]
            answer(new, seconds, sorted(texts.items()))


def scoring(session: Any, made: list, args: argparse.Namespace) -> None:
    from engine.data.distilled import Distilled
    from engine.distill.seed_likelihoods import score

    lines = [
        Distilled(
            id=f"{i}/0",
            messages=[{"role": "user", "content": p.question}],
            reference=p.answer,
            response=p.answer,
            response_ids=session.chat.tokenizer.encode(p.answer),
            target=p.answer,
            status="ok",
            stage="guided",
            finish="stop",
            prompt_tokens=1,
            response_tokens=1,
        )
        for i, p in enumerate(made[:6])
    ]
    for _ in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            means = score(session.model, session.chat, lines, Path(folder, "scores.jsonl"), {})
            seconds = time.perf_counter() - started
        tokens = means.reference_tokens + means.response_tokens
        answer(tokens, seconds, (means.reference, means.response))


def training(session: Any, made: list, args: argparse.Namespace) -> None:
    from engine.data.encode import Example
    from engine.train.optim import Optimizer
    from engine.train.step import step_gradients, step_update
    from model.lora import Lora, LoraConfig

    examples = []
    for i, p in enumerate(made[:3]):
        prompt = session.chat.prompt_ids([{"role": "user", "content": p.question}])
        ids = [*prompt, *session.chat.tokenizer.encode(p.answer)]
        examples.append(Example(str(i), ids, len(prompt)))
    model = session.model
    config = LoraConfig(rank=8, modules="qv")
    lora = Lora.init(config, model.config, model.device, model.dtype)
    optimizer = Optimizer.fresh(lora, weight_decay=0.0)
    tokens = sum(len(e.ids) for e in examples)
    for _ in sys.stdin:
        started = time.perf_counter()
        found = step_gradients(session.model, lora, examples, optimizer.step + 1, 1024, "none")
        step_update(session.model, lora, optimizer, found, 0.0, 1.0)
        answer(tokens, time.perf_counter() - started, None)


# ---- the orders


class Worker:
    """A job under a setting: a process that does it when told to."""

    def __init__(self, args: argparse.Namespace, job: str, setting: str, root: Path) -> None:
        self.job, self.rates, self.results = job, {}, set()
        env = {k: v for k, v in os.environ.items() if k not in WAITING}
        env["PYTHONPATH"] = str(root)
        if setting != "default":
            env |= dict(pair.split("=", 1) for pair in setting.split(","))
        # this file, with another clone's modules and without this folder's on the path
        start = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
        command = [sys.executable, "-c", start, str(Path(__file__).resolve()), "--worker", job]
        command += ["--model", str(Path(args.model).resolve())]
        command += ["--rows", str(args.rows), "--new", str(args.new)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=root, env=env, **pipes)

    def ask(self, beside: str | None) -> None:
        """Do the job once; `beside` None: to be warm."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = "..."
        while line and not line.startswith("{"):
            line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.job} ended with code {self.process.wait()}; see its words above")
        told = json.loads(line)
        self.results.add(told["result"])
        if beside is not None:
            self.rates.setdefault(beside, []).append(told["rate"])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def neighbour(kind: str) -> Iterator[subprocess.Popen | None]:
    """Another process at work, which has begun when the block does."""
    if kind == "none":
        yield None
        return
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", NEIGHBOURS[kind]]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


def main() -> None:
    args = parse_args()
    if args.worker:
        return work(args)
    roots = {"": ROOT} | ({"other clone, ": Path(args.against).resolve()} if args.against else {})
    workers = {
        (job, name + setting): Worker(args, job, setting, root)
        for job in args.jobs.split(",")
        for setting in args.set or ["default"]
        for name, root in roots.items()
    }
    beside, started = args.neighbours.split(","), time.monotonic()
    try:
        for worker in workers.values():
            worker.ask(None)
        for _ in range(args.repeats):
            for kind in beside:
                with neighbour(kind):
                    for (job, setting), worker in workers.items():
                        if time.monotonic() - started > args.seconds:
                            break
                        worker.ask(kind)
                        rate = worker.rates[kind][-1]
                        print(f"{job}, {setting}, {kind}: {rate:.1f}", file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    found: dict[str, Any] = {}
    texts: dict[str, set[str]] = {}
    print(f"{'tokens a second, beside':50}", *(f"{kind:>8}" for kind in beside))
    for (job, setting), worker in workers.items():
        rates = {kind: worker.rates.get(kind, [math.nan]) for kind in beside}
        medians = {kind: statistics.median(each) for kind, each in rates.items()}
        print(f"{job + ', ' + setting:50}", *(f"{rate:8.1f}" for rate in medians.values()))
        found[f"{job}, {setting}"] = {"median": medians, "all": worker.rates}
        texts.setdefault(job, set()).update(worker.results)
    from benchmarks.clock import machine, record  # imports torch, which a worker does by itself

    document = {"benchmark": "busy", "environment": machine("cpu"), "ask": vars(args)}
    record(document | {"found": found}, args.record)
    if len(texts.get("sample", ())) > 1:
        sys.exit(f"what was sampled differs: {texts['sample']}")


if __name__ == "__main__":
    main()
