"""Seed likelihoods: how likely references and rewrites are under the seed model itself

For every distilled line, the mean negative log-likelihood (NLL) in nats per token, end token
included, of the reference and of the response, both under the plain prompt (no reference shown).
The prompt is computed once for both. In fp32 on a CPU a number does not depend on the lines scored
beside it. FILE.scores.jsonl grows line by line and is resumed like the distilled file:

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
    BATCH_TOKENS,
    ScoringRequest,
    collective_rounds,
    scorer_for,
    scoring_batches,
)
from engine.runtime.distributed import World
from engine.runtime.locking import lock_file
from engine.runtime.process_memory import memory_for
from engine.runtime.resumable import ResumedLines
from engine.runtime.terminal import print_once, progress
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
    """Sums over the scored lines."""

    reference: float = 0.0  # nats
    reference_tokens: int = 0
    response: float = 0.0  # nats
    response_tokens: int = 0
    scored: int = field(default=0, compare=False)  # answer tokens that this process has scored
    seconds: float = field(default=0.0, compare=False)  # that this process took for them

    def add(self, record: dict[str, Any]) -> None:
        """Add one line of the scores file."""
        if record["reference_nll"] is not None:
            self.reference += record["reference_nll"] * record["reference_tokens"]
            self.reference_tokens += record["reference_tokens"]
        if record["response_nll"] is not None:
            self.response += record["response_nll"] * record["response_tokens"]
            self.response_tokens += record["response_tokens"]

    def text(self) -> str:
        """The printed line: nats per token of both, and the speed."""
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
    invariant: bool = False,
) -> LikelihoodSums:
    """Score every line that is trained on into `out` (FILE.scores.jsonl); returns the sums.

    Lines that are in `out` already are kept. settings: those of the distilled file; ValueError
    where `out` was begun under others. invariant: a score does not depend on those beside it on a
    GPU either. Where memory is short, fewer lines are scored together.
    """
    trained = [line for line in lines if line.status != CONTEXT]
    sums = LikelihoodSums()
    started = time.perf_counter()
    with (
        lock_file(out),
        ResumedLines(out, settings, resume=True, wanted=SCORE_FIELDS, world=world) as file,
    ):
        missing = [line for line in file.mine(trained) if line.id not in file.done]
        requests = [_scoring_request(model, chat, line) for line in missing]
        with_answers = []
        for request in requests:
            if any(request.answers):
                with_answers.append(request)
            else:  # nothing to score: its prompt may not even fit the model
                file.write(_score_record(request, request.answers))
        sums.scored = _score_requests(model, with_answers, file, invariant)
        sums.seconds = time.perf_counter() - started
        for record in file.finish([line.id for line in trained]):
            sums.add(record)
    return sums


def _score_requests(
    model: Llama, requests: Sequence[ScoringRequest], file: ResumedLines, invariant: bool
) -> int:
    """Score the requests and write their records; returns the answer tokens scored."""
    most_tokens = BATCH_TOKENS[model.device.type]
    batches = list(scoring_batches(requests, most_tokens))
    if batches and model.device.type != "cpu":
        print_once(f"scoring: up to {most_tokens} tokens at a time (automatic)")
    rounds = collective_rounds(model, file.world, len(batches))
    while len(batches) < rounds:
        batches.append([])  # this rank has no work left, but joins the others' collectives
    if not batches:
        return 0
    scored = 0
    prompts = [request.prompt for request in requests]
    is_quiet = not file.world.is_rank0
    with (
        file.world.report_lost_rank(),
        scorer_for(model, prompts, invariant) as scorer,
        progress(total=len(requests), desc="score", unit="turn", disable=is_quiet) as bar,
    ):
        for batch in batches:
            all_losses = scorer.losses(batch)  # [request][answer][token], nats
            for request, losses in zip(batch, all_losses, strict=True):
                answer_losses = []
                for nats, prompt_tokens in zip(losses, request.skip, strict=True):
                    answer_losses.append(nats[prompt_tokens:])
                file.write(_score_record(request, answer_losses))
                scored += sum(len(nats) for nats in answer_losses)
                bar.update()
    return scored


def _scoring_request(model: Llama, chat: Chat, line: Distilled) -> ScoringRequest:
    """The reference and the response of a line, each with its end token if it has one.

    Each follows the prompt it is trained on. A chat template may begin a finished answer otherwise
    than it prompts for one; then the two prompts differ. The request's prompt is their common
    beginning, the rest of each prompt stands before its answer, and `skip` counts that rest.
    """
    end_id = chat.end_id_of(line.answer) if line.answer else chat.end_id
    reference = chat.target(line.messages, line.answer or line.reference)
    reference_answer: list[int] = []
    if reference.answer:
        reference_answer = [*reference.answer, end_id]

    chat.check_ids(line.response_ids)
    response_prompt = chat.prompt_ids(line.messages)
    response_answer = list(line.response_ids)
    if response_answer and line.finish != "length":
        response_answer.append(end_id)

    shared = _common_length(reference.prompt, response_prompt)
    pairs = ((reference.prompt, reference_answer), (response_prompt, response_answer))
    answers: list[list[int]] = []
    skip: list[int] = []
    for prompt, answer in pairs:
        rest_of_prompt = prompt[shared:]
        skip.append(len(rest_of_prompt))
        fits = len(prompt) + len(answer) <= model.config.max_position
        if answer and fits:
            answers.append([*rest_of_prompt, *answer])
        else:
            answers.append([])  # not scored
    return ScoringRequest(line.id, reference.prompt[:shared], answers, tuple(skip))


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that are the same in both."""
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def _score_record(request: ScoringRequest, losses: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The line of the scores file.

    losses: [answer][token] in nats, first the reference, then the response; empty: not scored.
    """
    record: dict[str, Any] = {"id": request.id}
    for name, nats in zip(("reference", "response"), losses, strict=True):
        record[f"{name}_nll"] = math.fsum(nats) / len(nats) if nats else None
        record[f"{name}_tokens"] = len(nats)
    return record
