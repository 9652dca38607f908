"""The page: one HTML file that loads nothing else

Every text of a model, a data file or a path is treated as hostile. In sections 1 and 2 it passes
`tag`, which escapes everything that is not `Html` already; sections 3 to 5 are built in the browser
from a JSON block (`inline_json`) as text nodes. The policy allows the page's own style and script
by their hashes and nothing else: no network, no inline handler, no style attribute, no string that
becomes markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.report import plots as figures
from engine.report.findings import (
    Table,
    differing_settings,
    findings,
    result_table,
    results_table,
    tables_over_seeds,
    warnings,
    why_incomparable,
)
from engine.report.load import Run, load_runs
from engine.runtime.files import write_text

ASSETS = Path(__file__).resolve().parent
NO_PLOTS = "Without figures, which need matplotlib -> pip install -e '.[report]', then "
GLANCE = (0, 1, 3, 4, 6)  # columns of `result_table` that stand in the first table


class Html(str):
    """Text that is markup already."""


def tag(name: str, *children: str, **attributes: str) -> Html:
    """An element. Children that are not Html, and all attributes, are escaped.

    `class_` is the attribute class, `aria_label` is aria-label.
    """
    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    parts = (f' {names[key]}="{html.escape(value)}"' for key, value in attributes.items())
    inner = "".join(c if isinstance(c, Html) else html.escape(c) for c in children)
    return Html(f"<{name}{''.join(parts)}>{inner}</{name}>")


def inline_json(value: Any) -> Html:
    """JSON for a script element: no `<`, `>` or `&` is left, so nothing can end or open markup.

    ValueError for NaN and infinity, which are no JSON.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Html(text)


def table(rows: Table, caption: str, class_: str = "") -> Html:
    """A table whose first row and first column are headers."""
    head = [tag("th", cell, scope="col") for cell in rows[0]]
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows[1:]
    ]
    inner = tag("thead", tag("tr", *head)), tag("tbody", *body)
    whole = tag("table", tag("caption", tag("span", caption)), *inner, class_=class_)
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def write_report(paths: Sequence[Path], out: Path) -> str:
    """Write the page of these runs to `out`; returns the line to print about it.

    ValueError for a directory that is no finished run. Without matplotlib the page has its tables,
    no figures.
    """
    runs = load_runs(paths)
    drawn, page = render(runs)
    write_text(out, page)
    said = f"report: {out} ({len(page) / 1e6:.1f} MB, {sum(len(r.rows) for r in runs):,} rows)"
    command = "python scripts/report.py " + " ".join(str(path) for path in paths)
    return said if drawn else f"{said}. {NO_PLOTS}{command}"


def report_job(paths: Sequence[Path], out: Path | None, *, show: bool) -> None:
    """Write the page, by default into the run or, of several runs, into this directory."""
    out = out or (paths[0] if len(paths) == 1 else Path()) / "report.html"
    print(write_report(paths, out))
    if show and not webbrowser.open(out.resolve().as_uri()):
        print(f"no browser could be started here; open {out.resolve()}")


def render(runs: Sequence[Run]) -> tuple[bool, str]:
    """Whether figures could be drawn, and the page."""
    overview = figures.overview(runs)
    of_runs = [figures.plots_of_run(run, str(k)) for k, run in enumerate(runs)]
    plots = [*overview, *(plot for of_run in of_runs for plot in of_run)]
    drawn = figures.draw_all(plots)
    boxes = dict(zip((plot.name for plot in plots), drawn or [], strict=False))

    style, script = ((ASSETS / name).read_text("utf-8") for name in ("page.css", "page.js"))
    names = ", ".join(run.name for run in runs)
    parts = {
        "policy": html.escape(_policy(style, script)),
        "title": html.escape(f"SDFT report: {names}"),
        "style": style,
        "heading": "Self-distillation fine-tuning",
        "lede": Html("").join(_lede(runs)),
        "run": _what_was_run(runs),
        "result": _result(runs, overview, of_runs, boxes),
        "answers": html.escape(
            "Greedy answers of the seed model and of both tuned ones to the same prompts, those "
            "first that moved furthest. Marked: words that the seed's answer does not have there."
        ),
        "training": html.escape(
            "What the model is trained on, token by token, shaded by how unlikely the seed model "
            "finds each one. References are written by another hand; rewrites are the model's own."
        ),
        "footer": html.escape(_footer(runs)),
        "data": inline_json({"runs": [_data(run) for run in runs]}),
        "script": script,
    }
    skeleton = (ASSETS / "page.html").read_text("utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], skeleton)
    # A lone surrogate (a file name that is no UTF-8, say) cannot be written.
    return drawn is not None, page.encode("utf-8", "replace").decode("utf-8")


def _policy(style: str, script: str) -> str:
    """The content-security policy: these two texts, and nothing from anywhere."""
    return (
        f"default-src 'none'; style-src {_hash_source(style)}; script-src {_hash_source(script)}; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    )


def _hash_source(text: str) -> str:
    """A text as a source of the policy."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _data(run: Run) -> dict[str, Any]:
    """The data of sections 3 to 5."""
    return {"name": run.name, "rows": run.rows, "answers": run.answers, "tokens": run.tokens}


# ---- sections 1 and 2


def _lede(runs: Sequence[Run]) -> list[Html]:
    names = [tag("code", run.name) for run in runs]
    joined = Html(" · ".join(names))
    return [tag("span", f"{len(runs)} runs side by side: " if len(runs) > 1 else "Run "), joined]


def _what_was_run(runs: Sequence[Run]) -> Html:
    parts = []
    for run in runs:
        if len(runs) > 1:
            parts.append(tag("h3", run.name))
        said = [tag("div", tag("dt", name), tag("dd", text)) for name, text in findings(run)]
        notes = [tag("p", text, class_="note") for text in warnings(run)]
        glance = [[row[i] for i in GLANCE] for row in result_table(run)]
        numbers = table(glance, "At a glance", "arms")
        parts.append(
            tag(
                "div",
                tag("div", tag("dl", *said, class_="findings"), *notes),
                numbers,
                class_="glance",
            )
        )
        parts.append(_facts(run))
    return Html("".join(parts))


def _facts(run: Run) -> Html:
    """Model, data and settings of a run as a list of terms, with every setting folded below."""
    s, environment = run.settings, run.summary["environment"]
    model = run.summary.get("model", {})
    counts = f"{len(run.rows):,} turns"
    lora = f"rank {s['LoraConfig.rank']}, alpha {s['LoraConfig.alpha']:g}"
    training = (
        f"{s['TrainConfig.epochs']} x {len(run.rows):,} turns in batches of "
        f"{s['TrainConfig.batch_rows']}, learning rate {s['TrainConfig.lr']:g}, seed "
        f"{s['TrainConfig.seed']}"
    )
    sampling = ", ".join(
        f"{k} {s[f'SamplerConfig.{k}']}" for k in ("temperature", "top_p", "top_k")
    )
    machine = environment.get("gpu") or f"{environment['machine']} {environment['cpu']}"
    versions = f"python {environment['python']}, torch {environment['torch']}"
    facts = {
        "Model": f"{s['ModelConfig.model']}, {model.get('parameters', 0) / 1e6:.0f} M parameters",
        "Data": f"{s['DataConfig.data']}, {counts}",
        "Held out": str(s["SdftConfig.eval_data"] or "none"),
        "Rewrites": f"template {s['DistillConfig.template']}, cascade "
        f"{s.get('DistillConfig.cascade', 'guided:1')}, verified by {s['DistillConfig.verify']}, "
        f"{sampling}{', as published' if s.get('DistillConfig.paper_exact') else ''}",
        "LoRA": f"{lora} on {s['LoraConfig.modules']}",
        "Training": training,
        "Operations": f"table {model.get('ops', '?')}, {model.get('dtype', '?')} on "
        f"{model.get('device', '?')}, {environment['threads']} threads",
        "Machine": machine,
        "Versions": f"{versions}, commit {environment['commit'] or 'unknown'}",
    }
    terms = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()]
    seconds = run.summary["seconds"]
    times = [["Stage", "Seconds"], *([name, f"{value:,.0f}"] for name, value in seconds.items())]
    rows = [["Setting", "Value"], *([name, str(value)] for name, value in run.settings.items())]
    rows += [["sha256 of the data", run.data_sha256]]
    rows += [["fingerprint of the model", model.get("fingerprint", "unknown")]]
    ops = [["Operation", "Function"], *map(list, model.get("ops_table", {}).items())]
    return Html(
        tag("dl", *terms, class_="facts")
        + tag(
            "div",
            _folded(
                f"Times ({seconds['all']:,.0f} s)",
                table(times, "Seconds by stage, of the last process only"),
            ),
            _folded("All settings", table(rows, "Every setting of the run")),
            _folded("Table of operations", table(ops, "What computed each operation")),
            _folded("Command", tag("pre", " ".join(environment["command"]))),
            class_="folded",
        )
    )


def _folded(summary: str, *children: str) -> Html:
    return tag("details", tag("summary", summary), *children)


def _result(
    runs: Sequence[Run],
    overview: Sequence[figures.Plot],
    of_runs: Sequence[Sequence[figures.Plot]],
    boxes: dict[str, str],
) -> Html:
    parts = []
    if len(runs) > 1:
        parts += [tag("p", text, class_="note") for text in why_incomparable(runs)]
        parts.append(table(differing_settings(runs), "Settings in which the runs differ"))
    for group, numbers in tables_over_seeds(runs):
        names = ", ".join(run.name for run in group)
        caption = f"Mean and 95 % interval (Student's t) over {len(group)} seeds: {names}"
        parts.append(table(numbers, caption, "arms seeds"))
    caption = "Intervals over held-out questions (Wilson) and over prompts (bootstrap)"
    parts.append(table(results_table(runs), caption, "arms"))
    parts.append(
        tag(
            "p",
            "Target: share of held-out questions answered right, greedily. Held-out NLL: nats per "
            "token of the held-out references, lower is better. KL to seed: nats per token over "
            "the seed's own answers to general prompts, lower is less forgotten. Loss tokens and "
            "steps: the budgets of the two arms.",
            class_="notes",
        )
    )
    if not boxes:
        parts.append(tag("p", NO_PLOTS + "python scripts/report.py again.", class_="note"))
    if len(runs) == 1:
        parts.append(_plots([*overview, *of_runs[0]], boxes))
    else:
        parts.append(_plots(overview, boxes))
        for run, plots in zip(runs, of_runs, strict=True):
            parts += [tag("h3", run.name), _plots(plots, boxes)]
    return Html("".join(parts))


def _plots(plots: Sequence[figures.Plot], boxes: dict[str, str]) -> Html:
    made = []
    for plot in plots:
        caption = tag("figcaption", tag("b", plot.title), " ", plot.caption)
        numbers = table(plot.table, f"{plot.title}: the numbers")
        drawing = [Html(boxes[plot.name])] if boxes else []
        made.append(tag("figure", caption, *drawing, _folded("As a table", numbers)))
    return tag("div", *made, class_="figures")


def _footer(runs: Sequence[Run]) -> str:
    return (
        "Written by scripts/report.py. The page holds all its data, asks for nothing over the "
        f"network, and shows text of models and of data files as text: {len(runs)} run"
        f"{'s' if len(runs) > 1 else ''}, {sum(len(run.rows) for run in runs):,} rows."
    )
