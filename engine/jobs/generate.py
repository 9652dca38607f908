"""Answers to one prompt or to a file of prompts, greedy or sampled, with or without an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.data.config import DataConfig
from engine.data.encode import template_takes
from engine.data.rows import Row
from engine.runtime.files import AppendedLines, write_jsonl
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.terminal import progress
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request, SamplerConfig
from engine.session import ScaledAdapter, Session

MOST_SAMPLES = 10**6  # of a prompt


@memory_for("generating", SAMPLE_LESS)
def generate_job(
    session: Session,
    prompts: DataConfig | str,
    sampling: SamplerConfig,
    *,
    adapter: ScaledAdapter | None = None,
    system: str | None = None,
    prefix: str = "",
    samples: int = 1,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Answer one prompt (text) or the prompts of a file; write `out` line by line, or print.

    system     a system message for every prompt that has none
    prefix     the beginning of every answer; the model continues it
    samples    answers per prompt

    Returns the lines of `out`, in the order of the prompts. ValueError where `out` exists.
    """
    session.require_one_process("generation")
    if not 1 <= samples <= MOST_SAMPLES:
        raise ValueError(f"samples {samples}: expected 1 to {MOST_SAMPLES:,}")
    if out is not None and out.exists():
        raise ValueError(f"{out} exists already; choose another --out")
    rows = _rows(session, prompts)
    if system:
        rows = [_with_system(row, system) for row in rows]
    lora = None
    if adapter is not None:
        lora = session.adapter(adapter.path).scaled(adapter.scale)
        session.note_other_system([adapter.path], rows)

    requests = []
    for row in rows:
        ids = session.chat.prompt_ids(row.messages, prefix)
        requests += [Request(row.id, ids, sample=number) for number in range(samples)]
    generator = ChatGenerator(session.model, session.chat, sampling)
    with generator.sampler(lora) as sampler:
        completions = sampler.run(requests)
        bar = progress(completions, total=len(requests), desc="generate", unit="answer")
        answers = _collect(bar, prefix, out)

    # answers were finished in another order than that of the rows
    row_numbers = {row.id: number for number, row in enumerate(rows)}

    def position(answer: dict[str, Any]) -> tuple[int, int]:
        return row_numbers[answer["id"]], answer["sample"]

    in_order = sorted(answers, key=position)
    if out is None:
        _print(in_order)
    elif in_order != answers:
        write_jsonl(out, in_order)
    return in_order


def _rows(session: Session, prompts: DataConfig | str) -> list[Row]:
    """A row per prompt; ValueError for one that is empty or that the chat template refuses."""
    if isinstance(prompts, DataConfig):
        return prompts.load(need_reference=False, check=template_takes(session.chat))
    if not prompts.strip():
        raise ValueError("the prompt is empty; give some text")
    return [Row("prompt", ({"role": "user", "content": prompts},))]


def _with_system(row: Row, system: str) -> Row:
    """The row with a system message in front, unless it has one."""
    if row.messages[0]["role"] == "system":
        return row
    message = {"role": "system", "content": system}
    return dataclasses.replace(row, messages=(message, *row.messages))


def _collect(
    completions: Iterable[Completion], prefix: str, out: Path | None
) -> list[dict[str, Any]]:
    """The answers in the order in which they are finished; each is appended to `out` at once."""
    if out is None:
        return [_record(completion, prefix) for completion in completions]
    answers = []
    with AppendedLines(out) as file:
        for completion in completions:
            answer = _record(completion, prefix)
            file.write(answer)
            answers.append(answer)
    return answers


def _record(completion: Completion, prefix: str) -> dict[str, Any]:
    """A line of the output file."""
    return {
        "id": completion.id,
        "sample": completion.sample,
        "answer": (prefix + completion.text).strip(),
        "finish": completion.finish,
        "tokens": len(completion.ids),
        "logprob": sum(completion.logprobs),
    }


def _print(answers: list[dict[str, Any]]) -> None:
    """Print the answers; where there are several, each behind its prompt's id and its number."""
    for answer in answers:
        text = answer["answer"]
        if len(answers) > 1:
            text = f"[{answer['id']}, sample {answer['sample']}] {text}"
        print(text)
