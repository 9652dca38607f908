"""Seed likelihoods: how likely references and rewrites are under the seed model itself

For every distilled line, the mean negative log-likelihood in nats per token, end token included, of
the reference and of the response, both under the plain prompt (no reference shown). The prompt is
computed once for both; in fp32 on a CPU a number does not depend on the lines scored beside it.
FILE.scores.jsonl grows line by line and is resumed like the distilled file:

    {"id", "reference_nll", "reference_tokens", "response_nll", "response_tokens"}

An answer that is empty, or too long for the model, has nll null and 0 tokens.
"""

from __future__ import annotations

import math
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
from engine.runtime.resumable import ResumedLines
from engine.runtime.terminal import progress
from model.chat import Chat
from model.llama import Llama

NATS = (float, int, type(None))
SCORE_FIELDS = {  # name -> type, beside the id
    "reference_nll": NATS,
    "reference_tokens": int,
    "response_nll": NATS,
    "response_tokens": int,
}


@dataclass
class LikelihoodSums:
    """Sums over the scored lines, in nats and tokens."""

    reference: float = 0.0
    reference_tokens: int = 0
    response: float = 0.0
    response_tokens: int = 0
    scored: int = field(default=0, compare=False)  # answer tokens scored by this process ...
    seconds: float = field(default=0.0, compare=False)  # ... in this time

    def add(self, record: dict[str, Any]) -> None:
        """Add one line of the scores file."""
        if record["reference_nll"] is not None:
            self.reference += record["reference_nll"] * record["reference_tokens"]
            self.reference_tokens += record["reference_tokens"]
        if record["response_nll"] is not None:
            self.response += record["response_nll"] * record["response_tokens"]
            self.response_tokens += record["response_tokens"]

    def text(self) -> str:
        """Nats per token of both, and the speed."""
        reference = self.reference / max(1, self.reference_tokens)
        response = self.response / max(1, self.response_tokens)
        text = (
            "NLL per token under the seed model, plain prompt: "
            f"references {reference:.3f} ({self.reference_tokens} tokens), "
            f"responses {response:.3f} ({self.response_tokens} tokens)"
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
) -> LikelihoodSums:
    """Score every line that is trained on into `out` (FILE.scores.jsonl); returns the sums.

    Lines that are there already are kept. settings: a file is resumed under equal ones.
    """
    lines = [line for line in lines if line.status != CONTEXT]
    sums, started = LikelihoodSums(), time.perf_counter()
    with (
        lock_file(out),
        ResumedLines(out, settings, resume=True, wanted=SCORE_FIELDS, world=world) as file,
    ):
        missing = [line for line in file.mine(list(lines)) if line.id not in file.done]
        requests = [_scoring_request(model, chat, line) for line in missing]
        for request in requests:
            if not any(request.answers):  # nothing to score: its prompt may not even fit the model
                file.write(_score_record(request, request.answers))
        requests = [request for request in requests if any(request.answers)]
        sums.scored = _score_requests(model, requests, file)
        sums.seconds = time.perf_counter() - started
        for record in file.finish([line.id for line in lines]):
            sums.add(record)
    return sums


def _score_requests(model: Llama, requests: Sequence[ScoringRequest], file: ResumedLines) -> int:
    """Score the requests and write their records; returns the answer tokens scored."""
    batches = list(scoring_batches(requests))
    rounds = collective_rounds(model, file.world, len(batches))
    batches += [[]] * (rounds - len(batches))  # an empty batch takes part in the gathering
    if not batches:
        return 0
    scored = 0
    prompts = [request.prompt for request in requests]
    with (
        file.world.report_lost_rank(),
        scorer_for(model, prompts) as scorer,
        progress(
            total=len(requests), desc="score", unit="turn", disable=not file.world.is_rank0
        ) as bar,
    ):
        for batch in batches:
            for request, losses in zip(batch, scorer.losses(batch), strict=True):
                # the tokens of each answer's own prompt are not the answer's
                own = [nats[n:] for nats, n in zip(losses, request.skip, strict=True)]
                file.write(_score_record(request, own))
                scored += sum(len(nats) for nats in own)
                bar.update()
    return scored


def _scoring_request(model: Llama, chat: Chat, line: Distilled) -> ScoringRequest:
    """The reference and the response of a line, each with its end token if it has one.

    Each follows the prompt it is trained on. The two prompts differ where the template begins a
    finished answer otherwise than it prompts for one: then the request's prompt is their common
    beginning, and `skip` counts the rest of each.
    """
    reference = chat.target(line.messages, line.reference)
    reference_answer = [*reference.answer, chat.end_id] if reference.answer else []
    chat.check_ids(line.response_ids)
    response_prompt = chat.prompt_ids(line.messages)
    response_end = [] if line.finish == "length" else [chat.end_id]
    response_answer = [*line.response_ids, *response_end] if line.response_ids else []

    shared = _common_length(reference.prompt, response_prompt)
    answers: list[list[int]] = []
    skip: list[int] = []
    for own_prompt, answer in (
        (reference.prompt, reference_answer),
        (response_prompt, response_answer),
    ):
        rest_of_prompt = own_prompt[shared:]
        fits = len(own_prompt) + len(answer) <= model.config.max_position
        answers.append([*rest_of_prompt, *answer] if answer and fits else [])
        skip.append(len(rest_of_prompt))
    return ScoringRequest(line.id, reference.prompt[:shared], answers, tuple(skip))


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that are the same in both."""
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def _score_record(request: ScoringRequest, losses: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The line of the scores file; losses: nats of the reference's tokens and of the response's."""
    record: dict[str, Any] = {"id": request.id}
    for name, nats in zip(("reference", "response"), losses, strict=True):
        record[f"{name}_nll"] = math.fsum(nats) / len(nats) if nats else None
        record[f"{name}_tokens"] = len(nats)
    return record
