"""The two files of an audit: audit.html, which loads nothing else, and audit.txt

Both show every function of ours that ran, in the order of the first calls. Every text passes `tag`,
which escapes it; the page has no script, and its policy allows its own style only.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from engine.jobs.audit_records import Record, Trace
from engine.jobs.audit_source import source_of
from engine.report.page import Html, tag
from engine.runtime.terminal import aligned

STYLE = Path(__file__).with_name("audit_page.css")
COLUMNS = [
    "room",
    "functions",
    "code lines run",
    "code lines of the functions",
    "code lines of the files",
    "files",
]
UNTRACED = "compiled: its lines are not traced, all count as run"
LEGEND = (
    tag("span", "solid bar: the line ran", class_="ran"),
    tag("span", "dotted bar: it did not", class_="idle"),
    tag("span", "no bar: a comment or a docstring"),
)
MARKS = {"ran": "+", "idle": "-", "text": " "}  # in audit.txt


@dataclass(frozen=True)
class Counts:
    """The size of the code that ran, in one room or in all of them."""

    functions: int
    lines_run: int  # code lines in statements of which a line ran
    lines_of_functions: int  # code lines
    lines_of_files: int  # code lines of every file of which a function ran
    files: int

    @classmethod
    def of(cls, records: list[Record]) -> Counts:
        """The counts of these functions."""
        lines_run = 0
        lines_of_functions = 0
        files = {}
        for record in records:
            source = source_of(record.function)
            lines_run += len(record.ran)
            lines_of_functions += len(source.code_of(record.function))
            files[source.path] = source
        return cls(
            functions=len(records),
            lines_run=lines_run,
            lines_of_functions=lines_of_functions,
            lines_of_files=sum(len(source.code) for source in files.values()),
            files=len(files),
        )

    def cells(self) -> list[str]:
        """The numbers of a row of the table, in the order of COLUMNS."""
        return [
            f"{self.functions:,}",
            f"{self.lines_run:,}",
            f"{self.lines_of_functions:,}",
            f"{self.lines_of_files:,}",
            f"{self.files:,}",
        ]


def count_table(trace: Trace) -> list[list[str]]:
    """COLUMNS, a row per room in the order of the first calls, and the total."""
    records = list(trace.records.values())
    rooms: dict[str, list[Record]] = {}
    for record in records:
        rooms.setdefault(record.function.room, []).append(record)
    rows = [[room, *Counts.of(of_room).cells()] for room, of_room in rooms.items()]
    total = ["total", *Counts.of(records).cells()]
    return [COLUMNS, *rows, total]


# ---- one function


class Fact(NamedTuple):
    """A heading, and what is known under it, line by line."""

    heading: str
    lines: list[str]


class MarkedLine(NamedTuple):
    """A line of a function's source."""

    number: int
    mark: str  # "ran", "idle", or "text" for a blank line, a comment or a docstring
    text: str


def facts(record: Record) -> list[Fact]:
    """What is known of the calls of a function; headings without a line are left out."""
    found: list[Fact] = []
    launch = record.launch
    if launch is not None:
        grid = " x ".join(str(size) for size in launch.grid)
        launches = f"{times(record.launches)}; first over a grid of {grid}"
        constants = ", ".join(f"{name} = {value}" for name, value in launch.constants.items())
        found.append(Fact("launched", [launches]))
        found.append(Fact("constants", [constants]))
        found.append(Fact("launched with", _named_lines(launch.arguments)))
        if record.calls:
            programs = f"{record.calls:,}, in triton's interpreter"
            found.append(Fact("programs", [programs]))
    elif record.calls:
        found.append(Fact("called", [times(record.calls)]))
        found.append(Fact("arguments", _named_lines(record.arguments)))
        found.append(Fact("result", record.results))
    if record.untraced:
        found.append(Fact("lines", [UNTRACED]))
    if record.torch:
        calls = ", ".join(f"{name} ({count:,})" for name, count in record.torch.items())
        found.append(Fact("calls in torch", [calls]))
    return [fact for fact in found if fact.lines]


def _named_lines(named: Iterable[tuple[str, str]]) -> list[str]:
    """A line for every name and its text."""
    return [f"{name}: {text}" for name, text in named]


def times(count: int) -> str:
    """ "once", "12 times" """
    return "once" if count == 1 else f"{count:,} times"


def marked_lines(record: Record) -> list[MarkedLine]:
    """Every line of the function."""
    source = source_of(record.function)
    ran = record.ran
    marked = []
    for number in source.lines_of(record.function):
        mark = "text"
        if number in source.code:
            mark = "ran" if number in ran else "idle"
        marked.append(MarkedLine(number, mark, source.lines[number - 1]))
    return marked


def short_name(record: Record) -> str:
    """The name inside its file: RunningSequence.append."""
    function = record.function
    parts = function.name.split(".")
    if function.path.endswith(".c"):
        return parts[-1]
    module = function.path.removesuffix(".py").removesuffix("/__init__")
    of_module = len(module.split("/"))  # leading parts that name the module
    return ".".join(parts[of_module:])


# ---- audit.html


def render_page(title: str, about: str, trace: Trace, verdict: list[str]) -> str:
    """The page.

    about      the model and the operations
    verdict    the lines under the table: the violations, or one line that there are none
    """
    records = list(trace.records.values())
    navigation = tag(
        "nav", tag("h2", "In reading order"), _side_list(records), aria_label="Functions"
    )
    sections = [_section(number, record) for number, record in enumerate(records, 1)]
    content = tag(
        "main",
        tag("h1", title),
        tag("p", about, class_="lede"),
        tag("p", *LEGEND, class_="legend"),
        _html_table(count_table(trace)),
        *[_verdict_line(line) for line in verdict],
        *sections,
    )
    return f"{_head(title)}{navigation}\n{content}\n</body>\n</html>\n"


def _head(title: str) -> str:
    """The page up to its body, with the style and the policy that allows no other."""
    style = STYLE.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"{tag('title', title)}\n<style>{style}</style>\n</head>\n<body>\n"
    )


def _verdict_line(line: str) -> Html:
    """A violation, or the line "no autograd, ..."."""
    return tag("p", line, class_="good" if line.startswith("no ") else "bad")


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
    """The table of counts; the first row and the first column are headers."""
    header, *others = rows
    head = tag("tr", *[tag("th", cell, scope="col") for cell in header])
    body = []
    for name, *numbers in others:
        cells = [tag("td", number) for number in numbers]
        body.append(tag("tr", tag("th", name, scope="row"), *cells))
    caption = "What ran, per room. Code lines are not blank, comments or docstrings."
    whole = tag(
        "table", tag("caption", tag("span", caption)), tag("thead", head), tag("tbody", *body)
    )
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _section(number: int, record: Record) -> Html:
    """A function: where it stands, what is known of its calls, its marked source."""
    function = record.function
    heading = tag("h3", tag("span", f"{number}. "), short_name(record))
    where: list[str] = [f"{function.path}, lines {function.first} to {function.last}"]
    if record.called_from:
        where.append(", first called from ")
        where.append(tag("a", record.called_from, href=f"#{record.called_from}"))

    known = []
    for fact in facts(record):
        texts = [tag("div", line) for line in fact.lines]
        known.append(tag("div", tag("dt", fact.heading), tag("dd", *texts)))

    source = []
    for line in marked_lines(record):
        line_number = tag("b", str(line.number))
        source.append(tag("span", line_number, line.text, class_=line.mark))
    return tag(
        "section",
        heading,
        tag("p", *where, class_="where"),
        tag("dl", *known),
        tag("pre", *source, tabindex="0"),
        id=function.name,
    )


# ---- audit.txt


def render_text(title: str, about: str, trace: Trace, verdict: list[str]) -> str:
    """The same as plain text: `+` stands before lines that ran, `-` before those that did not."""
    lines = [title, about, "", text_table(count_table(trace)), "", *verdict]
    for number, record in enumerate(trace.records.values(), 1):
        function = record.function
        where = f"{function.path}:{function.first}-{function.last}"
        if record.called_from:
            where += f", first called from {record.called_from}"
        lines += ["", f"{number}. {function.name}", f"   {where}"]
        for fact in facts(record):
            lines += [f"   {fact.heading}: {line}" for line in fact.lines]
        for line in marked_lines(record):
            lines.append(f"{line.number:5} {MARKS[line.mark]} {line.text}".rstrip())
    return "\n".join(lines) + "\n"


def text_table(rows: list[list[str]]) -> str:
    """The counts as aligned text, without a rule under the header."""
    lines, _ = aligned(rows)
    return "\n".join(lines)
