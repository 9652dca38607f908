"""Figures of the answers to a task: shares with intervals, differences from the seed, the table.

With one answer per item a share has Wilson's interval, and two arms are compared by McNemar's exact
test. With several answers per item the interval is a bootstrap over items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from engine.evaluate.tasks.base import Item
from engine.measure.intervals import bootstrap, lost_won, mcnemar, smallest_difference, wilson
from engine.runtime.terminal import table

Lines = Mapping[tuple[str, str, int], dict[str, Any]]  # (arm, item, sample) -> line of the file
ArmScores = dict[str, Any]  # the return value of `arm_scores`
Scores = dict[str, dict[str, ArmScores]]  # by task and arm


def arm_scores(
    scorers: Sequence[str],
    items: Sequence[Item],
    samples: int,
    lines: Lines,
    arm: str,
    with_seed: bool,
) -> ArmScores:
    """An arm's shares with their intervals, and its difference from the seed on the same items.

    n, samples    items, and answers per item
    cut           answers that hit the token limit or had no room
    tokens        of all answers
    scores        by scorer: right (of n x samples), share, interval (95 %). Where the seed answered
                  too (`with_seed`) also only_seed, only_arm and p (one sample), or the 95 %
                  interval of the difference (several samples)
    """
    answers = [lines[arm, item.id, k] for item in items for k in range(samples)]
    cut = [line for line in answers if line["finish"] in ("length", "prompt_too_long")]
    result: ArmScores = {
        "n": len(items),
        "samples": samples,
        "cut": len(cut),
        "tokens": sum(line["tokens"] for line in answers),
        "scores": {},
    }
    for scorer in scorers:
        right = _right(scorer, items, samples, lines, arm)
        share = sum(right) / len(answers)
        if samples == 1:
            interval = wilson(share, len(items))
        else:
            interval = bootstrap(right, [samples] * len(items))
        score: dict[str, Any] = {"right": sum(right), "share": share, "interval": interval}
        if with_seed and arm != "seed":
            seed_right = _right(scorer, items, samples, lines, "seed")
            score |= _against_seed(seed_right, right, samples)
        result["scores"][scorer] = score
    return result


def _right(scorer: str, items: Sequence[Item], samples: int, lines: Lines, arm: str) -> list[int]:
    """The number of right answers to each item, 0 to `samples`."""
    counts = []
    for item in items:
        verdicts = [lines[arm, item.id, k]["scores"][scorer] for k in range(samples)]
        counts.append(sum(verdicts))
    return counts


def _against_seed(seed: Sequence[int], right: Sequence[int], samples: int) -> dict[str, Any]:
    """The comparison of an arm with the seed on the same items, from right answers per item."""
    if samples == 1:
        lost, won = lost_won(seed, right)
        return {"only_seed": lost, "only_arm": won, "p": mcnemar(lost, won)}
    differences = [of_arm - of_seed for of_arm, of_seed in zip(right, seed, strict=True)]
    return {"difference": bootstrap(differences, [samples] * len(right))}


def scores_table(scores: Scores, scorers: Mapping[str, Sequence[str]]) -> str:
    """The table, a line per task and scorer, a column per arm; "" where there is no task.

    scorers    the names of the scorers of each task
    """
    if not scores:
        return ""
    any_task = list(scores)[0]
    arms = list(scores[any_task])
    lines = [["task", "scorer", *arms]]
    cut = []
    not_scored = []
    for task, by_arm in scores.items():
        for scorer in scorers[task]:
            cells = [_cell(by_arm[arm], scorer) for arm in arms]
            lines.append([task, scorer, *cells])
        for arm, figures in by_arm.items():
            if figures["cut"]:
                cut.append(f"{task} {arm} {figures['cut']}")
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


def power_note(task: str, by_arm: Mapping[str, ArmScores]) -> str:
    """What the number of items can show, given how often the arms differ from the seed.

    "" where no arm was compared with the seed by McNemar's test.
    """
    parts = []
    for arm, figures in by_arm.items():
        for score in figures["scores"].values():
            if "p" not in score:
                continue
            differ = score["only_seed"] + score["only_arm"]
            smallest = smallest_difference(figures["n"], differ / figures["n"])
            words = "none" if math.isnan(smallest) else f"{100 * smallest:.1f} points"
            parts.append(f"{arm} differs on {differ} of {figures['n']} items: {words}")
    if not parts:
        return ""
    subject = f"{task}, the difference from the seed that is seen four times of five"
    return f"\n{subject}: {'; '.join(parts)}"


def _cell(figures: ArmScores, scorer: str) -> str:
    """right/all = share (interval), and the comparison with the seed."""
    score = figures["scores"][scorer]
    answers = figures["n"] * figures["samples"]
    low, high = score["interval"]
    cell = f"{score['right']}/{answers} = {score['share']:.1%}"
    cell += f" ({100 * low:.1f}-{100 * high:.1f})"
    if "p" in score:
        cell += f", p {score['p']:.3f}"
    if "difference" in score:
        low, high = score["difference"]
        cell += f", d {100 * low:+.1f} to {100 * high:+.1f}"
    return cell
