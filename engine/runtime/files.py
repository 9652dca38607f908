"""Files written beside and renamed, JSON lines that survive a kill, hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from model.durable import file_beside, sync, why, writing
from model.file_checks import check_file


def write_text(path: Path, text: str) -> None:
    """Write beside and rename: a reader sees the old file or the new one, never a part.

    OSError names the file, the cause and what helps.
    """
    with file_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written beside and renamed."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line, the whole file written beside and renamed."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


Kinds = Mapping[str, Any]  # what a line must have -> its type, or a tuple of them


def read_jsonl(path: Path, wanted: Kinds | None = None) -> list[dict[str, Any]]:
    """The objects of a JSONL file we wrote, without a torn last line; none where there is no file.

    ValueError with file and line where one is broken, or lacks something of `wanted`.
    """
    records = []
    # Only b"\n" ends a line: splitlines would also cut at U+2028, which a model may write.
    for number, line in enumerate(whole_lines(path).split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested too deeply
            raise _damaged(path, number, f"is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise _damaged(path, number, f"is no object but a {type(record).__name__}")
        for name, kind in (wanted or {}).items():
            value = record.get(name)
            if not isinstance(value, kind) or (type(value) is bool and kind is not bool):
                what = f"is {value!r:.60}" if name in record else "is missing"
                raise _damaged(path, number, f"is damaged: {name} {what}")
        records.append(record)
    return records


def _damaged(path: Path, number: int, what: str) -> ValueError:
    return ValueError(
        f"{path}:{number} {what}; it is not as it was written: take the file from a copy, or "
        "delete that line, and the same command makes it again"
    )


def whole_lines(path: Path) -> bytes:
    """What a file holds up to its last newline; nothing where there is no file."""
    check_file(path)
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def cut_torn_line(path: Path) -> None:
    """Remove a last line without its newline, which only a kill can leave."""
    if path.exists() and len(whole_lines(path)) < path.stat().st_size:
        os.truncate(path, len(whole_lines(path)))


class AppendedLines:
    """A JSONL file that grows by whole lines; a kill loses at most the line in flight.

    Opening cuts off a torn last line, which only a kill can leave. Each line is handed to the
    operating system at once, and to the disk on `close`. OSError where a line does not fit on the
    disk (what was written of it is cut off again) or the file is no longer in its place.
    """

    def __init__(self, path: Path) -> None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_torn_line(path)
            self.path, self.file = path, path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one object."""
        line = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode())
        before = self.file.tell()
        if not self.path.exists() or not os.path.samestat(
            self.path.stat(), os.fstat(self.file.fileno())
        ):
            raise OSError(f"{self.path} is no longer there; nothing more can be kept")
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            self.file.truncate(before)
            raise OSError(
                f"{self.path}: {why(error)}; {before:,} bytes of finished lines are kept"
            ) from None

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


def sha256(data: str | bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()
