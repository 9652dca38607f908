"""What a job keeps in temporary files because it may be larger than memory

    TemporaryTable     tables of texts by ids (SQLite): a few MB in memory, the rest in a file
    TemporaryNumbers   integers by their place, 8 bytes each
    temporary_file     an open file without a name

All of it is gone when it is closed, and when the process ends. The files lie in the folder that
TMPDIR names, else in /var/tmp or /tmp, in this order: /tmp is memory on many machines.
"""

from __future__ import annotations

import array
import contextlib
import os
import sqlite3
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any, BinaryIO

CACHE_KIB = 8192  # of a table, in memory
_SETTINGS = (
    f"PRAGMA cache_size = -{CACHE_KIB}",  # a negative number counts KiB
    "PRAGMA journal_mode = OFF",  # a temporary database is never rolled back
    "PRAGMA synchronous = OFF",
)
NUMBER_BYTES = 8
NUMBERS_AT_ONCE = 4096  # written or read together
_ADVICE = "name a folder for temporary files with more room: TMPDIR=FOLDER, and start again"


class TemporaryTable:
    """A temporary database with the tables that `schema` makes. Ids are compared as texts."""

    def __init__(self, *schema: str) -> None:
        # any thread may close it: the garbage collector's
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for statement in (*_SETTINGS, *schema, "BEGIN"):
            self._database.execute(statement)

    def close(self) -> None:
        """Forget everything, and delete the temporary file."""
        self._database.close()

    def _first(self, query: str, values: tuple = ()) -> tuple | None:
        """The first row that a query finds, None without one."""
        with _room_is_needed():
            return self._database.execute(query, values).fetchone()

    def _each(self, query: str) -> Iterator[tuple]:
        """The rows that a query finds, one after the other."""
        with _room_is_needed():
            yield from self._database.execute(query)

    def _execute(self, statement: str, values: tuple = ()) -> int:
        """Do a statement; returns how many rows it changed."""
        with _room_is_needed():
            return self._database.execute(statement, values).rowcount


def as_key(name: str) -> bytes:
    """An id or a text as a table holds it; JSON can write texts that UTF-8 cannot."""
    return name.encode("utf-8", "surrogatepass")


def of_key(key: bytes) -> str:
    """The id or the text that `as_key` made a key of."""
    return key.decode("utf-8", "surrogatepass")


@contextlib.contextmanager
def _room_is_needed() -> Iterator[None]:
    """Inside `with`, OSError that says what to do where the temporary file cannot grow."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(
            f"the ids of the rows do not fit in the folder for temporary files ({error}); {_ADVICE}"
        ) from None


def temporary_folder() -> str:
    """The folder for temporary files."""
    for folder in (os.environ.get("TMPDIR"), "/var/tmp"):
        if folder and os.access(folder, os.W_OK | os.X_OK):
            return folder
    return tempfile.gettempdir()


def temporary_file() -> BinaryIO:
    """An open file without a name, unbuffered; the system deletes it when it is closed."""
    file: Any = tempfile.TemporaryFile(buffering=0, dir=temporary_folder())
    return file


def write_temporary(file: BinaryIO, data: bytes) -> None:
    """Append bytes to a temporary file; OSError that says what to do where they do not fit."""
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]  # perhaps a part of them
    except OSError as error:
        raise OSError(
            f"the rows do not fit in the folder for temporary files ({error.strerror}); {_ADVICE}"
        ) from None


class TemporaryNumbers:
    """Integers (64 bits, signed) by their place from 0, in a temporary file."""

    def __init__(self) -> None:
        self._file = temporary_file()
        self._written = 0  # numbers in the file
        self._new = array.array("q")  # those that follow them
        self._known = array.array("q")  # some of the file, which were read together
        self._known_from = 0  # the place of the first of these
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return self._written + len(self._new)

    def append(self, number: int) -> None:
        """Add a number behind the others."""
        self._new.append(number)
        if len(self._new) == NUMBERS_AT_ONCE:
            write_temporary(self._file, self._new.tobytes())
            self._written += len(self._new)
            self._new = array.array("q")

    def __getitem__(self, place: int) -> int:
        """The number at a place; IndexError where there is none."""
        if not 0 <= place < len(self):
            raise IndexError(f"number {place} of {len(self)}")
        if place >= self._written:
            return self._new[place - self._written]
        if not self._known_from <= place < self._known_from + len(self._known):
            self._read(place)
        return self._known[place - self._known_from]

    def _read(self, place: int) -> None:
        """Read numbers of the file, the one at `place` first."""
        count = min(NUMBERS_AT_ONCE, self._written - place)
        data = os.pread(self._file.fileno(), count * NUMBER_BYTES, place * NUMBER_BYTES)
        self._known = array.array("q", data)
        self._known_from = place
