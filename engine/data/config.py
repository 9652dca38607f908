"""Which file is read, and which of its rows (`--data` and the flags beside it)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from engine.data.record_shapes import parse_columns
from engine.data.row_store import StoredRows
from engine.data.rows import ReadRules, Row, Rows, RowStream
from engine.data.sources import DirectoryOfFiles, Source, open_source
from engine.data.table_file import TableFile
from engine.data.thinking import MODES
from engine.runtime.limits import MOST, check_numbers


@dataclass(frozen=True)
class DataConfig:
    """The data file, and which of its rows are used."""

    data: str  # file of rows (JSON, JSONL or CSV, may be gzipped; Parquet or Arrow), a directory of
    #   such files or of a saved Hugging Face data set, or a file of distilled data
    columns: str | None = None  # names of the fields to read, as in prompt=goal,response=target; an
    #   empty id= ignores the ids in the file [default: recognised by their usual names]
    skip_bad: bool = False  # leave out and count unusable rows, instead of stopping with an error
    drop_long: bool = False  # leave out and count turns that are too long, instead of stopping with
    #   an error
    limit: int | None = None  # use only the first N usable rows [default: all]
    system: str | None = None  # system message for rows that have none [default: none]
    thinking: str = "keep"  # thoughts (<think>...</think>) in the answers: keep (text like any
    #   other), strip (removed), or answer-only (the model sees them, but what is trained on and
    #   judged is the answer behind them)

    def check(self) -> None:
        """ValueError for a limit that leaves no row, and for an unknown way with thoughts."""
        check_numbers(self, limit=(1, MOST))
        if self.thinking not in MODES:
            raise ValueError(f"thinking {self.thinking!r}: expected one of {', '.join(MODES)}")

    def load(
        self,
        need_reference: bool = True,
        *,
        check: Callable[[Row], None] | None = None,
    ) -> Rows:
        """The rows; prints how many there are, and what was left out or not used.

        check: raises ValueError for a row that cannot be used, as `template_takes` does for one
        that the chat template refuses.
        """
        stream = self.stream(open_source(self.data), need_reference, check)
        rows = stream.load()
        for line in self.account(stream):
            print(line)
        return rows

    def stored(self, check: Callable[[Row], None] | None = None) -> StoredRows:
        """The rows as `load` reads them, kept on disk instead of in memory; prints the same."""
        stream = self.stream(open_source(self.data), check=check)
        rows = StoredRows(stream)
        for line in self.account(stream):
            print(line)
        return rows

    def stream(
        self,
        source: Source,
        need_reference: bool = True,
        check: Callable[[Row], None] | None = None,
    ) -> RowStream:
        """The rows of an open source one after the other, read as `load` reads the file."""
        rules = ReadRules(
            columns=parse_columns(self.columns) if self.columns else None,
            skip_bad=self.skip_bad,
            limit=self.limit,
            need_reference=need_reference,
            system=self.system,
            thinking=self.thinking,
            check=check,
        )
        return RowStream(source, rules)

    def account(self, stream: RowStream) -> list[str]:
        """What to print of a stream whose rows have all been read, line by line."""
        text = f"data: {stream.count} rows from {self.data}"
        if stream.bad_count:
            text += f", {stream.bad_count} unusable rows left out"
        if stream.inputs:
            text += f", {', '.join(map(repr, stream.inputs))} read as input"
        if stream.unused:
            text += f", fields not used: {', '.join(stream.unused)}"
        source = stream.source
        if isinstance(source, DirectoryOfFiles):
            text += f", of {len(source.files)} files"
            if source.not_read:
                text += f" (not read: {', '.join(source.not_read)})"
        if isinstance(source, TableFile | DirectoryOfFiles) and source.columns_with_gaps:
            columns = ", ".join(sorted(source.columns_with_gaps))
            text += f", keys without a value left out in {columns}"
        lines = [text]
        if stream.context_only:
            lines.append(
                f"data: {stream.context_only} of the assistant's messages are context only, as "
                "they ask"
            )
        return lines

    def beside(self, file: str, limit: int | None) -> DataConfig:
        """Another file read in the same way: held-out rows, validation."""
        return dataclasses.replace(self, data=file, limit=limit)
