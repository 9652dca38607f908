"""Tables of ids that may be larger than memory: of the rows read so far, of the texts of others

A few MB of them are in memory, the rest in a temporary file (runtime/temporary.py). Ids are
compared as texts, not by a hash, so what is found is exact.
"""

from __future__ import annotations

from pathlib import Path

from engine.data.sources import Place
from engine.runtime.temporary import TemporaryTable, as_key, of_key


class SeenIds(TemporaryTable):
    """The ids that rows have, with their places, and how often each text without an id occurred."""

    def __init__(self) -> None:
        super().__init__(
            "CREATE TABLE places (id BLOB PRIMARY KEY, file INT, line INT) WITHOUT ROWID",
            "CREATE TABLE copies (text BLOB PRIMARY KEY, count INT) WITHOUT ROWID",
        )
        self._files: list[Path] = []

    def place_of(self, row_id: str) -> Place | None:
        """Where the row with this id stands, None if there is none so far."""
        found = self._first("SELECT file, line FROM places WHERE id = ?", (as_key(row_id),))
        if found is None:
            return None
        file, line = found
        return Place(self._files[file], line)

    def add(self, row_id: str, place: Place) -> None:
        """Take an id, which no row may have so far."""
        if not self._files or self._files[-1] != place.file:
            self._files.append(place.file)  # files are read one after the other
        values = (as_key(row_id), len(self._files) - 1, place.line)
        self._execute("INSERT INTO places VALUES (?, ?, ?)", values)

    def copies_of(self, text: str) -> int:
        """Count another occurrence of a text; returns how many there are with it."""
        key = as_key(text)
        found = self._first("SELECT count FROM copies WHERE text = ?", (key,))
        count = 1 if found is None else found[0] + 1
        self._execute("INSERT OR REPLACE INTO copies VALUES (?, ?)", (key, count))
        return count


class TextsById(TemporaryTable):
    """Texts by their ids."""

    def __init__(self) -> None:
        super().__init__("CREATE TABLE texts (id BLOB PRIMARY KEY, text BLOB) WITHOUT ROWID")

    def add(self, name: str, text: str) -> None:
        """Keep a text under an id, which none may have so far."""
        self._execute("INSERT INTO texts VALUES (?, ?)", (as_key(name), as_key(text)))

    def get(self, name: str) -> str | None:
        """The text of an id, None where there is none."""
        found = self._first("SELECT text FROM texts WHERE id = ?", (as_key(name),))
        return None if found is None else of_key(found[0])
