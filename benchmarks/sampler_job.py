"""One run of ours for `benchmarks.sampler`, in a process of its own; the last line is JSON.

    python -m benchmarks.sampler_job generate ROWS DRAFT < JOB.json
    python -m benchmarks.sampler_job score < JOB.json
    python -m benchmarks.sampler_job profile ROWS < JOB.json
    python -m benchmarks.sampler_job ceilings < JOB.json

JOB.json is written by benchmarks/sampler.py; `score` needs "answers" in it as well.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.floor import ceilings
from benchmarks.sampler_profile import profile
from engine.data.distilled import Distilled
from engine.distill.seed_likelihoods import score
from engine.sampling.requests import Request, SamplerConfig, SamplerStats
from engine.sampling.sampler import Sampler
from engine.session import ModelConfig, Session
from model.layout import GROUPS

# fields of SamplerStats -> their names in the records of benchmarks/results, where they differ
RECORDED = {
    "sequence_steps": "row_steps",
    "draft_tokens": "drafted",
    "accepted_tokens": "held",
    "preempted": "put_back",
    "fitting_sequences": "fitting",
    "why_not_captured": "not_captured",
}
MATRICES = tuple(f".{name}" for name in GROUPS)


def open_session(job: dict[str, Any]) -> tuple[Session, float]:
    """The model on the CPU, and the seconds it took to load."""
    started = time.perf_counter()
    config = ModelConfig(job["model"], device="cpu", dtype="float32", threads=job["threads"])
    return Session.open(config), time.perf_counter() - started


def requests_of(job: dict[str, Any]) -> list[Request]:
    requests = []
    for row in job["rows"]:
        reference = row["reference_ids"]
        requests.append(
            Request(
                row["id"],
                row["prompt"],
                job["max_new"],
                expected_tokens=len(reference),
                draft_source=reference,
            )
        )
    return requests


def recorded(stats: SamplerStats) -> dict[str, Any]:
    """The statistics under the names that records have had from the beginning."""
    values = dataclasses.asdict(stats)
    values["why_not_captured"] = values["why_not_captured"] or ""
    return {RECORDED.get(name, name): value for name, value in values.items()}


def weight_bytes(weights: Mapping[str, Any]) -> int:
    """Bytes of all matrices that a decode step reads, as they are packed."""
    return sum(w.nbytes for n, w in weights.items() if n == "head" or n.endswith(MATRICES))


def generate(job: dict[str, Any], rows: int, draft: str) -> dict[str, Any]:
    """All rows once, `rows` of them decoded together."""
    session, loaded = open_session(job)
    requests = requests_of(job)
    config = SamplerConfig(rows=rows, draft=draft)
    decode = session.chat.tokenizer.decode
    begun = time.perf_counter()
    with Sampler(session.model, decode, job["end_ids"], config) as sampler:
        started = time.perf_counter()
        done = {c.id: c.ids for c in sampler.run(requests)}
        seconds = time.perf_counter() - started
        stats, size = sampler.stats, weight_bytes(sampler.model.weights)
    return {
        "load_seconds": loaded,
        "pack_seconds": started - begun,  # packing the weights
        "seconds": seconds,
        "weight_bytes": size,
        "answers": [done[row["id"]] for row in job["rows"]],
        "stats": recorded(stats),
        "stats_text": stats.text(),
    }


def score_rows(job: dict[str, Any]) -> dict[str, Any]:
    """References and answers scored under the plain prompt."""
    session, loaded = open_session(job)
    decode, lines = session.chat.tokenizer.decode, []
    for row, ids in zip(job["rows"], job["answers"], strict=True):
        text = decode(ids).strip()
        lines.append(
            Distilled(
                id=f"{row['id']}/0",
                messages=row["messages"],
                reference=row["reference"],
                response=text,
                response_ids=ids,
                target=text,
                status="ok",
                stage="guided",
                finish="stop" if len(ids) < job["max_new"] else "length",
                prompt_tokens=len(row["prompt"]),
                response_tokens=len(ids),
            )
        )
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        means = score(session.model, session.chat, lines, Path(folder, "scores.jsonl"), {})
        seconds = time.perf_counter() - started
    return {
        "load_seconds": loaded,
        "seconds": seconds,
        "prompt_tokens": sum(len(session.chat.prompt_ids(line.messages)) for line in lines),
        "answer_tokens": means.reference_tokens + means.response_tokens,
        "nll": [means.reference, means.response],
    }


def peak_rss() -> int:
    """Bytes. VmHWM: ru_maxrss would begin at what the parent held when it forked."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in status if x.startswith("VmHWM"))


def main() -> None:
    kind, *settings = sys.argv[1:]
    job = json.load(sys.stdin)
    if kind == "ceilings":
        torch.set_num_threads(job["threads"])
        result = ceilings()
    elif kind == "score":
        result = score_rows(job)
    elif kind == "profile":
        session = open_session(job)[0]
        parts = profile(session, requests_of(job), int(settings[0]), job["end_ids"])
        result = {"profile": parts}
    else:
        result = generate(job, int(settings[0]), settings[1])
    print(json.dumps(result | {"rss": peak_rss()}))


if __name__ == "__main__":
    main()
