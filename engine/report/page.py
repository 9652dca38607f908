"""The page: one HTML file that loads nothing else

Every text of a model, a data file or a path is treated as hostile. In sections 1 and 2 `tag`
escapes everything that is not `Html` already; sections 3 to 5 are built in the browser from a JSON
block (`inline_json`) as text nodes. The content-security policy allows the page's own style and
script by their hashes and nothing else: no network, no inline handler, no style attribute, no
string that becomes markup.
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
    norms_table,
    result_table,
    results_table,
    tables_over_seeds,
    warnings,
    why_incomparable,
)
from engine.report.load import Run, load_runs
from engine.report.many_arms import equal_target_tables
from engine.runtime.files import write_text

ASSETS = Path(__file__).resolve().parent
NO_PLOTS = "Without figures, which need matplotlib -> pip install -e '.[report]', then "
# the columns of `result_table` that the first table shows: name, target, NLL, KL, same top-1, KL on
# the task's prompts
GLANCE = (0, 1, 3, 4, 6, 7)


class Html(str):
    """Text that is markup already."""


def tag(name: str, *children: str, **attributes: str) -> Html:
    """An element. Children that are not Html, and all attributes, are escaped.

    `class_` is the attribute class, `aria_label` is aria-label.
    """
    opening = f"<{name}"
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        opening += f' {attribute}="{html.escape(value)}"'
    inner = ""
    for child in children:
        inner += child if isinstance(child, Html) else html.escape(child)
    return Html(f"{opening}>{inner}</{name}>")


def inline_json(value: Any) -> Html:
    """JSON for a script element: no `<`, `>` or `&` is left, so nothing can end or open markup.

    ValueError for NaN and infinity, which are no JSON.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        escape = f"\\u{ord(char):04x}"
        text = text.replace(char, escape)
    return Html(text)


def table(rows: Table, caption: str, class_: str = "", inks: Sequence[str] = ()) -> Html:
    """A table whose first row and first column are headers, in a region that can be scrolled.

    inks    names of the colours of the rows' headers; rows after the last have none
    """
    head = [tag("th", cell, scope="col") for cell in rows[0]]
    body = []
    for i, (name, *cells) in enumerate(rows[1:]):
        colour = {"class_": f"ink {inks[i]}"} if i < len(inks) else {}
        data = [tag("td", cell) for cell in cells]
        body.append(tag("tr", tag("th", name, scope="row", **colour), *data))
    whole = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", tag("tr", *head)),
        tag("tbody", *body),
        class_=class_,
    )
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def write_report(paths: Sequence[Path], out: Path) -> str:
    """Write the page of these runs to `out`; returns the line to print about it.

    ValueError for a directory that is no finished run. Without matplotlib the page has the tables
    but no figures.
    """
    runs = load_runs(paths)
    has_figures, page = render(runs)
    write_text(out, page)
    message = f"report: {out} ({len(page) / 1e6:.1f} MB, {_rows_of(runs):,} rows)"
    if has_figures:
        return message
    command = " ".join(["python scripts/report.py", *map(str, paths)])
    return f"{message}. {NO_PLOTS}{command}"


def _rows_of(runs: Sequence[Run]) -> int:
    """The rows of all runs."""
    return sum(len(run.rows) for run in runs)


def report_job(paths: Sequence[Path], out: Path | None, *, show: bool) -> None:
    """Write the page, and with `show` open it in a browser.

    out    the file; None: report.html in the run or, for several runs, in the current directory
    """
    if out is None:
        folder = paths[0] if len(paths) == 1 else Path()
        out = folder / "report.html"
    print(write_report(paths, out))
    if show and not webbrowser.open(out.resolve().as_uri()):
        print(f"no browser could be started here; open {out.resolve()}")


def render(runs: Sequence[Run]) -> tuple[bool, str]:
    """Whether figures could be drawn, and the page."""
    overview = figures.overview(runs)
    of_runs = [figures.plots_of_run(run, str(k)) for k, run in enumerate(runs)]
    plots = list(overview)
    for of_run in of_runs:
        plots += of_run
    drawn = figures.draw_all(plots)
    boxes: dict[str, str] = {}  # name of a plot -> its SVG
    if drawn is not None:
        boxes = {plot.name: svg for plot, svg in zip(plots, drawn, strict=True)}

    style = (ASSETS / "page.css").read_text("utf-8")
    script = (ASSETS / "page.js").read_text("utf-8")
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
            f"Greedy answers of the seed model and of {_both_or_all(runs)} tuned models to the "
            "same prompts; those that drifted most come first. Marked: words that the seed's "
            "answer lacks there."
        ),
        "training": html.escape(
            "The text that the model is trained on, token by token, shaded by how unlikely the "
            "seed model finds each token. The model wrote the rewrites itself, not the references."
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
    """The content-security policy: it allows this style and this script, and nothing else."""
    return (
        f"default-src 'none'; style-src {_hash_source(style)}; script-src {_hash_source(script)}; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    )


def _hash_source(text: str) -> str:
    """The source expression of the policy that allows exactly this text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _data(run: Run) -> dict[str, Any]:
    """The data of sections 3 to 5."""
    inks = run.inks()
    return {
        "name": run.name,
        "arms": [[arm, title, inks[arm]] for arm, title in run.arms.items()],
        "rows": run.rows,
        "answers": run.answers,
        "tokens": run.tokens,
    }


def _both_or_all(runs: Sequence[Run]) -> str:
    """How many tuned models there are, in a word."""
    return "both" if all(len(run.tuned) == 2 for run in runs) else "all"


# ---- sections 1 and 2


def _lede(runs: Sequence[Run]) -> list[Html]:
    """The line under the heading, which names the runs."""
    names = [tag("code", run.name) for run in runs]
    joined = Html(" · ".join(names))
    before = f"{len(runs)} runs side by side: " if len(runs) > 1 else "Run "
    return [tag("span", before), joined]


def _what_was_run(runs: Sequence[Run]) -> Html:
    """Section 1: of each run the findings, the table at a glance, and its facts."""
    parts = []
    for run in runs:
        if len(runs) > 1:
            parts.append(tag("h3", run.name))
        terms = [_term(name, text) for name, text in findings(run)]
        notes = [tag("p", text, class_="note") for text in warnings(run)]
        words = tag("div", tag("dl", *terms, class_="findings"), *notes)
        glance = [[row[i] for i in GLANCE] for row in result_table(run)]
        numbers = table(glance, "At a glance", "arms", list(run.inks().values()))
        parts.append(tag("div", words, numbers, class_="glance"))
        parts.append(_facts(run))
    return Html("".join(parts))


def _term(name: str, text: str) -> Html:
    """An entry of a list of terms."""
    return tag("div", tag("dt", name), tag("dd", text))


def _facts(run: Run) -> Html:
    """Model, data and settings of a run as a list of terms, with every setting folded below."""
    terms = [_term(name, text) for name, text in _fact_texts(run).items()]
    model = run.summary.get("model", {})
    seconds = run.summary["seconds"]
    times = [["Stage", "Seconds"]]
    for stage, value in seconds.items():
        times.append([stage, f"{value:,.0f}"])
    settings = [["Setting", "Value"]]
    for name, value in run.settings.items():
        settings.append([name, str(value)])
    settings.append(["sha256 of the data", run.data_sha256])
    settings.append(["fingerprint of the model", model.get("fingerprint", "unknown")])
    ops = [["Operation", "Function"]]
    for operation, function in model.get("ops_table", {}).items():
        ops.append([operation, function])
    command = " ".join(run.summary["environment"]["command"])
    folded = tag(
        "div",
        _folded(
            f"Times ({seconds['all']:,.0f} s)",
            table(times, "Seconds by stage, of the last process only"),
        ),
        _folded("All settings", table(settings, "Every setting of the run")),
        _folded("Table of operations", table(ops, "The function that computed each operation")),
        _folded("Command", tag("pre", command)),
        class_="folded",
    )
    return Html(tag("dl", *terms, class_="facts") + folded)


def _fact_texts(run: Run) -> dict[str, str]:
    """The terms of `_facts`, and their texts."""
    s = run.settings
    environment = run.summary["environment"]
    model = run.summary.get("model", {})
    turns = f"{len(run.rows):,} turns"
    parameters = f"{model.get('parameters', 0) / 1e6:.0f} M parameters"
    rewrites = [
        f"template {s['DistillConfig.template']}",
        f"cascade {s.get('DistillConfig.cascade', 'guided:1')}",
        f"verified by {s['DistillConfig.verify']}",
        f"temperature {s['SamplerConfig.temperature']}",
        f"top_p {s['SamplerConfig.top_p']}",
        f"top_k {s['SamplerConfig.top_k']}",
    ]
    if s.get("DistillConfig.paper_exact"):
        rewrites.append("as published")
    training = [
        f"{s['TrainConfig.epochs']} x {turns} in batches of {s['TrainConfig.batch_rows']}",
        f"learning rate {s['TrainConfig.lr']:g}",
        f"seed {s['TrainConfig.seed']}",
    ]
    loss = s.get("TrainConfig.loss", "sft")
    if loss != "sft":
        training.append(f"loss {loss}")
    operations = [
        f"table {model.get('ops', '?')}",
        f"{model.get('dtype', '?')} on {model.get('device', '?')}",
        f"{environment['threads']} threads",
    ]
    versions = [
        f"python {environment['python']}",
        f"torch {environment['torch']}",
        f"commit {environment['commit'] or 'unknown'}",
    ]
    rank, alpha = s["LoraConfig.rank"], s["LoraConfig.alpha"]
    return {
        "Model": f"{s['ModelConfig.model']}, {parameters}",
        "Data": f"{s['DataConfig.data']}, {turns}",
        "Held out": str(s["SdftConfig.eval_data"] or "none"),
        "Rewrites": ", ".join(rewrites),
        "LoRA": f"rank {rank}, alpha {alpha:g} on {s['LoraConfig.modules']}",
        "Training": ", ".join(training),
        "Operations": ", ".join(operations),
        "Machine": environment.get("gpu") or f"{environment['machine']} {environment['cpu']}",
        "Versions": ", ".join(versions),
    }


def _folded(summary: str, *children: str) -> Html:
    """A part of the page that a click opens."""
    return tag("details", tag("summary", summary), *children)


def _result(
    runs: Sequence[Run],
    overview: Sequence[figures.Plot],
    of_runs: Sequence[Sequence[figures.Plot]],
    boxes: dict[str, str],
) -> Html:
    """Section 2: the tables and the figures.

    overview    the figure of all runs
    of_runs     the figures of each run
    boxes       the SVG of a figure by its name; {} without matplotlib
    """
    parts = []
    if len(runs) > 1:
        parts += [tag("p", text, class_="note") for text in why_incomparable(runs)]
        parts.append(table(differing_settings(runs), "Settings in which the runs differ"))
    for group, numbers in tables_over_seeds(runs):
        names = ", ".join(run.name for run in group)
        caption = f"Mean and 95 % interval (Student's t) over {len(group)} seeds: {names}"
        parts.append(table(numbers, caption, "arms", list(group[0].inks().values())))
    caption = "Intervals over held-out questions (Wilson) and over prompts (bootstrap)"
    inks = [ink for run in runs for ink in run.inks().values()]
    parts.append(table(results_table(runs), caption, "arms", inks))
    parts.append(
        tag(
            "p",
            "Target: share of held-out questions answered right, greedily. Held-out NLL: nats per "
            "token of the held-out references, lower is better. KL to seed: nats per token over "
            "the seed's own answers to general prompts, lower is less forgotten. KL, task: the "
            "same over its answers to the held-out prompts. Update norm: Frobenius norm of the "
            "adapter's updates s B A together (its share of that of the adapted weights). Loss "
            "tokens and steps: the budgets of the arms.",
            class_="notes",
        )
    )
    for run in runs:
        for caption, numbers in equal_target_tables(run):
            parts.append(table(numbers, f"{caption}: {run.name}"))
        norms = norms_table(run)
        if norms is not None:
            caption = f"Norms of the adapters' updates, by module and layer: {run.name}"
            parts.append(_folded("How far the weights moved", table(norms, caption)))
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
    """Figures with their captions and tables."""
    elements = []
    for plot in plots:
        parts = [tag("figcaption", tag("b", plot.title), " ", plot.caption)]
        if boxes:
            parts.append(Html(boxes[plot.name]))
        numbers = table(plot.table, f"{plot.title}: the numbers")
        parts.append(_folded("As a table", numbers))
        elements.append(tag("figure", *parts))
    return tag("div", *elements, class_="figures")


def _footer(runs: Sequence[Run]) -> str:
    count = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
    return (
        "Written by scripts/report.py. The page holds all its data, loads nothing over the "
        "network, and shows text of models and of data files as text: "
        f"{count}, {_rows_of(runs):,} rows."
    )
