"""Records: a data file in one pass, as JSON values or CSV lines, gzipped or not

    with DataFile(path) as file:
        for line, record in records(file): ...      # a ValueError stands for an unreadable line
    file.sha256()                                   # of all its bytes, also those not asked for

The file is opened once and read in pieces, so that the first five rows of a large file take the
memory of five rows. A file that is none of JSON, JSONL and CSV is named for what it is, with what
to do about it; nothing of it is guessed.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from model.file_checks import check_file

PIECE = 1 << 20  # bytes read at a time
LONGEST = 1 << 28  # characters of one line or one value; more is no row but a damaged file
LOOKED_AT = 1 << 16  # characters of a file's beginning that tell what it is
GZIP = b"\x1f\x8b"
PARTS_OF_A_ROW = ("messages", "conversations", "tools", "functions")  # lists of objects too
_SPACE = re.compile(r"[ \t\r\n]*")
_COLON, _COMMA, _ROWS = (re.compile(p) for p in (r"\s*:\s*", r"\s*,\s*", r"\[\s*\{"))
_PANDAS = (
    "python -c \"import pandas; pandas.{read}({{name!r}}).to_json({{out!r}}, orient='records', "
    'lines=True)"'
)
# (first bytes, what such a file is, what to do; {file} is quoted for a shell, {name!r} for Python)
FOREIGN = (
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


class Number(float):
    """A JSON number with a point or an exponent, and how it was written: 0.50 stays 0.50."""

    def __new__(cls, text: str) -> Number:
        number = super().__new__(cls, text)
        number.text = text
        return number


class DataFile:
    """A text file under way: its text in pieces, then the sha256 of its bytes.

    ValueError for what is no file of text: directories, pipes, Git LFS pointers, web pages
    (model/file_checks.py), and the formats of FOREIGN. A gzipped file is read, and hashed, as its
    uncompressed content.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.suffix = Path(self.path.name.lower().removesuffix(".gz")).suffix
        check_file(self.path)
        self._hash = hashlib.sha256()
        self._opened = self.path.open("rb")
        gzipped = self._opened.peek(len(GZIP)).startswith(GZIP)
        self._file: BinaryIO = gzip.GzipFile(fileobj=self._opened) if gzipped else self._opened
        self._stream = self._decoded()
        self._ahead: list[str] = []  # text that was looked at and is still to be read

    @classmethod
    def of(cls, source: str | Path | DataFile) -> DataFile:
        """The file of a path, or the one that is open already."""
        return source if isinstance(source, DataFile) else cls(source)

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _read(self) -> bytes:
        """The next bytes, hashed; b"" at the end."""
        try:
            data = self._file.read(PIECE)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{self.path} is a damaged gzip file ({error}); download it again"
            ) from None
        self._hash.update(data)
        return data

    def sha256(self) -> str:
        """The hash of all bytes; reads those that are left."""
        while self._read():
            pass
        return self._hash.hexdigest()

    def first_line(self) -> str:
        """The first line that is not blank; the reading still begins at the file's beginning."""
        line, end, _ = self.beginning().lstrip(" \t\r\n").partition("\n")
        parts = [line]
        while not end and (piece := next(self._stream, None)) is not None:
            self._ahead.append(piece)
            line, end, _ = piece.partition("\n")
            parts.append(line)
            _check_size(self.path, sum(map(len, self._ahead)))
        return "".join(parts)

    def beginning(self) -> str:
        """The first LOOKED_AT characters or more, or all there are."""
        while sum(map(len, self._ahead)) < LOOKED_AT:
            piece = next(self._stream, None)
            if piece is None:
                break
            self._ahead.append(piece)
        return "".join(self._ahead)

    def pieces(self) -> Iterator[str]:
        """The text, from its beginning; to be called once."""
        ahead, self._ahead = self._ahead, []
        return itertools.chain(ahead, self._stream)

    def _decoded(self) -> Iterator[str]:
        """The text, without byte order mark; ValueError where it is none."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        data, offset, lines, at_start = self._read(), 0, 1, True
        for magic, what, todo in FOREIGN:
            if data.startswith(magic):
                name, out = str(self.path), f"{self.path.stem}.jsonl"
                todo = todo.format(file=shlex.quote(name), name=name, out=out)
                raise ValueError(f"{self.path} is {what}; wanted JSON, JSONL or CSV: {todo}")
        while True:
            waiting = len(decoder.getstate()[0])  # bytes of a character that is not whole yet
            try:
                text, fault = decoder.decode(data, final=not data), None
            except UnicodeDecodeError as error:
                text, fault = error.object[: error.start].decode("utf-8"), error
            if at_start and text:
                text, at_start = text.removeprefix("\ufeff"), False
            yield text
            if fault is not None:
                offset += fault.start - waiting
                raise ValueError(
                    f"{self.path} is not UTF-8: byte 0x{fault.object[fault.start]:02x} at offset "
                    f"{offset} (line {lines + text.count(chr(10))}); convert it: "
                    "iconv -f ENCODING -t UTF-8"
                )
            if not data:
                return
            offset, lines = offset + len(data), lines + text.count("\n")
            data = self._read()


def lines(file: DataFile) -> Iterator[str]:
    """The lines of a file with their ends. Only "\\n" ends one: str.splitlines would also cut at
    U+2028, which JSON allows in a text."""
    begun: list[str] = []  # of a line that is not whole
    size = 0
    for piece in file.pieces():
        *whole, rest = piece.split("\n")
        for line in whole:
            yield "".join((*begun, line, "\n"))
            begun, size = [], 0
        begun.append(rest)
        size += len(rest)
        _check_size(file.path, size)
    if size:
        yield "".join(begun)


def _check_size(path: Path, size: int) -> None:
    if size > LONGEST:
        raise ValueError(f"{path}: a line or a row has over {LONGEST} characters; split it")


def records(file: DataFile) -> Iterator[tuple[int, object]]:
    """(line it starts on, record) of a file; a ValueError stands for a record that is unreadable.

    Raises ValueError, naming line and reason, where nothing can be read behind a fault.
    """
    head = file.beginning()
    head = head[_SPACE.match(head).end() :]
    if file.suffix == ".csv":
        return _csv(file)
    if head[:1] == "[":
        return _json_array(file)
    if head[:1] == "{" and not _is_json(head.partition("\n")[0]):
        if why := _why_not_lines(file.path, head):
            raise ValueError(f"{file.path} {why}")
        if re.match(r'\{\s*\n\s*"', head):
            return _objects(file)
    if head[:1] == "{" or file.suffix in (".json", ".jsonl", ".ndjson"):
        return json_lines(lines(file))
    raise ValueError(
        f"{file.path} begins with {head[:1]!r}; wanted a JSON array, JSONL or a .csv file"
    )


def json_lines(text: Iterable[str]) -> Iterator[tuple[int, object]]:
    """(line, value) of JSONL; a ValueError stands for a line that is no JSON."""
    for line, source in enumerate(text, 1):
        if source.strip():
            try:
                yield line, json.loads(source.removesuffix("\n"), parse_float=Number)
            except json.JSONDecodeError as error:
                yield line, ValueError(f"bad JSON: {error.msg} (column {error.colno})")
            except (ValueError, RecursionError) as error:  # 5,000 digits, 5,000 brackets
                yield line, ValueError(f"bad JSON: {error}")


# ---- a file that begins with "{" and is not JSONL


def _why_not_lines(path: Path, head: str) -> str:
    """What a file is whose first line is no JSON value: one of the forms that people have, and how
    to make JSONL of it. "" where none of them is seen in its beginning."""
    first, *others = (line.strip() for line in head.split("\n"))
    second = next((line for line in others if line), "")
    if first.endswith(",") and _is_json(first[:-1]) and (second.endswith(",") or not second):
        return (
            "has a comma behind every line; one JSON object a line is wanted, and nothing else: "
            f"sed 's/,[[:space:]]*$//' {shlex.quote(str(path))} > rows.jsonl"
        )
    if key := _key_of_rows(head):
        return f"is one JSON object with its rows under {key!r}; {_unwrap(path, key)}"
    return ""


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _key_of_rows(head: str) -> str:
    """The first key of the object whose value is a list of objects; "" where none is seen."""
    decoder, at = json.JSONDecoder(), 1
    try:
        while True:
            key, at = decoder.raw_decode(head, _SPACE.match(head, at).end())
            at = _COLON.match(head, at).end()
            if _ROWS.match(head, at):
                return "" if key in PARTS_OF_A_ROW else key
            _, at = decoder.raw_decode(head, at)
            at = _COMMA.match(head, at).end()
    except (ValueError, RecursionError, AttributeError):  # the beginning ends, or is broken
        return ""


def _unwrap(path: Path, key: str) -> str:
    """The command that writes the rows under `key` one a line."""
    program = (
        f"import json; [print(json.dumps(row)) for row in json.load(open({str(path)!r}, "
        f"encoding='utf-8'))[{key!r}]]"
    )
    return f"write them one a line: python -c {shlex.quote(program)} > rows.jsonl"


def wrapped(path: Path, record: dict[str, Any]) -> str:
    """What to say of a record that is no row but holds them under a key; "" where it holds none."""
    for key, value in record.items():
        objects = isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
        if objects and not {"role", "from"} & value[0].keys():
            return f"; it holds a list of objects under {key!r}: if those are the rows, " + _unwrap(
                path, key
            )
    return ""


# ---- JSON that goes over several lines


class Text:
    """Text that comes in pieces and is forgotten as it is read."""

    def __init__(self, file: DataFile) -> None:
        self._path, self._pieces = file.path, iter(file.pieces())
        self.text, self.at = "", 0
        self._line, self._counted = 1, 0  # the line of place `_counted`
        self.decoder = json.JSONDecoder(parse_float=Number)

    def line(self, at: int) -> int:
        """The line of a place in `text`, which is none before the last one asked for."""
        self._line += self.text.count("\n", self._counted, at)
        self._counted = at
        return self._line

    def more(self) -> bool:
        """Twice as much text behind `at`, or what there is; False at the end."""
        self.line(self.at)
        found = [self.text[self.at :]]
        wanted = len(found[0]) + 1
        _check_size(self._path, wanted)
        for piece in self._pieces:
            found.append(piece)
            wanted -= len(piece)
            if wanted <= 0:
                break
        grown = sum(map(len, found[1:])) > 0
        self.text, self.at, self._counted = "".join(found), 0, 0
        return grown

    def next(self) -> str:
        """The next character that is no space, where `at` then stands; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> object:
        """The JSON value that begins at `at`; json.JSONDecodeError with its place in `text`."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # An unfinished value is told by a fault at the end, or a text without its quote.
                unfinished = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated")
                if unfinished and self.more():
                    continue
                raise
            if end == len(self.text) and self.more():  # a number may go on
                continue
            self.at = end
            return value


def _broken(file: DataFile, line: int, what: str) -> ValueError:
    return ValueError(
        f"{file.path}:{line}: bad JSON: {what}; a broken file of this form cannot be read past "
        "this point (--skip-bad does not help): repair it, or write one row per line (JSONL)"
    )


def _value(file: DataFile, text: Text) -> object:
    try:
        return text.value()
    except json.JSONDecodeError as error:
        raise _broken(file, text.line(error.pos), error.msg) from None
    except (ValueError, RecursionError) as error:
        raise _broken(file, text.line(text.at), str(error)) from None


def _json_array(file: DataFile) -> Iterator[tuple[int, object]]:
    text = Text(file)
    text.next()
    text.at += 1
    end = text.next()
    while end != "]":
        line = text.line(text.at)
        yield line, _value(file, text)
        end = text.next()
        if end not in (",", "]"):
            raise _broken(file, text.line(text.at), "wanted ',' or ']' after a row")
        if end == ",":
            text.at += 1
            text.next()
    text.at += 1
    if text.next():
        raise _broken(file, text.line(text.at), "text after the closing ']'")


def _objects(file: DataFile) -> Iterator[tuple[int, object]]:
    """Objects one behind the other, each over several lines."""
    text = Text(file)
    while begin := text.next():
        line = text.line(text.at)
        if begin != "{":
            raise _broken(file, line, f"wanted the '{{' of the next row, got {begin!r}")
        yield line, _value(file, text)


# ---- CSV


def _csv(file: DataFile) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(LONGEST)  # the module's own limit is 131,072 characters
    # A lone "\r" ends a line too, as in files of old Macs.
    text = (part for line in lines(file) for part in io.StringIO(line, newline=""))
    reader = csv.reader(text, strict=True)
    header: list[str] = []
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{file.path}:{line}: bad CSV: {error}; repair it") from None
        if cells is None:
            return
        if not cells:  # an empty line, which is no row
            pass
        elif not header:
            header = cells
            if len(set(header)) < len(header):
                raise ValueError(
                    f"{file.path}:{line}: two columns have one name: {header}; rename one"
                )
            if len(header) == 1 and (found := re.search("[;\t|]", header[0])):
                raise ValueError(
                    f"{file.path}:{line}: the columns are parted by {found[0]!r}, and commas are "
                    "wanted; save it again with commas"
                )
        elif len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        else:
            yield line, ValueError(f"{len(cells)} cells, wanted {len(header)} as in the header")
        line = reader.line_num + 1
