"""Reading a file of rows for a training: peak memory and seconds, kept on disk and in memory.

    python -m benchmarks.rows --model MODEL_DIR --rows 10000,100000

Of every number of rows a file of made conversations is written, and read by processes of their own:
`disk` encodes it into the files that scripts/train.py trains from, then reads all examples once in
the order of an epoch; `memory` loads its rows and encodes them into a list, as the main job does.
The peak is the growth of the resident set over that of the process with its tokenizer; the model's
weights are not loaded. Seconds are those of one processor, which other processes do not change. The
examples of both must be the same. The last line is JSON.
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
from engine.data.config import DataConfig
from engine.data.encode import EncodeRules, encode, fingerprint, template_takes
from engine.runtime.process_memory import give_back_freed_memory, held_memory, peak_memory
from engine.runtime.terminal import table
from engine.session import ModelConfig, Session
from engine.train.config import TrainConfig
from engine.train.file_examples import stored_examples
from engine.train.order import batches
from model.chat import Chat
from model.config import LlamaConfig
from model.tokenizer import load_tokenizer

FORMS = ("disk", "memory")
RULES = EncodeRules(max_length=1024)
WORDS = "the a of in water light paper seven city river open quick green letter small why".split()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="its tokenizer and chat template are used")
    parser.add_argument("--rows", default="10000,100000", help="sizes of files, joined by commas")
    parser.add_argument("--forms", default=",".join(FORMS), help="disk, memory or both")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--worker", nargs=2, metavar=("FORM", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(path: Path, count: int) -> None:
    """A file of `count` made rows, one message and its answer each, no two of them alike."""
    made = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question = " ".join(made.choices(WORDS, k=15))
            answer = " ".join(made.choices(WORDS, k=25))
            row = {"instruction": f"{number}: {question}?", "output": f"{answer}."}
            file.write(json.dumps(row) + "\n")


def session_without_weights(path: str) -> Session:
    """A session whose model has its sizes alone: reading rows needs no more."""
    model = SimpleNamespace(config=LlamaConfig.from_dir(Path(path)))
    chat = Chat.from_dir(path, load_tokenizer(path))
    return Session(ModelConfig(path), model, chat, fingerprint="", settings={})


def worker(model: str, form: str, file: str) -> None:
    """Read the file in one form; print its figures as JSON."""
    session = session_without_weights(model)
    data = DataConfig(file)
    session.chat.target([{"role": "user", "content": "a"}], "b")  # what is made once
    give_back_freed_memory("cpu")  # what loading the tokenizer took and gave back
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    held = held_memory("cpu")
    started = time.process_time()
    figures: dict[str, Any] = {"form": form}
    if form == "memory":
        rows = data.load(check=template_takes(session.chat))
        examples, _ = encode(rows, session.chat, RULES)
        figures["seconds"] = time.process_time() - started
    else:
        run = Path(file).with_suffix(".run")
        examples = stored_examples(session, data, RULES, run)
        figures["seconds"] = time.process_time() - started
        figures["disk_bytes"] = sum(examples.account.size.values())
        started = time.process_time()
        for batch in batches(len(examples), TrainConfig(epochs=1)):
            for number in batch.indices:
                examples[number]
        figures["epoch_seconds"] = time.process_time() - started
    figures["peak_bytes"] = peak_memory("cpu") - held  # before the hash of all is taken
    print(json.dumps(figures | {"rows": len(examples), "examples": fingerprint(examples)}))


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A process for every size and form; AssertionError where the forms give other examples."""
    results: list[dict[str, Any]] = []
    command = [sys.executable, "-m", "benchmarks.rows", "--model", args.model]
    for count in map(int, args.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            write_rows(file, count)
            made = set()
            for form in args.forms.split(","):
                worker_command = [*command, "--worker", form, str(file)]
                done = subprocess.run(worker_command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{form}, {count} rows:\n{done.stderr[-2000:]}")
                figures = json.loads(done.stdout.splitlines()[-1])
                made.add(figures.pop("examples"))
                results.append(figures | {"file_bytes": file.stat().st_size})
                print(f"{form}, {count:,} rows: {json.dumps(results[-1])}", file=sys.stderr)
            assert len(made) == 1, f"{count} rows: the examples differ"
    return results


def main() -> None:
    args = parse_args()
    if args.worker:
        return worker(args.model, *args.worker)
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
    record(document | {"model": Path(args.model).name}, args.record)


if __name__ == "__main__":
    main()
