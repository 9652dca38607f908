"""Reading a file of rows for a training, and distilling it: peak memory and seconds.

    python -m benchmarks.rows --model MODEL_DIR --rows 10000,100000
    python -m benchmarks.rows --model MODEL_DIR --rows 10000,100000 --forms distill --words 5

Of every number of rows a file of made conversations is written, and read by processes of their own:

    disk       encodes it into the files that scripts/train.py trains from, then reads all examples
               once in the order of an epoch
    memory     loads its rows and encodes them into a list; the examples must be those of `disk`
    distill    all that scripts/distill.py does but sampling (instant_sampler.py) and scoring: reads
               and checks the rows, encodes the prompts, judges and writes the lines, sorts them

The peak is the growth of the resident set over that of the process with its tokenizer; the model's
weights are not loaded. Seconds are those of one processor, which other processes do not change. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.clock import machine, record
from benchmarks.instant_sampler import answered_at_once
from engine.data.config import DataConfig
from engine.data.encode import EncodeRules, encode, fingerprint, template_takes
from engine.distill.config import DistillConfig
from engine.distill.distill import distill_file
from engine.runtime.process_memory import give_back_freed_memory, held_memory, peak_memory
from engine.runtime.terminal import table
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig, Session
from engine.train.config import TrainConfig
from engine.train.file_examples import stored_examples
from engine.train.order import batches
from model.chat import Chat
from model.config import LlamaConfig
from model.tokenizer import load_tokenizer

FORMS = ("disk", "memory", "distill")
RULES = EncodeRules(max_length=1024)
WORDS = "the a of in water light paper seven city river open quick green letter small why".split()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="its tokenizer and chat template are used")
    parser.add_argument("--rows", default="10000,100000", help="sizes of files, joined by commas")
    parser.add_argument("--forms", default=",".join(FORMS), help="of disk, memory and distill")
    parser.add_argument("--words", type=int, default=40, help="words of a row, about")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--worker", nargs=2, metavar=("FORM", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(path: Path, count: int, words: int) -> None:
    """A file of `count` made rows, one message and its answer each, no two of them alike.

    words: of a row; three of eight are in the message, and a number before them.
    """
    of_question = words * 3 // 8
    made = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question = " ".join(made.choices(WORDS, k=of_question))
            answer = " ".join(made.choices(WORDS, k=words - of_question))
            row = {"instruction": f"{number}: {question}?", "output": f"{answer}."}
            file.write(json.dumps(row) + "\n")


def session_without_weights(path: str) -> Session:
    """A session whose model has its sizes alone: reading rows needs no more."""
    model = SimpleNamespace(config=LlamaConfig.from_dir(Path(path)))
    chat = Chat.from_dir(path, load_tokenizer(path))
    return Session(ModelConfig(path), model, chat, fingerprint="", settings={})


def worker(model: str, form: str, file: Path) -> None:
    """Read the file in one form; print its figures as JSON."""
    session = session_without_weights(model)
    session.chat.target([{"role": "user", "content": "a"}], "b")  # what is made once
    give_back_freed_memory("cpu")  # what loading the tokenizer took and gave back
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    held = held_memory("cpu")
    figures = FORM_WORKERS[form](session, file)
    # `peak_memory` was read before the hash of all examples was taken
    figures["peak_bytes"] -= held
    print(json.dumps({"form": form} | figures))


def read_into_memory(session: Session, file: Path) -> dict[str, Any]:
    """Figures of reading the rows and their examples into memory."""
    started = time.process_time()
    rows = DataConfig(str(file)).load(check=template_takes(session.chat))
    examples, _ = encode(rows, session.chat, RULES)
    return {
        "seconds": time.process_time() - started,
        "peak_bytes": peak_memory("cpu"),
        "rows": len(examples),
        "examples": fingerprint(examples),
    }


def read_onto_disk(session: Session, file: Path) -> dict[str, Any]:
    """Figures of reading the rows into a store of examples, and of reading those once."""
    started = time.process_time()
    examples = stored_examples(session, DataConfig(str(file)), RULES, file.with_suffix(".run"))
    figures: dict[str, Any] = {"seconds": time.process_time() - started}
    figures["disk_bytes"] = sum(examples.account.size.values())
    started = time.process_time()
    for batch in batches(len(examples), TrainConfig(epochs=1)):
        for number in batch.indices:
            examples[number]
    figures["epoch_seconds"] = time.process_time() - started
    figures["peak_bytes"] = peak_memory("cpu")
    return figures | {"rows": len(examples), "examples": fingerprint(examples)}


def distil(session: Session, file: Path) -> dict[str, Any]:
    """Figures of a distillation whose every answer is there at once."""
    out = file.with_suffix(".distilled.jsonl")
    started = time.process_time()
    with answered_at_once():
        distill_file(
            session,
            DataConfig(str(file)),
            out,
            DistillConfig(),
            SamplerConfig(),
            scoring=False,
            resume=False,
        )
    seconds = time.process_time() - started
    peak_bytes = peak_memory("cpu")
    with out.open("rb") as lines:
        count = sum(1 for _ in lines)
    disk_bytes = out.stat().st_size
    out.unlink()
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "rows": count,
        "disk_bytes": disk_bytes,
    }


FORM_WORKERS = {"disk": read_onto_disk, "memory": read_into_memory, "distill": distil}


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A process for every size and form; AssertionError where the forms give other examples."""
    results: list[dict[str, Any]] = []
    command = [sys.executable, "-m", "benchmarks.rows", "--model", args.model]
    for count in map(int, args.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            write_rows(file, count, args.words)
            made = set()  # fingerprints of examples
            for form in args.forms.split(","):
                worker_command = [*command, "--worker", form, str(file)]
                done = subprocess.run(worker_command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{form}, {count} rows:\n{done.stderr[-2000:]}")
                figures = json.loads(done.stdout.splitlines()[-1])
                if "examples" in figures:
                    made.add(figures.pop("examples"))
                results.append(figures | {"file_bytes": file.stat().st_size})
                print(f"{form}, {count:,} rows: {json.dumps(results[-1])}", file=sys.stderr)
            assert len(made) <= 1, f"{count} rows: the examples differ"
    return results


def main() -> None:
    args = parse_args()
    if args.worker:
        form, file = args.worker
        return worker(args.model, form, Path(file))
    results = measured(args)
    lines = [["kept", "rows", "file MB", "peak MB", "bytes a row", "encoding s", "an epoch s"]]
    for result in results:
        peak = result["peak_bytes"]
        epoch = f"{result['epoch_seconds']:.1f}" if "epoch_seconds" in result else "-"
        cells = [f"{result['rows']:,}", f"{result['file_bytes'] / 1e6:.1f}", f"{peak / 1e6:.1f}"]
        cells += [f"{peak / result['rows']:.0f}", f"{result['seconds']:.1f}", epoch]
        lines.append([result["form"], *cells])
    print(table(lines))
    document = {"benchmark": "rows", "environment": machine("cpu"), "results": results}
    record(document | {"model": Path(args.model).name, "words": args.words}, args.record)


if __name__ == "__main__":
    main()
