"""The plot of a study: target against retention, a point an arm, with error bars."""

from __future__ import annotations

from pathlib import Path

from engine.evaluate.arms import ARM_NAMES
from engine.jobs.study_findings import ArmResults, Estimate, Pairs, all_arms
from model.durable import file_beside

COLOURS = {"seed": "#555555", "sft": "#b4521e", "sdft": "#1f6f8b"}


def draw(seed: ArmResults, pairs: Pairs, file: Path) -> str:
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

    # a grey line from a setting's SFT to its SDFT
    for pair in pairs:
        kl = [arm.estimate("kl").mean for arm in pair]
        target = [arm.estimate(goal).mean for arm in pair]
        axes.plot(kl, target, color="#bbbbbb", linewidth=0.8, zorder=1)

    in_legend: set[str] = set()
    for arm in all_arms(seed, pairs):
        x = arm.estimate("kl")
        y = arm.estimate(goal)
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=_error_bar(x),
            yerr=_error_bar(y),
            color=COLOURS[arm.arm],
            fmt="o",
            markersize=6,
            elinewidth=0.8,
            label=None if arm.arm in in_legend else ARM_NAMES[arm.arm],
            zorder=3,
        )
        in_legend.add(arm.arm)
        # the names of a pair are apart where its points lie on each other
        offset = (6, -11) if arm.arm == "sdft" else (6, 5)
        position = (x.mean, y.mean)
        axes.annotate(arm.name, position, offset, textcoords="offset points", fontsize=7)

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
    """Lengths below and above the mean, (2, 1) as matplotlib takes them."""
    below = max(0.0, estimate.mean - estimate.low)
    above = max(0.0, estimate.high - estimate.mean)
    return [[below], [above]]
