"""Files written beside and renamed, JSONL files that survive a kill, hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from model.durable import file_beside, sync, why, writing
from model.file_checks import check_file

BLOCK_BYTES = 1 << 16  # read at a time, from the end of a file


def write_text(path: Path, text: str) -> None:
    """Write beside and rename: a reader sees the old file or the new one, never a part of it.

    OSError names the file, the cause and what helps.
    """
    with file_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written beside and renamed."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line, the whole file written beside and renamed."""
    with file_beside(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


Kinds = Mapping[str, Any]  # field that a line must have -> its type, or a tuple of types


def read_jsonl(path: Path, fields: Kinds | None = None) -> list[dict[str, Any]]:
    """The objects of a JSONL file that a job wrote; [] where there is no file.

    A torn last line, which a kill leaves, is ignored. ValueError with file and line for one that is
    broken, or lacks one of `fields`.
    """
    return list(each_of_jsonl(path, fields))


def each_of_jsonl(path: Path, fields: Kinds | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file one after the other, as `read_jsonl` reads them."""
    for line in placed_lines(path, fields):
        yield line.record


class PlacedLine(NamedTuple):
    """A line of a JSONL file, and where it stands."""

    begin: int  # bytes before it
    size: int  # its bytes, with the newline
    record: dict[str, Any]


def placed_lines(path: Path, fields: Kinds | None = None) -> Iterator[PlacedLine]:
    """The lines of a JSONL file one after the other, as `read_jsonl` reads them."""
    check_file(path)
    if not path.exists():
        return
    begin = 0
    with path.open("rb") as file:
        # only b"\n" ends a line: a text file's lines would also end at a lone "\r"
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            yield PlacedLine(begin, len(line), _parsed(path, number, line, fields or {}))
            begin += len(line)


def _parsed(path: Path, number: int, line: bytes, fields: Kinds) -> dict[str, Any]:
    """The object of a line; ValueError where it is broken, or lacks one of `fields`."""
    try:
        record = json.loads(line.removesuffix(b"\n").decode())
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested too deeply
        raise _damaged(path, number, f"is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise _damaged(path, number, f"is no object but a {type(record).__name__}")
    for name, kind in fields.items():
        value = record.get(name)
        if not _is_of_kind(value, kind):
            fault = f"is {value!r:.60}" if name in record else "is missing"
            raise _damaged(path, number, f"is damaged: {name} {fault}")
    return record


def _is_of_kind(value: Any, kind: Any) -> bool:
    """As isinstance, but True and False are no numbers."""
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, kind)


def _damaged(path: Path, number: int, fault: str) -> ValueError:
    """The error about a line of a file of ours that a job did not write so."""
    return ValueError(
        f"{path}:{number} {fault}; it is not as it was written: restore the file from a copy, or "
        "delete that line, and the same command writes it anew"
    )


def cut_torn_line(path: Path) -> None:
    """Remove a last line without its newline, which only a kill can leave."""
    check_file(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        whole = _end_of_whole_lines(file, size)
    if whole < size:
        os.truncate(path, whole)


def _end_of_whole_lines(file: BinaryIO, size: int) -> int:
    """The bytes of a file of `size` bytes up to its last newline; reads it from its end."""
    end = size
    while end:
        begin = max(0, end - BLOCK_BYTES)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


class AppendedLines:
    """A JSONL file that grows by whole lines; a kill loses at most the line being written.

    Opening cuts off a torn last line, which only a kill can leave. Each line is handed to the
    operating system at once, and to the disk on `close`. OSError where a line does not fit on the
    disk (its beginning is cut off again), or the file has been moved or deleted.
    """

    def __init__(self, path: Path) -> None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_torn_line(path)
            self.path = path
            self.file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> PlacedLine:
        """Append one object; returns it with its place."""
        line = json.dumps(record, ensure_ascii=False) + "\n"
        data = line.encode()
        left = memoryview(data)  # bytes still to be written
        before = self.file.tell()
        if not self._is_in_place():
            raise OSError(f"{self.path} is no longer there; nothing more can be kept")
        try:
            while left:
                written = self.file.write(left)  # perhaps a part of them
                left = left[written:]
        except OSError as error:
            self.file.truncate(before)
            raise OSError(
                f"{self.path}: {why(error)}; {before:,} bytes of finished lines are kept"
            ) from None
        return PlacedLine(before, len(data), record)

    def _is_in_place(self) -> bool:
        """Whether the open file is still the one at its path."""
        if not self.path.exists():
            return False
        return os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))

    def close(self) -> None:
        """Flush to the disk and close."""
        with writing(self.path):
            os.fsync(self.file.fileno())
            self.file.close()
            if self.path.parent.exists():
                sync(self.path.parent)

    def __enter__(self) -> AppendedLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GrowingHash:
    """The hash of a file that only grows: bytes that were read once are not read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._size = 0  # bytes in `_digest`

    def part(self) -> dict[str, Any]:
        """{"bytes", "sha256"} of the file as it is now."""
        with self.path.open("rb") as file:
            file.seek(self._size)
            while block := file.read(BLOCK_BYTES):
                self._digest.update(block)
                self._size += len(block)
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def sha256_of_first(path: Path, size: int) -> str | None:
    """The hash of the first `size` bytes of a file; None where it is missing or has fewer."""
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    left = size
    with path.open("rb") as file:
        while left:
            block = file.read(min(BLOCK_BYTES, left))
            if not block:
                return None
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def sha256(data: str | bytes) -> str:
    """The hash of bytes, or of a text in UTF-8, as hex digits."""
    if isinstance(data, str):
        data = data.encode()
    return hashlib.sha256(data).hexdigest()
