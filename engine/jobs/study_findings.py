"""The findings of a study: target against retention per arm, differences with intervals, in words

Everything is paired: all arms answered the same held-out rows and were compared with the seed over
the same answers to the same general prompts. Differences are taken under every setting, from the
first arm of --arms (SDFT - SFT); comparison.py compares all arms at equal target.

    interval     `crossed_bootstrap` (engine/measure/intervals.py): held-out rows, or general
                 prompts, are resampled, the same for both arms and all seeds; with several
                 training seeds the seeds are resampled too
    p            right or wrong on the same rows: McNemar's exact test for each training seed;
                 combined, the exact test that flips the signs of the rows' differences, each summed
                 over the seeds. It is a test over rows; the spread over seeds is in the interval

A difference is reported where its interval leaves out zero and, on the target, the combined p is
below 0.05 too; otherwise "no difference seen". Nothing corrects these for looking at many settings
and arms; the comparison at equal target is corrected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.evaluate.arm_grammar import way_of
from engine.jobs.comparison import SIGNIFICANT, compare, comparison_record, comparison_text
from engine.jobs.costs import Cost
from engine.jobs.measured import DRIFT_NAMES, ArmResults, Estimate, all_points
from engine.measure.intervals import crossed_bootstrap, lost_won, mcnemar, sign_flip_test
from engine.runtime.terminal import table

NOT_SEEN = "no difference seen"

Groups = Sequence[Sequence[ArmResults]]  # the points of every setting, the reference first


# ---- differences


def difference(reference: ArmResults, arm: ArmResults) -> dict[str, Any]:
    """arm - reference in every measurement, with intervals, tests and words."""
    found: dict[str, Any] = {
        "setting": arm.name,
        "arm": arm.arm,
        "reference": reference.arm,
        "reference_setting": reference.name,
    }
    for name in ("nll", *DRIFT_NAMES):
        of_reference = reference.sums(name)
        of_arm = arm.sums(name)
        by_item = of_arm.values - of_reference.values  # (seeds, items)
        found[name] = Estimate(*crossed_bootstrap(by_item, of_reference.weights))
    if reference.has_task_drift and arm.has_task_drift:
        of_reference = reference.sums("task_kl")
        by_item = arm.sums("task_kl").values - of_reference.values
        found["task_kl"] = Estimate(*crossed_bootstrap(by_item, of_reference.weights))
    if arm.judged:
        found |= verdict_difference(reference, arm)
    found["words"] = in_words(found, arm.title, reference.title)
    return found


def verdict_difference(reference: ArmResults, arm: ArmResults) -> dict[str, Any]:
    """arm - reference in right answers: the mean with its interval, and the tests."""
    by_row = arm.right() - reference.right()  # (seeds, rows) of -1, 0 and 1
    equal_weights = [1.0] * by_row.shape[1]
    counts = []  # for every training seed: rows that only the reference, and that only the arm got
    for of_reference, of_arm in zip(reference.right(), arm.right(), strict=True):
        lost, won = lost_won(of_reference, of_arm)
        counts.append([lost, won])
    return {
        "right": Estimate(*crossed_bootstrap(by_row, equal_weights)),
        "lost_won": counts,
        "p_by_seed": [mcnemar(lost, won) for lost, won in counts],
        "p": sign_flip_test(by_row.sum(0).tolist()),
    }


def in_words(found: dict[str, Any], arm: str, reference: str) -> str:
    """A difference as text; NOT_SEEN where an interval holds 0. arm, reference: their titles."""
    parts = []
    if "right" in found:
        words = _verdict_words(found, f"{arm} better", f"{reference} better")
        parts.append(f"target: {words}")
    words = _mean_words(found["nll"], f"{arm} fits better", f"{reference} fits better")
    parts.append(f"held-out NLL: {words}")
    words = _mean_words(found["kl"], f"{arm} forgot less", f"{reference} forgot less")
    parts.append(f"KL to seed: {words}")
    if "task_kl" in found:
        words = _mean_words(found["task_kl"], f"{arm} moved less", f"{reference} moved less")
        parts.append(f"KL to seed on the task: {words}")
    return "; ".join(parts)


def _mean_words(estimate: Estimate, if_less: str, if_more: str) -> str:
    """The words for a difference of NLL or KL: lower is better."""
    mean, low, high = estimate
    words = NOT_SEEN
    if high < 0:
        words = if_less
    elif low > 0:
        words = if_more
    return f"{words} ({mean:+.4f}, {low:+.4f} to {high:+.4f})"


def _verdict_words(found: dict[str, Any], if_more: str, if_less: str) -> str:
    """The words for a difference of the shares of right answers, by interval and test."""
    mean, low, high = found["right"]
    words = NOT_SEEN
    if found["p"] < SIGNIFICANT and low > 0:
        words = if_more
    elif found["p"] < SIGNIFICANT and high < 0:
        words = if_less
    interval = f"{100 * mean:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f}"
    return f"{words} ({interval}, p {_p_values(found)})"


def _p_values(found: dict[str, Any]) -> str:
    """The combined p, and those of the training seeds where there are several."""
    combined = f"{found['p']:.3f}"
    if len(found["p_by_seed"]) == 1:
        return combined
    by_seed = ", ".join(f"{p:.3f}" for p in found["p_by_seed"])
    return f"{combined} (by seed {by_seed})"


# ---- the Pareto front


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For every point (goodness, drift): whether no other point beats it."""
    front = []
    for point in points:
        beaten = any(_beats(other, point) for other in points)
        front.append(not beaten)
    return front


def _beats(other: tuple[float, float], point: tuple[float, float]) -> bool:
    """Whether `other` is at least as good and drifted no more, and the two are not equal."""
    goodness, drift = point
    other_goodness, other_drift = other
    return other_goodness >= goodness and other_drift <= drift and other != point


def _front_of(arms: Sequence[ArmResults]) -> list[bool]:
    """For every arm: whether it is on the Pareto front of target against KL to the seed."""
    points = []
    for arm in arms:
        goodness = arm.estimate("right").mean if arm.judged else -arm.estimate("nll").mean
        points.append((goodness, arm.estimate("kl").mean))
    return pareto_front(points)


# ---- the text


def findings(
    seed: ArmResults, groups: Groups, verify: str, costs: Mapping[str, Cost]
) -> tuple[dict[str, Any], str]:
    """The findings as study.json holds them, and the closing table.

    costs: of every way (`way_of` an arm), by its name
    """
    points = all_points(seed, groups)
    on_front = _front_of(points)
    header = [
        "setting",
        "arm",
        f"target ({verify})",
        "95 % interval",
        "held-out NLL",
        "KL to seed",
        "95 % interval",
        "KL from seed",
        "same top-1",
        "KL, task",
        "update norm",
        "examples",
        "steps",
        "tokens",
        "loss tokens",
        "front",
    ]
    lines = [header]
    figures = []
    for point, is_best in zip(points, on_front, strict=True):
        mark = "*" if is_best else ""
        lines.append([point.name or "-", point.title, *_cells(point), mark])
        figures.append(point.figures() | {"front": is_best})

    differences = [difference(reference, arm) for reference, arm in listed_pairs(groups)]
    tasks, task_lines = task_differences(seed, groups)
    goals = compare(seed, points[1:])
    text = [table(lines), "", *difference_lines(differences, groups)]
    text += task_lines
    text += comparison_text(goals, costs, with_seconds=False)
    text += ["", *_notes(seed, groups)]
    record = {"points": figures, "differences": differences, "elsewhere": tasks}
    record["costs"] = {way: cost.record() for way, cost in costs.items()}
    record["equal_target"] = comparison_record(goals, costs)
    return record, "\n".join(text)


def listed_pairs(groups: Groups) -> list[tuple[ArmResults, ArmResults]]:
    """(reference, arm) of every setting: the first of its arms, and each other that --arms names.

    A pair whose two runs several settings share is there once.
    """
    pairs: dict[tuple[str, str, str, str], tuple[ArmResults, ArmResults]] = {}
    for group in groups:
        listed = [point for point in group if point.listed]
        reference = listed[0]
        for arm in listed[1:]:
            key = (reference.name, reference.arm, arm.name, arm.arm)
            pairs[key] = (reference, arm)
    return list(pairs.values())


def difference_lines(differences: Sequence[dict[str, Any]], groups: Groups) -> list[str]:
    """The differences as text, under a heading for each pair of arms."""
    titles = {point.arm: point.title for group in groups for point in group}
    lines: list[str] = []
    by_pair: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for found in differences:
        by_pair.setdefault((found["arm"], found["reference"]), []).append(found)
    for (arm, reference), of_pair in by_pair.items():
        lines.append(f"{titles[arm]} - {titles[reference]}:")
        lines += [f"  {_setting_of(found)}: {found['words']}" for found in of_pair]
    return lines


def _setting_of(found: dict[str, Any]) -> str:
    """The setting of a difference; with the reference's where that differs in more than the mix."""
    setting, other = found["setting"], found["reference_setting"]
    without_mix, _, _ = setting.partition("-mix")
    return setting if other in (setting, without_mix) else f"{setting} against {other}"


def _cells(arm: ArmResults) -> list[str]:
    """An arm's line of the table, after its names and before its mark."""
    target = ["-", "-"]
    if arm.judged:
        right = arm.estimate("right")
        target = [_share(arm), f"{right.low:.1%} - {right.high:.1%}"]

    kl = arm.estimate("kl")
    kl_interval = f"{kl.low:.4f} - {kl.high:.4f}"
    budget = ["-", "-", "-", "-"]
    if arm.arm == "seed":
        kl_interval = "-"
    else:
        training = arm.runs[0].training  # other seeds differ in the draw of the mix at most
        names = ("examples", "steps", "tokens", "response_tokens")
        budget = [f"{training[name]}" for name in names]
    return [
        *target,
        f"{arm.estimate('nll').mean:.3f}",
        f"{kl.mean:.4f}",
        kl_interval,
        f"{arm.estimate('reverse_kl').mean:.4f}",
        f"{arm.estimate('agree').mean:.1%}",
        f"{arm.estimate('task_kl').mean:.4f}" if arm.has_task_drift else "-",
        f"{arm.norm:.3f}",
        *budget,
    ]


def _share(arm: ArmResults) -> str:
    """Share of right answers over all seeds, with the count of each seed."""
    right = arm.right()  # (seeds, rows)
    counts = "+".join(str(count) for count in right.sum(1))
    return f"{right.mean():.1%} ({counts}/{right.shape[1]})"


def task_differences(seed: ArmResults, groups: Groups) -> tuple[list[dict[str, Any]], list[str]]:
    """The --task tasks, by setting and scorer: figures for study.json, and lines of the text."""
    found: list[dict[str, Any]] = []
    lines: list[str] = []
    by_pair: dict[tuple[str, str], list[list[str]]] = {}
    for reference, arm in listed_pairs(groups):
        titles = (reference.title, arm.title)
        for name in seed.runs[0].tasks:
            of_seed = seed.on_task(name)
            of_reference, of_arm = reference.on_task(name), arm.on_task(name)
            verdicts = verdict_difference(of_reference, of_arm)
            words = _verdict_words(verdicts, "higher", "lower")
            names = {"setting": arm.name, "arm": arm.arm, "reference": reference.arm}
            found.append(names | {"task": name, "words": words} | verdicts)
            shares = [_share(of_seed), _share(of_reference), _share(of_arm)]
            by_pair.setdefault(titles, []).append([arm.name, name, *shares, words])
    for (reference_title, arm_title), rows in by_pair.items():
        difference_title = f"{arm_title} - {reference_title}"
        names = ["seed", reference_title, arm_title, difference_title]
        lines += ["", "elsewhere:", table([["setting", "task, scorer", *names], *rows])]
    return found, lines


def _notes(seed: ArmResults, groups: Groups) -> list[str]:
    """How to read the table."""
    first = groups[0][0]
    seeds = len(first.runs)
    several = seeds > 1
    rows = len(seed.runs[0].ids)
    prompts = len(first.runs[0].drift)
    ways = {way_of(point.arm) for group in groups for point in group}
    arms = "both arms" if len(ways) == 2 else "all arms"
    resampled = (
        f"the {rows} held-out rows or the {prompts} general prompts drawn again, the same for "
        f"{arms}"
    )
    if several:
        resampled += f" and all seeds, and the {seeds} training seeds too"
    notes = [
        "KL in nats per token over the seed's own answers to general prompts: to seed is "
        "KL(seed || tuned), from seed KL(tuned || seed); lower is less forgotten. KL, task: the "
        "same over its answers to the held-out prompts. update norm: Frobenius norm of all updates "
        "s B A together. front: no other line is better at both target and KL to seed.",
        f"Intervals of differences, NLL and KL: 95 %, 2000 bootstrap draws, {resampled}.",
    ]
    if seed.judged:
        as_one = ", as if all seeds were one run" if several else ""
        notes.append(f"The interval of a share is Wilson's over rows{as_one}.")
        test = "p: McNemar's exact test on the same rows"
        if several:
            test += (
                " for every seed; combined: exact, signs of the rows' differences summed over seeds"
            )
        notes.append(
            f"{test}. A difference is called one where p < 0.05 and the interval leaves out 0."
        )
    if several:
        notes.append(f"With {seeds} seeds the seeds' part of an interval is rather too small.")
    else:
        notes.append("One training seed: how much another would change is not in any interval.")
    return notes
