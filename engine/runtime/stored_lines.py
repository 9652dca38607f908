"""JSONL files of results that may be larger than memory

    ResumedOnDisk    as ResumedLines (resumable.py): finished lines are kept, in the order of the
                     data; but of a line its id and its place are held, in a temporary table
    LinesById        the finished lines of one or several files, by their ids
    LinesOfFile      the first lines of a finished file, as a sequence

A line is read from its file when it is asked for. The files stay open: lines can be read after the
file was replaced or deleted.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from engine.runtime.files import PlacedLine, placed_lines
from engine.runtime.on_demand import OnDemand
from engine.runtime.resumable import Line, ResumedLines
from engine.runtime.temporary import TemporaryNumbers, TemporaryTable, as_key, of_key
from model.durable import file_beside

Made = TypeVar("Made")


class _OpenFile:
    """A file of which lines are read by their places, whatever becomes of its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self.descriptor)

    def bytes_at(self, begin: int, size: int) -> bytes:
        """Bytes of the file; ValueError where it has become shorter."""
        data = os.pread(self.descriptor, size, begin)
        if len(data) < size:
            raise ValueError(f"{self.path} was cut while it was read; start the same command again")
        return data


class LinesById(TemporaryTable, Mapping[str, Line]):
    """Lines of JSONL files by their ids, in the order in which they were added."""

    def __init__(self) -> None:
        super().__init__(
            "CREATE TABLE lines (id BLOB PRIMARY KEY, place INT, file INT, begin INT, size INT,"
            " asked INT) WITHOUT ROWID"
        )
        self._files: list[_OpenFile] = []
        self._places = 0  # lines that were added, those with equal ids too
        weakref.finalize(self, self._database.close)

    def open(self, path: Path) -> int:
        """The number of a file, of which lines can be added from then on."""
        self._files.append(_OpenFile(path))
        return len(self._files) - 1

    def add(self, file: int, line: PlacedLine) -> None:
        """Add a line of a file with this number, unless one with its id is there."""
        self._insert("INSERT OR IGNORE", file, line)

    def put(self, file: int, line: PlacedLine) -> None:
        """Add a line in the place of one with its id."""
        self._execute("DELETE FROM lines WHERE id = ?", (as_key(line.record["id"]),))
        self._insert("INSERT", file, line)

    def _insert(self, how: str, file: int, line: PlacedLine) -> None:
        values = (as_key(line.record["id"]), self._places, file, line.begin, line.size)
        self._execute(f"{how} INTO lines VALUES (?, ?, ?, ?, ?, 0)", values)
        self._places += 1

    def clear(self) -> None:
        """Forget all lines and files."""
        self._execute("DELETE FROM lines")
        self._files.clear()
        self._places = 0

    def __len__(self) -> int:
        return self._first("SELECT COUNT(*) FROM lines")[0]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.place_of(name) is not None

    def __getitem__(self, name: str) -> Line:
        return json.loads(self.bytes_of(name))

    def __iter__(self) -> Iterator[str]:
        for (key,) in self._each("SELECT id FROM lines ORDER BY place"):
            yield of_key(key)

    def place_of(self, name: str) -> int | None:
        """How many lines were added before the one with this id; None without it."""
        found = self._first("SELECT place FROM lines WHERE id = ?", (as_key(name),))
        return None if found is None else found[0]

    def bytes_of(self, name: str) -> bytes:
        """A line as it stands in its file; KeyError where there is none."""
        query = "SELECT file, begin, size FROM lines WHERE id = ?"
        found = self._first(query, (as_key(name),))
        if found is None:
            raise KeyError(name)
        file, begin, size = found
        return self._files[file].bytes_at(begin, size)

    def are_in_order(self, names: Iterable[str]) -> bool:
        """Whether the first lines are those with these ids, in this order, and no id is twice."""
        if len(self) < self._places:
            return False
        return all(self.place_of(name) == place for place, name in enumerate(names))

    def in_order(self, names: Iterable[str]) -> Iterator[bytes]:
        """The lines with these ids in this order, then the others in theirs."""
        for name in names:
            yield self.bytes_of(name)
            self._execute("UPDATE lines SET asked = 1 WHERE id = ?", (as_key(name),))
        others = "SELECT id FROM lines WHERE asked = 0 ORDER BY place"
        for (key,) in self._each(others):
            yield self.bytes_of(of_key(key))


class ResumedOnDisk(ResumedLines):
    """ResumedLines whose finished lines (`done`) are read from the disk. The key is the id."""

    done: LinesById

    def __init__(self, out: Path, settings: dict[str, Any], **options: Any) -> None:
        """The arguments of ResumedLines, but for `key` and `keep`."""
        super().__init__(out, settings, **options)
        self._own_number = self.done.open(self.file.path)

    def _no_lines(self) -> LinesById:
        return LinesById()

    def write(self, line: Line) -> None:
        """Append a finished line."""
        self.done.put(self._own_number, self.file.write(line))

    def put_in_order(self, names: Iterable[str]) -> None:
        """Put the lines of these ids in that order; lines of other ids stay after them.

        names: iterated twice. KeyError where a line is not there. Of all processes together.
        """
        self.world.barrier()
        if self.world.size > 1:
            for file in self.parts():
                self._read(file)
        parts = self.parts()
        is_in_order = not parts and self.done.are_in_order(names)
        if self.world.is_rank0 and not is_in_order:
            with file_beside(self.out) as beside, beside.open("wb") as file:
                for line in self.done.in_order(names):
                    file.write(line)
        self.world.barrier()
        if self.world.is_rank0:
            for file in parts:
                file.unlink()
        if not is_in_order:
            self.done.clear()
            self._read(self.out)
        self.world.barrier()

    def lines(self, count: int, make: Callable[[Line], Made]) -> LinesOfFile[Made]:
        """The first `count` lines of OUT, after `put_in_order`."""
        return LinesOfFile(self.out, count, make)

    def _read(self, file: Path) -> None:
        """Add the finished lines of OUT or a part to `done`."""
        if not file.exists():
            return
        number = self.done.open(file)
        wanted = {"id": str, **(self.wanted or {})}
        for line in placed_lines(file, wanted):
            self.done.add(number, line)


class LinesOfFile(OnDemand[Made]):
    """The first `count` lines of a JSONL file; each is read when it is asked for.

    make    makes of the object of a line what the sequence holds
    """

    def __init__(self, path: Path, count: int, make: Callable[[Line], Made]) -> None:
        """ValueError where the file has fewer lines."""
        self._file = _OpenFile(path)
        self._make = make
        self._count = count
        self._begins = TemporaryNumbers()  # bytes before every line, and after the last one
        self._begins.append(0)
        with path.open("rb") as file:
            end = 0
            for number in range(count):
                line = file.readline()
                if not line.endswith(b"\n"):
                    raise ValueError(f"{path} has {number} whole lines, expected {count}")
                end += len(line)
                self._begins.append(end)

    def __len__(self) -> int:
        return self._count

    def item(self, number: int) -> Made:
        begin, end = self._begins[number], self._begins[number + 1]
        return self._make(json.loads(self._file.bytes_at(begin, end - begin)))
