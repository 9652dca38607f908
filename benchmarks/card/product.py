"""Whole jobs with the embedded model on a GPU, beside the files of a CPU: `scripts/gpu.sh product`.

    python -m benchmarks.card.product --work .gpu/work/product --seconds 220
    python -m benchmarks.card.product --work /tmp/w --dry        a tiny random model, on a CPU

In this order; what the seconds no longer allow is named and left out:

    checkpoint      the two halves that `scripts/gpu.sh prepare` wrote, joined and imported
    first job       scripts/sdft.py in the device's dtype with --ops auto, alone: how long from
                    nothing to the first text, and to the table
    side by side    the job in fp32; again with 8 rows and without CUDA graphs; training twice with
                    dropout, and once killed and resumed; two processes with --shard
    comparisons     texts and figures with those of the CPU (benchmarks/compare_runs.py)
    drafts          draft tokens on real text (drafts.py), alone
    memory short    the card filled before (fill_memory.py): the job ends, its texts are the same

Every figure is a JSON line at once. Exit code 1 where something that must hold does not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.card.checkpoint import PREPARED, ROOT, place_data, place_model
from benchmarks.card.jobs import Ended, run_job
from benchmarks.clock import figure, machine, record
from benchmarks.compare_runs import loss_differences, read_lines
from model.config import read_json

# the quickstart's flags on word problems (scripts/quickstart.sh --word-problems)
JOB = (
    "--verify number --template gsm8k --temperature 0 --max-new-tokens 160 --lr 1e-3 --epochs 2 "
    "--rank 8 --modules qv --dropout 0 --eval-max-new 160 --retention-max-new 64 "
    "--report-rows 32 --report-answers 8"
).split()
TRAIN = "--lr 1e-3 --epochs 2 --rank 8 --modules qv".split()
TINY = (  # flags that come last, so they are the ones that count
    "--max-new-tokens 8 --eval-max-new 4 --retention-max-new 2 --report-rows 2 --report-answers 2"
).split()
ROWS = {False: (100, 40), True: (6, 3)}  # by dry: to train on, held out
TOLERANCES = {"fp32": 1e-3, "first": 0.25}  # nats between the tokens of a tie; bf16 logits are
#   rounded to 8 bits, so two of about 20 differ by 0.1
NEARLY_EQUAL = 0.95  # share of fp32 rewrites that must be the CPU's
LEFT_GB = 2.0  # on the filled card
KEPT = (  # files of a job that another machine's are compared with
    "distilled.jsonl",
    "distilled.jsonl.meta.json",
    "evaluation.jsonl",
    "seed_answers.jsonl",
    "retention.jsonl",
    "summary.json",
    "table.txt",
    "sft/metrics.jsonl",
    "sdft/metrics.jsonl",
)
RESERVE = 8.0  # seconds in which the record is written
FOR_COMPARISONS = 25.0  # seconds that the processes side by side leave


@dataclass
class Product:
    """The run: its settings, its files, and the figures so far."""

    work: Path
    seconds: float
    dry: bool
    started: float = field(default_factory=time.monotonic)
    results: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    model: Path = Path()
    data: Path = Path()
    cpu: Path | None = None  # the CPU's files; None where they are not there

    def left(self) -> float:
        return self.seconds - RESERVE - (time.monotonic() - self.started)

    def note(self, what: str, **figures: Any) -> None:
        """Keep figures, and print them."""
        line = {"what": what} | figures
        self.results.append(line)
        figure("product", line)
        print(json.dumps(line), flush=True)

    def must(self, holds: bool, fault: str) -> None:
        """Remember the fault where something that must hold does not."""
        if not holds:
            self.faults.append(fault)
            print(f"NOT GOOD: {fault}", flush=True)

    def script(self, name: str, *flags: object) -> list[str]:
        """A script of the product on this run's model."""
        command = [sys.executable, ROOT / "scripts" / f"{name}.py", "--model", self.model, *flags]
        return [str(part) for part in command]

    def job(self, out: Path, *flags: object) -> list[str]:
        """scripts/sdft.py on the made word problems."""
        files = ["--data", self.data / "train.json", "--eval-data", self.data / "test.json"]
        tiny = TINY if self.dry else []
        return self.script("sdft", *files, *JOB, *tiny, *flags, "--out", out)

    def training(self, out: Path, *flags: object) -> list[str]:
        """scripts/train.py on the CPU's rewrites, or where there are none on the first job's."""
        source = self.cpu or self.work / "first"
        save_every = 2 if self.dry else 5
        batch = ["--batch-rows", 2] if self.dry else []
        fixed = [*TRAIN, *batch, "--dtype", "float32", "--save-every", save_every]
        data = ["--data", source / "distilled.jsonl"]
        return self.script("train", *data, *fixed, *flags, "--out", out)

    def run(self, name: str, command: Sequence[str], keep: float = 0.0, **options: Any) -> Ended:
        """Run a process of this product run; its failure is a fault.

        keep: seconds that it must leave of those that are left. options: of `run_job`.
        """
        log = self.work / "logs" / f"{name.replace(' ', '-')}.log"
        limit = max(1.0, self.left() - keep)
        ended = run_job(name, command, log, limit, **options)
        self.must(not ended.failed, f"{name} ended with code {ended.code}, see {ended.log}")
        return ended


# ---- the sub-parts


def checkpoint(run: Product) -> None:
    """Join and import the model, make the data, find the CPU's files."""
    started = time.monotonic()
    run.model = place_model(run.work, run.dry)
    run.data = place_data(run.work, *ROWS[run.dry])
    cpu = PREPARED / "cpu"
    if not run.dry and (cpu / "distilled.jsonl").exists():
        run.cpu = cpu
    files = None if run.cpu is None else str(run.cpu)
    run.note("checkpoint", seconds=time.monotonic() - started, cpu_files=files)


def first_job(run: Product) -> None:
    """The job as a user types it, alone on the card and with empty caches."""
    out = run.work / "first"
    command = run.job(out, "--ops", "auto")
    half = run.left() / 2
    ended = run.run("first job", command, keep=half, watch=out / "distilled.jsonl")
    run.note("first job", **ended.figures(), **summary_figures(out))


def pack_files(work: Path) -> None:
    """Put the files of the jobs and all logs into $OUT/product.tar, so that they come back."""
    folder = os.environ.get("OUT")
    if not folder:
        return
    with tarfile.open(Path(folder) / "product.tar", "w") as archive:
        for job in ("first", "fp32", "fp32-few", "short"):
            for name in KEPT:
                if (work / job / name).exists():
                    archive.add(work / job / name, arcname=f"{job}/{name}")
        if (work / "logs").is_dir():
            archive.add(work / "logs", arcname="logs")


def summary_figures(out: Path) -> dict[str, Any]:
    """Seconds by stage, peaks of memory and counts of summary.json; {} where the job failed."""
    file = out / "summary.json"
    if not file.exists():
        return {}
    summary = read_json(file)
    peaks = {arm: values["peak_bytes"] / 1e9 for arm, values in summary["training"].items()}
    speeds = {arm: values["tokens_s"] for arm, values in summary["training"].items()}
    return {
        "ops": summary["model"]["ops"],
        "dtype": summary["model"]["dtype"],
        "device": summary["environment"].get("gpu"),
        "seconds_of": summary["seconds"],
        "peak_gb": peaks,
        "train_tokens_s": speeds,
        "counts": summary["distilled"]["counts"],
    }


def job_in_fp32(run: Product, name: str, *flags: object) -> None:
    """The job in fp32, beside other processes: only its files count, not its time."""
    out = run.work / name
    command = run.job(out, "--dtype", "float32", *flags)
    ended = run.run(name, command, keep=FOR_COMPARISONS, threads=2)
    run.note(name, **ended.figures(), **summary_figures(out))


def trained_twice(run: Product) -> None:
    """Two trainings with dropout from the same files, and a third that is killed and resumed."""
    dropout = ["--dropout", "0.1"]
    for name in ("train a", "train b"):
        out = run.work / name.replace(" ", "-")
        command = run.training(out, *dropout)
        ended = run.run(name, command, keep=FOR_COMPARISONS, threads=2)
        run.note(name, **ended.figures())
    equal = same_training(run.work / "train-a", run.work / "train-b")
    run.note("trained twice", bitwise_equal=equal)
    run.must(equal, "two trainings on this machine gave different bytes")


def killed_and_resumed(run: Product) -> None:
    """Kill a training (SIGKILL) at a checkpoint, resume it, compare with one left alone."""
    out = run.work / "train-killed"
    steps = 2 if run.dry else 10
    at = out / "checkpoints" / f"step-{steps:06d}"
    flags = ["--dropout", "0.1"]
    options: dict[str, Any] = {"keep": FOR_COMPARISONS, "threads": 2}
    killed = run.run("train killed", run.training(out, *flags), kill_when=at, **options)
    run.must(killed.killed, "the training had ended before it was killed")
    resumed = run.run("train resumed", run.training(out, *flags, "--resume"), **options)
    run.note("train resumed", was_killed=killed.killed, **resumed.figures())


def compare_killed(run: Product) -> None:
    equal = same_training(run.work / "train-a", run.work / "train-killed")
    run.note("killed and resumed", bitwise_equal=equal)
    run.must(equal, "a training that was killed and resumed gave other bytes")


def same_training(run: Path, other: Path) -> bool:
    """Whether two run directories hold the same adapter, byte for byte, and the same losses."""
    name = "adapter_model.safetensors"
    if not (run / name).exists() or not (other / name).exists():
        return False
    if (run / name).read_bytes() != (other / name).read_bytes():
        return False
    return _metrics_without_times(run) == _metrics_without_times(other)


def _metrics_without_times(run: Path) -> list[dict[str, Any]]:
    lines = read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "tokens_s"} for line in lines]


def two_processes(run: Product) -> None:
    """Training with sharded weights in two processes, beside one process with all of them."""
    alone = run.work / "train-alone"
    sharded = run.work / "train-sharded"
    command = run.training(alone, "--dropout", "0")
    run.run("train alone", command, keep=FOR_COMPARISONS, threads=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2"]
    _, *script = run.training(sharded, "--dropout", "0", "--shard")
    command = [*torchrun, *script]
    ended = run.run("train sharded", command, keep=FOR_COMPARISONS, threads=1)
    gaps = {}
    if not ended.failed:
        gaps = loss_differences(alone, sharded, "")
        run.must(gaps["share"] < 1e-3, f"losses of two processes differ: {gaps}")
    run.note("two processes, sharded", losses=gaps, **ended.figures())


def side_by_side(run: Product) -> None:
    """Everything of which only the files count."""
    tasks: list[Callable[[], None]] = [
        lambda: job_in_fp32(run, "fp32", "--ops", "auto"),
        lambda: trained_twice(run),
        lambda: killed_and_resumed(run),
        lambda: job_in_fp32(run, "fp32-few", "--ops", "auto", "--rows", "8", "--no-graphs"),
        lambda: two_processes(run),
    ]
    at_once = 1 if run.dry else len(tasks)
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(task) for task in tasks]
        for future in futures:
            future.result()
    compare_killed(run)


def comparisons(run: Product) -> None:
    """Texts and figures beside the CPU's; fp32 also with few rows and without graphs."""
    pairs = [(run.work / "fp32", "fp32-few")]
    if run.cpu is not None:
        pairs += [(run.cpu, "fp32"), (run.cpu, "first")]
    elif run.dry:
        pairs.append((run.work / "first", "fp32"))
    at_once = 1 if run.dry else len(pairs)
    with ThreadPoolExecutor(at_once) as pool:
        all_ended = list(pool.map(lambda pair: compare_pair(run, *pair), pairs))
    for (_, other), ended in zip(pairs, all_ended, strict=True):
        text = ended.log.read_text(errors="replace")
        found = last_json(text)
        if found is None:
            run.note(ended.name, **ended.figures())
            run.must(False, f"{ended.name} ended with code {ended.code}, see {ended.log}")
            continue
        print(text.rsplit("\n{", 1)[0], flush=True)
        run.note(ended.name, **found)
        judge(run, ended.name, found, strict=other != "first")


def compare_pair(run: Product, one: Path, other: str) -> Ended:
    """benchmarks.compare_runs in a process of its own."""
    tolerance = TOLERANCES["first" if other == "first" else "fp32"]
    command = [sys.executable, "-m", "benchmarks.compare_runs", one, run.work / other]
    command += ["--model", run.model, "--tolerance", tolerance]
    name = f"compare {one.name} {other}"
    log = run.work / "logs" / f"{name.replace(' ', '-')}.log"
    return run_job(name, [str(part) for part in command], log, max(1.0, run.left()))


def judge(run: Product, name: str, found: dict[str, Any], strict: bool) -> None:
    """Nearly all rewrites must be equal and every other one a tie; of bf16 nothing is asked."""
    if not strict:
        return
    rewrites = found["texts"]["rewrites"]
    share = rewrites["share_equal"]
    run.must(share >= NEARLY_EQUAL, f"{name}: {share:.1%} of the rewrites are equal")
    run.must(found["good"], f"{name}: texts differ where no tie is")


def last_json(text: str) -> dict[str, Any] | None:
    """The JSON object of the last line; None where it is none."""
    lines = text.strip().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def drafts(run: Product) -> None:
    """Draft tokens on real text; drafts.py writes its figures itself."""
    flags = ["--model", run.model, "--data", run.data / "train.json"]
    flags += ["--work", run.work / "drafts"]
    if run.dry:
        flags += ["--max-new", 8, "--limit", 3]
    command = [sys.executable, "-m", "benchmarks.card.drafts", *flags]
    ended = run.run("drafts", [str(part) for part in command])
    kinds = []
    for line in ended.log.read_text(errors="replace").splitlines():
        if line.startswith('{"seconds"'):
            kinds.append(json.loads(line))
    run.note("drafts", kinds=kinds, code=ended.code)


def memory_short(run: Product) -> None:
    """The job in fp32 where memory is short: it ends, and its texts are the same."""
    out = run.work / "short"
    # without a card the pages for keys and values are made few instead
    flags: list[object] = ["--limit", 24] if not run.dry else ["--kv-memory", 0.002]
    filler = None
    if not run.dry:
        filler = start_filler(run)
    try:
        command = run.job(out, "--dtype", "float32", "--ops", "auto", *flags)
        ended = run.run("memory short", command)
    finally:
        if filler is not None:
            filler.stdin.close()
            filler.wait(timeout=20)
    same, rows = 0, 0
    if not ended.failed and (run.work / "fp32" / "distilled.jsonl").exists():
        texts = texts_of(out)
        others = texts_of(run.work / "fp32")
        rows = len(texts)
        same = sum(others.get(row) == ids for row, ids in texts.items())
    run.note("memory short", rows=rows, rows_equal=same, **ended.figures())


def start_filler(run: Product) -> subprocess.Popen:
    """A process that holds the card's memory but for LEFT_GB."""
    command = [sys.executable, "-m", "benchmarks.card.fill_memory", "--leave-gb", str(LEFT_GB)]
    filler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said = filler.stdout.readline().strip()
    run.note("card filled", said=said)
    return filler


def texts_of(run: Path) -> dict[str, list[int]]:
    """Row id -> token ids of its rewrite."""
    return {line["id"]: line["response_ids"] for line in read_lines(run / "distilled.jsonl")}


# ---- the command

# name, the fewest seconds with which it is begun, what is done
SUB_PARTS: tuple[tuple[str, float, Callable[[Product], None]], ...] = (
    ("checkpoint", 10, checkpoint),
    ("first job", 20, first_job),
    ("side by side", 30, side_by_side),
    ("comparisons", 10, comparisons),
    ("drafts", 15, drafts),
    ("memory short", 15, memory_short),
)


def run_all(run: Product) -> None:
    """All sub-parts in turn, as far as the seconds go."""
    for name, least, do in SUB_PARTS:
        if run.left() < least:
            run.note("left out", part=name, seconds_left=round(run.left(), 1))
            run.must(False, f"{name}: left out, {run.left():.0f} s are left")
            continue
        print(f"-- {name}, {run.left():.0f} s left", flush=True)
        try:
            do(run)
        except Exception as error:
            run.note(name, failed=f"{type(error).__name__}: {error}"[:400])
            run.must(False, f"{name}: {type(error).__name__}: {error}"[:400])
            if name == "checkpoint":
                return  # nothing runs without it


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs, emptied")
    parser.add_argument("--seconds", type=float, default=220.0, help="in all")
    parser.add_argument("--dry", action="store_true", help="a tiny random model, on a CPU")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    work = fresh_folder(args.work)
    run = Product(work, args.seconds, args.dry)

    def stop(*_: object) -> None:  # the results so far are recorded
        run.seconds = 0.0  # what waits in other threads does not begin
        sys.exit(143)

    signal.signal(signal.SIGTERM, stop)
    document = {"benchmark": "product", "environment": machine("cpu" if args.dry else "cuda")}
    try:
        run_all(run)
    finally:
        record(document | {"results": run.results, "faults": run.faults}, wanted=False)
        pack_files(work)
    print("\n".join(f"NOT GOOD: {fault}" for fault in run.faults) or "product: all is well")
    if run.faults:
        sys.exit(1)


def fresh_folder(folder: Path) -> Path:
    """The folder, empty: what an earlier run left there is moved aside."""
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        folder.rename(folder.with_name(f"{folder.name}-{int(time.time())}"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
