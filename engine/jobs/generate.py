"""Answers to one prompt or to a file of prompts, greedy or sampled, with or without an adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from engine.data.config import DataConfig
from engine.data.encode import template_takes
from engine.data.rows import Row
from engine.runtime.files import AppendedLines, write_jsonl
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.terminal import progress
from engine.sampling.requests import Completion, Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.session import Session

MOST_SAMPLES = 10**6  # of a prompt


@memory_for("generating", SAMPLE_LESS)
def generate_job(
    session: Session,
    asked: DataConfig | str,
    sampling: SamplerConfig,
    *,
    adapter: str | None = None,
    system: str | None = None,
    prefix: str = "",
    samples: int = 1,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Answer a prompt (text) or the prompts of a file; to `out`, line by line, or printed.

    `prefix` is how every answer begins; the model goes on from there.
    """
    session.alone("generation")
    if not 1 <= samples <= MOST_SAMPLES:
        raise ValueError(f"samples {samples}: 1 to {MOST_SAMPLES:,} are wanted")
    if out is not None and out.exists():
        raise ValueError(f"{out} exists already; choose another --out")
    if isinstance(asked, str):
        if not asked.strip():
            raise ValueError("the prompt is empty; give some text")
        rows = [Row("prompt", ({"role": "user", "content": asked},))]
    else:
        rows = asked.load(need_reference=False, check=template_takes(session.chat))
    lora = None if adapter is None else session.adapter(adapter)
    if system:
        told = {"role": "system", "content": system}
        rows = [
            row
            if row.messages[0]["role"] == "system"
            else dataclasses.replace(row, messages=(told, *row.messages))
            for row in rows
        ]
    session.note_systems([] if adapter is None else [adapter], rows)
    chat, requests = session.chat, []
    for row in rows:
        ids = chat.prompt_ids(row.messages, prefix)
        requests += [Request(row.id, ids, sample=k) for k in range(samples)]
    answers: list[dict[str, Any]] = []
    with Sampler(session.model, chat.tokenizer.decode, chat.end_ids, sampling, lora) as sampler:
        bar = progress(sampler.run(requests), total=len(requests), desc="generate", unit="answer")
        if out is None:
            answers = [_record(done, prefix) for done in bar]
        else:
            with AppendedLines(out) as file:
                for done in bar:
                    answers.append(_record(done, prefix))
                    file.write(answers[-1])
    order = {row.id: n for n, row in enumerate(rows)}
    finished = list(answers)
    answers.sort(key=lambda a: (order[a["id"]], a["sample"]))
    if out is not None and answers != finished:  # the order of the rows, not of the clock
        write_jsonl(out, answers)
    if out is None:
        for answer in answers:
            label = "" if len(answers) == 1 else f"[{answer['id']}, sample {answer['sample']}] "
            print(f"{label}{answer['answer']}")
    return answers


def _record(done: Completion, prefix: str) -> dict[str, Any]:
    return {
        "id": done.id,
        "sample": done.sample,
        "answer": (prefix + done.text).strip(),
        "finish": done.finish,
        "tokens": len(done.ids),
        "logprob": sum(done.logprobs),
    }
