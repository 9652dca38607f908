"""Records of CSV: a header, then one record of texts per row."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from engine.data.data_file import MAX_CHARACTERS, DataFile, lines


def csv_records(file: DataFile) -> Iterator[tuple[int, object]]:
    """(line on which the row begins, {column: cell}); line numbers count from 1.

    A ValueError in place of the record for a row with more or fewer cells than the header. Raises
    ValueError for broken quotes, a column name that occurs twice, columns separated by ; tab or |.
    """
    csv.field_size_limit(MAX_CHARACTERS)  # the module's own limit is 131,072 characters
    reader = csv.reader(_csv_lines(file), strict=True)
    header: list[str] = []
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{file.path}:{line}: bad CSV: {error}; repair it") from None
        if cells is None:  # the end of the file
            return
        if cells and not header:  # a blank line has no cells
            _check_header(f"{file.path}:{line}", cells)
            header = cells
        elif cells and len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        elif cells:
            yield line, ValueError(f"{len(cells)} cells, expected {len(header)} as in the header")
        line = reader.line_num + 1


def _csv_lines(file: DataFile) -> Iterator[str]:
    """The lines of a file; a lone "\\r" ends a line too, as in files of old Macs."""
    for line in lines(file):
        yield from io.StringIO(line, newline="")


def _check_header(place: str, header: list[str]) -> None:
    """ValueError for a header that cannot name the columns."""
    if len(set(header)) < len(header):
        raise ValueError(f"{place}: two columns have one name: {header}; rename one")
    separator = re.search("[;\t|]", header[0])
    if len(header) == 1 and separator:
        raise ValueError(
            f"{place}: the columns are separated by {separator[0]!r}, expected commas; save it "
            "again with commas"
        )
