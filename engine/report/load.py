"""Reads a run directory into a `Run`, which holds the content of the page. Needs no model.

Parts that a run lacks (no held-out rows, no scores, files of an older version) are left out of the
page; a damaged file raises ValueError naming file and line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.distilled import CONTEXT, KEPT, load_distilled
from engine.evaluate.arms import TUNED
from engine.runtime.files import read_jsonl
from model.config import read_json

# fields that the lines of a run must have to be shown
_NUMBER = (float, int)
METRICS = {"step": int, "loss": _NUMBER}
DRIFT = {"arm": str, "kl": _NUMBER, "agree": int, "tokens": int}
TOKENS = {"id": str, "sft": dict, "sdft": (dict, type(None))}
RETENTION = {"prompt": str, "category": str, "answer": str} | DRIFT
EVALUATION = dict.fromkeys(("id", "arm", "reference", "answer", "reason", "finish"), str)
EVALUATION |= {"ok": bool}


@dataclass
class Run:
    """One run of scripts/sdft.py. Likelihoods are nats per token, end token included."""

    name: str  # the end of its path, different from those of the other runs of the page
    path: Path
    summary: dict[str, Any]
    data_sha256: str  # of the data file
    rows: list[dict[str, Any]]  # distilled lines with their likelihoods
    tokens: dict[str, dict[str, Any]]  # row id -> tokens.jsonl
    answers: list[dict[str, Any]]  # prompts with the answers of all arms
    losses: dict[str, list[tuple[int, float]]]  # arm -> (step, loss)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting as `Class.field`."""
        groups = self.summary["settings"].items()
        return {f"{group}.{name}": v for group, fields in groups for name, v in fields.items()}

    def drift(self, arm: str) -> list[dict[str, Any]]:
        """The general prompts on which that arm was compared with the seed, the KL finite."""
        general = [a for a in self.answers if a["source"] == "general"]
        return [a for a in general if a["kl"].get(arm) is not None]

    def right(self, arm: str) -> dict[str, bool]:
        """Held-out row id -> verdict."""
        held_out = [a for a in self.answers if a["source"] == "held-out" and arm in a["answers"]]
        return {a["id"]: a["answers"][arm]["ok"] for a in held_out}


def load_run(path: Path, name: str) -> Run:
    """Read one run; ValueError where `path` is not a finished run of scripts/sdft.py."""
    if not (path / "summary.json").is_file():
        fault = "holds no summary.json" if path.is_dir() else "is no directory"
        raise ValueError(
            f"{path} {fault}; expected the --out of a finished scripts/sdft.py (the same command "
            "again finishes one that was stopped)"
        )
    meta = read_json(path / "distilled.jsonl.meta.json", {})
    losses = {arm: read_jsonl(path / arm / "metrics.jsonl", METRICS) for arm in TUNED}
    return Run(
        name=name,
        path=path,
        summary=read_json(path / "summary.json"),
        data_sha256=meta.get("data", {}).get("sha256", "unknown"),
        rows=_rows(path),
        tokens={line["id"]: _tokens(line) for line in read_jsonl(path / "tokens.jsonl", TOKENS)},
        answers=_held_out(path) + _general(path),
        losses={arm: [(m["step"], m["loss"]) for m in lines] for arm, lines in losses.items()},
    )


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs under the shortest ends of their paths that tell them apart."""
    places = [path.resolve() for path in paths]
    twice = sorted({str(place) for place in places if places.count(place) > 1})
    if twice or not places:
        raise ValueError(f"{', '.join(twice) or 'no run'}: expected runs, each named once")
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    names = ["/".join(place.parts[-depth:]) for place in places]
    return [load_run(path, name) for path, name in zip(paths, names, strict=True)]


def _rows(path: Path) -> list[dict[str, Any]]:
    """The distilled lines that are targets, with their likelihoods."""
    file = path / "distilled.jsonl.scores.jsonl"
    scores = {line["id"]: line for line in read_jsonl(file, {"id": str})}
    rows = []
    for line in load_distilled(path / "distilled.jsonl"):
        if line.status == CONTEXT:  # not trained on
            continue
        row = {
            "id": line.id,
            "messages": line.messages,
            "reference": line.reference,
            "response": line.response,
            "status": line.status,
            "kept": line.status in KEPT,
            "stage": line.stage,
            "finish": line.finish,
            "tries": line.tries,
        }
        score = scores.get(line.id, {})
        for text in ("reference", "response"):
            row[f"{text}_nll"] = finite(score.get(f"{text}_nll"))
            row[f"{text}_tokens"] = score.get(f"{text}_tokens")
        rows.append(row)
    return rows


def _tokens(line: dict[str, Any]) -> dict[str, Any]:
    """The tokens of both arms; SDFT's are None where both train on the same text."""
    arms: dict[str, Any] = {}
    for arm in TUNED:
        tokens = line[arm]
        if tokens:
            tokens = tokens | {"nll": [finite(value) for value in tokens["nll"]]}
        arms[arm] = tokens
    return arms


def _general(path: Path) -> list[dict[str, Any]]:
    """The general prompts, all with the seed's answer, some with the tuned models'."""
    found: dict[str, dict[str, Any]] = {}
    for line in read_jsonl(path / "retention.jsonl", RETENTION):
        prompt = line["prompt"]
        item = found.setdefault(prompt, _item("general", prompt, line["category"]))
        item["messages"] = [{"role": "user", "content": prompt}]
        item["answers"].setdefault("seed", {"text": line["answer"]})
        _add_drift(item, line)
    for line in read_jsonl(path / "answers.jsonl", {"arm": str}):
        if "prompt" in line and line["prompt"] in found:
            answer = {"text": line["answer"], "finish": line["finish"]}
            found[line["prompt"]]["answers"][line["arm"]] = answer
    return list(found.values())


def _held_out(path: Path) -> list[dict[str, Any]]:
    """The held-out rows with the judged answers of all arms."""
    found: dict[str, dict[str, Any]] = {}
    for line in read_jsonl(path / "evaluation.jsonl", EVALUATION):
        item = found.setdefault(line["id"], _item("held-out", line["id"], "held-out"))
        item["messages"] = line.get("messages", [])
        item["reference"] = line["reference"]
        answer = {"text": line["answer"], "ok": line["ok"], "reason": line["reason"]}
        item["answers"][line["arm"]] = answer | {"finish": line["finish"]}
    for line in read_jsonl(path / "answers.jsonl", {"arm": str}):
        if "id" in line and line["id"] in found:
            _add_drift(found[line["id"]], line)
    return list(found.values())


def _item(source: str, id: str, category: str) -> dict[str, Any]:
    """A prompt without its answers."""
    empty: dict[str, Any] = {"answers": {}, "kl": {}, "agree": {}, "tokens": 0}
    return {"source": source, "id": id, "category": category} | empty


def _add_drift(item: dict[str, Any], line: dict[str, Any]) -> None:
    item["kl"][line["arm"]] = finite(line["kl"] / line["tokens"])
    item["agree"][line["arm"]] = line["agree"] / line["tokens"]
    item["tokens"] = line["tokens"]


def finite(value: float | None) -> float | None:
    """The value; None for NaN and infinity, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None
