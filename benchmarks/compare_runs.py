"""Two runs of scripts/sdft.py on two machines, row by row: the same texts, the same figures?

    python -m benchmarks.compare_runs RUN OTHER --model DIR
    python -m benchmarks.compare_runs .gpu/cpu runs/on-the-card --model DIR --tolerance 0.1

Compares the seed model's texts token by token: rewrites (distilled.jsonl), answers to held-out rows
(evaluation.jsonl) and to general prompts (seed_answers.jsonl). Where two greedy texts differ, the
model computes the log-probabilities of both tokens at the first difference: if they are closer
than --tolerance nats, rounding decided between them ("a tie"). Without --model only the rows are
counted. Then, beside each other: the status of the rewrites, right answers, NLL and drift of every
arm, and the losses of the training steps. Answers of the trained arms are counted and not judged:
their adapters differ in the last bits already.

Exit code 1 where a row is missing, or texts differ and that was not a tie. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.clock import figure
from engine.distill.rewrite_prompts import TEMPLATES, prompt
from engine.measure.likelihood import nll
from engine.runtime.terminal import table
from engine.session import DTYPES, ModelConfig, Session
from model.chat import Chat
from model.config import read_json

TOLERANCE = 1e-3  # nats; fp32 on two devices differs by less than a tenth of it
SHOWN = 10  # differing rows that are printed
MEASURES = ("right", "n", "nll", "kl", "reverse_kl", "agreement")  # of an arm
# (row, ids before the two tokens, the two tokens) -> their log-probabilities
Scorer = Callable[["TextRow", list[int], tuple[int, int]], tuple[float, float]]


@dataclass(frozen=True)
class TextRow:
    """A text that the seed model wrote."""

    key: str  # unique in its file
    messages: list[dict[str, str]]  # of the prompt; the text stands behind it
    ids: list[int]  # as sampled, without the end token
    ended: bool  # whether the end token was sampled after them


@dataclass(frozen=True)
class Difference:
    """Two texts of one row that differ."""

    key: str
    position: int  # of the first token that differs
    tokens: tuple[int, int]  # there, the end token included
    logprobs: tuple[float, float] | None  # of these two under the model; None: not computed

    def is_tie(self, tolerance: float) -> bool:
        """Whether both tokens were equally likely, within the tolerance in nats."""
        if self.logprobs is None:
            return False
        return abs(self.logprobs[0] - self.logprobs[1]) <= tolerance


@dataclass(frozen=True)
class Comparison:
    """The rows of one file in two runs."""

    equal: int
    missing: list[str]  # keys that only one of the runs has
    differences: list[Difference]

    def is_good(self, tolerance: float) -> bool:
        """Whether no row is missing and every difference is a tie."""
        ties = [difference.is_tie(tolerance) for difference in self.differences]
        return not self.missing and all(ties)

    def record(self, tolerance: float) -> dict[str, Any]:
        """What the JSON line says of this file."""
        count = self.equal + len(self.differences)
        listed = []
        for d in self.differences:
            listed.append(
                {
                    "row": d.key,
                    "position": d.position,
                    "tokens": d.tokens,
                    "logprobs": d.logprobs,
                    "tie": d.is_tie(tolerance),
                }
            )
        return {
            "rows": count,
            "equal": self.equal,
            "share_equal": self.equal / count if count else 1.0,
            "missing": self.missing,
            "differences": listed,
            "good": self.is_good(tolerance),
        }


def compare_rows(
    rows: Mapping[str, TextRow], others: Mapping[str, TextRow], end_id: int, score: Scorer | None
) -> Comparison:
    """Compare the texts of the rows that both have.

    end_id: the token id that stands for the end of a text that ended. score: computes the
    log-probabilities at a difference; None: they stay unknown.
    """
    missing = sorted(rows.keys() ^ others.keys())
    equal = 0
    differences = []
    for key, row in rows.items():
        if key not in others:
            continue
        ids = _with_end(row, end_id)
        other_ids = _with_end(others[key], end_id)
        if ids == other_ids:
            equal += 1
            continue
        position = first_difference(ids, other_ids)
        # a text that was cut at its limit has no token where the other one goes on
        tokens = (_token_at(ids, position), _token_at(other_ids, position))
        logprobs = None
        if score is not None and min(tokens) >= 0:
            logprobs = score(row, ids[:position], tokens)
        differences.append(Difference(key, position, tokens, logprobs))
    return Comparison(equal, missing, differences)


def _with_end(row: TextRow, end_id: int) -> list[int]:
    return [*row.ids, end_id] if row.ended else row.ids


def _token_at(ids: Sequence[int], position: int) -> int:
    """The token at a position, -1 behind the last one."""
    return ids[position] if position < len(ids) else -1


def first_difference(ids: Sequence[int], others: Sequence[int]) -> int:
    """The first position at which two sequences differ; the shorter one's length if none does."""
    for position, (token, other) in enumerate(zip(ids, others, strict=False)):
        if token != other:
            return position
    return min(len(ids), len(others))


# ---- the files of a run


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; ValueError where it is not there."""
    if not file.exists():
        raise ValueError(f"{file} is not there; expected the files of a finished scripts/sdft.py")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def rewrites(run: Path) -> dict[str, TextRow]:
    """The rewrites of distilled.jsonl, behind the prompts that asked for them."""
    settings = read_json(run / "distilled.jsonl.meta.json")
    template = TEMPLATES[settings["distill"]["template"]]
    chat_name = str(settings["chat"])
    rows = {}
    for line in read_lines(run / "distilled.jsonl"):
        named = _ChatName(chat_name)
        messages = prompt(named, template, line["messages"], line["reference"])
        rows[line["id"]] = TextRow(
            line["id"], messages, line["response_ids"], line["finish"] == "stop"
        )
    return rows


@dataclass(frozen=True)
class _ChatName:
    """What `rewrite_prompts.prompt` asks of a chat format."""

    name: str


def answers(run: Path, arm: str) -> dict[str, TextRow]:
    """The answers of one arm to the held-out rows; {} where none were evaluated."""
    file = run / "evaluation.jsonl"
    if not file.exists():
        return {}
    rows = {}
    for line in read_lines(file):
        if line["arm"] == arm:
            ended = line["finish"] == "stop"
            rows[line["id"]] = TextRow(line["id"], line["messages"], line["ids"], ended)
    return rows


def general_answers(run: Path) -> dict[str, TextRow]:
    """The seed's answers to general prompts. Their ids hold the end token where it was sampled."""
    rows = {}
    for line in read_lines(run / "seed_answers.jsonl"):
        messages = [{"role": "user", "content": line["prompt"]}]
        rows[line["prompt"]] = TextRow(line["prompt"], messages, line["ids"], ended=False)
    return rows


def scorer(session: Session) -> Scorer:
    """Log-probabilities by the seed model of a session."""

    def score(row: TextRow, before: list[int], tokens: tuple[int, int]) -> tuple[float, float]:
        prompt_ids = [*session.chat.prompt_ids(row.messages), *before]
        first = nll(session.model, prompt_ids, [tokens[0]]).item()
        second = nll(session.model, prompt_ids, [tokens[1]]).item()
        return -first, -second

    return score


# ---- figures


def arm_figures(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Arm -> its figures in summary.json, as far as it has them."""
    arms: dict[str, dict[str, float]] = {}
    for part in ("evaluation", "retention"):
        for arm, values in (summary.get(part) or {}).items():
            known = {name: values[name] for name in MEASURES if name in values}
            arms[arm] = arms.get(arm, {}) | known
    return arms


def loss_differences(run: Path, other: Path, arm: str) -> dict[str, float]:
    """The largest difference of a step's loss, absolute and as a share; {} without the metrics.

    ValueError where the runs have different numbers of steps.
    """
    files = [folder / arm / "metrics.jsonl" for folder in (run, other)]
    if not all(file.exists() for file in files):
        return {}
    losses = [line["loss"] for line in read_lines(files[0])]
    other_losses = [line["loss"] for line in read_lines(files[1])]
    if len(losses) != len(other_losses):
        raise ValueError(f"{files[0]} has {len(losses)} steps, {files[1]} {len(other_losses)}")
    gaps = [abs(a - b) for a, b in zip(losses, other_losses, strict=True)]
    shares = [gap / abs(a) for gap, a in zip(gaps, losses, strict=True)]
    return {"steps": len(losses), "nats": max(gaps), "share": max(shares)}


def compare_figures(run: Path, other: Path) -> dict[str, Any]:
    """Statuses of the rewrites, figures of every arm and losses of its steps, of both runs."""
    summaries = [read_json(folder / "summary.json") for folder in (run, other)]
    arms = [arm_figures(summary) for summary in summaries]
    both = {}
    for arm in arms[0]:
        both[arm] = {"run": arms[0][arm], "other": arms[1].get(arm, {})}
    losses = {arm: loss_differences(run, other, arm) for arm in ("sft", "sdft")}
    counts = [summary["distilled"]["counts"] for summary in summaries]
    return {"counts": counts, "arms": both, "losses": losses}


# ---- the command


def compare(run: Path, other: Path, end_id: int, score: Scorer | None) -> dict[str, Comparison]:
    """Name of a kind of text -> its comparison."""
    found = {
        "rewrites": compare_rows(rewrites(run), rewrites(other), end_id, score),
        "seed, held-out": compare_rows(answers(run, "seed"), answers(other, "seed"), end_id, score),
        "seed, general": compare_rows(general_answers(run), general_answers(other), end_id, score),
    }
    for arm in ("sft", "sdft"):
        rows = compare_rows(answers(run, arm), answers(other, arm), end_id, None)
        found[f"{arm}, held-out"] = rows
    return found


def is_judged(name: str) -> bool:
    """Whether texts of this kind must be equal but for ties: the seed model's."""
    return not name.startswith(("sft", "sdft"))


def report(found: Mapping[str, Comparison], figures: Mapping[str, Any], tolerance: float) -> str:
    """The counts, the first differences and the figures, for people."""
    lines = [["texts", "rows", "equal", "ties", "other", "missing"]]
    shown = []
    for name, comparison in found.items():
        count = comparison.equal + len(comparison.differences)
        ties = sum(difference.is_tie(tolerance) for difference in comparison.differences)
        others = len(comparison.differences) - ties
        judged = [str(ties), str(others)] if is_judged(name) else ["-", "-"]
        missing = str(len(comparison.missing))
        lines.append([name, str(count), str(comparison.equal), *judged, missing])
        if is_judged(name):
            shown += [_difference_text(name, d, tolerance) for d in comparison.differences]
    arm_lines = [["arm", "run", *MEASURES]]
    for arm, values in figures["arms"].items():
        for which in ("run", "other"):
            cells = [values[which].get(name) for name in MEASURES]
            texts = ["-" if value is None else f"{value:.5g}" for value in cells]
            arm_lines.append([arm, which, *texts])
    text = [table(lines), *shown[:SHOWN], "", table(arm_lines)]
    for arm, gaps in figures["losses"].items():
        if gaps:
            text.append(
                f"{arm}: losses of {gaps['steps']} steps differ by at most {gaps['nats']:.3g} "
                f"nats, {gaps['share']:.2%}"
            )
    return "\n".join(text)


def _difference_text(name: str, difference: Difference, tolerance: float) -> str:
    logprobs = "not computed"
    if difference.logprobs is not None:
        first, second = difference.logprobs
        verdict = "a tie" if difference.is_tie(tolerance) else "NOT a tie"
        logprobs = f"{first:.5f} and {second:.5f}: {verdict}"
    row = difference.key[:60]
    return (
        f"{name}, {row}: token {difference.position} is {difference.tokens[0]} and "
        f"{difference.tokens[1]}, log-probabilities {logprobs}"
    )


def end_id_of(chat: Chat | None) -> int:
    """The end token; without a model a number that no token has."""
    return chat.end_id if chat is not None else 2**31 - 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--model", help="computes log-probabilities where texts differ")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ops", default="torch")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="nats between two tokens of a tie"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    session = None
    if args.model:
        config = ModelConfig(args.model, device=args.device, dtype=args.dtype, ops=args.ops)
        session = Session.open(config)
    end_id = end_id_of(session and session.chat)
    score = None if session is None else scorer(session)
    try:
        found = compare(args.run, args.other, end_id, score)
        figures = compare_figures(args.run, args.other)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(report(found, figures, args.tolerance))
    texts = {name: comparison.record(args.tolerance) for name, comparison in found.items()}
    good = all(texts[name]["good"] for name in texts if is_judged(name))
    document = {
        "run": str(args.run),
        "other": str(args.other),
        "tolerance": args.tolerance,
        "texts": texts,
        "good": good,
    }
    figure("compare_runs", document | figures)
    print(json.dumps(document | figures))
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
