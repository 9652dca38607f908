"""Read a run directory into a `Run`, which holds the content of the page. Needs no model.

Parts that a run lacks (no held-out rows, no scores, files of an older version) are left out of the
page; a damaged file raises ValueError naming file and line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.distilled import CONTEXT, KEPT, load_distilled
from engine.data.tool_calls import calls_as_text, tools_as_text
from engine.evaluate.arm_grammar import Arm, way_of
from engine.evaluate.arms import ARM_NAMES, TUNED
from engine.evaluate.target_task import Score
from engine.runtime.files import read_jsonl
from model.config import read_json
from model.messages import tools_of

# fields that the lines of a run must have to be shown, with their types
_NUMBER = (float, int)
METRICS = {"step": int, "loss": _NUMBER}
DRIFT = {"arm": str, "kl": _NUMBER, "agree": int, "tokens": int}
TOKENS = {"id": str, "sft": dict, "sdft": (dict, type(None))}
RETENTION = {"prompt": str, "category": str, "answer": str} | DRIFT
EVALUATION = dict.fromkeys(("id", "arm", "reference", "answer", "reason", "finish"), str)
EVALUATION |= {"ok": bool}
OTHER_INKS = 6  # colours for arms other than SFT and SDFT (--arm1 ... of page.css)


@dataclass
class Run:
    """One run of scripts/sdft.py. Likelihoods are in nats per token, end token included."""

    name: str  # the end of its path, different from those of the other runs of the page
    path: Path
    summary: dict[str, Any]
    data_sha256: str  # of the data file
    rows: list[dict[str, Any]]  # distilled lines with their likelihoods
    tokens: dict[str, dict[str, Any]]  # row id -> its line of tokens.jsonl
    answers: list[dict[str, Any]]  # held-out rows and general prompts, with the answers of all arms
    losses: dict[str, list[tuple[int, float]]]  # trained arm -> (step, loss in nats per token)
    # arm -> held-out row id -> its line of retention_task.jsonl, where the KL is finite
    task_drift: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting as `Class.field`."""
        settings = {}
        for group, fields in self.summary["settings"].items():
            for name, value in fields.items():
                settings[f"{group}.{name}"] = value
        return settings

    @property
    def arms(self) -> dict[str, str]:
        """The names of the seed and of all arms in the files -> those that people are shown."""
        return self.summary.get("arms", ARM_NAMES)

    @property
    def tuned(self) -> list[str]:
        """The arms with an adapter."""
        return [arm for arm in self.arms if arm != "seed"]

    @property
    def has_default_arms(self) -> bool:
        """Whether SFT and SDFT are compared and nothing else."""
        return tuple(self.tuned) == TUNED

    def training(self, arm: str) -> dict[str, Any]:
        """The summary of an arm's training, which other scales share; {} for the seed."""
        if arm == "seed":
            return {}
        return self.summary["training"].get(Arm.parse(arm).trained().name, {})

    def inks(self) -> dict[str, str]:
        """Arm -> the name of its colour; arms that differ in scale or rate alone share one."""
        ways = list(dict.fromkeys(way_of(arm) for arm in self.tuned))
        others = [way for way in ways if way not in TUNED]
        inks = {"seed": "seed"}
        for arm in self.tuned:
            way = way_of(arm)
            inks[arm] = way if way in TUNED else f"arm{others.index(way) % OTHER_INKS + 1}"
        return inks

    def drift(self, arm: str) -> list[dict[str, Any]]:
        """The general prompts on which that arm was compared with the seed and the KL is finite."""
        general = [item for item in self.answers if item["source"] == "general"]
        return [item for item in general if item["kl"].get(arm) is not None]

    def right(self, arm: str) -> dict[str, bool]:
        """Held-out row id -> whether the arm's answer is right; rows that it answered."""
        verdicts = {}
        for item in self.answers:
            if item["source"] == "held-out" and arm in item["answers"]:
                verdicts[item["id"]] = item["answers"][arm]["ok"]
        return verdicts

    @property
    def scores(self) -> dict[str, Score]:
        """Arm -> its score on the target task; {} where the target was not measured."""
        scores = {}
        for arm, figures in self.summary["evaluation"].items():
            scores[arm] = Score(
                n=figures["n"],
                right=figures["right"],
                truncated=figures["truncated"],
                nll=figures["nll"],
            )
        return scores


def load_run(path: Path, name: str) -> Run:
    """Read one run, to be shown under `name`.

    ValueError where `path` is no finished run of scripts/sdft.py, or one of its files is damaged.
    """
    if not (path / "summary.json").is_file():
        fault = "holds no summary.json" if path.is_dir() else "is no directory"
        raise ValueError(
            f"{path} {fault}; expected the --out of a finished scripts/sdft.py (the same command "
            "again finishes one that was stopped)"
        )
    meta = read_json(path / "distilled.jsonl.meta.json", {})
    losses = {}
    summary = read_json(path / "summary.json")
    for arm in summary["training"]:
        steps = read_jsonl(path / Arm.parse(arm).directory / "metrics.jsonl", METRICS)
        losses[arm] = [(line["step"], line["loss"]) for line in steps]
    tokens = {}
    for line in read_jsonl(path / "tokens.jsonl", TOKENS):
        tokens[line["id"]] = _tokens(line)
    return Run(
        name=name,
        path=path,
        summary=summary,
        data_sha256=meta.get("data", {}).get("sha256", "unknown"),
        rows=_rows(path),
        tokens=tokens,
        answers=_held_out(path) + _general(path),
        losses=losses,
        task_drift=_task_drift(path),
    )


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs; their names are the shortest ends of their paths that tell them apart.

    ValueError where there is none, one is named twice, and as from `load_run`.
    """
    places = [path.resolve() for path in paths]
    if not places:
        raise ValueError("no run: expected runs, each named once")
    twice = sorted({str(place) for place in places if places.count(place) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: expected runs, each named once")
    depth = 1  # parts of a path in a name
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    runs = []
    for path, place in zip(paths, places, strict=True):
        name = "/".join(place.parts[-depth:])
        runs.append(load_run(path, name))
    return runs


def _rows(path: Path) -> list[dict[str, Any]]:
    """The distilled lines that are targets, with their likelihoods."""
    file = path / "distilled.jsonl.scores.jsonl"
    scores = {line["id"]: line for line in read_jsonl(file, {"id": str})}
    rows = []
    for line in load_distilled(path / "distilled.jsonl"):
        if line.status == CONTEXT:  # a turn that is not trained on
            continue
        row = {
            "id": line.id,
            "messages": _shown(line.messages),
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


def _shown(messages: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Messages as the page shows them: a role and a text, calls of tools as text.

    The tools that may be called come first.
    """
    shown = [{"role": turn["role"], "content": calls_as_text(turn)} for turn in messages]
    tools = tools_of(messages)
    if tools:
        shown.insert(0, {"role": "tools", "content": tools_as_text(tools)})
    return shown


def _tokens(line: dict[str, Any]) -> dict[str, Any]:
    """The tokens of both arms, NLL that is not finite as None; SDFT's tokens are None where both
    arms train on the same text."""
    arms: dict[str, Any] = {}
    for arm in TUNED:
        tokens = line[arm]
        if tokens:
            tokens = tokens | {"nll": [finite(value) for value in tokens["nll"]]}
        arms[arm] = tokens
    return arms


def _general(path: Path) -> list[dict[str, Any]]:
    """The general prompts, all with the seed's answer, some with the tuned models' answers."""
    found: dict[str, dict[str, Any]] = {}  # by prompt
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
    found: dict[str, dict[str, Any]] = {}  # by id
    for line in read_jsonl(path / "evaluation.jsonl", EVALUATION):
        item = found.setdefault(line["id"], _item("held-out", line["id"], "held-out"))
        item["messages"] = _shown(line.get("messages", []))
        item["reference"] = line["reference"]
        item["answers"][line["arm"]] = {
            "text": line["answer"],
            "ok": line["ok"],
            "reason": line["reason"],
            "finish": line["finish"],
        }
    for line in read_jsonl(path / "answers.jsonl", {"arm": str}):
        if "id" in line and line["id"] in found:
            _add_drift(found[line["id"]], line)
    return list(found.values())


def _task_drift(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The lines of retention_task.jsonl by arm and row; {} for a run without it."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in read_jsonl(path / "retention_task.jsonl", DRIFT | {"id": str}):
        if math.isfinite(line["kl"]):
            found.setdefault(line["arm"], {})[line["id"]] = line
    return found


def _item(source: str, id: str, category: str) -> dict[str, Any]:
    """A prompt, at first without answers and drift."""
    return {
        "source": source,
        "id": id,
        "category": category,
        "answers": {},  # by arm
        "kl": {},  # by arm: KL(seed || tuned) over the seed's answer, nats per token
        "agree": {},  # by arm: share of positions with the same likeliest token
        "tokens": 0,  # of the seed's answer
    }


def _add_drift(item: dict[str, Any], line: dict[str, Any]) -> None:
    """Enter the drift of one arm; the line holds sums over the tokens."""
    item["kl"][line["arm"]] = finite(line["kl"] / line["tokens"])
    item["agree"][line["arm"]] = line["agree"] / line["tokens"]
    item["tokens"] = line["tokens"]


def finite(value: float | None) -> float | None:
    """The value; None for NaN and infinity, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None
