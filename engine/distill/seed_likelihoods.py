"""Seed likelihoods: how foreign are the references, and the rewrites, to the model itself?

For every distilled line, the mean negative log-likelihood in nats per token, end token included, of
the reference and of the response, both under the plain prompt (no reference shown). The prompt is
computed once for both, and a number does not depend on its neighbours. FILE.scores.jsonl grows
line by line and is resumed like the distilled file.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.distilled import CONTEXT, Distilled
from engine.measure.likelihood import (
    ScoringRequest,
    collective_rounds,
    scorer_for,
    scoring_batches,
)
from engine.runtime.distributed import World
from engine.runtime.locking import lock_file
from engine.runtime.process_memory import memory_for
from engine.runtime.resumable_lines import ResumedLines
from engine.runtime.terminal import progress
from model.chat import Chat
from model.llama import Llama

_NATS = (float, int, type(None))
WANTED = {  # of a line of the scores file, beside its id
    **{"reference_nll": _NATS, "reference_tokens": int},
    **{"response_nll": _NATS, "response_tokens": int},
}


@dataclass
class Means:
    """Sums over the scored lines, in nats and tokens."""

    reference: float = 0.0
    reference_tokens: int = 0
    response: float = 0.0
    response_tokens: int = 0
    scored: int = field(default=0, compare=False)  # answer tokens scored by this process ...
    seconds: float = field(default=0.0, compare=False)  # ... in this time

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
        text = (
            f"NLL per token under the seed model, plain prompt: references {a:.3f} "
            f"({self.reference_tokens} tokens), responses {b:.3f} ({self.response_tokens} tokens)"
        )
        if self.scored and self.seconds:
            text += f"; {self.scored / self.seconds:.0f} tokens/s scored"
        return text


@memory_for("scoring", "--no-score leaves it out; else a row is too long for this machine")
def score(
    model: Llama,
    chat: Chat,
    lines: Sequence[Distilled],
    out: Path,
    settings: dict[str, Any],
    world: World | None = None,
) -> Means:
    """Score every line that is trained on into `out` (FILE.scores.jsonl); lines there already are
    kept."""
    lines = [line for line in lines if line.status != CONTEXT]
    means, started = Means(), time.perf_counter()
    with (
        lock_file(out),
        ResumedLines(out, settings, resume=True, wanted=WANTED, world=world) as file,
    ):
        todo = [line for line in file.mine(list(lines)) if line.id not in file.done]
        asked_for = [_asked(model, chat, line) for line in todo]
        for asked in asked_for:
            if not any(asked.answers):  # its prompt may be longer than the model's context
                file.write(_record(asked, asked.answers))
        asked_for = [asked for asked in asked_for if any(asked.answers)]
        forwards = list(scoring_batches(asked_for))
        rounds = collective_rounds(model, file.world, len(forwards))
        forwards += [[]] * (rounds - len(forwards))
        if forwards:
            prompts = [asked.prompt for asked in asked_for]
            with (
                file.world.report_lost_rank(),
                scorer_for(model, prompts) as scorer,
                progress(
                    total=len(asked_for), desc="score", unit="row", disable=not file.world.is_rank0
                ) as bar,
            ):
                for batch in forwards:
                    for asked, losses in zip(batch, scorer.losses(batch), strict=True):
                        losses = [v[n:] for v, n in zip(losses, asked.skip, strict=True)]
                        file.write(_record(asked, losses))
                        means.scored += sum(len(values) for values in losses)
                        bar.update()
        means.seconds = time.perf_counter() - started
        for record in file.finish([line.id for line in lines]):
            means.add(record)
    return means


def _asked(model: Llama, chat: Chat, line: Distilled) -> ScoringRequest:
    """The reference and the response of a line, each with its end token if it has one.

    Each stands behind the prompt it is trained on. Those differ where the template begins a
    finished answer otherwise than it prompts for one: what they share is then the prompt.
    """
    ends = [] if line.finish == "length" else [chat.end_id]
    reference = chat.target(line.messages, line.reference)
    chat.check_ids(line.response_ids)
    pairs = [
        (reference.prompt, [*reference.answer, chat.end_id] if reference.answer else []),
        (
            chat.prompt_ids(line.messages),
            [*line.response_ids, *ends] if line.response_ids else [],
        ),
    ]
    prompt = os.path.commonprefix([own for own, _ in pairs])
    answers, skip = [], []
    for own, answer in pairs:
        rest = own[len(prompt) :]
        fits = answer and len(own) + len(answer) <= model.config.max_position
        answers.append([*rest, *answer] if fits else [])
        skip.append(len(rest))
    return ScoringRequest(line.id, prompt, answers, tuple(skip))


def _record(asked: ScoringRequest, losses: list[list[float]]) -> dict[str, Any]:
    """One line of the scores file; an answer that is empty or too long has none."""
    result: dict[str, Any] = {"id": asked.id}
    for name, values in zip(("reference", "response"), losses, strict=True):
        mean = math.fsum(values) / len(values) if values else None
        result |= {f"{name}_nll": mean, f"{name}_tokens": len(values)}
    return result
