"""What a study says: target against retention per arm, differences with intervals, in words

Everything is paired: both arms answered the same held-out rows and were compared with the seed over
the same answers to the same general prompts. A difference is SDFT - SFT.

    interval     `crossed_bootstrap` (engine/measure/intervals.py): held-out rows, or general
                 prompts, are drawn again, the same for both arms and all seeds; with several
                 training seeds these too
    p            right or wrong on the same rows: McNemar's exact test for each training seed;
                 combined, the exact test that flips the signs of the rows' differences, each summed
                 over the seeds. It asks about rows; what seeds do is in the interval

A difference is called one where its interval leaves out zero and, on the target, the combined p is
below 0.05 too; else it says "no difference seen". Nothing corrects for looking at many settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.measure.intervals import crossed_bootstrap, lost_won, mcnemar, sign_flip_test, wilson
from engine.runtime.terminal import table
from model.durable import file_beside

SURE = 0.05  # a difference of verdicts is called one below this p
NAMES = {"seed": "seed", "sft": "SFT", "sdft": "SDFT"}
Value = tuple[float, float, float]  # a mean and its 95 % interval


@dataclass
class Measured:
    """One run, item by item."""

    ids: list[str]  # held-out rows
    right: list[bool] | None  # None where nothing is judged
    nll: list[float]  # nats of the references, summed over `tokens`
    tokens: list[int]
    drift: list[dict[str, Any]] = field(default_factory=list)  # lines of retention.jsonl
    training: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, list[bool]] = field(default_factory=dict)  # "task scorer" -> verdicts


@dataclass
class Point:
    """A setting and arm with its runs, one for every training seed."""

    name: str
    arm: str
    runs: list[Measured]

    @property
    def judged(self) -> bool:
        return self.runs[0].right is not None

    def on(self, task: str) -> Point:
        """The same runs, seen by their verdicts on a further task."""
        runs = [Measured([], run.tasks[task], [], []) for run in self.runs]
        return Point(self.name, self.arm, runs)

    @property
    def seconds(self) -> float:
        return sum(run.training["seconds"] for run in self.runs) / len(self.runs)

    def right(self) -> np.ndarray:
        """(seeds, rows) of 0 and 1."""
        return np.array([run.right for run in self.runs], dtype=np.int64)

    def sums(self, name: str) -> tuple[np.ndarray, list[int]]:
        """(seeds, items) and weights (items,): nll over held-out rows, drift over prompts."""
        if name == "nll":
            return np.array([run.nll for run in self.runs]), self.runs[0].tokens
        values = [[line[name] for line in run.drift] for run in self.runs]
        return np.array(values), [line["tokens"] for line in self.runs[0].drift]

    def value(self, name: str) -> Value:
        """A mean and its interval. The share right has Wilson's, as if the seeds were one run:
        where all are wrong a bootstrap would claim to know it for sure."""
        if name == "right":
            right = self.right()
            share = float(right.mean())
            return share, *wilson(share, right.shape[1])
        if self.arm == "seed" and name != "nll":
            return (1.0 if name == "agree" else 0.0,) * 3  # it is its own measure
        return crossed_bootstrap(*self.sums(name))

    def figures(self) -> dict[str, Any]:
        """Everything of this point for study.json."""
        names = ["right"] * self.judged + ["nll", "kl", "reverse_kl", "agree"]
        values = {name: self.value(name) for name in names}
        found: dict[str, Any] = {"setting": self.name, "arm": self.arm, "runs": len(self.runs)}
        found |= {n: {"value": v[0], "interval": v[1:]} for n, v in values.items()}
        found["by_seed"] = [_by_seed(run) for run in self.runs]
        return found


def _by_seed(run: Measured) -> dict[str, Any]:
    found: dict[str, Any] = {"nll": sum(run.nll) / sum(run.tokens), "training": run.training}
    if run.right is not None:
        found["right"] = sum(run.right)
    found |= {"tasks": {name: sum(right) for name, right in run.tasks.items()}} if run.tasks else {}
    if run.drift:
        tokens = sum(line["tokens"] for line in run.drift)
        for name in ("kl", "reverse_kl", "agree"):
            found[name] = sum(line[name] for line in run.drift) / tokens
    return found


def difference(sft: Point, sdft: Point) -> dict[str, Any]:
    """SDFT - SFT in everything, with intervals, tests and words."""
    found: dict[str, Any] = {"setting": sdft.name}
    for name in ("nll", "kl", "reverse_kl", "agree"):
        (a, weights), (b, _) = sft.sums(name), sdft.sums(name)
        found[name] = crossed_bootstrap(b - a, weights)
    if sdft.judged:
        found |= verdicts(sft, sdft)
    found["words"] = words(found)
    return found


def verdicts(sft: Point, sdft: Point) -> dict[str, Any]:
    """SDFT - SFT in what was right: the mean with its interval, and the tests."""
    apart = sdft.right() - sft.right()
    counts = [list(lost_won(*runs)) for runs in zip(sft.right(), sdft.right(), strict=True)]
    return {
        "right": crossed_bootstrap(apart, [1.0] * apart.shape[1]),
        "lost_won": counts,
        "p_by_seed": [mcnemar(*pair) for pair in counts],
        "p": sign_flip_test(apart.sum(0).tolist()),
    }


def elsewhere(
    seed: Point, pairs: Sequence[Sequence[Point]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Further tasks, a line per setting and scorer: figures, and the table."""
    found: list[dict[str, Any]] = []
    lines = [["setting", "task, scorer", "seed", "SFT", "SDFT", "SDFT - SFT"]]
    for sft, sdft in pairs:
        for name in seed.runs[0].tasks:
            a, b = sft.on(name), sdft.on(name)
            d = verdicts(a, b)
            said = _target(d, "higher", "lower")
            found.append({"setting": sdft.name, "task": name, "words": said} | d)
            cells = [_share(p) for p in (seed.on(name), a, b)]
            lines.append([sdft.name, name, *cells, said])
    return found, ["", "elsewhere:", table(lines)] if found else []


def _target(d: dict[str, Any], better: str, worse: str) -> str:
    """Whether what was right differs, by interval and test."""
    value, low, high = d["right"]
    seen = 0 if d["p"] >= SURE else 1 if low > 0 else -1 if high < 0 else 0
    interval = f"{100 * value:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f}"
    return _said(seen, better, worse, f"{interval}, p {_p(d)}")


def words(d: dict[str, Any]) -> str:
    """What a difference says, and what it does not."""
    said = []
    if "right" in d:
        said.append("target: " + _target(d, "SDFT better", "SFT better"))
    for name, what, better, worse in (
        ("nll", "held-out NLL", "SDFT fits better", "SFT fits better"),
        ("kl", "KL to seed", "SDFT forgot less", "SFT forgot less"),
    ):
        value, low, high = d[name]
        seen = 1 if high < 0 else -1 if low > 0 else 0
        interval = f"{value:+.4f}, {low:+.4f} to {high:+.4f}"
        said.append(f"{what}: {_said(seen, better, worse, interval)}")
    return "; ".join(said)


def _said(seen: int, better: str, worse: str, interval: str) -> str:
    return f"{({1: better, -1: worse, 0: 'no difference seen'})[seen]} ({interval})"


def _p(d: dict[str, Any]) -> str:
    combined = f"{d['p']:.3f}"
    if len(d["p_by_seed"]) == 1:
        return combined
    return f"{combined} (by seed {', '.join(f'{p:.3f}' for p in d['p_by_seed'])})"


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (goodness, drift) no other point beats: at least as good, no more drift, one better."""
    return [
        not any(g >= good and k <= drift and (g, k) != (good, drift) for g, k in points)
        for good, drift in points
    ]


def every(seed: Point, pairs: Sequence[Sequence[Point]]) -> list[Point]:
    """The points, each once: settings that differ in the mix share their SFT."""
    points = [seed, *(p for pair in pairs for p in pair)]
    return list({(p.arm, p.name): p for p in points}.values())


def findings(
    seed: Point, pairs: Sequence[Sequence[Point]], verify: str
) -> tuple[dict[str, Any], str]:
    """What study.json holds of it, and the closing table."""
    points = every(seed, pairs)
    goal = "right" if seed.judged else "nll"
    worth = [(p.value(goal)[0] * (1 if seed.judged else -1), p.value("kl")[0]) for p in points]
    best = front(worth)
    header = ["setting", "arm", f"target ({verify})", "95 % interval", "held-out NLL"]
    header += ["KL to seed", "95 % interval", "KL from seed", "same top-1", "examples", "steps"]
    lines = [[*header, "tokens", "loss tokens", "front"]]
    for p, star in zip(points, best, strict=True):
        lines.append([p.name or "-", NAMES[p.arm], *_cells(p), "*" if star else ""])
    apart = [difference(*pair) for pair in pairs]
    tasks, more = elsewhere(seed, pairs)
    rows, prompts = len(seed.runs[0].ids), len(pairs[0][0].runs[0].drift)
    text = [table(lines), "", "SDFT - SFT:"]
    text += [f"  {d['setting']}: {d['words']}" for d in apart]
    text += more
    text += ["", *_notes(len(pairs[0][0].runs), rows, prompts, seed.judged)]
    figures = [p.figures() | {"front": star} for p, star in zip(points, best, strict=True)]
    return {"points": figures, "differences": apart, "elsewhere": tasks}, "\n".join(text)


def _cells(p: Point) -> list[str]:
    """A point's line of the table, behind its names."""
    cells = ["-", "-"]
    if p.judged:
        _, low, high = p.value("right")
        cells = [_share(p), f"{low:.1%} - {high:.1%}"]
    cells.append(f"{p.value('nll')[0]:.3f}")
    kl, low, high = p.value("kl")
    cells += [f"{kl:.4f}", "-" if p.arm == "seed" else f"{low:.4f} - {high:.4f}"]
    cells += [f"{p.value('reverse_kl')[0]:.4f}", f"{p.value('agree')[0]:.1%}"]
    if p.arm == "seed":
        return [*cells, *["-"] * 4]
    budget = p.runs[0].training  # of the first seed: the others differ in the mix's draw at most
    return [*cells, *(f"{budget[n]}" for n in ("examples", "steps", "tokens", "response_tokens"))]


def _share(p: Point) -> str:
    right = p.right()
    return f"{right.mean():.1%} ({'+'.join(map(str, right.sum(1)))}/{right.shape[1]})"


def _notes(seeds: int, rows: int, prompts: int, judged: bool) -> list[str]:
    """How to read the table."""
    drawn = f"the {rows} held-out rows or the {prompts} general prompts drawn again, the same for "
    drawn += "both arms" + (f" and all seeds, and the {seeds} training seeds too" * (seeds > 1))
    notes = [
        "KL in nats per token over the seed's own answers to general prompts: to seed is "
        "KL(seed || tuned), from seed KL(tuned || seed); lower is less forgotten. front: nothing "
        "is better at both.",
        f"Intervals of differences, NLL and KL: 95 %, 2000 bootstrap draws, {drawn}.",
    ]
    if judged:
        seed = "The interval of a share is Wilson's over rows"
        notes.append(seed + (", as if all seeds were one run." if seeds > 1 else "."))
        test = "p: McNemar's exact test on the same rows"
        if seeds > 1:
            test += " for every seed; combined: exact, signs of the rows' differences summed over "
            test += "seeds"
        test += ". A difference is called one where p < 0.05 and the interval leaves out 0."
        notes.append(test)
    if seeds == 1:
        notes.append("One training seed: how much another would change is not in any interval.")
    else:
        notes.append(f"With {seeds} seeds the seeds' part of an interval is rather too small.")
    return notes


def draw(seed: Point, pairs: Sequence[Sequence[Point]], file: Path) -> str:
    """The Pareto plot as a PNG; returns what to say of it."""
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
    named: set[str] = set()
    for pair in pairs:
        ends = [[p.value(axis)[0] for p in pair] for axis in ("kl", goal)]
        axes.plot(*ends, color="#bbbbbb", linewidth=0.8, zorder=1)
    for p in every(seed, pairs):
        x, y = p.value("kl"), p.value(goal)
        bars = [[[max(0.0, v[0] - v[1])], [max(0.0, v[2] - v[0])]] for v in (x, y)]
        name = None if p.arm in named else NAMES[p.arm]
        named.add(p.arm)
        axes.errorbar(x[0], y[0], xerr=bars[0], yerr=bars[1], color=colours[p.arm], fmt="o",
                      markersize=6, elinewidth=0.8, label=name, zorder=3)  # fmt: skip
        place = (6, -11) if p.arm == "sdft" else (6, 5)  # the two may lie on each other
        axes.annotate(p.name, (x[0], y[0]), place, textcoords="offset points", fontsize=7)
    axes.set_xlabel("KL(seed || tuned) on general prompts, nats per token: left is less forgotten")
    up = "share of held-out rows right: up is better"
    axes.set_ylabel(up if seed.judged else "NLL of held-out references: down is better")
    axes.margins(x=0.12, y=0.08)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.legend(frameon=False)
    with file_beside(file) as beside:
        figure.savefig(beside, format="png", dpi=130, metadata={"Software": None})
    return f"target against retention: {file}"
