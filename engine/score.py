"""Seed likelihoods: how foreign are the references, and the rewrites, to the model itself?

For every distilled line, the mean negative log-likelihood in nats per token, end token included, of
the reference and of the response, both under the plain prompt (no reference shown). Each text is
a forward of its own, so a number does not depend on its neighbours. FILE.scores.jsonl grows line by
line and is resumed like the distilled file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.data import Distilled
from engine.log import AppendedLines, cut_torn_line, differing, progress, read_jsonl, write_json
from kernels.context import Packed
from model.chat import Chat
from model.config import read_json
from model.llama import Llama
from model.lora import Lora


def nll(
    model: Llama, prompt: Sequence[int], answer: Sequence[int], lora: Lora | None = None
) -> torch.Tensor:
    """Negative log-likelihood of every answer token, (len(answer),) in nats."""
    ids = torch.tensor([*prompt, *answer], device=model.device)
    hidden = model.forward(ids, Packed.from_lengths([len(ids)], model.device), lora=lora)
    start = len(prompt)
    losses, _ = model.ops.linear_cross_entropy(
        hidden[start - 1 : -1], model.weights["head"], ids[start:], need_grad=False
    )
    return losses


@dataclass
class Means:
    """Sums over the scored lines, in nats and tokens."""

    reference: float = 0.0
    reference_tokens: int = 0
    response: float = 0.0
    response_tokens: int = 0

    def add(self, score: dict[str, Any]) -> None:
        """Count one line of the scores file."""
        for name in ("reference", "response"):
            if score[f"{name}_nll"] is not None:
                tokens = score[f"{name}_tokens"]
                setattr(self, name, getattr(self, name) + score[f"{name}_nll"] * tokens)
                count = getattr(self, f"{name}_tokens") + tokens
                setattr(self, f"{name}_tokens", count)

    def text(self) -> str:
        """Nats per token of both."""
        a = self.reference / max(1, self.reference_tokens)
        b = self.response / max(1, self.response_tokens)
        return (
            f"NLL per token under the seed model, plain prompt: references {a:.3f} "
            f"({self.reference_tokens} tokens), responses {b:.3f} ({self.response_tokens} tokens)"
        )


def score(
    model: Llama, chat: Chat, lines: Sequence[Distilled], out: Path, settings: dict[str, Any]
) -> Means:
    """Score every line into `out` (FILE.scores.jsonl); lines there already are kept."""
    meta = out.with_name(out.name + ".meta.json")
    if meta.exists() and (changes := differing(read_json(meta), settings)):
        raise ValueError(f"{out} was made under other settings:\n  " + "\n  ".join(changes))
    write_json(meta, settings)
    cut_torn_line(out)
    done = {s["id"]: s for s in read_jsonl(out)} if out.exists() else {}
    means = Means()
    with AppendedLines(out) as file:
        for line in progress(lines, desc="score", unit="row"):
            if line.id not in done:
                done[line.id] = _score(model, chat, line)
                file.write(done[line.id])
            means.add(done[line.id])
    return means


def _score(model: Llama, chat: Chat, line: Distilled) -> dict[str, Any]:
    """One line of the scores file; a response that is empty or too long has none."""
    prompt = chat.prompt_ids(line.messages)
    answers = {"reference": [*chat.response_ids(line.reference), chat.end_id]}
    ends = [] if line.finish == "length" else [chat.end_id]
    answers["response"] = [*line.response_ids, *ends] if line.response_ids else []
    result: dict[str, Any] = {"id": line.id}
    for name, ids in answers.items():
        fits = 0 < len(ids) <= model.config.max_position - len(prompt)
        value = nll(model, prompt, ids).double().mean().item() if fits else None
        result |= {f"{name}_nll": value, f"{name}_tokens": len(ids) if fits else 0}
    return result
