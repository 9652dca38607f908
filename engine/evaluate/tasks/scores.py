"""What the answers to a task show: shares with intervals, differences from the seed, the table.

With one answer per item a share has Wilson's interval and two arms are compared by McNemar's exact
test; with several, the items are drawn again (bootstrap).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.evaluate.tasks.base import Item
from engine.measure.intervals import bootstrap, lost_won, mcnemar, wilson
from engine.runtime.terminal import table

Lines = Mapping[tuple[str, str, int], dict[str, Any]]  # (arm, item, sample) -> line of the file
Scores = dict[str, dict[str, dict[str, Any]]]  # task -> arm -> what `arm_scores` returns


def arm_scores(
    scorers: Sequence[str],
    items: Sequence[Item],
    samples: int,
    lines: Lines,
    arm: str,
    with_seed: bool,
) -> dict[str, Any]:
    """An arm's shares with their intervals, and its difference from the seed on the same items.

    `cut` is the number of answers that hit the token limit or had no room. Per scorer: right (of n
    x samples), share, interval (95 %), and where the seed was asked too (`with_seed`) either
    only_seed, only_arm and p (one sample) or difference, its interval over items (several).
    """
    answers = [lines[arm, item.id, k] for item in items for k in range(samples)]
    result: dict[str, Any] = {
        "n": len(items),
        "samples": samples,
        "cut": sum(line["finish"] in ("length", "prompt_too_long") for line in answers),
        "tokens": sum(line["tokens"] for line in answers),
        "scores": {},
    }
    for scorer in scorers:
        right = _right(scorer, items, samples, lines, arm)
        score: dict[str, Any] = {"right": sum(right), "share": sum(right) / len(answers)}
        if samples == 1:
            score["interval"] = wilson(score["share"], len(items))
        else:
            score["interval"] = bootstrap(right, [samples] * len(items))
        if with_seed and arm != "seed":
            score |= _against_seed(_right(scorer, items, samples, lines, "seed"), right, samples)
        result["scores"][scorer] = score
    return result


def _right(scorer: str, items: Sequence[Item], samples: int, lines: Lines, arm: str) -> list[int]:
    """Right answers of each item."""
    return [sum(lines[arm, item.id, k]["scores"][scorer] for k in range(samples)) for item in items]


def _against_seed(seed: Sequence[int], right: Sequence[int], samples: int) -> dict[str, Any]:
    """The comparison of an arm with the seed on the same items."""
    if samples == 1:
        lost, won = lost_won(seed, right)
        return {"only_seed": lost, "only_arm": won, "p": mcnemar(lost, won)}
    differences = [a - b for a, b in zip(right, seed, strict=True)]
    return {"difference": bootstrap(differences, [samples] * len(right))}


def scores_table(scores: Scores, scorers: Mapping[str, Sequence[str]]) -> str:
    """The table, a line per task and scorer, a column per arm; "" where there is no task.

    scorers    the names of the scorers of each task
    """
    if not scores:
        return ""
    arms = list(next(iter(scores.values())))
    lines = [["task", "scorer", *arms]]
    cut, not_scored = [], []
    for task, by_arm in scores.items():
        for scorer in scorers[task]:
            lines.append([task, scorer, *(_cell(by_arm[arm], scorer) for arm in arms)])
        cut += [f"{task} {arm} {score['cut']}" for arm, score in by_arm.items() if score["cut"]]
        if not scorers[task]:
            not_scored.append(task)
    is_scored = len(lines) > 1
    parts = []
    if is_scored:
        parts.append(table(lines))
    if cut:
        parts.append("cut short by the token limit: " + ", ".join(cut))
    if not_scored:
        parts.append(f"answered, not scored here: {', '.join(not_scored)}")
    if is_scored:
        parts.append("95 % intervals; p and d compare with the seed on the same items")
    return "\n\n" + "\n".join(parts)


def _cell(arm: dict[str, Any], scorer: str) -> str:
    """right/all = share (interval), and the comparison with the seed."""
    score = arm["scores"][scorer]
    low, high = score["interval"]
    cell = f"{score['right']}/{arm['n'] * arm['samples']} = {score['share']:.1%}"
    cell += f" ({100 * low:.1f}-{100 * high:.1f})"
    if "p" in score:
        cell += f", p {score['p']:.3f}"
    if "difference" in score:
        low, high = score["difference"]
        cell += f", d {100 * low:+.1f} to {100 * high:+.1f}"
    return cell
