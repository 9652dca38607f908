"""Findings of a run with other arms than SFT and SDFT: which are compared, drift, equal target.

The comparison at equal target, with its words and tables, was made by the job and stands in
summary.json (engine/jobs/comparison.py); here it is only shown.
"""

from __future__ import annotations

from typing import Any

from engine.measure.intervals import bootstrap
from engine.report.load import Run

Table = list[list[str]]  # the first row is the header


def compared_pairs(run: Run) -> list[tuple[str, str]]:
    """The pairs of arms that are tested on the target task.

    The seed against every arm, and the first arm against every other.
    """
    first, *others = run.tuned
    pairs = [("seed", arm) for arm in run.tuned]
    return pairs + [(first, other) for other in others]


def retention_words(run: Run) -> str:
    """KL of every arm to the seed, and the differences from the first arm over general prompts."""
    first, *others = run.tuned
    shown = []
    for arm in run.tuned:
        kl = run.summary["retention"][arm]["kl"]
        shown.append(f"{run.arms[arm]} {kl:.4f}")
    prompts = len(run.drift(first))
    sentences = [
        f"KL to the seed on {prompts} general prompts, nats per token: {', '.join(shown)}."
    ]
    unseen = []
    for arm in others:
        low, high = _difference(run, first, arm)
        ends = f"{low:+.4f} to {high:+.4f}".replace("-", "−")
        interval = f"({run.arms[first]} − {run.arms[arm]}: {ends})"
        if low > 0:
            less, more = arm, first
        elif high < 0:
            less, more = first, arm
        else:
            unseen.append(run.arms[arm])
            continue
        sentences.append(f"{run.arms[less]} forgot less than {run.arms[more]} {interval}.")
    if unseen:
        sentences.append(
            f"No difference is seen between {run.arms[first]} and {', '.join(unseen)}."
        )
    sentences.append("(95 % over prompts, not corrected for the number of arms.)")
    return " ".join(sentences)


def _difference(run: Run, first: str, arm: str) -> tuple[float, float]:
    """95 % interval of KL(first) - KL(arm) per token, over the general prompts of both."""
    items = [item for item in run.drift(first) if item["kl"].get(arm) is not None]
    tokens = [item["tokens"] for item in items]
    differences = []
    for item in items:
        differences.append((item["kl"][first] - item["kl"][arm]) * item["tokens"])
    return bootstrap(differences, tokens)


def equal_target_words(run: Run) -> list[tuple[str, str]]:
    """(subject, finding) of the comparison at equal target, under each measure of goodness."""
    return [(_title(goal), " ".join(goal["words"])) for goal in _goals(run)]


def equal_target_tables(run: Run) -> list[tuple[str, Table]]:
    """(caption, table) of the comparison at equal target, then of what each arm costs."""
    tables = [(_title(goal), goal["table"]) for goal in _goals(run)]
    costs = run.summary.get("cost_table")
    if costs and not run.has_default_arms:
        tables.append(("What each arm costs alone", costs))
    return tables


def _goals(run: Run) -> list[dict[str, Any]]:
    """The comparisons at equal target; [] for a run of SFT and SDFT alone, or without them."""
    if run.has_default_arms:
        return []
    return list(run.summary.get("equal_target", {}).values())


def _title(goal: dict[str, Any]) -> str:
    """The title of a comparison, as the page begins a phrase."""
    title = goal["title"].removesuffix(":")
    return title[:1].upper() + title[1:]
