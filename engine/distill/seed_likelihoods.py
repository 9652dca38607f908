"""Seed likelihoods: how likely references and rewrites are under the seed model itself

For every distilled line, the mean negative log-likelihood (NLL) in nats per token, end token
included, of the reference and of the response, both under the plain prompt (no reference shown).
The prompt is computed once for both. In fp32 on a CPU a number does not depend on the lines scored
beside it. FILE.scores.jsonl grows line by line and is resumed like the distilled file:

    {"id", "reference_nll", "reference_tokens", "response_nll", "response_tokens"}

An answer that is empty, or too long for the model, has nll null and 0 tokens.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.distilled import CONTEXT, Distilled
from engine.measure.likelihood import (
    BATCH_TOKENS,
    PackedScorer,
    Scorer,
    ScoringRequest,
    collective_rounds,
    scorer_for,
    scoring_batches,
)
from engine.runtime.distributed import World
from engine.runtime.locking import lock_file
from engine.runtime.process_memory import memory_for
from engine.runtime.stored_lines import ResumedOnDisk
from engine.runtime.terminal import print_once, progress
from model.chat import Chat
from model.llama import Llama

REQUESTS_FOR_PREFIX = 4096  # whose prompts tell which beginning is computed once for all
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
    lines: Iterable[Distilled],
    out: Path,
    settings: dict[str, Any],
    world: World | None = None,
    invariant: bool = False,
) -> LikelihoodSums:
    """Score every line that is trained on into `out` (FILE.scores.jsonl); returns the sums.

    Lines that are in `out` already are kept. settings: those of the distilled file; ValueError
    where `out` was begun under others. lines: iterated several times. invariant: a score does not
    depend on those beside it on a GPU either. Where memory is short, fewer lines are scored
    together.
    """
    trained = TrainedLines(lines)
    sums = LikelihoodSums()
    started = time.perf_counter()
    with (
        lock_file(out),
        ResumedOnDisk(out, settings, resume=True, wanted=SCORE_FIELDS, world=world) as file,
    ):
        sums.scored = _score_missing(model, chat, MissingLines(trained, file), invariant)
        sums.seconds = time.perf_counter() - started
        file.put_in_order(trained.ids)
        for name in trained.ids:
            sums.add(file.done[name])
    return sums


class TrainedLines:
    """The lines that are trained on: all but those that are context only.

    They and their ids may be iterated several times, and are not kept.
    """

    def __init__(self, lines: Iterable[Distilled]) -> None:
        self.lines = lines
        self.ids = _Ids(self)

    def __iter__(self) -> Iterator[Distilled]:
        for line in self.lines:
            if line.status != CONTEXT:
                yield line


class _Ids:
    """The ids of lines."""

    def __init__(self, lines: Iterable[Distilled]) -> None:
        self.lines = lines

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            yield line.id


class MissingLines:
    """The trained lines of this process that its file of scores lacks; may be iterated several
    times."""

    def __init__(self, trained: Iterable[Distilled], file: ResumedOnDisk) -> None:
        self.trained = trained
        self.file = file

    def __iter__(self) -> Iterator[Distilled]:
        world = self.file.world
        for line in itertools.islice(self.trained, world.rank, None, world.size):
            if line.id not in self.file.done:
                yield line


def _score_missing(model: Llama, chat: Chat, missing: MissingLines, invariant: bool) -> int:
    """Score the lines and write their records; returns the answer tokens scored."""
    file = missing.file
    most_tokens = BATCH_TOKENS[model.device.type]
    rounds = 0  # forwards that all ranks make, where they make them together
    if model.is_sharded:
        requests = _answered_requests(model, chat, missing, None)
        own = sum(1 for _ in scoring_batches(requests, most_tokens))
        rounds = collective_rounds(model, file.world, own)
    requests = _answered_requests(model, chat, missing, file)
    first = list(itertools.islice(requests, REQUESTS_FOR_PREFIX))
    if not first and not rounds:
        return 0
    if first and model.device.type != "cpu":
        print_once(f"scoring: up to {most_tokens} tokens at a time (automatic)")
    scored = 0
    prompts = [request.prompt for request in first]
    is_quiet = not file.world.is_rank0
    count = sum(1 for _ in missing)
    with (
        file.world.report_lost_rank(),
        scorer_for(model, prompts, invariant) as scorer,
        progress(total=count, desc="score", unit="turn", disable=is_quiet) as bar,
    ):
        for batch in scoring_batches(itertools.chain(first, requests), most_tokens):
            scored += _score_batch(scorer, batch, file)
            rounds -= 1
            bar.update(len(batch))
        for _ in range(rounds):  # this rank has no work left, but joins the others' collectives
            scorer.losses([])
    return scored


def _answered_requests(
    model: Llama, chat: Chat, lines: Iterable[Distilled], file: ResumedOnDisk | None
) -> Iterator[ScoringRequest]:
    """The requests of the lines, but for those without an answer to score.

    Their records are written to `file` at once; None: they are not written.
    """
    for line in lines:
        request = _scoring_request(model, chat, line)
        if any(request.answers):
            yield request
        elif file is not None:  # its prompt may not even fit the model
            file.write(_score_record(request, request.answers))


def _score_batch(
    scorer: Scorer | PackedScorer, batch: Sequence[ScoringRequest], file: ResumedOnDisk
) -> int:
    """Score requests together and write their records; returns their answer tokens."""
    scored = 0
    all_losses = scorer.losses(batch)  # [request][answer][token], nats
    for request, losses in zip(batch, all_losses, strict=True):
        answer_losses = []
        for nats, prompt_tokens in zip(losses, request.skip, strict=True):
            answer_losses.append(nats[prompt_tokens:])
        file.write(_score_record(request, answer_losses))
        scored += sum(len(nats) for nats in answer_losses)
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
