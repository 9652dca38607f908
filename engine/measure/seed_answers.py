"""Greedy answers of the seed model to general prompts: the texts over which drift is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from engine.measure.answer_missing import answer_missing
from engine.measure.general_prompts import PROMPTS
from engine.measure.packed_rows import SeedRow
from engine.runtime.files import sha256
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request

Prompts = Sequence[tuple[str, str]]  # (category, prompt)
FIELDS = {"prompt": str, "answer": str, "ids": list}  # of a line


@dataclass
class SeedAnswer(SeedRow):
    """The seed model's answer to a general prompt."""

    category: str
    prompt: str
    answer: str


@memory_for("answering general prompts", SAMPLE_LESS)
def seed_answers(
    generator: ChatGenerator,
    out: Path,
    settings: dict[str, Any],
    prompts: Prompts = PROMPTS,
) -> list[SeedAnswer]:
    """The seed's answers to (category, prompt) pairs, kept in `out`, a line per prompt.

    Answers that are in `out` already are not made again. A prompt that leaves no room for an answer
    is left out, with a note. ValueError where `out` was begun under other settings, or no prompt
    leaves room.
    """
    settings = settings | {"prompts": sha256(repr(list(prompts)))}
    texts = [text for _, text in prompts]
    requests = {text: Request(text, generator.prompt_ids(text)) for text in texts}

    def to_line(completion: Completion) -> dict[str, Any]:
        return {
            "prompt": completion.id,
            "answer": completion.text,
            "ids": generator.answer_ids(completion.ids, completion.finish),
            "finish": completion.finish,
        }

    with ResumedLines(out, settings, key=itemgetter("prompt"), wanted=FIELDS) as file:
        answer_missing(generator, None, requests, file, to_line, "seed's answers")
        lines = file.finish(texts)
    answers = []
    for (category, text), line in zip(prompts, lines, strict=True):
        if not line["ids"]:
            continue
        prompt_ids = requests[text].prompt
        ids = [*prompt_ids, *line["ids"]]
        answers.append(
            SeedAnswer(category, text, line["answer"], ids=ids, n_prompt=len(prompt_ids))
        )
    if not answers:
        raise ValueError(
            f"none of the {len(prompts)} prompts leaves room for an answer in the model's context; "
            "give shorter ones"
        )
    left_out = len(prompts) - len(answers)
    if left_out:
        print(f"{left_out} prompts left out: the seed has no room to answer")
    return answers


def seed_file(out: Path) -> Path:
    """The file of the seed's answers, beside `out`, the file of figures measured over them."""
    return out.with_name(out.name + ".seed.jsonl")
