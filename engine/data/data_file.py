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
from typing import BinaryIO, NamedTuple

from model.file_checks import check_file

CHUNK_BYTES = 1 << 20  # read at a time
MAX_CHARACTERS = 1 << 28  # of one line or one JSON value; a longer one means a damaged file
HEAD_CHARACTERS = 1 << 16  # at the beginning of a file, from which its format is told
GZIP_MAGIC = b"\x1f\x8b"
_PANDAS = (
    "python -c \"import pandas; pandas.{read}({{name!r}}).to_json({{out!r}}, orient='records', "
    'lines=True)"'
)


class ForeignFormat(NamedTuple):
    """A file format that is refused."""

    magic: bytes  # the first bytes of such a file
    name: str
    conversion: str  # advice; {file} is the file's name for a shell, {name!r} and {out!r} in Python


FOREIGN_FORMATS = (
    # (as files that is_table does not see first: gzipped ones)
    ForeignFormat(b"PAR1", "a Parquet file", _PANDAS.format(read="read_parquet")),
    ForeignFormat(b"ARROW1", "an Arrow (Feather) file", _PANDAS.format(read="read_feather")),
    ForeignFormat(
        b"\xff\xff\xff\xff",
        "an Arrow stream (a file of a saved Hugging Face data set)",
        "load the data set with `datasets` and write it with its to_json({out!r})",
    ),
    ForeignFormat(
        b"PK\x03\x04",
        "a zip archive (an .xlsx workbook is one)",
        "save a workbook's sheet as CSV (UTF-8), unpack anything else: unzip {file}",
    ),
    ForeignFormat(b"\xd0\xcf\x11\xe0", "an old Excel workbook", "save the sheet as CSV (UTF-8)"),
    ForeignFormat(b"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -d {file}"),
    ForeignFormat(b"BZh", "compressed with bzip2", "bzip2 -dk {file}"),
    ForeignFormat(b"\xfd7zXZ\x00", "compressed with xz", "xz -dk {file}"),
    ForeignFormat(b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    ForeignFormat(b"%PDF", "a PDF document", "write its rows as JSONL"),
)


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
        self._file: BinaryIO = self._opened
        beginning = self._opened.peek(len(GZIP_MAGIC))
        if beginning.startswith(GZIP_MAGIC):
            self._file = gzip.GzipFile(fileobj=self._opened)
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
        peeked = self._peeked
        self._peeked = []
        return itertools.chain(peeked, self._stream)

    def _peek_chunk(self) -> str | None:
        """The next chunk, kept for `chunks`; None at the end of the file."""
        chunk = next(self._stream, None)
        if chunk is not None:
            self._peeked.append(chunk)
        return chunk

    def _peeked_characters(self) -> int:
        """Characters in the chunks that are kept for `chunks`."""
        return sum(len(chunk) for chunk in self._peeked)

    def head(self) -> str:
        """At least the first HEAD_CHARACTERS characters, or all if there are fewer.

        `chunks` still begins at the beginning of the file.
        """
        while self._peeked_characters() < HEAD_CHARACTERS:
            if self._peek_chunk() is None:
                break
        return "".join(self._peeked)

    def first_line(self) -> str:
        """The first line that is not blank; `chunks` still begins at the beginning of the file."""
        text = self.head().lstrip(" \t\r\n")
        line, newline, _ = text.partition("\n")
        parts = [line]
        while not newline:
            chunk = self._peek_chunk()
            if chunk is None:
                break
            line, newline, _ = chunk.partition("\n")
            parts.append(line)
            check_size(self.path, self._peeked_characters())
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
        offset = 0  # bytes before `data`
        line = 1  # in which `data` begins
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
            line += text.count("\n")
            if fault is not None:
                byte = fault.object[fault.start]
                at = offset - undecoded + fault.start
                raise ValueError(
                    f"{self.path} is not UTF-8: byte 0x{byte:02x} at offset {at} (line {line}); "
                    "convert it: iconv -f ENCODING -t UTF-8"
                )
            if not data:
                return
            offset += len(data)
            data = self._read_chunk()

    def _refuse_foreign_format(self, data: bytes) -> None:
        """ValueError where the first bytes are those of one of FOREIGN_FORMATS."""
        for foreign in FOREIGN_FORMATS:
            if data.startswith(foreign.magic):
                name = str(self.path)
                advice = foreign.conversion.format(
                    file=shlex.quote(name), name=name, out=f"{self.path.stem}.jsonl"
                )
                raise ValueError(
                    f"{self.path} is {foreign.name}; expected JSON, JSONL or CSV: {advice}"
                )


def lines(file: DataFile) -> Iterator[str]:
    """The lines of a file with their newlines.

    Only "\\n" ends a line: str.splitlines would also split at U+2028, which JSON allows in a text.
    ValueError for a line of more than MAX_CHARACTERS.
    """
    unfinished: list[str] = []  # the parts of a line whose newline has not come yet
    size = 0  # characters in `unfinished`
    for chunk in file.chunks():
        *ended, rest = chunk.split("\n")
        for line in ended:
            unfinished.append(line)
            yield "".join(unfinished) + "\n"
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
