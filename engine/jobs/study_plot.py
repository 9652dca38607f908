"""The plot of a study: target against retention, a point an arm, with error bars.

Every way (method and loss) has a colour and a marker. The scales of a training are joined by a line
that begins at the seed, its scale 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.evaluate.arm_grammar import STEP, title_of, way_of
from engine.jobs.measured import ArmResults, Estimate, all_points
from engine.jobs.study_findings import Groups
from model.durable import file_beside

SEED_COLOUR = "#555555"
# of the ways in the order of --arms; the first two are those of SFT and SDFT in the report
COLOURS = (
    "#b4521e", "#1f6f8b", "#5b8c2a", "#8a4fa3", "#c2952b", "#3f4fa0", "#b03060", "#2f8f7f",
)  # fmt: skip
MARKERS = "os^Dv<>P"


def draw(seed: ArmResults, groups: Groups, file: Path) -> str:
    """Draw the Pareto plot as a PNG; returns the line to print about it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"{file} is not drawn: matplotlib is missing, pip install -e '.[report]'"
    goal = "right" if seed.judged else "nll"
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    points = all_points(seed, groups)
    ways = list(dict.fromkeys(way_of(point.arm) for point in points[1:]))
    if len(ways) == 2:
        _join_pairs(axes, groups, goal)
    for i, way in enumerate(ways):
        _join_scales(axes, seed, points, way, goal, COLOURS[i % len(COLOURS)])

    in_legend: set[str] = set()
    for point in points:
        way = "seed" if point.arm == "seed" else way_of(point.arm)
        colour, marker = SEED_COLOUR, "o"
        if way != "seed":
            place = ways.index(way)
            colour = COLOURS[place % len(COLOURS)]
            marker = MARKERS[place % len(MARKERS)]
        x = point.estimate("kl")
        y = point.estimate(goal)
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=_error_bar(x),
            yerr=_error_bar(y),
            color=colour,
            fmt=marker,
            markersize=6 if point.listed else 4,
            elinewidth=0.8 if point.listed else 0.4,
            label=None if way in in_legend else title_of(way),
            zorder=3,
        )
        in_legend.add(way)
        if point.listed:
            # the names of a pair are apart where its points lie on each other
            offset = (6, -11) if way == "sdft" else (6, 5)
            position = (x.mean, y.mean)
            axes.annotate(point.name, position, offset, textcoords="offset points", fontsize=7)

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


def _join_pairs(axes: Any, groups: Groups, goal: str) -> None:
    """A grey line from a setting's first arm to its second."""
    for group in groups:
        pair = [point for point in group if point.listed]
        kl = [point.estimate("kl").mean for point in pair]
        target = [point.estimate(goal).mean for point in pair]
        axes.plot(kl, target, color="#bbbbbb", linewidth=0.8, zorder=1)


def _join_scales(
    axes: Any, seed: ArmResults, points: Sequence[ArmResults], way: str, goal: str, colour: str
) -> None:
    """A line through the scales of every training of a way, from the seed; none for one scale."""
    by_setting: dict[str, list[ArmResults]] = {}
    for point in points[1:]:
        if way_of(point.arm) == way and STEP not in point.arm:
            by_setting.setdefault(point.name, []).append(point)
    for of_training in by_setting.values():
        if len(of_training) < 2:
            continue
        ordered = [seed, *sorted(of_training, key=lambda point: point.estimate("kl").mean)]
        kl = [point.estimate("kl").mean for point in ordered]
        target = [point.estimate(goal).mean for point in ordered]
        axes.plot(kl, target, color=colour, linewidth=0.8, alpha=0.6, zorder=2)


def _error_bar(estimate: Estimate) -> list[list[float]]:
    """Lengths below and above the mean, (2, 1) as matplotlib takes them."""
    below = max(0.0, estimate.mean - estimate.low)
    above = max(0.0, estimate.high - estimate.mean)
    return [[below], [above]]
