"""A data file as text: opened once, read in chunks, gzipped or not, hashed on the way

    with DataFile(path) as file:
        for line in lines(file): ...
    file.sha256()                # of all its bytes, also those that were not read as lines

Because it is read in chunks, the first five rows of a large file take the memory of five rows.
What is neither JSON nor JSONL nor CSV is refused: the message names the format and how to convert.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import itertools
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from model.file_checks import check_file

CHUNK_BYTES = 1 << 20  # read at a time
MAX_CHARACTERS = 1 << 28  # of one line or one JSON value; a longer one means a damaged file
HEAD_CHARACTERS = 1 << 16  # at the beginning of a file, from which its format is told
GZIP_MAGIC = b"\x1f\x8b"
_PANDAS = (
    "python -c \"import pandas; pandas.{read}({{name!r}}).to_json({{out!r}}, orient='records', "
    'lines=True)"'
)
# (first bytes, what such a file is, what to do; {file} is quoted for a shell, {name!r} for Python)
FOREIGN_FORMATS = (
    (b"PAR1", "a Parquet file", _PANDAS.format(read="read_parquet")),
    (b"ARROW1", "an Arrow (Feather) file", _PANDAS.format(read="read_feather")),
    (b"\xff\xff\xff\xff", "an Arrow stream (a file of a saved Hugging Face data set)",
     "load the data set with `datasets` and write it with its to_json({out!r})"),
    (b"PK\x03\x04", "a zip archive (an .xlsx workbook is one)",
     "save a workbook's sheet as CSV (UTF-8), unpack anything else: unzip {file}"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "save the sheet as CSV (UTF-8)"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -d {file}"),
    (b"BZh", "compressed with bzip2", "bzip2 -dk {file}"),
    (b"\xfd7zXZ\x00", "compressed with xz", "xz -dk {file}"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"%PDF", "a PDF document", "write its rows as JSONL"),
)  # fmt: skip


class DataFile:
    """An open text file: its text in chunks, then the sha256 of its bytes.

    ValueError for anything but a file of UTF-8 text: directories, pipes, Git LFS pointers, web
    pages (model/file_checks.py), FOREIGN_FORMATS. A gzipped file is decompressed; the hash is that
    of the decompressed bytes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.suffix = Path(self.path.name.lower().removesuffix(".gz")).suffix
        check_file(self.path)
        self._hash = hashlib.sha256()
        self._opened = self.path.open("rb")
        gzipped = self._opened.peek(len(GZIP_MAGIC)).startswith(GZIP_MAGIC)
        self._file: BinaryIO = gzip.GzipFile(fileobj=self._opened) if gzipped else self._opened
        self._stream = self._decoded_chunks()
        self._peeked: list[str] = []  # chunks that `head` or `first_line` read ahead of `chunks`

    @classmethod
    def of(cls, source: str | Path | DataFile) -> DataFile:
        """The file of a path, or `source` itself if it is open already."""
        return source if isinstance(source, DataFile) else cls(source)

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def chunks(self) -> Iterator[str]:
        """The text from its beginning, in chunks; to be called once."""
        peeked, self._peeked = self._peeked, []
        return itertools.chain(peeked, self._stream)

    def head(self) -> str:
        """At least the first HEAD_CHARACTERS characters, or all if there are fewer.

        `chunks` still begins at the beginning of the file.
        """
        while sum(map(len, self._peeked)) < HEAD_CHARACTERS:
            chunk = next(self._stream, None)
            if chunk is None:
                break
            self._peeked.append(chunk)
        return "".join(self._peeked)

    def first_line(self) -> str:
        """The first line that is not blank; `chunks` still begins at the beginning of the file."""
        line, newline, _ = self.head().lstrip(" \t\r\n").partition("\n")
        parts = [line]
        while not newline:
            chunk = next(self._stream, None)
            if chunk is None:
                break
            self._peeked.append(chunk)
            line, newline, _ = chunk.partition("\n")
            parts.append(line)
            check_size(self.path, sum(map(len, self._peeked)))
        return "".join(parts)

    def sha256(self) -> str:
        """The hash of all bytes, as hex digits; reads what is left of the file."""
        while self._read_chunk():
            pass
        return self._hash.hexdigest()

    def _read_chunk(self) -> bytes:
        """The next bytes, added to the hash; b"" at the end."""
        try:
            data = self._file.read(CHUNK_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{self.path} is a damaged gzip file ({error}); download it again"
            ) from None
        self._hash.update(data)
        return data

    def _decoded_chunks(self) -> Iterator[str]:
        """The text without its byte order mark; ValueError at the first byte that is not UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        data = self._read_chunk()
        self._refuse_foreign_format(data)
        offset, line = 0, 1  # of the beginning of `data`
        mark_may_follow = True
        while True:
            undecoded = len(decoder.getstate()[0])  # bytes of a character that `data` completes
            fault = None
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                fault = error
                text = error.object[: error.start].decode("utf-8")
            if mark_may_follow and text:
                text = text.removeprefix("\ufeff")
                mark_may_follow = False
            yield text
            if fault is not None:
                raise ValueError(
                    f"{self.path} is not UTF-8: byte 0x{fault.object[fault.start]:02x} at offset "
                    f"{offset + fault.start - undecoded} (line {line + text.count(chr(10))}); "
                    "convert it: iconv -f ENCODING -t UTF-8"
                )
            if not data:
                return
            offset += len(data)
            line += text.count("\n")
            data = self._read_chunk()

    def _refuse_foreign_format(self, data: bytes) -> None:
        """ValueError where the first bytes are those of one of FOREIGN_FORMATS."""
        for magic, format_name, command in FOREIGN_FORMATS:
            if data.startswith(magic):
                name, out = str(self.path), f"{self.path.stem}.jsonl"
                command = command.format(file=shlex.quote(name), name=name, out=out)
                raise ValueError(
                    f"{self.path} is {format_name}; expected JSON, JSONL or CSV: {command}"
                )


def lines(file: DataFile) -> Iterator[str]:
    """The lines of a file with their newlines.

    Only "\\n" ends a line: str.splitlines would also split at U+2028, which JSON allows in a text.
    ValueError for a line of more than MAX_CHARACTERS.
    """
    unfinished: list[str] = []  # the parts of a line whose newline has not come yet
    size = 0  # characters in `unfinished`
    for chunk in file.chunks():
        *whole, rest = chunk.split("\n")
        for line in whole:
            yield "".join((*unfinished, line, "\n"))
            unfinished = []
            size = 0
        unfinished.append(rest)
        size += len(rest)
        check_size(file.path, size)
    if size:
        yield "".join(unfinished)


def check_size(path: Path, size: int) -> None:
    """ValueError for a line or a JSON value of more than MAX_CHARACTERS characters."""
    if size > MAX_CHARACTERS:
        raise ValueError(f"{path}: a line or a row has over {MAX_CHARACTERS} characters; split it")
