"""Tables of ids that may be larger than memory: of the rows read so far, of the texts of others

SQLite keeps them: a few MB in memory, the rest in a temporary file, which it makes when they are
full and deletes itself (in the folder that TMPDIR names, else in /var/tmp or /tmp). Ids are
compared as texts, not by a hash, so what is found is exact.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from engine.data.sources import Place

CACHE_KIB = 8192  # of a database, in memory
_SETTINGS = (
    f"PRAGMA cache_size = -{CACHE_KIB}",  # a negative number counts KiB
    "PRAGMA journal_mode = OFF",  # a temporary database is never rolled back
    "PRAGMA synchronous = OFF",
)


class _Database:
    """A temporary database with the tables that `schema` makes."""

    def __init__(self, *schema: str) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        for statement in (*_SETTINGS, *schema, "BEGIN"):
            self._database.execute(statement)

    def close(self) -> None:
        """Forget everything, and delete the temporary file."""
        self._database.close()

    def _first(self, query: str, values: tuple) -> tuple | None:
        """The first row that a query finds, None without one."""
        with _room_is_needed():
            return self._database.execute(query, values).fetchone()

    def _execute(self, statement: str, values: tuple) -> None:
        with _room_is_needed():
            self._database.execute(statement, values)


def _key(name: str) -> bytes:
    """An id or a text as the database holds it; JSON can write texts that UTF-8 cannot."""
    return name.encode("utf-8", "surrogatepass")


@contextlib.contextmanager
def _room_is_needed() -> Iterator[None]:
    """Inside `with`, OSError that says what to do where the temporary file cannot grow."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(
            f"the ids of the rows do not fit in the folder for temporary files ({error}); name "
            "one with more room: TMPDIR=FOLDER, and start again"
        ) from None


class SeenIds(_Database):
    """The ids that rows have, with their places, and how often each text without an id occurred."""

    def __init__(self) -> None:
        super().__init__(
            "CREATE TABLE places (id BLOB PRIMARY KEY, file INT, line INT) WITHOUT ROWID",
            "CREATE TABLE copies (text BLOB PRIMARY KEY, count INT) WITHOUT ROWID",
        )
        self._files: list[Path] = []

    def place_of(self, row_id: str) -> Place | None:
        """Where the row with this id stands, None if there is none so far."""
        found = self._first("SELECT file, line FROM places WHERE id = ?", (_key(row_id),))
        if found is None:
            return None
        file, line = found
        return Place(self._files[file], line)

    def add(self, row_id: str, place: Place) -> None:
        """Take an id, which no row may have so far."""
        if not self._files or self._files[-1] != place.file:
            self._files.append(place.file)  # files are read one after the other
        values = (_key(row_id), len(self._files) - 1, place.line)
        self._execute("INSERT INTO places VALUES (?, ?, ?)", values)

    def copies_of(self, text: str) -> int:
        """Count another occurrence of a text; returns how many there are with it."""
        key = _key(text)
        found = self._first("SELECT count FROM copies WHERE text = ?", (key,))
        count = 1 if found is None else found[0] + 1
        self._execute("INSERT OR REPLACE INTO copies VALUES (?, ?)", (key, count))
        return count


class TextsById(_Database):
    """Texts by their ids."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE texts (id BLOB PRIMARY KEY, text BLOB) WITHOUT ROWID")

    def add(self, name: str, text: str) -> None:
        """Keep a text under an id, which none may have so far."""
        self._execute("INSERT INTO texts VALUES (?, ?)", (_key(name), _key(text)))

    def get(self, name: str) -> str | None:
        """The text of an id, None where there is none."""
        found = self._first("SELECT text FROM texts WHERE id = ?", (_key(name),))
        return None if found is None else found[0].decode("utf-8", "surrogatepass")
