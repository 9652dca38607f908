"""From turns to distilled lines: requests, judged attempts, the winner, the line

    DistilledWriter.start    submit the requests of a turn's first stage
    DistilledWriter.take     judge a completion; after the last one of a stage, write the turn's
                             line and start the row's next turn, or submit the next stage

The functions below the class are its steps: stage_requests, judged_attempt, decided_line,
unasked_line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.data.distilled import CONTEXT, KEPT, NOT_ASKED, OPTIONAL, Distilled
from engine.data.fit import answer_ids
from engine.data.thinking import thinks, without_thoughts
from engine.distill.cascade import REFERENCE, AssistantTurn, Attempt, TurnAttempts
from engine.distill.config import DistillConfig
from engine.distill.rewrite_prompts import prompt
from engine.distill.selection import judge
from engine.measure.likelihood import Scorer
from engine.runtime.stored_lines import ResumedOnDisk
from engine.sampling.requests import Completion, Request
from engine.sampling.sampler import Sampler
from engine.verify.tool_calls import verifier_of_calls
from engine.verify.verifiers import get_verifier
from model.chat import Chat
from model.messages import calls_of

FIELDS = tuple(part.name for part in dataclasses.fields(Distilled))
# name -> type of the fields that a line of the file must have; a line may lack OPTIONAL
LINE_FIELDS = {name: str for name in FIELDS if name not in OPTIONAL} | {
    "messages": list,
    "response_ids": list,
    "prompt_tokens": int,
    "response_tokens": int,
}


def distilled_line(record: dict[str, Any]) -> Distilled:
    """A parsed line of the file, which has LINE_FIELDS, as Distilled. Unknown keys are left out."""
    known = {name: record[name] for name in FIELDS if name in record}
    return Distilled(**known)


@dataclass
class DistilledWriter:
    """Submits turns to the sampler, and writes their lines once they are decided."""

    chat: Chat
    config: DistillConfig
    sampler: Sampler
    scorer: Scorer | None  # finds the likeliest of several accepted attempts; None: the first wins
    file: ResumedOnDisk
    sampling: dict[str, TurnAttempts] = field(default_factory=dict)  # turns by request id
    written: int = 0  # lines
    no_room: int = 0  # stages whose prompt fills the model's context

    @property
    def context_tokens(self) -> int:
        """Tokens of the model's context."""
        return self.sampler.owner.config.max_position

    def start(self, turn: AssistantTurn | None) -> None:
        """Submit the first stage of a turn; None, which follows a row's last turn, does nothing.

        The line of a turn that is not rewritten is written at once, and the row's next turn is
        started in its place.
        """
        while turn is not None:
            status = self._status_if_unasked(turn)
            if status is None:
                self._submit(TurnAttempts(turn, self.config.stages))
                return
            turn = self._write(turn, unasked_line(self.chat, turn, status))

    def take(self, completion: Completion) -> None:
        """Judge a completion. After the last one of a stage, write the line or submit the next."""
        attempts = self.sampling[completion.id]
        attempt = judged_attempt(self.chat, self.config, attempts, completion)
        attempts.add(attempt)
        if not attempts.stage_is_complete:
            return
        del self.sampling[completion.id]
        winner = attempts.winner(self.chat, self.scorer)
        if winner is None and attempts.has_next_stage:
            attempts.start_next_stage()
            self._submit(attempts)
            return
        next_turn = self._write(attempts.turn, decided_line(self.chat, attempts, winner))
        self.start(next_turn)

    def _status_if_unasked(self, turn: AssistantTurn) -> str | None:
        """The status of a turn that is not rewritten; None for a turn that is."""
        if turn.number in turn.row.context_only:
            return CONTEXT
        if not turn.is_last and not self.config.rules.every_turn:
            return NOT_ASKED
        return None

    def _submit(self, attempts: TurnAttempts) -> None:
        """Submit all attempts of the turn's current stage."""
        temperature = self.sampler.config.temperature
        requests = stage_requests(self.chat, self.config, attempts, temperature)
        first = requests[0]  # they differ in their sample number only
        if len(first.prompt) >= self.context_tokens:
            self.no_room += 1
        self.sampling[first.id] = attempts
        for request in requests:
            self.sampler.submit(request)

    def _write(self, turn: AssistantTurn, line: Distilled) -> AssistantTurn | None:
        """Write a turn's line; returns the row's next turn, None where there is none."""
        record = dataclasses.asdict(line)
        if not line.answer:
            del record["answer"]
        self.file.write(record)
        self.written += 1
        return turn.following(line.target)


def stage_requests(
    chat: Chat, config: DistillConfig, attempts: TurnAttempts, temperature: float
) -> list[Request]:
    """The requests of the current stage: samples of one prompt under one id.

    temperature: that of the run; the stage takes its share of it. ValueError where the chat
    template refuses the conversation.
    """
    turn, stage = attempts.turn, attempts.stage
    template = config.shown_template
    try:
        if stage.guided:
            messages = prompt(chat, template, turn.context, turn.shown_reference(chat))
            prompt_ids = chat.prompt_ids(messages, template.prefix)
        else:
            prompt_ids = chat.prompt_ids(turn.context)
    except ValueError as error:
        raise ValueError(f"row {turn.id}: {error}; leave the row out") from None
    if config.rules.cut_prompts:
        prompt_ids = prompt_ids[: config.rules.cut_prompts]
    reference_ids = answer_ids(chat, turn.context, turn.answer)
    limit = config.limit(len(reference_ids))
    # rewrites are about twice as long as their references (2.4 times in the paper's Alpaca)
    expected = min(limit, 16 + 2 * len(reference_ids))
    requests = []
    for sample in range(stage.tries):
        request = Request(
            stage.request_id(turn.id),
            prompt_ids,
            limit,
            sample,
            temperature=stage.temperature(temperature),
            expected_tokens=expected,
            draft_source=reference_ids,
        )
        requests.append(request)
    return requests


def judged_attempt(
    chat: Chat, config: DistillConfig, attempts: TurnAttempts, completion: Completion
) -> Attempt:
    """A completion with its status.

    The forced beginning of a guided answer becomes part of the attempt (in the published code it
    does not: `rules.prefix_in_target`).
    """
    turn, rules = attempts.turn, config.rules
    ids = list(completion.ids)
    if ids and attempts.stage.guided and rules.prefix_in_target:
        prefix = config.shown_template.prefix
        ids = [*chat.prefix_ids(prefix), *ids]
    text = chat.tokenizer.decode(ids).strip()
    status = status_of_text(chat, config, turn, text, completion.finish)
    if status in KEPT and not _has_control_tokens_of_calls(chat, turn, ids):
        status = "notation"
    return Attempt(
        sample=completion.sample,
        ids=ids,
        text=text,
        status=status,
        finish=completion.finish,
        prompt_tokens=completion.prompt_tokens,
        kept=status in KEPT,
    )


def _has_control_tokens_of_calls(chat: Chat, turn: AssistantTurn, ids: Sequence[int]) -> bool:
    """Whether sampled ids have the control tokens of the turn's calls, which no text shows.

    True for a turn without calls.
    """
    if not calls_of(turn.answer):
        return True
    control = set(chat.tokenizer.special.values())
    wanted = answer_ids(chat, turn.context, turn.answer)
    return [id for id in ids if id in control] == [id for id in wanted if id in control]


def status_of_text(
    chat: Chat, config: DistillConfig, turn: AssistantTurn, text: str, finish: str
) -> str:
    """The status of a response (selection.py).

    An answer that calls tools is judged by its calls, unless the verifier is the user's own. Under
    `--thinking answer-only` what follows the thoughts is judged; under `strip` a response with a
    thought is `thinks`, since sampled ids are kept as they are or not at all.
    """
    thinking = turn.row.thinking
    if thinking == "strip" and thinks(text):
        return "thinks"
    reference = turn.shown_reference(chat)
    if thinking != "keep":
        reference = without_thoughts(reference)
        text = without_thoughts(text)
    verifier = get_verifier(config.verifier)
    if calls_of(turn.answer):
        bare = {**turn.answer, "content": ""}
        written = chat.text_of_calls(turn.context, bare)
        verifier = verifier_of_calls(verifier, turn.answer, written)
    return judge(
        turn.context, reference, text, finish, verifier, rules=config.rules, tests=turn.tests
    )


def decided_line(chat: Chat, attempts: TurnAttempts, winner: Attempt | None) -> Distilled:
    """The line of a decided turn.

    Without a winner, the response is the first attempt of the last stage, and the target is the
    reference.
    """
    turn = attempts.turn
    reference = turn.shown_reference(chat)
    if winner is None:
        shown = attempts.attempts[0]
        target = reference
        stage = REFERENCE
    else:
        shown = winner
        target = winner.text
        stage = attempts.stage.name
    return Distilled(
        id=turn.id,
        messages=turn.context,
        reference=reference,
        response=shown.text,
        response_ids=shown.ids,
        target=target,
        status=shown.status,
        stage=stage,
        finish=shown.finish,
        prompt_tokens=shown.prompt_tokens,
        response_tokens=len(shown.ids),
        tries=attempts.tries,
        answer=turn.answer if calls_of(turn.answer) else {},
    )


def unasked_line(chat: Chat, turn: AssistantTurn, status: str) -> Distilled:
    """The line of a turn that is not rewritten: its target is the reference."""
    reference = turn.shown_reference(chat)
    return Distilled(
        id=turn.id,
        messages=turn.context,
        reference=reference,
        response="",
        response_ids=[],
        target=reference,
        status=status,
        stage=REFERENCE,
        finish="stop",
        prompt_tokens=0,
        response_tokens=0,
        answer=turn.answer if calls_of(turn.answer) else {},
    )
