"""The two files of an audit: audit.html, which loads nothing else, and audit.txt

Both show every function of ours that ran, in the order of the first calls. Every text passes `tag`,
which escapes it; the page has no script, and its policy allows its own style only.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from engine.jobs.audit_source import source_of
from engine.jobs.audit_trace import Record, Trace
from engine.report.page import Html, tag

STYLE = Path(__file__).with_name("audit_page.css")
COLUMNS = (
    "room",
    "functions",
    "code lines run",
    "code lines of the functions",
    "code lines of the files",
    "files",
)
UNTRACED = "compiled: its lines are not traced, all count as run"
LEGEND = (
    tag("span", "solid bar: the line ran", class_="ran"),
    tag("span", "dotted bar: it did not", class_="idle"),
    tag("span", "no bar: a comment or a docstring"),
)
MARKS = {"ran": "+", "idle": "-", "text": " "}  # in audit.txt


@dataclass(frozen=True)
class Counts:
    """What ran in a room, or in all of them."""

    functions: int
    lines_run: int  # code lines in statements of which a line ran
    lines_of_functions: int  # code lines
    lines_of_files: int  # code lines of every file of which a function ran
    files: int

    @classmethod
    def of(cls, records: list[Record]) -> Counts:
        files = {record.function.path: source_of(record.function) for record in records}
        return cls(
            functions=len(records),
            lines_run=sum(len(record.ran) for record in records),
            lines_of_functions=sum(
                len(source_of(record.function).code_of(record.function)) for record in records
            ),
            lines_of_files=sum(len(source.code) for source in files.values()),
            files=len(files),
        )

    def cells(self) -> list[str]:
        numbers = (
            self.functions,
            self.lines_run,
            self.lines_of_functions,
            self.lines_of_files,
            self.files,
        )
        return [f"{number:,}" for number in numbers]


def count_table(trace: Trace) -> list[list[str]]:
    """A row per room, in the order of the first calls, and the total."""
    rooms: dict[str, list[Record]] = {}
    for record in trace.records.values():
        rooms.setdefault(record.function.room, []).append(record)
    rows = [[room, *Counts.of(records).cells()] for room, records in rooms.items()]
    total = Counts.of(list(trace.records.values()))
    return [list(COLUMNS), *rows, ["total", *total.cells()]]


# ---- one function


def facts(record: Record) -> list[tuple[str, list[str]]]:
    """What is known of the calls: a heading and its lines."""
    found: list[tuple[str, list[str]]] = []
    launch = record.launch
    if launch is not None:
        grid = " x ".join(map(str, launch.grid))
        found.append(("launched", [f"{times(record.launches)}; first over a grid of {grid}"]))
        constants = [f"{name} = {value}" for name, value in launch.constants.items()]
        found.append(("constants", [", ".join(constants)]))
        found.append(("launched with", [f"{name}: {text}" for name, text in launch.arguments]))
        if record.calls:
            found.append(("programs", [f"{record.calls:,}, in triton's interpreter"]))
    elif record.calls:
        found.append(("called", [times(record.calls)]))
        found.append(("arguments", [f"{name}: {text}" for name, text in record.arguments]))
        found.append(("result", record.results))
    if record.untraced:
        found.append(("lines", [UNTRACED]))
    calls = [f"{name} ({n:,})" for name, n in record.torch.items()]
    found.append(("calls in torch", [", ".join(calls)] if calls else []))
    return [(heading, lines) for heading, lines in found if lines]


def times(count: int) -> str:
    """ "once", "12 times" """
    return "once" if count == 1 else f"{count:,} times"


def marked_lines(record: Record) -> list[tuple[int, str, str]]:
    """(number, "ran", "idle" or "text", the line) of every line of the function."""
    source, ran = source_of(record.function), record.ran
    marked = []
    for number in source.lines_of(record.function):
        mark = "text"  # blank, a comment or a docstring
        if number in source.code:
            mark = "ran" if number in ran else "idle"
        marked.append((number, mark, source.lines[number - 1]))
    return marked


def short_name(record: Record) -> str:
    """The name inside its file: RunningSequence.append."""
    parts = record.function.name.split(".")
    module = record.function.path.rpartition(".")[0].removesuffix("/__init__").count("/") + 1
    is_c = record.function.path.endswith(".c")
    return parts[-1] if is_c else ".".join(parts[module:])


# ---- audit.html


def render_page(title: str, about: str, trace: Trace, said: list[str]) -> str:
    """The page. about: what was run. said: the lines under the table, findings first."""
    style = STYLE.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"{tag('title', title)}\n<style>{style}</style>\n</head>\n<body>\n"
    )
    records = list(trace.records.values())
    body = [
        tag("nav", tag("h2", "In reading order"), _side_list(records), aria_label="Functions"),
        tag(
            "main",
            tag("h1", title),
            tag("p", about, class_="lede"),
            tag("p", *LEGEND, class_="legend"),
            _html_table(count_table(trace)),
            *(tag("p", line, class_="good" if line.startswith("no ") else "bad") for line in said),
            *(_section(number, record) for number, record in enumerate(records, 1)),
        ),
    ]
    return head + "\n".join(body) + "\n</body>\n</html>\n"


def _side_list(records: list[Record]) -> Html:
    """Links to the functions; where the file changes, its path."""
    items = []
    for path, group in groupby(records, key=lambda record: record.function.path):
        items.append(tag("li", path, class_="room"))
        for record in group:
            link = tag("a", short_name(record), href=f"#{record.function.name}")
            items.append(tag("li", link))
    return tag("ol", *items)


def _html_table(rows: list[list[str]]) -> Html:
    head = tag("tr", *(tag("th", cell, scope="col") for cell in rows[0]))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows[1:]
    ]
    caption = "What ran, per room. Code lines are not blank, comments or docstrings."
    whole = tag(
        "table", tag("caption", tag("span", caption)), tag("thead", head), tag("tbody", *body)
    )
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _section(number: int, record: Record) -> Html:
    function = record.function
    heading = tag("h3", tag("span", f"{number}. "), short_name(record))
    where: list[str] = [f"{function.path}, lines {function.first} to {function.last}"]
    if record.called_from:
        where += [
            ", first called from ",
            tag("a", record.called_from, href=f"#{record.called_from}"),
        ]
    listed = [
        tag("div", tag("dt", name), tag("dd", *(tag("div", line) for line in lines)))
        for name, lines in facts(record)
    ]
    lines = [
        tag("span", tag("b", str(line_number)), text, class_=mark)
        for line_number, mark, text in marked_lines(record)
    ]
    return tag(
        "section",
        heading,
        tag("p", *where, class_="where"),
        tag("dl", *listed),
        tag("pre", *lines, tabindex="0"),
        id=function.name,
    )


# ---- audit.txt


def render_text(title: str, about: str, trace: Trace, said: list[str]) -> str:
    """The same as plain text: `+` stands before lines that ran, `-` before those that did not."""
    parts = [title, about, "", text_table(count_table(trace)), "", *said]
    for number, record in enumerate(trace.records.values(), 1):
        function = record.function
        parts += ["", f"{number}. {function.name}"]
        where = f"{function.path}:{function.first}-{function.last}"
        if record.called_from:
            where += f", first called from {record.called_from}"
        parts.append(f"   {where}")
        for heading, lines in facts(record):
            parts += [f"   {heading}: {line}" for line in lines]
        parts += [
            f"{line_number:5} {MARKS[mark]} {text}".rstrip()
            for line_number, mark, text in marked_lines(record)
        ]
    return "\n".join(parts) + "\n"


def text_table(rows: list[list[str]]) -> str:
    """Columns of equal width, the first left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *others]))
    return "\n".join(lines)
