"""Examples on disk, for more of them than memory holds

    DIR/tokens.bin    the token ids of all examples, end to end: uint16, or uint32 where the
                      vocabulary has more than 65,536 tokens
    DIR/names.bin     the ids of all examples, end to end, in UTF-8
    DIR/index.bin     int64 (N + 1, 3): the place of an example's first token in tokens.bin, of its
                      first byte in names.bin, and n_prompt; the last line holds the two ends
    DIR/meta.json     `key`, which says what the examples were made of; their number, the bytes and
                      the hash of every file, and what else `Account` has

All numbers are little-endian. The directory is written beside its place and renamed, so one that is
there is whole. An example is read by its number with three small reads; the pages stay with the
operating system, which takes them back where memory is short. So a training holds the examples of
one batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.data.encode import Example, ExampleSize, ExamplesOnDisk, Fingerprint
from engine.data.encode import names as names_of
from engine.data.encode import sizes as sizes_of
from model.config import read_json

FORMAT = 1  # raised when the files change their form
FILES = ("tokens.bin", "names.bin", "index.bin")
META = "meta.json"
LINE = struct.Struct("<3q")  # of index.bin
LINES_READ = 4096  # of index.bin, at a time
BUFFER_BYTES = 1 << 20
TOKEN_TYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}  # by the bytes of a token id


@dataclass
class Account:
    """What is known of the examples of a directory without reading them."""

    key: dict[str, Any]  # what they were made of, as JSON has it
    fingerprint: str  # of all examples (encode.py)
    count: int
    token_bytes: int  # of a token id: 2 or 4
    text: list[str]  # what to print of them: how many rows there were, what was cut or left out
    system: str | None  # the system message of all rows, if they have the same
    sha256: dict[str, str] = field(default_factory=dict)  # of FILES, by name
    size: dict[str, int] = field(default_factory=dict)  # bytes of FILES, by name


ACCOUNT_TYPES: dict[str, Any] = {  # of the values in meta.json
    "key": dict,
    "fingerprint": str,
    "count": int,
    "token_bytes": int,
    "text": list,
    "system": str | None,
    "sha256": dict,
    "size": dict,
}


class ExampleWriter:
    """Writes examples one after the other into an empty directory; `finish` makes it whole."""

    def __init__(self, directory: Path, vocabulary: int) -> None:
        """vocabulary: a number that is larger than every token id."""
        self.directory = directory
        self.fingerprint = Fingerprint()
        self.count = 0
        self._token_bytes = 2 if vocabulary <= 1 << 16 else 4
        self._tokens = _HashedFile(directory / "tokens.bin")
        self._names = _HashedFile(directory / "names.bin")
        self._index = _HashedFile(directory / "index.bin")
        self._token_count = 0

    def add(self, example: Example) -> None:
        """Write the next example."""
        self._write_line(example.n_prompt)
        ids = np.array(example.ids, dtype=TOKEN_TYPES[self._token_bytes])
        self._tokens.write(ids.tobytes())
        self._names.write(example.id.encode("utf-8", "surrogatepass"))
        self._token_count += len(example.ids)
        self.fingerprint.add(example)
        self.count += 1

    def finish(self, key: dict[str, Any], text: list[str], system: str | None) -> None:
        """Write the end of the index, and meta.json; the arguments as in `Account`."""
        self._write_line(0)
        account = Account(
            key=key,
            fingerprint=self.fingerprint.hexdigest(),
            count=self.count,
            token_bytes=self._token_bytes,
            text=text,
            system=system,
        )
        for name, file in zip(FILES, (self._tokens, self._names, self._index), strict=True):
            file.close()
            account.sha256[name] = file.digest.hexdigest()
            account.size[name] = file.size
        text = json.dumps({"format": FORMAT} | dataclasses.asdict(account), indent=1)
        (self.directory / META).write_text(text + "\n", encoding="utf-8")

    def _write_line(self, n_prompt: int) -> None:
        """Write a line of the index: what comes next begins here."""
        self._index.write(LINE.pack(self._token_count, self._names.size, n_prompt))


class _HashedFile:
    """A new file, the hash of what was written to it, and its size in bytes."""

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self._file = path.open("wb", buffering=BUFFER_BYTES)

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def close(self) -> None:
        """Hand what is buffered to the operating system."""
        self._file.close()


def read_account(directory: Path) -> Account | None:
    """What meta.json of a directory says; None where it is not what this version writes.

    ValueError where it is no directory of examples.
    """
    record = read_json(directory / META, {})
    if "format" not in record:
        raise ValueError(f"{directory} holds something else than examples; choose another --out")
    if record["format"] != FORMAT:
        return None
    for name, kind in ACCOUNT_TYPES.items():
        if name not in record or not isinstance(record[name], kind):
            return None
    account = Account(**{name: record[name] for name in ACCOUNT_TYPES})
    index_bytes = (account.count + 1) * LINE.size
    is_whole = account.size.get("index.bin") == index_bytes and account.token_bytes in TOKEN_TYPES
    return account if is_whole else None


def why_damaged(directory: Path, account: Account) -> str | None:
    """Why the files of a directory are not what was written, None where they are. Reads them."""
    for name in FILES:
        file = directory / name
        if not file.is_file():
            return f"{file} is missing"
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while chunk := opened.read(BUFFER_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != account.sha256.get(name):
            return f"{file} is not what was written"
    return None


class ExampleStore(ExamplesOnDisk):
    """The examples of a directory, as a sequence; each is read when it is asked for.

    A context manager, which closes the files.
    """

    def __init__(self, directory: Path) -> None:
        """ValueError where the directory does not hold examples as they were written."""
        account = read_account(directory)
        if account is None:
            raise ValueError(f"{directory / META} is not what this version writes")
        self.directory = directory
        self.account = account
        opened: list[BinaryIO] = []
        for name in FILES:
            file = (directory / name).open("rb", buffering=0)
            opened.append(file)
            size = os.fstat(file.fileno()).st_size
            if size != account.size.get(name):
                raise ValueError(
                    f"{directory / name} has {size} bytes, expected {account.size.get(name)}; "
                    f"delete {directory}, and the same command makes it again"
                )
        self.files = tuple(opened)
        self._tokens, self._names, self._index = opened

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()

    def __enter__(self) -> ExampleStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.account.count

    def item(self, number: int) -> Example:
        both_lines = self._read(self._index, number * LINE.size, 2 * LINE.size)
        begin, end = LINE.iter_unpack(both_lines)
        return Example(self._name(begin[1], end[1]), self._ids(begin[0], end[0]), begin[2])

    def sizes(self) -> Iterator[ExampleSize]:
        for begin, end in self._neighbours():
            yield ExampleSize(end[0] - begin[0], begin[2])

    def names(self) -> Iterator[str]:
        for begin, end in self._neighbours():
            yield self._name(begin[1], end[1])

    def fingerprint(self) -> str:
        return self.account.fingerprint

    def _neighbours(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Every line of the index with the one that follows it."""
        begin: tuple[int, ...] | None = None
        for first in range(0, len(self) + 1, LINES_READ):
            count = min(LINES_READ, len(self) + 1 - first)
            lines = self._read(self._index, first * LINE.size, count * LINE.size)
            for line in LINE.iter_unpack(lines):
                if begin is not None:
                    yield begin, line
                begin = line

    def _ids(self, begin: int, end: int) -> list[int]:
        """The token ids between two places in tokens.bin, counted in tokens."""
        width = self.account.token_bytes
        data = self._read(self._tokens, begin * width, (end - begin) * width)
        return np.frombuffer(data, dtype=TOKEN_TYPES[width]).tolist()

    def _name(self, begin: int, end: int) -> str:
        """The id between two places in names.bin."""
        return self._read(self._names, begin, end - begin).decode("utf-8", "surrogatepass")

    def _read(self, file: BinaryIO, offset: int, size: int) -> bytes:
        """Bytes of a file; ValueError where it has become shorter."""
        data = os.pread(file.fileno(), size, offset)
        if len(data) < size:
            raise ValueError(
                f"{file.name} was cut while it was read; delete {self.directory}, and the same "
                "command makes it again"
            )
        return data


class JoinedExamples(ExamplesOnDisk):
    """Examples on disk, followed by others in memory."""

    def __init__(self, stored: ExamplesOnDisk, others: Sequence[Example]) -> None:
        self.stored = stored
        self.others = others

    def __len__(self) -> int:
        return len(self.stored) + len(self.others)

    def item(self, number: int) -> Example:
        if number < len(self.stored):
            return self.stored[number]
        return self.others[number - len(self.stored)]

    def sizes(self) -> Iterator[ExampleSize]:
        yield from self.stored.sizes()
        yield from sizes_of(self.others)

    def names(self) -> Iterator[str]:
        yield from self.stored.names()
        yield from names_of(self.others)

    def fingerprint(self) -> str:
        digest = Fingerprint()
        for example in self:
            digest.add(example)
        return digest.hexdigest()
