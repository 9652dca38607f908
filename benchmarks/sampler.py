"""The sampler against transformers' `generate`: same prompts, same stopping, same machine.

    python -m benchmarks.sampler --model MODEL_DIR --data ../shared/data/alpaca_train.json
    python -m benchmarks.sampler ... --limit 64 --batches 8,16,32 --peer-python OTHER/bin/python

Prompts are the `using` template in the model's chat format, greedy. Ours and the peer's runs are
interleaved, each peer run in a process of its own (loading is not timed on either side). Useful
tokens are those up to and including the end token. The last line is JSON, also appended to
benchmarks/results/sampler.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

from engine.distill import TEMPLATES, prompt
from engine.log import environment, table
from engine.sampler import Request, Sampler, SamplerConfig
from engine.session import DataConfig, ModelConfig, Session

HERE = Path(__file__).resolve().parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=32, help="rows")
    parser.add_argument("--max-new", type=int, default=128, help="new tokens per row")
    parser.add_argument("--rows", default="32,1", help="rows in flight to try, ours")
    parser.add_argument("--batches", default="8,16,32,1", help="batch sizes to try, the peer's")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--peer-python", default=sys.executable)
    return parser.parse_args()


def ours(session: Session, requests: list[Request], rows: int) -> dict:
    """One run of our sampler."""
    decode, end_ids = session.chat.tokenizer.decode, session.chat.end_ids
    with Sampler(session.model, decode, end_ids, SamplerConfig(rows=rows)) as sampler:
        started = time.perf_counter()
        done = {c.id: c for c in sampler.run(requests)}
        seconds = time.perf_counter() - started
        stats = sampler.stats
    return {
        "seconds": seconds,
        "tokens": sum(len(c.ids) + (c.finish == "stop") for c in done.values()),
        "prefill_seconds": stats.prefill_seconds,
        "answers": [done[r.id].ids for r in requests],
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def peer(python: str, model: str, prompts: Path, batch: int) -> dict:
    """One run of transformers."""
    script = HERE / "peers" / "transformers_generate.py"
    command = [python, str(script), str(Path(model).resolve()), str(prompts), str(batch)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=prompts.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = parse_args()
    load = os.getloadavg()[0]
    if load > 0.7:
        print(f"WARNING: the machine is busy (load {load:.1f}); timings will be wrong")
    session = Session.open(ModelConfig(args.model))
    chat, requests = session.chat, []
    for row in DataConfig(args.data, limit=args.limit).load():
        messages = prompt(chat, TEMPLATES["using"], row.messages[:-1], row.reference)
        requests.append(Request(row.id, chat.prompt_ids(messages), args.max_new))
    runs: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.json"
        asked = {"prompts": [r.prompt for r in requests], "max_new": args.max_new}
        asked |= {"end_ids": list(chat.end_ids), "pad_id": chat.end_id}
        file.write_text(json.dumps(asked))
        for _ in range(args.repeats):
            for rows in map(int, args.rows.split(",")):
                runs.setdefault(f"ours, {rows} rows", []).append(ours(session, requests, rows))
            for batch in map(int, args.batches.split(",")):
                result = peer(args.peer_python, args.model, file, batch)
                runs.setdefault(f"transformers, batch {batch}", []).append(result)
    want = next(iter(runs.values()))[0]["answers"]
    lines = [["engine", "tokens/s", "rows/s", "seconds", "peak RSS", "rows as ours"]]
    results = {}
    for name, several in runs.items():
        seconds = statistics.median(r["seconds"] for r in several)
        same = sum(a == b for a, b in zip(several[0]["answers"], want, strict=True))
        rate, rss = several[0]["tokens"] / seconds, several[0]["rss"]
        spread = [r["seconds"] for r in several]
        cells = [f"{rate:.1f}", f"{len(requests) / seconds:.2f}", f"{seconds:.1f}"]
        lines.append([name, *cells, f"{rss / 1e9:.2f} GB", f"{same}/{len(requests)}"])
        results[name] = {"tokens_s": rate, "seconds": spread, "rss": rss, "rows_as_ours": same}
    best = max(r["tokens_s"] for n, r in results.items() if n.startswith("transformers"))
    mine = max(r["tokens_s"] for n, r in results.items() if n.startswith("ours"))
    print(table(lines))
    print(f"ours / transformers' best: {mine / best:.2f}")
    record = {
        "benchmark": "sampler",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_before": load,
        "data": f"{Path(args.data).name}, {args.limit} rows",
        "prompt_tokens": sum(len(r.prompt) for r in requests),
        "ratio": mine / best,
        "results": results,
        "environment": environment(),
    }
    (HERE / "results").mkdir(exist_ok=True)
    with (HERE / "results" / "sampler.jsonl").open("a") as log:
        log.write(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
