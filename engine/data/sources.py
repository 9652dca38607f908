"""Where rows come from: a text file, a table, or a directory of such files

    with open_source("train.parquet") as source:
        for place, record in source_records(source): ...      # Place: file and line
    source.sha256()

A directory is one source: its data files in the order of their names. Each keeps its own lines in
messages, and an id must be unique among all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.data.data_file import DataFile
from engine.data.records import records
from engine.data.table_file import SAVED_SPLITS, TableFile, is_table

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".arrow", ".feather")


class Place(NamedTuple):
    """Where a record stands."""

    file: Path
    line: int  # on which it begins, counted from 1; of a table the number of the row


class DirectoryOfFiles:
    """The data files of a directory, opened one after the other; `names` are those of the files.

    Files of other kinds and hidden ones are not read; `not_read` has their names. ValueError where
    there is no data file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[Path] = []
        self.not_read: list[str] = []
        folders: list[str] = []
        for entry in sorted(path.iterdir(), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            suffix = Path(entry.name.lower().removesuffix(".gz")).suffix
            if entry.is_dir():
                folders.append(entry.name)
            elif suffix in SUFFIXES:
                self.files.append(entry)
            else:
                self.not_read.append(entry.name)
        if not self.files:
            within = f"; it holds the directories {', '.join(folders)}: give one" if folders else ""
            raise ValueError(
                f"{path} is a directory without a data file ({', '.join(SUFFIXES)}, or gzipped)"
                f"{within}"
            )
        self.not_read += [f"{name}/" for name in folders]
        self.columns_with_gaps: set[str] = set()  # of its tables (TableFile)
        self._hashes: dict[Path, str] = {}  # of the files that were read

    def __enter__(self) -> DirectoryOfFiles:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # every file is closed when its records are read

    def records(self) -> Iterator[tuple[Place, object]]:
        """(Place, record) of every file."""
        for file in self.files:
            with open_source(file) as source:
                yield from source_records(source)
                self._hashes[file] = source.sha256()
                if isinstance(source, TableFile):
                    self.columns_with_gaps |= source.columns_with_gaps

    def sha256(self) -> str:
        """A hash of the names and the bytes of all files, as hex digits."""
        digest = hashlib.sha256()
        for file in self.files:
            if file not in self._hashes:
                with open_source(file) as source:
                    self._hashes[file] = source.sha256()
            digest.update(f"{file.name} {self._hashes[file]}\n".encode())
        return digest.hexdigest()


Source = DataFile | TableFile | DirectoryOfFiles


def open_source(path: str | Path | Source) -> Source:
    """The source of a path, or `path` itself if it is one already.

    ValueError for what holds no rows: a pipe, a file of another kind, a data set of several splits.
    """
    if isinstance(path, DataFile | TableFile | DirectoryOfFiles):
        return path
    path = Path(path)
    if is_table(path):
        return TableFile(path)
    if not path.is_dir():
        return DataFile(path)
    if (path / SAVED_SPLITS).is_file():
        splits = [entry.name for entry in sorted(path.iterdir()) if is_table(entry)]
        named = ", ".join(splits) or "none found"
        raise ValueError(f"{path} is a saved data set with several splits ({named}): give one")
    return DirectoryOfFiles(path)


def source_records(source: Source) -> Iterator[tuple[Place, object]]:
    """(Place, record); a ValueError in place of a record that is unreadable."""
    if isinstance(source, DirectoryOfFiles):
        yield from source.records()
        return
    numbered = source.records() if isinstance(source, TableFile) else records(source)
    for line, record in numbered:
        yield Place(source.path, line), record
