"""A JSONL file of answers that a killed job began under the same settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.runtime.files import (
    Kinds,
    cut_torn_line,
    read_jsonl,
    write_json,
    write_jsonl,
)
from engine.runtime.run_record import differing
from model.config import read_json


def resume_lines(out: Path, settings: dict[str, Any], wanted: Kinds) -> list[dict[str, Any]]:
    """Lines of a file that an earlier run of the same settings began.

    ValueError where the settings differ, or a line lacks what is `wanted`.
    """
    meta = meta_of(out)
    if out.exists():
        if not meta.exists():
            raise ValueError(f"{out} exists already and is not ours; choose another name")
        if changes := differing(read_json(meta), settings):
            raise ValueError(
                f"{out} was made under other settings; choose another name or delete it:\n  "
                + "\n  ".join(changes)
            )
    write_json(meta, settings)
    cut_torn_line(out)
    return read_jsonl(out, wanted)


def put_in_order(out: Path, done: Mapping[Any, dict[str, Any]], order: Iterable[Any]) -> None:
    """Have the lines of `out` stand in the order of `order` (keys of `done`), others behind them.

    They were written as they were finished, which is another order in every run.
    """
    ordered = list(dict.fromkeys([*order, *done]))
    if list(done) != ordered:
        write_jsonl(out, [done[key] for key in ordered])


def meta_of(out: Path) -> Path:
    """Where the settings of a JSONL file of results lie."""
    return out.with_name(out.name + ".meta.json")
