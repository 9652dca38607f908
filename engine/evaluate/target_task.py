"""Evaluation on the target task: greedy answers of the seed and of adapters over one frozen base

For every held-out row the model answers the plain prompt and a verifier compares the answer with
the reference. Scores carry a 95 % Wilson interval; two arms are compared on the same items. Also
the mean NLL per token of the references, under each arm; FILE.nll.jsonl keeps the sum of every row.
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

from engine.data.config import DataConfig
from engine.data.encode import template_takes
from engine.data.rows import Row, Rows, listing
from engine.evaluate.arms import Arms, adapter_hashes
from engine.measure.answer_missing import answer_missing
from engine.measure.intervals import wilson
from engine.measure.likelihood import nll
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable import ResumedLines
from engine.runtime.terminal import progress, table
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import Completion, Request, SamplerConfig
from engine.session import Session
from engine.verify.verifiers import Verifier, get_verifier
from model.chat import Chat
from model.llama import Llama

# fields of a line of answers, and of a line of likelihoods
ANSWER = {"arm": str, "id": str, "ok": bool, "finish": str, "tokens": int}
NATS = {"arm": str, "id": str, "nll": (float, int), "tokens": int}
by_arm_and_id = itemgetter("arm", "id")


@dataclass(frozen=True)
class Score:
    """Right answers of n held-out rows, and the mean NLL of their references."""

    n: int
    right: int
    truncated: int  # answers that hit the token limit
    nll: float  # nats per reference token, end token included

    @property
    def share(self) -> float:
        return self.right / self.n if self.n else math.nan

    def cells(self) -> list[str]:
        """Share and interval for a table; dashes where nothing was judged."""
        if not self.n:
            return ["-", "-"]
        low, high = self.interval()
        return [f"{self.right}/{self.n} = {self.share:.1%}", f"{low:.1%} - {high:.1%}"]

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        return wilson(self.share, self.n)


@memory_for("answering held-out rows", SAMPLE_LESS)
def evaluate(
    generator: ChatGenerator,
    rows: Sequence[Row],
    verify: str,
    arms: Arms,
    out: Path,
    settings: dict[str, Any],
) -> dict[str, Score]:
    """Answer and judge every row with every arm; answers go to `out`, lines there are kept.

    With verify "none" there is nothing to judge: only the references' NLL is measured (n is 0).
    """
    chat, verifier = generator.chat, get_verifier(verify)
    losses = reference_nll(generator.model, chat, rows, arms, nll_file(out), settings)
    if verify == "none":
        return {arm: Score(0, 0, 0, nats) for arm, nats in losses.items()}
    by_id = {row.id: row for row in rows}
    prompts = {row.id: chat.prompt_ids(row.messages[:-1]) for row in rows}
    with ResumedLines(out, settings, key=by_arm_and_id, wanted=ANSWER) as file:
        for arm, lora in arms.items():
            requests = {(arm, row.id): Request(row.id, prompts[row.id]) for row in rows}
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
    ok, reason = verifier(row, completion.text)
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
    """
    rows = data.load(check=template_takes(session.chat))
    longest = session.model.config.max_position
    lengths = {row.id: sum(map(len, _prompt_and_reference(session.chat, row))) for row in rows}
    fit = [row for row in rows if lengths[row.id] <= longest]
    too_long = [f"{name}: {n} tokens" for name, n in lengths.items() if n > longest]
    if too_long and not data.drop_long:
        message = (
            f"{len(too_long)} held-out rows of {data.data} are longer than the model's {longest} "
            "tokens"
        )
        raise ValueError(
            listing(message, too_long, "remove them, or leave them out with --drop-long")
        )
    if not fit:
        raise ValueError(
            f"{data.data}: all held-out rows are longer than the model's {longest} tokens"
        )
    if too_long:
        print(
            f"data: {len(too_long)} held-out rows left out: longer than the model's {longest} "
            "tokens"
        )
    return rows.only(fit)


def _prompt_and_reference(chat: Chat, row: Row) -> tuple[list[int], list[int]]:
    """Ids of a row's prompt, and of its reference with the end token."""
    target = chat.target(row.messages[:-1], row.reference)
    return target.prompt, [*target.answer, chat.end_id]


def evaluate_job(
    session: Session,
    data: DataConfig,
    verify: str,
    adapters: Sequence[str],
    out: Path,
    sampling: SamplerConfig,
) -> dict[str, Score]:
    """Score the seed and the adapters, print the table."""
    session.require_one_process("evaluation")
    get_verifier(verify)
    rows = rows_to_judge(session, data)
    arms: Arms = {"seed": None, **session.adapters(adapters)}
    session.note_other_system(adapters, rows)
    settings = session.settings | {"data": rows.sha256, "rows": len(rows), "verify": verify}
    settings |= {"sampling": sampling.settings(), "adapters": adapter_hashes(adapters)}
    generator = ChatGenerator(session.model, session.chat, sampling)
    scores = evaluate(generator, rows, verify, arms, out, settings)
    lines = [["", f"target ({verify})", "95 % interval", "cut short", "NLL of references"]]
    for arm, s in scores.items():
        lines.append([arm, *s.cells(), str(s.truncated), f"{s.nll:.3f}"])
    print(f"{table(lines)}\nanswers: {out}")
    return scores


def nll_file(out: Path) -> Path:
    """The file of the references' likelihoods, beside a file of answers."""
    return out.with_name(out.name + ".nll.jsonl")


def reference_nll(
    model: Llama,
    chat: Chat,
    rows: Sequence[Row],
    arms: Arms,
    out: Path,
    settings: dict[str, Any],
) -> dict[str, float]:
    """Nats per reference token (end token included) under each arm.

    `out` keeps a line per arm and row (`nll` in nats, summed over `tokens`); those there are kept.
    """
    with ResumedLines(out, settings, key=by_arm_and_id, wanted=NATS) as file:
        missing = [row for row in rows if any((arm, row.id) not in file.done for arm in arms)]
        texts = {row.id: _fitting_prompt_and_reference(model, chat, row) for row in missing}
        for row in progress(missing, desc="held-out NLL", unit="row") if missing else ():
            prompt, answer = texts[row.id]
            for arm, lora in arms.items():
                if (arm, row.id) not in file.done:
                    nats = nll(model, prompt, answer, lora).double().sum().item()
                    file.write({"arm": arm, "id": row.id, "nll": nats, "tokens": len(answer)})
        file.finish([(arm, row.id) for row in rows for arm in arms])
        done = file.done
    means = {}
    for arm in arms:
        lines = [done[arm, row.id] for row in rows]
        means[arm] = sum(line["nll"] for line in lines) / sum(line["tokens"] for line in lines)
    return means


def _fitting_prompt_and_reference(
    model: Llama, chat: Chat, row: Row
) -> tuple[list[int], list[int]]:
    """`_prompt_and_reference`; ValueError where they are longer than the model's context."""
    prompt, answer = _prompt_and_reference(chat, row)
    if len(prompt) + len(answer) > model.config.max_position:
        raise ValueError(
            f"held-out row {row.id} has {len(prompt) + len(answer)} tokens, the model was made "
            f"for {model.config.max_position}; leave it out"
        )
    return prompt, answer


def summary(scores: dict[str, Score]) -> dict[str, Any]:
    """Scores with their shares and intervals, for JSON."""
    return {
        arm: dataclasses.asdict(s) | {"share": s.share, "interval": s.interval()}
        for arm, s in scores.items()
    }
