"""Answers of the seed model to general prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.measure.divergence import hidden_states
from engine.measure.general_prompts import PROMPTS
from engine.runtime.files import AppendedLines, sha256
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable_answers import put_in_order, resume_lines
from engine.runtime.terminal import progress
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from model.chat import Chat
from model.llama import Llama

Prompts = Sequence[tuple[str, str]]  # (category, prompt)


@dataclass
class SeedAnswer:
    """What the seed model says to a general prompt."""

    category: str
    prompt: str
    answer: str
    ids: list[int]  # prompt and answer, the end token included where the answer ended
    start: int  # tokens of the prompt
    states: Tensor | None = None  # the seed's hidden states, once somebody needed them

    def hidden(self, model: Llama) -> Tensor:
        """The seed's hidden states from which the answer is predicted: (answer tokens, D)."""
        if self.states is None:
            self.states = hidden_states(model, self.ids, self.start, None)
        return self.states


@memory_for("answering general prompts", SAMPLE_LESS)
def seed_answers(
    model: Llama,
    chat: Chat,
    out: Path,
    sampling: SamplerConfig,
    settings: dict[str, Any],
    prompts: Prompts = PROMPTS,
) -> list[SeedAnswer]:
    """The seed's greedy answers, kept in `out` (a line per prompt); those there are not made again.

    ValueError where the file was made under other settings.
    """
    settings = settings | {"prompts": sha256(repr(list(prompts)))}
    wanted = {"prompt": str, "answer": str, "ids": list}
    done = {line["prompt"]: line for line in resume_lines(out, settings, wanted)}
    todo = [prompt for _, prompt in prompts if prompt not in done]
    with AppendedLines(out) as file:
        if todo:
            requests = [Request(p, chat.prompt_ids([{"role": "user", "content": p}])) for p in todo]
            with Sampler(model, chat.tokenizer.decode, chat.end_ids, sampling) as sampler:
                bar = progress(
                    sampler.run(requests), desc="seed's answers", total=len(todo), unit="row"
                )
                for said in bar:
                    ids = [*said.ids, *([chat.end_id] if said.finish == "stop" else [])]
                    line = {"prompt": said.id, "answer": said.text, "ids": ids}
                    line |= {"finish": said.finish}
                    file.write(line)
                    done[said.id] = line
    put_in_order(out, done, [prompt for _, prompt in prompts])
    found = []
    for category, prompt in prompts:
        asked, line = chat.prompt_ids([{"role": "user", "content": prompt}]), done[prompt]
        ids = [*asked, *line["ids"]]
        if line["ids"]:
            found.append(SeedAnswer(category, prompt, line["answer"], ids, len(asked)))
    if not found:
        raise ValueError("the seed has no room to answer any of the prompts; give shorter ones")
    if len(found) < len(prompts):
        print(f"{len(prompts) - len(found)} prompts left out: the seed has no room to answer")
    return found


def seed_file(out: Path) -> Path:
    """Where the seed's answers lie, beside the file of what was measured over them."""
    return out.with_name(out.name + ".seed.jsonl")
