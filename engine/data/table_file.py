"""Tables as data files: Parquet, Arrow, and data sets that the package `datasets` saved on disk

    rows.parquet                             Parquet
    rows.arrow                               an Arrow file or stream (Feather version 2 too)
    DIR/state.json, DIR/*.arrow              what Dataset.save_to_disk writes

They are read with pyarrow (the extra `tables`), which is imported here only, in batches: the first
five rows of a large file take the memory of one batch. A row is a dict, as a JSON object is; in the
objects inside of it keys without a value are left out, since a table gives every object the keys of
all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.data.json_records import Number
from model.file_checks import check_file

PARQUET_MAGIC = b"PAR1"
ARROW_MAGIC = b"ARROW1"
STREAM_MAGIC = b"\xff\xff\xff\xff"
CHUNK_BYTES = 1 << 20  # hashed at a time
BATCH_ROWS = 256  # of a Parquet file, in memory together
SAVED_STATE = "state.json"  # lies in the directory of a saved data set
SAVED_SPLITS = "dataset_dict.json"  # in that of several, one for each split


def is_table(path: Path) -> bool:
    """Whether the file begins as Parquet and Arrow files do, or is a saved data set's directory."""
    if path.is_dir():
        return (path / SAVED_STATE).is_file()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(len(ARROW_MAGIC))
    return beginning.startswith((PARQUET_MAGIC, ARROW_MAGIC, STREAM_MAGIC))


class TableFile:
    """An open table: its rows as dicts, and the hash of the bytes of its files.

    columns_with_gaps    the columns in whose objects keys without a value were left out so far
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns_with_gaps: set[str] = set()
        self._pyarrow = _pyarrow(path)
        self._files = [path]
        if path.is_dir():
            self._files = _files_of_saved(path)
        for file in self._files:
            check_file(file)

    def __enter__(self) -> TableFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # every file is closed when its rows are read

    def records(self) -> Iterator[tuple[int, object]]:
        """(number of the row from 1, row) of all rows, file after file."""
        number = 0
        for file in self._files:
            try:
                for row in self._rows_of(file):
                    number += 1
                    yield number, row
            except (self._pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{file} cannot be read as a table: {error}") from None

    def _rows_of(self, file: Path) -> Iterator[dict]:
        """The rows of one file."""
        with file.open("rb") as opened:
            beginning = opened.read(len(ARROW_MAGIC))
            opened.seek(0)
            if beginning.startswith(PARQUET_MAGIC):
                import pyarrow.parquet

                table = pyarrow.parquet.ParquetFile(opened)
                batches = table.iter_batches(batch_size=BATCH_ROWS)
            elif beginning.startswith(ARROW_MAGIC):
                reader = self._pyarrow.ipc.open_file(opened)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = self._pyarrow.ipc.open_stream(opened)
            for batch in batches:
                for row in batch.to_pylist():
                    yield {name: self._cell(name, value) for name, value in row.items()}

    def _cell(self, column: str, value: Any) -> Any:
        """A cell as JSON would have it: keys without a value left out, numbers with their text."""
        if isinstance(value, dict):
            given = {key: part for key, part in value.items() if part is not None}
            if len(given) < len(value):
                self.columns_with_gaps.add(column)
            return {key: self._cell(column, part) for key, part in given.items()}
        if isinstance(value, list | tuple):
            return [self._cell(column, part) for part in value]
        if isinstance(value, float):
            return Number(repr(value))
        return value

    def sha256(self) -> str:
        """The hash of the bytes of all files, as hex digits."""
        digest = hashlib.sha256()
        for file in self._files:
            with file.open("rb") as opened:
                while chunk := opened.read(CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()


def _pyarrow(path: Path) -> ModuleType:
    """The module; ValueError, saying how to install it, where it is absent."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise ValueError(
            f"{path} is a table (Parquet or Arrow), which needs pyarrow: pip install "
            "'sdft-engine[tables]' (or pip install pyarrow), or write the rows as JSONL"
        ) from None
    return pyarrow


def _files_of_saved(path: Path) -> list[Path]:
    """The files of a saved data set, in their order."""
    state = path / SAVED_STATE
    try:
        entries = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        files = [path / entry["filename"] for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{state} does not list the files of a saved data set ({type(error).__name__}: {error})"
        ) from None
    for file in files:
        if file.parent != path or not file.is_file():
            raise ValueError(f"{state} lists {file.name!r}, which is not in {path}")
    return files
