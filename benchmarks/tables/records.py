"""The records of benchmarks/results/*.jsonl: one JSON document a line, one file per benchmark.

A record says where it comes from in `environment`: `commit`, `date`, `device` (CPU model or GPU
name), `threads`, `torch`, `triton`. Three further fields are written by hand where they are known:

    tree        the source tree that ran, where `commit` names another one
    stated_in   the commit that first stated the figures, where the commit that ran is not known
    source      the origin of figures that no benchmark wrote down
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Record:
    """One line of one file."""

    kind: str  # name of the benchmark, and of the file without its ending
    line: int  # of the file, from 1
    data: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    @property
    def environment(self) -> dict[str, Any]:
        return self.data["environment"]

    @property
    def file(self) -> str:
        return f"benchmarks/results/{self.kind}.jsonl"

    @property
    def date(self) -> str:
        """YYYY-MM-DD, or "" where it is not known."""
        return (self.environment.get("date") or self.data.get("when") or "")[:10]

    @property
    def commit(self) -> str | None:
        """Short hash of the code that ran, else of the page that stated the figures, else None."""
        tree = self.environment.get("tree")
        if tree:
            return tree.split()[0]
        commit = self.environment.get("commit") or self.environment.get("stated_in")
        return commit.rstrip("+") if commit else None

    @property
    def commit_text(self) -> str:
        """The commit as a page shows it; a + stands for uncommitted changes."""
        environment = self.environment
        if environment.get("tree"):
            return environment["tree"].split(";")[0]
        if environment.get("commit"):
            return environment["commit"]
        if environment.get("stated_in"):
            return f"not recorded, at the latest {environment['stated_in']}"
        return "not recorded"

    @property
    def machine(self) -> str:
        """The device with the versions of the software, as far as they were recorded."""
        environment = self.environment
        device = environment.get("device") or environment["machine"]
        parts = []
        if environment.get("gpu") is None and environment.get("threads"):
            threads = environment["threads"]
            parts.append("1 thread" if threads == 1 else f"{threads} threads")
        for name in ("driver", "torch", "triton"):
            if environment.get(name):
                parts.append(f"{name} {environment[name]}")
        return f"{device} ({', '.join(parts)})" if parts else device


def load_records(folder: Path = RESULTS) -> list[Record]:
    """All records, oldest first; those of one date in the order of their lines.

    ValueError, with file and line, for a line that is not a record.
    """
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            records.append(_record(path, number, line))
    return sorted(records, key=lambda record: (record.kind, record.date, record.line))


def _record(path: Path, number: int, line: str) -> Record:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON: {error}; mend or remove the line") from None
    named = data.get("benchmark") if isinstance(data, dict) else None
    if named != path.stem or not isinstance(data.get("environment"), dict):
        raise ValueError(
            f"{path}:{number}: expected an object with "
            f'"benchmark": "{path.stem}" and an "environment", got benchmark {named!r}'
        )
    return Record(path.stem, number, data)


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    return [record for record in records if record.kind == kind]


def newest(fitting: Sequence[Record], what: str) -> Record:
    """The last of the records. ValueError, saying what they should be, where there is none."""
    if not fitting:
        raise ValueError(f"no record of {what} in benchmarks/results")
    return fitting[-1]


def origin(records: Iterable[Record]) -> str:
    """One paragraph: machine, commits with dates, files. The order is that of the records."""
    by_machine: dict[str, dict[str, None]] = {}  # dicts keep the order and drop repetitions
    files: dict[str, None] = {}
    sources: dict[str, None] = {}
    for record in records:
        when = f" ({record.date})" if record.date else ""
        by_machine.setdefault(record.machine, {})[f"{record.commit_text}{when}"] = None
        files[f"`{record.file}`"] = None
        if record.environment.get("source"):
            sources[record.environment["source"]] = None
    measured = [f"{machine}, commit {', '.join(at)}" for machine, at in by_machine.items()]
    text = f"Measured on {'; on '.join(measured)}. Records: {', '.join(files)}"
    return text + (f" ({'; '.join(sources)})." if sources else ".")
