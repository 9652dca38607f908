"""The figures: drawn by matplotlib, embedded in the page as SVG whose text stays text

The numbers of a figure also stand in a table, which needs no matplotlib. The SVG obeys the page's
content-security policy (no style element, no style attribute) and takes its colours from the page's
CSS variables, so that it is light or dark with the page.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from engine.evaluate.arm_grammar import Arm, title_of
from engine.report.findings import Table, drift_interval
from engine.report.load import Run

# The colour that matplotlib draws with -> the variable of page.css that replaces it in the SVG.
INKS = {
    "#000001": "--ink", "#000002": "--soft", "#000003": "--rule", "#000004": "--seed",
    "#000005": "--sft", "#000006": "--sdft", "#000007": "--kept", "#000008": "--rejected",
    "#000011": "--arm1", "#000012": "--arm2", "#000013": "--arm3", "#000014": "--arm4",
    "#000015": "--arm5", "#000016": "--arm6",
}  # fmt: skip
INK = {name.removeprefix("--"): colour for colour, name in INKS.items()}
MARKERS = {
    "seed": "o", "sft": "o", "sdft": "o", "arm1": "s", "arm2": "^", "arm3": "D", "arm4": "v",
    "arm5": "<", "arm6": ">",
}  # fmt: skip
SIZE = (4.4, 2.8)  # inches; narrow, so that the text stays legible on a telephone
SVG = "{http://www.w3.org/2000/svg}"  # ElementTree's prefix of SVG tags
POINTS_IN_TABLE = 50  # of a loss curve, about
BARS = 12  # most of them in the figure of acceptance
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
    """matplotlib's SVG without style attributes, in the page's colours, its ids unique on the page.

    source    the SVG, as matplotlib writes it
    name      goes before every id
    label     the text that screen readers read
    """
    ElementTree.register_namespace("", SVG[1:-1])
    root = ElementTree.fromstring(source)
    used_ids = set(re.findall(r'(?:url\(#|href="#)([^")]+)', source))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}style", f"{SVG}metadata"):
                parent.remove(child)
    for element in root.iter():
        _style_to_attributes(element)
        _rewrite_references(element, name, used_ids)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": label, "stroke-linejoin": "round"}
    return ElementTree.tostring(root, encoding="unicode")


def _style_to_attributes(element: ElementTree.Element) -> None:
    """Replace the style attribute, which the policy forbids, by an attribute per declaration."""
    for declaration in element.attrib.pop("style", "").split(";"):
        property, _, value = declaration.partition(":")
        property, value = property.strip(), value.strip()
        if property == "font":  # "9px 'DejaVu Sans', ...": the page has the family
            property, value = "font-size", value.split()[0]
        if property and property not in ("stroke-linejoin", "font-family"):
            element.set(property, value)


def _rewrite_references(element: ElementTree.Element, name: str, used_ids: set[str]) -> None:
    """Put `name` before ids and references to them, and variables in place of colours."""
    for key, value in list(element.attrib.items()):
        if key.endswith("}href"):  # of xlink
            element.attrib.pop(key)
            element.set("href", f"#{name}-{value[1:]}")
        elif key == "id":
            element.attrib.pop(key)
            if value in used_ids:
                element.set("id", f"{name}-{value}")
        elif value.startswith("url(#"):
            element.set(key, f"url(#{name}-{value[5:]}")
        elif value.lower() in INKS:
            element.set(key, f"var({INKS[value.lower()]})")


def label(text: str, longest: int = 28) -> str:
    """A text from outside for a figure: its last `longest` characters, all of them printable."""
    printable = "".join(char if char.isprintable() else "\ufffd" for char in text)
    if len(printable) <= longest:
        return printable
    return "…" + printable[1 - longest :]


# ---- the figures


def overview(runs: Sequence[Run]) -> list[Plot]:
    """Target against retention, all runs in one figure; [] where the target was not measured."""
    points = []
    judged = None  # whether answers were judged, as in the first run whose target was measured
    for run in runs:
        of_run = _points(run, len(runs) > 1)
        if of_run and judged is None:
            judged = run.scores["seed"].n > 0
        points += of_run
    if not points:
        return []
    goal = "target, share right" if judged else "held-out NLL, nats per token"
    table = [["Model", "KL to seed", "95 % interval", goal.capitalize(), "95 % interval"]]
    for point in points:
        table.append([point.name, *_estimate_cells(point.kl), *_estimate_cells(point.target)])

    def draw(axes: Any) -> None:
        _join_scales(axes, points)
        for point in points:
            x, y = point.kl.mean, point.target.mean
            axes.errorbar(
                x,
                y,
                xerr=_error_bar(point.kl),
                yerr=_error_bar(point.target),
                color=INK[point.ink],
                marker=MARKERS[point.ink],
                markersize=6,
                elinewidth=1.1,
                zorder=3,
            )
            # SDFT's label lies below its point, because the points of two arms may coincide
            offset = (7, -13) if point.arm == "sdft" else (7, 6)
            axes.annotate(label(point.name), (x, y), offset, textcoords="offset points")
        axes.set_xlabel("KL to seed on general prompts, nats per token")
        axes.set_ylabel(goal)
        axes.margins(x=0.18, y=0.12)
        if judged:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    if judged:
        caption = "Up is a better target, left is less forgotten. Bars: 95 % intervals."
    else:
        caption = (
            "Down is a better fit to the target, left is less forgotten. Bars: 95 % intervals."
        )
    return [Plot("overview", "Target against retention", caption, table, draw)]


class Estimate(NamedTuple):
    """A mean and the ends of its 95 % interval, both equal to the mean where none is known."""

    mean: float
    low: float
    high: float


def _join_scales(axes: Any, points: Sequence[Point]) -> None:
    """A line through the scales of every training, in the order of their drift."""
    by_training: dict[str, list[Point]] = {}
    for point in points:
        by_training.setdefault(point.training, []).append(point)
    for of_training in by_training.values():
        if len(of_training) > 1:
            ordered = sorted(of_training, key=lambda point: point.kl.mean)
            x = [point.kl.mean for point in ordered]
            y = [point.target.mean for point in ordered]
            axes.plot(x, y, color=INK[ordered[0].ink], linewidth=0.9, alpha=0.6)


@dataclass(frozen=True)
class Point:
    """An arm of a run in the overview."""

    name: str
    arm: str
    ink: str  # the name of its colour
    training: str  # the same for all scales of an arm
    kl: Estimate  # nats per token
    target: Estimate  # share right; the held-out NLL where nothing is judged


def _points(run: Run, several: bool) -> list[Point]:
    """A point for every arm whose target was measured; `several`: the names hold the run's too."""
    points = []
    inks = run.inks()
    for arm, score in run.scores.items():
        target = Estimate(score.nll, score.nll, score.nll)
        if score.n:
            target = Estimate(score.share, *score.interval())
        name = f"{run.arms[arm]} · {run.name}" if several else run.arms[arm]
        training = f"{run.path} {_trained(arm)}"
        points.append(Point(name, arm, inks[arm], training, _kl_estimate(run, arm), target))
    return points


def _trained(arm: str) -> str:
    """The name of the arm at scale 1, which is trained for all scales."""
    return arm if arm == "seed" else Arm.parse(arm).trained().name


def _kl_estimate(run: Run, arm: str) -> Estimate:
    """An arm's KL to the seed; the seed's is zero and has no interval."""
    kl = run.summary["retention"].get(arm, {"kl": 0.0})["kl"]
    low, high = drift_interval(run, arm)
    if math.isnan(low):
        low = kl
    if math.isnan(high):
        high = kl
    return Estimate(kl, low, high)


def _estimate_cells(estimate: Estimate) -> list[str]:
    """Mean and interval, as cells of a table."""
    return [f"{estimate.mean:.4f}", f"{estimate.low:.4f} – {estimate.high:.4f}"]


def _error_bar(estimate: Estimate) -> list[list[float]]:
    """Lengths below and above the mean, as matplotlib takes them."""
    below = max(0, estimate.mean - estimate.low)
    above = max(0, estimate.high - estimate.mean)
    return [[below], [above]]


def plots_of_run(run: Run, key: str) -> list[Plot]:
    """The figures of one run whose numbers it has; `key` makes their names unique on the page."""
    plots = []
    for make in (_loss, _nll, _drift, _lengths, _acceptance):
        plot = make(run)
        if plot is not None:
            plot.name = f"{plot.name}-{key}"
            plots.append(plot)
    return plots


def _loss(run: Run) -> Plot | None:
    """The loss of all trainings by optimizer step."""
    curves = {arm: dict(points) for arm, points in run.losses.items() if points}  # step -> loss
    inks = {_trained(arm): ink for arm, ink in run.inks().items()}
    if not curves:
        return None
    steps = sorted(set().union(*curves.values()))
    every = max(1, len(steps) // POINTS_IN_TABLE)
    table = [["Step", *(title_of(arm) for arm in curves)]]
    for step in steps[::every]:
        losses = [curve.get(step, math.nan) for curve in curves.values()]
        table.append([str(step), *(f"{loss:.4f}" for loss in losses)])

    def draw(axes: Any) -> None:
        for arm in curves:
            ink = INK[inks[arm]]
            x, y = np.array(run.losses[arm]).T  # (steps,) each
            smooth = _running_mean(y)
            axes.plot(x, y, color=ink, alpha=0.35, linewidth=0.9)
            axes.plot(x, smooth, color=ink, linewidth=1.6, label=title_of(arm))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss, nats per token")
        axes.legend()

    caption = "Mean over the loss-carrying tokens of a step; the thick line is a running mean."
    return Plot("loss", "Training loss", caption, table, draw)


def _running_mean(y: np.ndarray) -> list[float]:
    """The mean of every value and a twentieth of the curve on both sides of it."""
    width = max(1, len(y) // 20)
    means = []
    for i in range(len(y)):
        window = y[max(0, i - width) : i + width + 1]
        means.append(window.mean())
    return means


class Series(NamedTuple):
    """The values of one line of a histogram."""

    ink: str  # name of its colour
    values: list[float]


@dataclass(frozen=True)
class Histogram:
    """Distributions over the same bins."""

    name: str
    title: str
    caption: str
    axis: str  # the measured quantity, with its unit
    counted: str  # rows or prompts
    series: dict[str, Series]  # by its name in the legend

    def plot(self) -> Plot | None:
        """The figure and its table; None where no series has a value."""
        values = [value for series in self.series.values() for value in series.values]
        if not values:
            return None
        top = float(np.quantile(values, 0.99)) or 1.0  # the last bin holds all larger values
        edges = np.linspace(0, top, 25)  # (25,)
        counts = {}
        for name, series in self.series.items():
            clipped = np.minimum(series.values, top)
            counts[name], _ = np.histogram(clipped, bins=edges)  # (24,)
        caption = self.caption + " The last bin holds all larger values."
        draw = partial(self._draw, edges, counts)
        return Plot(self.name, self.title, caption, self._table(edges, counts), draw)

    def _table(self, edges: np.ndarray, counts: dict[str, np.ndarray]) -> Table:
        table = [[self.axis.capitalize(), *counts]]
        bins = len(edges) - 1
        for i in range(bins):
            is_last = i == bins - 1
            bin = f"{edges[i]:.3g} and more" if is_last else f"{edges[i]:.3g} – {edges[i + 1]:.3g}"
            table.append([bin, *(str(of_series[i]) for of_series in counts.values())])
        return table

    def _draw(self, edges: np.ndarray, counts: dict[str, np.ndarray], axes: Any) -> None:
        for name, series in self.series.items():
            ink = INK[series.ink]
            axes.stairs(counts[name], edges, color=ink, fill=True, alpha=0.16)
            axes.stairs(counts[name], edges, color=ink, linewidth=1.4, label=name)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(self.axis)
        axes.set_ylabel(self.counted)
        axes.set_xlim(0)
        axes.legend()


def _nll(run: Run) -> Plot | None:
    """The likelihoods of references and rewrites under the seed."""
    references = [row["reference_nll"] for row in run.rows if row["reference_nll"] is not None]
    rewrites = [row["response_nll"] for row in run.rows if row["response_nll"] is not None]
    return Histogram(
        name="nll",
        title="Likelihood under the seed",
        caption="How unlikely the seed model finds the texts after the plain prompt: mean per row.",
        axis="NLL, nats per token",
        counted="rows",
        series={"references": Series("sft", references), "rewrites": Series("sdft", rewrites)},
    ).plot()


def _drift(run: Run) -> Plot | None:
    """KL to the seed of every training at scale 1, by general prompt."""
    series = {}
    inks = run.inks()
    for arm in run.tuned:
        if _trained(arm) != arm:
            continue
        values = [item["kl"][arm] for item in run.drift(arm)]
        series[run.arms[arm]] = Series(inks[arm], values)
    return Histogram(
        name="drift",
        title="Drift by prompt",
        caption="How far each model moved on each general prompt, over the seed's own answer.",
        axis="KL to seed, nats per token",
        counted="prompts",
        series=series,
    ).plot()


def _lengths(run: Run) -> Plot | None:
    """Characters of a rewrite per character of its reference."""
    kept = []
    rejected = []
    for row in run.rows:
        ratio = len(row["response"]) / len(row["reference"])
        if row["kept"]:
            kept.append(ratio)
        else:
            rejected.append(ratio)
    return Histogram(
        name="length",
        title="Length ratios",
        caption="Characters of the rewrite divided by characters of its reference.",
        axis="length of rewrite / reference",
        counted="rows",
        series={"kept": Series("kept", kept), "rejected": Series("rejected", rejected)},
    ).plot()


def _acceptance(run: Run) -> Plot:
    """How many tries of each stage of the cascade ended with which status."""
    tries: list[tuple[str, str]] = []  # (stage, status)
    for row in run.rows:
        by_stage = row["tries"] or {row["stage"]: [row["status"]]}
        for stage, statuses in by_stage.items():
            tries += [(stage, status) for status in statuses]
    counts = Counter(tries)
    kept = {row["status"] for row in run.rows if row["kept"]}
    table = [["Stage", "Status", "Fit", "Tries", "Share"]]
    for (stage, status), n in counts.most_common():
        fit = "yes" if status in kept else "no"
        table.append([stage, status, fit, f"{n:,}", f"{n / len(tries):.1%}"])

    def draw(axes: Any) -> None:
        stages = {stage for stage, _ in counts}
        has_several_stages = len(stages - {"reference"}) > 1
        names: list[str] = []
        inks: list[str] = []
        lengths: list[int] = []
        texts: list[str] = []
        for (stage, status), n in reversed(counts.most_common(BARS)):
            names.append(label(f"{stage}: {status}" if has_several_stages else status))
            inks.append(INK["kept" if status in kept else "rejected"])
            lengths.append(n)
            texts.append(f"{n:,} · {n / len(tries):.0%}")
        bars = axes.barh(range(len(lengths)), lengths, color=inks, height=0.66)
        axes.set_yticks(range(len(lengths)), names)
        axes.bar_label(bars, texts, padding=3)
        axes.set_xlabel("tries")
        axes.margins(x=0.22)
        axes.grid(False, axis="y")

    caption = "The outcome of each try; where none is fit, the reference is the target."
    return Plot("acceptance", "Acceptance by stage and reason", caption, table, draw)


def draw_all(plots: Sequence[Plot]) -> list[str] | None:
    """The SVG of every plot; None where matplotlib is not installed."""
    try:
        return [svg(plot) for plot in plots]
    except ImportError:
        return None
