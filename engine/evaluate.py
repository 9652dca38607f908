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

from engine.data import Row, Rows
from engine.intervals import wilson
from engine.log import (
    AppendedLines,
    cut_torn_line,
    differing,
    progress,
    read_jsonl,
    sha256,
    table,
    write_json,
)
from engine.sampler import Request, Sampler, SamplerConfig
from engine.score import nll
from engine.session import Session
from engine.verifiers import get_verifier
from model.chat import Chat
from model.config import read_json
from model.llama import Llama
from model.lora import Lora

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


def resume_lines(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of a file that an earlier run of the same settings began; ValueError if they differ."""
    meta = out.with_name(out.name + ".meta.json")
    if out.exists():
        if not meta.exists():
            raise ValueError(f"{out} exists already and is not ours; choose another name")
        if changes := differing(read_json(meta), settings):
            raise ValueError(
                f"{out} was made under other settings; choose another name or delete it:\n  "
                + "\n  ".join(changes)
            )
    write_json(meta, settings)
    cut_torn_line(out)
    return read_jsonl(out) if out.exists() else []


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
    done = {(a["arm"], a["id"]): a for a in resume_lines(out, settings)}
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


def evaluate_job(
    session: Session,
    rows: Rows,
    verify: str,
    adapters: Sequence[str],
    out: Path,
    sampling: SamplerConfig,
) -> dict[str, Score]:
    """Score the seed and the adapters, print the table."""
    session.alone("evaluation")
    get_verifier(verify)
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
    done = {(line["arm"], line["id"]): line for line in resume_lines(out, settings)}
    todo = [row for row in rows if any((arm, row.id) not in done for arm in arms)]
    asked = {}
    for row in todo:
        asks = chat.target(row.messages[:-1], row.reference)
        prompt, answer = asks.prompt, [*asks.answer, chat.end_id]
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
