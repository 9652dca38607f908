"""Write the marked tables of all pages from the records in benchmarks/results/.

    python -m benchmarks.tables            write them
    python -m benchmarks.tables --check    write nothing; exit 1 if a page differs, naming the line
    python -m benchmarks.tables --stale    which tables are older than the code that they measure
    python -m benchmarks.tables --list     names of the tables, to be used in a page as

        <!-- table: NAME -->
        <!-- end -->

A mark stands alone on its line. Figures are changed by running a benchmark again (it appends a
record, newer records win), never by hand.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from benchmarks.tables import kernels, real_data, rivals, sampling, speed, stale, training
from benchmarks.tables.pages import blocks, filled, first_difference, pages
from benchmarks.tables.records import RESULTS, ROOT, Record, load_records
from benchmarks.tables.table import Definition
from engine.runtime.files import write_text

DEFINITIONS: dict[str, Definition] = {
    **real_data.DEFINITIONS,
    **rivals.DEFINITIONS,
    **speed.DEFINITIONS,
    **kernels.DEFINITIONS,
    **training.DEFINITIONS,
    **sampling.DEFINITIONS,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail if a page differs")
    action.add_argument("--stale", action="store_true", help="tables older than their code")
    action.add_argument("--list", action="store_true", help="names of the tables")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds the pages")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    return parser.parse_args(argv)


def update(root: Path, records: list[Record], check: bool) -> list[str]:
    """Write the pages, or only compare them; a line for every page that differs."""

    @functools.cache
    def markdown(name: str) -> str:
        return DEFINITIONS[name].build(records).markdown()

    tables = {name: functools.partial(markdown, name) for name in DEFINITIONS}
    told = []
    for path in pages(root):
        page = path.relative_to(root).as_posix()
        old = path.read_text(encoding="utf-8")
        new = filled(old, page, tables)
        if new == old:
            continue
        if not check:
            write_text(path, new)
            told.append(f"{page}: written")
            continue
        number, is_now, should_be = first_difference(old, new)
        told.append(f"{page}:{number}: {is_now!r} should be {should_be!r}")
    return told


def used_names(root: Path) -> list[str]:
    """Names of the tables that stand in a page, in the order of DEFINITIONS."""
    used = set()
    for path in pages(root):
        text = path.read_text(encoding="utf-8")
        used |= {block.name for block in blocks(text, path.relative_to(root).as_posix())}
    return [name for name in DEFINITIONS if name in used]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        for name, definition in DEFINITIONS.items():
            print(f"{name:22} {definition.summary}")
        return 0
    records = load_records(args.results)
    if args.stale:
        used = used_names(args.root)
        print(
            stale.report(
                {name: DEFINITIONS[name].build(records).records for name in used}, args.root
            )
        )
        return 0
    told = update(args.root, records, args.check)
    for line in told:
        print(line)
    if args.check and told:
        print("pages differ from the records; `python -m benchmarks.tables` writes them")
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(str(error))
