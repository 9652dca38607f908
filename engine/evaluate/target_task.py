"""Evaluation on the target task: greedy answers of the seed and of adapters over one frozen base

For every held-out row each arm answers the plain prompt, and a verifier compares the answer with
the reference. The share of right answers carries a 95 % Wilson interval; arms are compared on the
same rows. The mean NLL per token of the references is measured under each arm too.

    FILE              a line per arm and row: the answer and its verdict
    FILE.nll.jsonl    a line per arm and row: the reference's NLL, summed over its tokens
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.config import DataConfig
from engine.data.encode import template_takes
from engine.data.fit import thought_tokens
from engine.data.rows import Row, Rows, listing
from engine.evaluate.arms import Arms, adapter_hashes, arms_of_group, arms_without_line
from engine.measure.answer_missing import answer_missing
from engine.measure.intervals import wilson
from engine.measure.packed_rows import AnsweredRow, groups, states_in_memory
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines
from engine.runtime.short_memory import tried_twice
from engine.runtime.terminal import progress, table
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request, SamplerConfig
from engine.session import Session
from engine.verify.tool_calls import verdict
from engine.verify.verifiers import Verifier, get_verifier
from model.chat import Chat
from model.llama import Llama

# fields that a line of answers, and a line of likelihoods, must have, with their types
ANSWER = {"arm": str, "id": str, "ok": bool, "finish": str, "tokens": int}
NATS = {"arm": str, "id": str, "nll": (float, int), "tokens": int}
by_arm_and_id = itemgetter("arm", "id")


@dataclass(frozen=True)
class Score:
    """Right answers to n held-out rows, and the mean NLL of their references."""

    n: int  # judged answers; 0 where the verifier is "none"
    right: int
    truncated: int  # answers that hit the token limit
    nll: float  # nats per reference token, end token included

    @property
    def share(self) -> float:
        """The share of right answers; nan where nothing was judged."""
        return self.right / self.n if self.n else math.nan

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share; (nan, nan) where nothing was judged."""
        return wilson(self.share, self.n)

    def cells(self) -> list[str]:
        """Share and interval for a table; dashes where nothing was judged."""
        if not self.n:
            return ["-", "-"]
        low, high = self.interval()
        share = f"{self.right}/{self.n} = {self.share:.1%}"
        return [share, f"{low:.1%} - {high:.1%}"]


@memory_for("answering held-out rows", SAMPLE_LESS)
def evaluate(
    generator: ChatGenerator,
    rows: Sequence[Row],
    verify: str,
    arms: Arms,
    out: Path,
    settings: dict[str, Any],
) -> dict[str, Score]:
    """Answer and judge every row under every arm; the score of each arm.

    rows        held-out rows; the last message of each is its reference
    verify      name of the verifier; with "none" nothing is answered or judged (`Score.n` is 0),
                only the references' NLL is measured
    out         file of the answers; lines that it holds already are kept. The NLL goes to
                `nll_file(out)`
    settings    identify the run; ValueError where `out` was begun under others

    ValueError also for a row that is longer than the model's context.
    """
    chat = generator.chat
    verifier = get_verifier(verify)
    losses = reference_nll(generator.model, chat, rows, arms, nll_file(out), settings)
    if verify == "none":
        return {arm: Score(n=0, right=0, truncated=0, nll=nats) for arm, nats in losses.items()}
    by_id = {row.id: row for row in rows}
    prompts = {row.id: chat.prompt_ids(row.messages[:-1]) for row in rows}
    with ResumedLines(out, settings, key=by_arm_and_id, wanted=ANSWER) as file:
        for arm, lora in arms.items():
            requests = {}
            for row in rows:
                requests[arm, row.id] = Request(row.id, prompts[row.id])
            to_line = partial(_answer_line, verifier, by_id, arm)
            answer_missing(generator, lora, requests, file, to_line, f"evaluate {arm}")
        file.finish([(arm, row.id) for arm in arms for row in rows])
        done = file.done
    scores = {}
    for arm in arms:
        answers = [done[arm, row.id] for row in rows]
        scores[arm] = Score(
            n=len(answers),
            right=sum(answer["ok"] for answer in answers),
            truncated=sum(answer["finish"] == "length" for answer in answers),
            nll=losses[arm],
        )
    return scores


def _answer_line(
    verifier: Verifier, rows: Mapping[str, Row], arm: str, completion: Completion
) -> dict[str, Any]:
    """A judged answer, as a line of the file."""
    row = rows[completion.id]
    ok, reason = verdict(verifier, row, completion.text)
    return {
        "arm": arm,
        "id": row.id,
        "ok": ok,
        "reason": reason,
        "answer": completion.text.strip(),
        "reference": row.reference,
        "finish": completion.finish,
        "tokens": len(completion.ids),
        "messages": row.messages[:-1],
        "ids": list(completion.ids),
    }


def rows_to_judge(session: Session, data: DataConfig) -> Rows:
    """Held-out rows that the model can answer and score, read as all data are.

    ValueError, before any work, for rows that the chat template refuses and for those that are
    longer than the model's context; under `skip_bad` and `drop_long` they are left out and counted.
    ValueError also where no row is left.
    """
    rows = data.load(check=template_takes(session.chat))
    longest = session.model.config.max_position
    fit: list[Row] = []
    too_long: list[str] = []
    for row in rows:
        prompt, reference = _prompt_and_reference(session.chat, row)
        length = len(prompt) + len(reference)
        if length <= longest:
            fit.append(row)
        else:
            too_long.append(f"{row.id}: {length} tokens")
    context = f"longer than the model's {longest} tokens"
    if too_long and not data.drop_long:
        message = f"{len(too_long)} held-out rows of {data.data} are {context}"
        remedy = "remove them, or leave them out with --drop-long"
        raise ValueError(listing(message, too_long, remedy))
    if not fit:
        raise ValueError(f"{data.data}: all held-out rows are {context}")
    if too_long:
        print(f"data: {len(too_long)} held-out rows left out: {context}")
    return rows.only(fit)


def _prompt_and_reference(chat: Chat, row: Row) -> tuple[list[int], list[int]]:
    """Token ids of a row's prompt, and of its reference with the end token.

    Under `--thinking answer-only` the thoughts of the reference belong to the prompt.
    """
    reference = row.messages[-1]
    target = chat.target(row.messages[:-1], reference)
    thought = thought_tokens(chat, target.answer) if row.thinking == "answer-only" else 0
    prompt = [*target.prompt, *target.answer[:thought]]
    return prompt, [*target.answer[thought:], chat.end_id_of(reference)]


def evaluate_job(
    session: Session,
    data: DataConfig,
    verify: str,
    adapters: Sequence[str],
    out: Path,
    sampling: SamplerConfig,
    scales: Sequence[float] = (1.0,),
) -> dict[str, Score]:
    """Score the seed and the adapters (directories) on a data file, and print the table.

    scales: strengths at which each adapter is scored (`Lora.scaled`).

    ValueError, before any work, for an unknown verifier and for rows as `rows_to_judge` says.
    """
    session.require_one_process("evaluation")
    get_verifier(verify)  # an unknown name is refused before the data are read
    rows = rows_to_judge(session, data)
    arms: Arms = {"seed": None, **session.adapters(adapters, scales)}
    session.note_other_system(adapters, rows)
    settings = session.settings | {
        "data": rows.sha256,
        "rows": len(rows),
        "verify": verify,
        "sampling": sampling.settings(),
        "adapters": adapter_hashes(adapters, scales),
    }
    generator = ChatGenerator(session.model, session.chat, sampling)
    scores = evaluate(generator, rows, verify, arms, out, settings)
    lines = [["", f"target ({verify})", "95 % interval", "cut short", "NLL of references"]]
    for arm, score in scores.items():
        lines.append([arm, *score.cells(), str(score.truncated), f"{score.nll:.3f}"])
    print(f"{table(lines)}\nanswers: {out}")
    return scores


@dataclass
class _Reference(AnsweredRow):
    """A held-out row's prompt, and its reference with the end token."""

    id: str  # of the row

    @property
    def n_answer(self) -> int:
        """Tokens of the reference."""
        return len(self.ids) - self.n_prompt


def nll_file(out: Path) -> Path:
    """The file with the NLL of the references, beside a file of answers."""
    return out.with_name(out.name + ".nll.jsonl")


def reference_nll(
    model: Llama,
    chat: Chat,
    rows: Sequence[Row],
    arms: Arms,
    out: Path,
    settings: dict[str, Any],
) -> dict[str, float]:
    """Mean NLL of the references under each arm: nats per token, end token included.

    `out` keeps a line per arm and row: `nll` in nats, summed over its `tokens`. Lines that it holds
    already are not computed again. ValueError for a row that is longer than the model's context.
    """
    with ResumedLines(out, settings, key=by_arm_and_id, wanted=NATS) as file:
        missing = {row.id for row in rows if arms_without_line(arms, row.id, file.done)}
        references: list[_Reference] = []  # every row is encoded and checked before one is scored
        if missing:
            references = [_reference(model, chat, row) for row in rows]
        name = "held-out NLL"
        with progress(total=len(missing), desc=name, unit="row", disable=not missing) as bar:
            for group in groups(references, model, arms.values()) if missing else ():
                not_done = arms_of_group(arms, [one.id for one in group], file.done)
                states = {}
                for arm, lora in not_done.items():
                    states[arm] = states_in_memory(name, model, group, lora)
                for place, one in enumerate(group):
                    for arm in arms_without_line(not_done, one.id, file.done):
                        total = tried_twice(
                            name, model.device, _total_nll, model, one, states[arm][place]
                        )
                        file.write({"arm": arm, "id": one.id, "nll": total, "tokens": one.n_answer})
                    if one.id in missing:
                        bar.update()
        file.finish([(arm, row.id) for row in rows for arm in arms])
        done = file.done
    means = {}
    for arm in arms:
        lines = [done[arm, row.id] for row in rows]
        total = sum(line["nll"] for line in lines)
        tokens = sum(line["tokens"] for line in lines)
        means[arm] = total / tokens
    return means


def _total_nll(model: Llama, one: _Reference, states: Tensor) -> float:
    """Nats of the whole reference, for the hidden states (N, D) that predict it."""
    answer = torch.tensor(one.ids[one.n_prompt :], device=model.device)  # (N,)
    nats, _ = model.nll(states, answer, need_grad=False)  # (N,)
    return nats.double().sum().item()


def _reference(model: Llama, chat: Chat, row: Row) -> _Reference:
    """A row's prompt and reference; ValueError where they are longer than the model's context."""
    prompt, reference = _prompt_and_reference(chat, row)
    length = len(prompt) + len(reference)
    longest = model.config.max_position
    if length > longest:
        raise ValueError(
            f"held-out row {row.id} has {length} tokens; expected at most the model's {longest}; "
            "leave it out"
        )
    return _Reference(row.id, ids=[*prompt, *reference], n_prompt=len(prompt))


def summary(scores: dict[str, Score]) -> dict[str, Any]:
    """Scores with their shares and intervals, for JSON."""
    values = {}
    for arm, score in scores.items():
        values[arm] = dataclasses.asdict(score)
        values[arm] |= {"share": score.share, "interval": score.interval()}
    return values
