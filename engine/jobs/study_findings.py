"""The findings of a study: target against retention per arm, differences with intervals, in words

Everything is paired: both arms answered the same held-out rows and were compared with the seed over
the same answers to the same general prompts. A difference is SDFT - SFT.

    interval     `crossed_bootstrap` (engine/measure/intervals.py): held-out rows, or general
                 prompts, are drawn again, the same for both arms and all seeds; with several
                 training seeds these too
    p            right or wrong on the same rows: McNemar's exact test for each training seed;
                 combined, the exact test that flips the signs of the rows' differences, each summed
                 over the seeds. It is a test over rows; the spread over seeds is in the interval

A difference is reported where its interval leaves out zero and, on the target, the combined p is
below 0.05 too; otherwise "no difference seen". Nothing corrects for looking at many settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluate.arms import ARM_NAMES
from engine.measure.intervals import crossed_bootstrap, lost_won, mcnemar, sign_flip_test, wilson
from engine.runtime.terminal import table
from model.durable import file_beside

SIGNIFICANT = 0.05  # a difference of verdicts is reported below this p
DRIFT_NAMES = ("kl", "reverse_kl", "agree")
Estimate = tuple[float, float, float]  # a mean and its 95 % interval


@dataclass
class MeasuredRun:
    """The measurements of one run, item by item."""

    ids: list[str]  # held-out rows
    right: list[bool] | None  # None where nothing is judged
    nll: list[float]  # nats of the references, summed over `tokens`
    tokens: list[int]
    drift: list[dict[str, Any]] = field(default_factory=list)  # lines of retention.jsonl
    training: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, list[bool]] = field(default_factory=dict)  # "task scorer" -> verdicts


@dataclass
class ArmResults:
    """A setting and arm with its runs, one for every training seed."""

    name: str  # of the setting; "" for the seed model
    arm: str  # seed | sft | sdft
    runs: list[MeasuredRun]

    @property
    def judged(self) -> bool:
        """Whether answers to the held-out rows were judged."""
        return self.runs[0].right is not None

    def on_task(self, task: str) -> ArmResults:
        """The same runs, with their verdicts on a further task in place of the held-out rows."""
        runs = [MeasuredRun([], run.tasks[task], [], []) for run in self.runs]
        return ArmResults(self.name, self.arm, runs)

    @property
    def seconds(self) -> float:
        """Seconds of training, the mean over the runs."""
        return sum(run.training["seconds"] for run in self.runs) / len(self.runs)

    def right(self) -> np.ndarray:
        """Verdicts as (seeds, rows) of 0 and 1."""
        return np.array([run.right for run in self.runs], dtype=np.int64)

    def sums(self, name: str) -> tuple[np.ndarray, list[int]]:
        """(seeds, items) and weights (items,): "nll" over held-out rows, drift over prompts."""
        if name == "nll":
            return np.array([run.nll for run in self.runs]), self.runs[0].tokens
        values = [[line[name] for line in run.drift] for run in self.runs]
        return np.array(values), [line["tokens"] for line in self.runs[0].drift]

    def estimate(self, name: str) -> Estimate:
        """A mean and its interval; `name` is right, nll, kl, reverse_kl or agree.

        The share of right answers has Wilson's interval, as if the seeds were one run: where all
        are wrong a bootstrap would have no spread.
        """
        if name == "right":
            right = self.right()
            share = float(right.mean())
            return share, *wilson(share, right.shape[1])
        if self.arm == "seed" and name == "agree":
            return 1.0, 1.0, 1.0  # drift is measured against the seed itself
        if self.arm == "seed" and name != "nll":
            return 0.0, 0.0, 0.0
        return crossed_bootstrap(*self.sums(name))

    def figures(self) -> dict[str, Any]:
        """Every figure of these runs, for study.json."""
        names = ["nll", *DRIFT_NAMES]
        if self.judged:
            names = ["right", *names]
        figures: dict[str, Any] = {"setting": self.name, "arm": self.arm, "runs": len(self.runs)}
        for name in names:
            mean, *interval = self.estimate(name)
            figures[name] = {"value": mean, "interval": tuple(interval)}
        figures["by_seed"] = [_figures_of_run(run) for run in self.runs]
        return figures


Pairs = Sequence[Sequence[ArmResults]]  # (SFT, SDFT) of every setting


def _figures_of_run(run: MeasuredRun) -> dict[str, Any]:
    figures: dict[str, Any] = {"nll": sum(run.nll) / sum(run.tokens), "training": run.training}
    if run.right is not None:
        figures["right"] = sum(run.right)
    if run.tasks:
        figures["tasks"] = {name: sum(right) for name, right in run.tasks.items()}
    if run.drift:
        tokens = sum(line["tokens"] for line in run.drift)
        for name in DRIFT_NAMES:
            figures[name] = sum(line[name] for line in run.drift) / tokens
    return figures


# ---- differences


def difference(sft: ArmResults, sdft: ArmResults) -> dict[str, Any]:
    """SDFT - SFT in every measurement, with intervals, tests and words."""
    found: dict[str, Any] = {"setting": sdft.name}
    for name in ("nll", *DRIFT_NAMES):
        (before, weights), (after, _) = sft.sums(name), sdft.sums(name)
        found[name] = crossed_bootstrap(after - before, weights)
    if sdft.judged:
        found |= verdict_difference(sft, sdft)
    found["words"] = in_words(found)
    return found


def verdict_difference(sft: ArmResults, sdft: ArmResults) -> dict[str, Any]:
    """SDFT - SFT in right answers: the mean with its interval, and the tests."""
    by_row = sdft.right() - sft.right()  # (seeds, rows) of -1, 0 and 1
    counts = [list(lost_won(*runs)) for runs in zip(sft.right(), sdft.right(), strict=True)]
    return {
        "right": crossed_bootstrap(by_row, [1.0] * by_row.shape[1]),
        "lost_won": counts,
        "p_by_seed": [mcnemar(*pair) for pair in counts],
        "p": sign_flip_test(by_row.sum(0).tolist()),
    }


def task_differences(seed: ArmResults, pairs: Pairs) -> tuple[list[dict[str, Any]], list[str]]:
    """Further tasks, a line per setting and scorer: figures, and the lines of the text."""
    found: list[dict[str, Any]] = []
    lines = [["setting", "task, scorer", "seed", "SFT", "SDFT", "SDFT - SFT"]]
    for sft, sdft in pairs:
        for name in seed.runs[0].tasks:
            arms = [arm.on_task(name) for arm in (seed, sft, sdft)]
            verdicts = verdict_difference(arms[1], arms[2])
            words = _verdict_words(verdicts, "higher", "lower")
            found.append({"setting": sdft.name, "task": name, "words": words} | verdicts)
            lines.append([sdft.name, name, *map(_share, arms), words])
    return found, ["", "elsewhere:", table(lines)] if found else []


def in_words(found: dict[str, Any]) -> str:
    """A difference as text; "no difference seen" where an interval holds 0."""
    parts = []
    if "right" in found:
        parts.append("target: " + _verdict_words(found, "SDFT better", "SFT better"))
    for name, label, better, worse in (
        ("nll", "held-out NLL", "SDFT fits better", "SFT fits better"),
        ("kl", "KL to seed", "SDFT forgot less", "SFT forgot less"),
    ):
        mean, low, high = found[name]
        words = "no difference seen"
        if high < 0:
            words = better
        elif low > 0:
            words = worse
        parts.append(f"{label}: {words} ({mean:+.4f}, {low:+.4f} to {high:+.4f})")
    return "; ".join(parts)


def _verdict_words(found: dict[str, Any], better: str, worse: str) -> str:
    """Whether the shares of right answers differ, by interval and test."""
    mean, low, high = found["right"]
    words = "no difference seen"
    if found["p"] < SIGNIFICANT and low > 0:
        words = better
    elif found["p"] < SIGNIFICANT and high < 0:
        words = worse
    interval = f"{100 * mean:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f}"
    return f"{words} ({interval}, p {_p_values(found)})"


def _p_values(found: dict[str, Any]) -> str:
    """The combined p, and those of the training seeds where there are several."""
    combined = f"{found['p']:.3f}"
    if len(found["p_by_seed"]) == 1:
        return combined
    by_seed = ", ".join(f"{p:.3f}" for p in found["p_by_seed"])
    return f"{combined} (by seed {by_seed})"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For every (goodness, drift): True where no other point beats it.

    A point beats another that is no better and drifted no less, unless the two are equal.
    """

    def beats(other: tuple[float, float], point: tuple[float, float]) -> bool:
        return other[0] >= point[0] and other[1] <= point[1] and other != point

    return [not any(beats(other, point) for other in points) for point in points]


def all_arms(seed: ArmResults, pairs: Pairs) -> list[ArmResults]:
    """The seed and all arms, each once: settings that differ in the mix share their SFT."""
    arms = [seed, *(arm for pair in pairs for arm in pair)]
    return list({(arm.arm, arm.name): arm for arm in arms}.values())


# ---- the text


def findings(seed: ArmResults, pairs: Pairs, verify: str) -> tuple[dict[str, Any], str]:
    """The findings as study.json holds them, and the closing table."""
    arms = all_arms(seed, pairs)
    if seed.judged:
        goodness = [arm.estimate("right")[0] for arm in arms]
    else:
        goodness = [-arm.estimate("nll")[0] for arm in arms]
    drift = [arm.estimate("kl")[0] for arm in arms]
    on_front = pareto_front(list(zip(goodness, drift, strict=True)))

    lines = [
        [
            "setting",
            "arm",
            f"target ({verify})",
            "95 % interval",
            "held-out NLL",
            "KL to seed",
            "95 % interval",
            "KL from seed",
            "same top-1",
            "examples",
            "steps",
            "tokens",
            "loss tokens",
            "front",
        ]
    ]
    for arm, is_best in zip(arms, on_front, strict=True):
        lines.append([arm.name or "-", ARM_NAMES[arm.arm], *_cells(arm), "*" if is_best else ""])
    differences = [difference(*pair) for pair in pairs]
    tasks, task_lines = task_differences(seed, pairs)
    text = [table(lines), "", "SDFT - SFT:"]
    text += [f"  {found['setting']}: {found['words']}" for found in differences]
    text += [*task_lines, "", *_notes(seed, pairs)]
    figures = [
        arm.figures() | {"front": is_best} for arm, is_best in zip(arms, on_front, strict=True)
    ]
    record = {"points": figures, "differences": differences, "elsewhere": tasks}
    return record, "\n".join(text)


def _cells(arm: ArmResults) -> list[str]:
    """An arm's line of the table, after its names and before its mark."""
    cells = ["-", "-"]
    if arm.judged:
        _, low, high = arm.estimate("right")
        cells = [_share(arm), f"{low:.1%} - {high:.1%}"]
    cells.append(f"{arm.estimate('nll')[0]:.3f}")
    kl, low, high = arm.estimate("kl")
    cells += [f"{kl:.4f}", "-" if arm.arm == "seed" else f"{low:.4f} - {high:.4f}"]
    cells += [f"{arm.estimate('reverse_kl')[0]:.4f}", f"{arm.estimate('agree')[0]:.1%}"]
    if arm.arm == "seed":
        return [*cells, "-", "-", "-", "-"]
    budget = arm.runs[0].training  # other training seeds differ in the draw of the mix at most
    return cells + [f"{budget[n]}" for n in ("examples", "steps", "tokens", "response_tokens")]


def _share(arm: ArmResults) -> str:
    """Share of right answers over all seeds, with the count of each seed."""
    right = arm.right()
    counts = "+".join(str(count) for count in right.sum(1))
    return f"{right.mean():.1%} ({counts}/{right.shape[1]})"


def _notes(seed: ArmResults, pairs: Pairs) -> list[str]:
    """How to read the table."""
    first = pairs[0][0]
    seeds, rows, prompts = len(first.runs), len(seed.runs[0].ids), len(first.runs[0].drift)
    several = seeds > 1
    drawn = (
        f"the {rows} held-out rows or the {prompts} general prompts drawn again, the same for "
        "both arms"
    )
    if several:
        drawn += f" and all seeds, and the {seeds} training seeds too"
    notes = [
        "KL in nats per token over the seed's own answers to general prompts: to seed is "
        "KL(seed || tuned), from seed KL(tuned || seed); lower is less forgotten. front: nothing "
        "is better at both.",
        f"Intervals of differences, NLL and KL: 95 %, 2000 bootstrap draws, {drawn}.",
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


# ---- the plot


def draw(seed: ArmResults, pairs: Pairs, file: Path) -> str:
    """Draw the Pareto plot as a PNG; returns the line to print about it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"{file} is not drawn: matplotlib is missing, pip install -e '.[report]'"
    colours = {"seed": "#555555", "sft": "#b4521e", "sdft": "#1f6f8b"}
    goal = "right" if seed.judged else "nll"
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for pair in pairs:  # a line from a setting's SFT to its SDFT
        x, y = ([arm.estimate(axis)[0] for arm in pair] for axis in ("kl", goal))
        axes.plot(x, y, color="#bbbbbb", linewidth=0.8, zorder=1)
    in_legend: set[str] = set()
    for arm in all_arms(seed, pairs):
        x, y = arm.estimate("kl"), arm.estimate(goal)
        axes.errorbar(
            x[0],
            y[0],
            xerr=_error_bar(x),
            yerr=_error_bar(y),
            color=colours[arm.arm],
            fmt="o",
            markersize=6,
            elinewidth=0.8,
            label=None if arm.arm in in_legend else ARM_NAMES[arm.arm],
            zorder=3,
        )
        in_legend.add(arm.arm)
        offset = (6, -11) if arm.arm == "sdft" else (6, 5)  # the two may lie on each other
        axes.annotate(arm.name, (x[0], y[0]), offset, textcoords="offset points", fontsize=7)
    axes.set_xlabel("KL(seed || tuned) on general prompts, nats per token: left is less forgotten")
    if seed.judged:
        axes.set_ylabel("share of held-out rows right: up is better")
    else:
        axes.set_ylabel("NLL of held-out references: down is better")
    axes.margins(x=0.12, y=0.08)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.legend(frameon=False)
    with file_beside(file) as beside:
        figure.savefig(beside, format="png", dpi=130, metadata={"Software": None})
    return f"target against retention: {file}"


def _error_bar(estimate: Estimate) -> list[list[float]]:
    """Lengths below and above the mean, as matplotlib takes them."""
    mean, low, high = estimate
    return [[max(0.0, mean - low)], [max(0.0, high - mean)]]
