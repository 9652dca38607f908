"""Evaluation on the target task: greedy answers of the seed and of adapters over one frozen base

For every held-out row the model answers the plain prompt and a verifier compares the answer with
the reference. Scores carry a 95 % Wilson interval; two arms are compared on the same items. Also
the mean NLL per token of the references, under each arm; FILE.nll.jsonl keeps the sum of every row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.config import DataConfig
from engine.data.encode import template_takes
from engine.data.rows import Row, Rows, listing
from engine.measure.intervals import wilson
from engine.measure.likelihood import nll
from engine.runtime.files import (
    AppendedLines,
    sha256,
)
from engine.runtime.process_memory import SAMPLE_LESS, memory_for
from engine.runtime.resumable_answers import put_in_order, resume_lines
from engine.runtime.terminal import progress, table
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.session import Session
from engine.verify.verifiers import get_verifier
from model.chat import Chat
from model.llama import Llama
from model.lora import Lora

# what a line of answers, and one of likelihoods, must have
ANSWER = {"arm": str, "id": str, "ok": bool, "finish": str, "tokens": int}
NATS = {"arm": str, "id": str, "nll": (float, int), "tokens": int}
Arms = dict[str, Lora | None]  # name -> adapter; the seed is None


@dataclass(frozen=True)
class Score:
    """How many of n held-out answers were right, and how foreign the references are."""

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
    model: Llama,
    chat: Chat,
    rows: Sequence[Row],
    verify: str,
    arms: Arms,
    out: Path,
    sampling: SamplerConfig,
    settings: dict[str, Any],
) -> dict[str, Score]:
    """Answer and judge every row with every arm; answers go to `out`, lines there are kept.

    With verify "none" there is nothing to judge: only the references' NLL is taken (n is 0).
    """
    losses = reference_nll(model, chat, rows, arms, nll_file(out), settings)
    if verify == "none":
        return {arm: Score(0, 0, 0, v) for arm, v in losses.items()}
    verifier = get_verifier(verify)
    done = {(a["arm"], a["id"]): a for a in resume_lines(out, settings, ANSWER)}
    prompts = {row.id: chat.prompt_ids(row.messages[:-1]) for row in rows}
    by_id = {row.id: row for row in rows}
    with AppendedLines(out) as file:
        for arm, lora in arms.items():
            todo = [row for row in rows if (arm, row.id) not in done]
            if not todo:
                continue
            requests = [Request(row.id, prompts[row.id]) for row in todo]
            with (
                Sampler(model, chat.tokenizer.decode, chat.end_ids, sampling, lora) as sampler,
                progress(total=len(todo), desc=f"evaluate {arm}", unit="row") as bar,
            ):
                for answer in sampler.run(requests):
                    row = by_id[answer.id]
                    ok, reason = verifier(row, answer.text)
                    line = {"arm": arm, "id": row.id, "ok": ok, "reason": reason}
                    line |= {"answer": answer.text.strip(), "reference": row.reference}
                    line |= {"finish": answer.finish, "tokens": len(answer.ids)}
                    line |= {"messages": row.messages[:-1], "ids": list(answer.ids)}
                    file.write(line)
                    done[arm, row.id] = line
                    bar.update()
    put_in_order(out, done, [(arm, row.id) for arm in arms for row in rows])
    scores = {}
    for arm in arms:
        answers = [done[arm, row.id] for row in rows]
        scores[arm] = Score(
            n=len(answers),
            right=sum(a["ok"] for a in answers),
            truncated=sum(a["finish"] == "length" for a in answers),
            nll=losses[arm],
        )
    return scores


def rows_to_judge(session: Session, data: DataConfig) -> Rows:
    """Held-out rows that the model can answer and score, read as all data are.

    ValueError, before any work, for rows that the chat template refuses and for those that are
    longer than the model's context; under `skip_bad` and `drop_long` they are left out and counted.
    """
    rows, most = data.load(check=template_takes(session.chat)), session.model.config.max_position
    lengths = [sum(map(len, _prompt_and_reference(session.chat, row))) for row in rows]
    fit = [row for row, length in zip(rows, lengths, strict=True) if length <= most]
    long = [f"{r.id}: {n} tokens" for r, n in zip(rows, lengths, strict=True) if n > most]
    if long and not data.drop_long:
        what = f"{len(long)} held-out rows of {data.data} are longer than the model's {most} tokens"
        raise ValueError(listing(what, long, "remove them, or leave them out with --drop-long"))
    if not fit:
        raise ValueError(
            f"{data.data}: all held-out rows are longer than the model's {most} tokens"
        )
    if long:
        print(f"data: {len(long)} held-out rows left out: longer than the model's {most} tokens")
    return rows.only(fit)


def _prompt_and_reference(chat: Chat, row: Row) -> tuple[list[int], list[int]]:
    """Ids of a row's prompt, and of its reference with the end token."""
    asks = chat.target(row.messages[:-1], row.reference)
    return asks.prompt, [*asks.answer, chat.end_id]


def evaluate_job(
    session: Session,
    data: DataConfig,
    verify: str,
    adapters: Sequence[str],
    out: Path,
    sampling: SamplerConfig,
) -> dict[str, Score]:
    """Score the seed and the adapters, print the table."""
    session.alone("evaluation")
    get_verifier(verify)
    rows = rows_to_judge(session, data)
    arms: Arms = {"seed": None, **session.adapters(adapters)}
    session.note_systems(adapters, rows)
    settings = session.settings | {"data": rows.sha256, "rows": len(rows), "verify": verify}
    settings |= {"sampling": sampling.settings(), "adapters": adapter_hashes(adapters)}
    scores = evaluate(session.model, session.chat, rows, verify, arms, out, sampling, settings)
    lines = [["", f"target ({verify})", "95 % interval", "cut short", "NLL of references"]]
    for arm, s in scores.items():
        lines.append([arm, *s.cells(), str(s.truncated), f"{s.nll:.3f}"])
    print(f"{table(lines)}\nanswers: {out}")
    return scores


def adapter_hashes(paths: Sequence[str]) -> dict[str, str]:
    """Name -> hash of the adapter's bytes, for settings."""
    file = "adapter_model.safetensors"
    return {Path(p).resolve().name: sha256((Path(p) / file).read_bytes()) for p in paths}


def nll_file(out: Path) -> Path:
    """Where the references' likelihoods lie, beside a file of answers."""
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
    done = {(line["arm"], line["id"]): line for line in resume_lines(out, settings, NATS)}
    todo = [row for row in rows if any((arm, row.id) not in done for arm in arms)]
    asked = {}
    for row in todo:
        prompt, answer = _prompt_and_reference(chat, row)
        if len(prompt) + len(answer) > model.config.max_position:
            raise ValueError(
                f"held-out row {row.id} has {len(prompt) + len(answer)} tokens, the model was made "
                f"for {model.config.max_position}; leave it out"
            )
        asked[row.id] = prompt, answer
    with AppendedLines(out) as file:
        for row in progress(todo, desc="held-out NLL", unit="row") if todo else ():
            prompt, answer = asked[row.id]
            for arm, lora in arms.items():
                if (arm, row.id) not in done:
                    nats = nll(model, prompt, answer, lora).double().sum().item()
                    line = {"arm": arm, "id": row.id, "nll": nats, "tokens": len(answer)}
                    file.write(line)
                    done[arm, row.id] = line
    put_in_order(out, done, [(arm, row.id) for row in rows for arm in arms])
    found = {}
    for arm in arms:
        lines = [done[arm, row.id] for row in rows]
        found[arm] = sum(line["nll"] for line in lines) / sum(line["tokens"] for line in lines)
    return found


def summary(scores: dict[str, Score]) -> dict[str, Any]:
    """Scores with their shares and intervals, for JSON."""
    return {
        arm: dataclasses.asdict(s) | {"share": s.share, "interval": s.interval()}
        for arm, s in scores.items()
    }
