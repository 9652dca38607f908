"""Greedy answers of the seed model to general prompts: the texts over which drift is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.measure.answer_missing import answer_missing
from engine.measure.divergence import hidden_states
from engine.measure.general_prompts import PROMPTS
from engine.runtime.files import sha256
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request
from model.llama import Llama

Prompts = Sequence[tuple[str, str]]  # (category, prompt)
FIELDS = {"prompt": str, "answer": str, "ids": list}  # of a line


@dataclass
class SeedAnswer:
    """The seed model's answer to a general prompt."""

    category: str
    prompt: str
    answer: str
    ids: list[int]  # prompt and answer, the end token included where the answer ended
    n_prompt: int  # tokens of the prompt
    states: Tensor | None = None  # computed by `hidden` and kept

    def hidden(self, model: Llama) -> Tensor:
        """The seed's hidden states from which the answer is predicted: (answer tokens, D)."""
        if self.states is None:
            self.states = hidden_states(model, self.ids, self.n_prompt, None)
        return self.states


@memory_for("answering general prompts", SAMPLE_LESS)
def seed_answers(
    generator: ChatGenerator,
    out: Path,
    settings: dict[str, Any],
    prompts: Prompts = PROMPTS,
) -> list[SeedAnswer]:
    """The seed's answers, kept in `out` (a line per prompt); those there are not made again.

    ValueError where the file was begun under other settings, or no prompt leaves room to answer.
    """
    settings = settings | {"prompts": sha256(repr(list(prompts)))}
    requests = {text: Request(text, generator.prompt_ids(text)) for _, text in prompts}

    def to_line(completion: Completion) -> dict[str, Any]:
        return {
            "prompt": completion.id,
            "answer": completion.text,
            "ids": generator.answer_ids(completion.ids, completion.finish),
            "finish": completion.finish,
        }

    with ResumedLines(out, settings, key=itemgetter("prompt"), wanted=FIELDS) as file:
        answer_missing(generator, None, requests, file, to_line, "seed's answers")
        lines = file.finish([text for _, text in prompts])
    found = []
    for (category, text), line in zip(prompts, lines, strict=True):
        prompt_ids = list(requests[text].prompt)
        if line["ids"]:
            ids = [*prompt_ids, *line["ids"]]
            found.append(SeedAnswer(category, text, line["answer"], ids, len(prompt_ids)))
    if not found:
        raise ValueError("the seed has no room to answer any of the prompts; give shorter ones")
    if len(found) < len(prompts):
        print(f"{len(prompts) - len(found)} prompts left out: the seed has no room to answer")
    return found


def seed_file(out: Path) -> Path:
    """The file of the seed's answers, beside the file of figures measured over them."""
    return out.with_name(out.name + ".seed.jsonl")
