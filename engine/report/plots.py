"""The figures: drawn by matplotlib, embedded in the page as SVG whose text stays text

The numbers of a figure also stand in a table, which is there without matplotlib too. The SVG obeys
the page's content-security policy (no style element, no style attribute) and takes its colours from
the page's variables, so that it is light or dark with the page.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.evaluate.arms import ARM_NAMES, TUNED
from engine.evaluate.target_task import Score
from engine.report.findings import Table, drift_interval
from engine.report.load import Run

# The colour that matplotlib draws with -> the variable of page.css that replaces it.
INKS = {
    "#000001": "--ink", "#000002": "--soft", "#000003": "--rule", "#000004": "--seed",
    "#000005": "--sft", "#000006": "--sdft", "#000007": "--kept", "#000008": "--rejected",
}  # fmt: skip
INK = {name.removeprefix("--"): colour for colour, name in INKS.items()}
SIZE = (4.4, 2.8)  # inches; narrow, so that the text is still read on a telephone
SVG = "{http://www.w3.org/2000/svg}"
STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.labelsize": 9,
    "axes.edgecolor": INK["soft"], "axes.labelcolor": INK["soft"], "text.color": INK["ink"],
    "xtick.color": INK["soft"], "ytick.color": INK["soft"], "grid.color": INK["rule"],
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.linewidth": 0.6,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "grid.linewidth": 0.5,
}  # fmt: skip


@dataclass
class Plot:
    """A figure, and its numbers as a table."""

    name: str  # unique on the page
    title: str
    caption: str
    table: Table
    draw: Callable[[Any], None]  # on a matplotlib Axes


def svg(plot: Plot) -> str:
    """The drawn figure as an <svg> element. ImportError without matplotlib."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": plot.name}):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        plot.draw(figure.add_subplot())
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return themed(file.getvalue().decode(), plot.name, plot.title)


def themed(source: str, name: str, label: str) -> str:
    """matplotlib's SVG without style and ids of its own, in the page's colours."""
    ElementTree.register_namespace("", SVG[1:-1])
    root = ElementTree.fromstring(source)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', source))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{SVG}style" or child.tag == f"{SVG}metadata":
                parent.remove(child)
    for element in root.iter():
        for declaration in element.attrib.pop("style", "").split(";"):
            property, _, value = (part.strip() for part in declaration.partition(":"))
            if property == "font":  # "9px 'DejaVu Sans', ...": the page has the family
                property, value = "font-size", value.split()[0]
            if property and property not in ("stroke-linejoin", "font-family"):
                element.set(property, value)
        for key, value in list(element.attrib.items()):
            if key.endswith("}href"):  # xlink's
                element.attrib.pop(key)
                element.set("href", f"#{name}-{value[1:]}")
            elif key == "id":
                element.attrib.pop(key)
                if value in used:
                    element.set("id", f"{name}-{value}")
            elif value.startswith("url(#"):
                element.set(key, f"url(#{name}-{value[5:]}")
            elif value.lower() in INKS:
                element.set(key, f"var({INKS[value.lower()]})")
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": label, "stroke-linejoin": "round"}
    return ElementTree.tostring(root, encoding="unicode")


def label(text: str, longest: int = 28) -> str:
    """Foreign text for a figure: one short line of what can be printed."""
    clean = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return clean if len(clean) <= longest else "…" + clean[1 - longest :]


# ---- the figures


def overview(runs: Sequence[Run]) -> list[Plot]:
    """Target against retention, all runs in one figure."""
    points = [point for run in runs for point in _points(run, len(runs) > 1)]
    if not points:
        return []
    judged = runs[0].summary["evaluation"]["seed"]["n"] > 0
    goal = "target, share right" if judged else "held-out NLL, nats per token"
    table = [["Model", "KL to seed", "95 % interval", goal.capitalize(), "95 % interval"]]
    for point in points:
        table.append([point.name, *_estimate_cells(point.kl), *_estimate_cells(point.target)])

    def draw(axes: Any) -> None:
        for point in points:
            x, y = point.kl[0], point.target[0]
            axes.errorbar(
                x,
                y,
                xerr=_error_bar(point.kl),
                yerr=_error_bar(point.target),
                color=INK[point.arm],
                marker="o",
                markersize=6,
                elinewidth=1.1,
                zorder=3,
            )
            offset = (7, -13) if point.arm == "sdft" else (7, 6)  # the two may lie on each other
            axes.annotate(label(point.name), (x, y), offset, textcoords="offset points")
        axes.set_xlabel("KL to seed on general prompts, nats per token")
        axes.set_ylabel(goal)
        axes.margins(x=0.18, y=0.12)
        if judged:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    if judged:
        caption = "Up is a better target, left is less forgotten. Bars: 95 %."
    else:
        caption = "Down is a better fit to the target, left is less forgotten. Bars: 95 %."
    return [Plot("overview", "Target against retention", caption, table, draw)]


Estimate = tuple[float, float, float]  # a mean and its 95 % interval


@dataclass(frozen=True)
class Point:
    """An arm of a run in the overview."""

    name: str
    arm: str
    kl: Estimate
    target: Estimate  # share right; the held-out NLL where nothing is judged


def _points(run: Run, several: bool) -> list[Point]:
    points = []
    for arm, score in run.summary["evaluation"].items():
        kl = run.summary["retention"].get(arm, {"kl": 0.0})["kl"]
        low, high = (kl if math.isnan(end) else end for end in drift_interval(run, arm))
        target = score["nll"], score["nll"], score["nll"]
        if score["n"]:
            held_out = Score(*(score[k] for k in ("n", "right", "truncated", "nll")))
            target = held_out.share, *held_out.interval()
        name = f"{ARM_NAMES[arm]} · {run.name}" if several else ARM_NAMES[arm]
        points.append(Point(name, arm, (kl, low, high), target))
    return points


def _estimate_cells(estimate: Estimate) -> list[str]:
    mean, low, high = estimate
    return [f"{mean:.4f}", f"{low:.4f} – {high:.4f}"]


def _error_bar(estimate: Estimate) -> list[list[float]]:
    """Lengths below and above the mean, as matplotlib takes them."""
    mean, low, high = estimate
    return [[max(0, mean - low)], [max(0, high - mean)]]


def plots_of_run(run: Run, key: str) -> list[Plot]:
    """The figures of one run; `key` makes their names unique."""
    made = [_loss(run), _nll(run), _drift(run), _lengths(run), _acceptance(run)]
    plots = [plot for plot in made if plot is not None]
    for plot in plots:
        plot.name = f"{plot.name}-{key}"
    return plots


def _loss(run: Run) -> Plot | None:
    lines = {arm: points for arm, points in run.losses.items() if points}
    if not lines:
        return None
    steps = sorted({step for points in lines.values() for step, _ in points})
    of = {arm: dict(points) for arm, points in lines.items()}
    shown = steps[:: max(1, len(steps) // 50)]
    table = [["Step", *(ARM_NAMES[arm] for arm in lines)]]
    table += [[str(s), *(f"{of[arm].get(s, math.nan):.4f}" for arm in lines)] for s in shown]

    def draw(axes: Any) -> None:
        for arm, points in lines.items():
            x, y = np.array(points).T
            axes.plot(x, y, color=INK[arm], alpha=0.35, linewidth=0.9)
            width = max(1, len(y) // 20)
            smooth = [y[max(0, i - width) : i + width + 1].mean() for i in range(len(y))]
            axes.plot(x, smooth, color=INK[arm], linewidth=1.6, label=ARM_NAMES[arm])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss, nats per token")
        axes.legend()

    caption = "Mean over the loss-carrying tokens of a step; the thick line is a running mean."
    return Plot("loss", "Training loss", caption, table, draw)


def _histogram(
    name: str, title: str, caption: str, axis: str, count: str, series: dict[str, Any]
) -> Plot | None:
    """Distributions over the same bins; series: name -> (ink, values)."""
    every = [v for _, values in series.values() for v in values]
    if not every:
        return None
    top = float(np.quantile(every, 0.99)) or 1.0  # the last bin holds what lies beyond
    edges = np.linspace(0, top, 25)
    counts = {}
    for line, (_, values) in series.items():
        counts[line] = np.histogram(np.minimum(values, top), bins=edges)[0]
    table = [[axis.capitalize(), *counts]]
    for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        bin = f"{low:.3g} – {high:.3g}" if i < len(edges) - 2 else f"{low:.3g} and more"
        table.append([bin, *(str(c[i]) for c in counts.values())])

    def draw(axes: Any) -> None:
        for line, (ink, _) in series.items():
            axes.stairs(counts[line], edges, color=INK[ink], fill=True, alpha=0.16)
            axes.stairs(counts[line], edges, color=INK[ink], linewidth=1.4, label=line)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(axis)
        axes.set_ylabel(count)
        axes.set_xlim(0)
        axes.legend()

    return Plot(name, title, caption + " The last bin holds all beyond.", table, draw)


def _nll(run: Run) -> Plot | None:
    values = {}
    for text, name, ink in (("reference", "references", "sft"), ("response", "rewrites", "sdft")):
        found = [r[f"{text}_nll"] for r in run.rows if r[f"{text}_nll"] is not None]
        values[name] = (ink, found)
    caption = "How foreign the texts are to the seed model, under the plain prompt: mean per row."
    axis = "NLL, nats per token"
    return _histogram("nll", "Likelihood under the seed", caption, axis, "rows", values)


def _drift(run: Run) -> Plot | None:
    values = {}
    for arm in TUNED:
        values[ARM_NAMES[arm]] = (arm, [a["kl"][arm] for a in run.drift(arm)])
    caption = "How far each model moved on each general prompt, over the seed's own answer."
    axis = "KL to seed, nats per token"
    return _histogram("drift", "Drift by prompt", caption, axis, "prompts", values)


def _lengths(run: Run) -> Plot | None:
    kept = [_length_ratio(row) for row in run.rows if row["kept"]]
    rejected = [_length_ratio(row) for row in run.rows if not row["kept"]]
    caption = "Characters of the rewrite by characters of its reference."
    series = {"kept": ("kept", kept), "rejected": ("rejected", rejected)}
    axis = "length of rewrite / reference"
    return _histogram("length", "Length ratios", caption, axis, "rows", series)


def _length_ratio(row: dict[str, Any]) -> float:
    return len(row["response"]) / len(row["reference"])


def _acceptance(run: Run) -> Plot | None:
    tries = [
        (stage, status)
        for row in run.rows
        for stage, statuses in (row["tries"] or {row["stage"]: [row["status"]]}).items()
        for status in statuses
    ]
    counts, kept = Counter(tries), {row["status"] for row in run.rows if row["kept"]}
    table = [["Stage", "Status", "Fit", "Tries", "Share"]]
    for (stage, status), n in counts.most_common():
        fit = "yes" if status in kept else "no"
        table.append([stage, status, fit, f"{n:,}", f"{n / len(tries):.1%}"])

    def draw(axes: Any) -> None:
        pairs = counts.most_common(12)[::-1]
        several = len({stage for stage, _ in counts} - {"reference"}) > 1
        names = [label(f"{stage}: {status}" if several else status) for (stage, status), _ in pairs]
        inks = [INK["kept" if status in kept else "rejected"] for (_, status), _ in pairs]
        bars = axes.barh(range(len(pairs)), [n for _, n in pairs], color=inks, height=0.66)
        axes.set_yticks(range(len(pairs)), names)
        axes.bar_label(bars, [f"{n:,} · {n / len(tries):.0%}" for _, n in pairs], padding=3)
        axes.set_xlabel("tries")
        axes.margins(x=0.22)
        axes.grid(False, axis="y")

    caption = "What became of the tries; where none is fit, the reference is the target."
    return Plot("acceptance", "Acceptance by stage and reason", caption, table, draw)


def draw_all(plots: Sequence[Plot]) -> list[str] | None:
    """SVG of every plot; None without matplotlib."""
    try:
        return [svg(plot) for plot in plots]
    except ImportError:
        return None
