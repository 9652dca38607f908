"""Records of JSON: one value a line, one array of values, or objects one after the other

Every reader yields (line, value): the line on which the value begins, counted from 1. JSONL is read
past a broken line. An array or an object over several lines is not: where one value ends is known
only if it can be parsed, so the reading stops with ValueError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from engine.data.data_file import DataFile, check_size

JSON_SPACE = re.compile(r"[ \t\r\n]*")
# A value that the end of the buffer cuts off fails within this many characters of the end.
CUT_OFF_WITHIN = 16


class Number(float):
    """A JSON number with a point or an exponent, with the text it was written as: "0.50"."""

    text: str

    def __new__(cls, text: str) -> Number:
        number = super().__new__(cls, text)
        number.text = text
        return number


def json_lines(lines: Iterable[str]) -> Iterator[tuple[int, object]]:
    """(line, value) of JSONL; a ValueError in place of the value for a line that is not JSON."""
    for line, source in enumerate(lines, 1):
        if not source.strip():
            continue
        try:
            yield line, json.loads(source.removesuffix("\n"), parse_float=Number)
        except json.JSONDecodeError as error:
            yield line, ValueError(f"bad JSON: {error.msg} (column {error.colno})")
        except (ValueError, RecursionError) as error:  # 5,000 digits, 5,000 brackets
            yield line, ValueError(f"bad JSON: {error}")


def json_array(file: DataFile) -> Iterator[tuple[int, object]]:
    """(line, value) of the elements of the array that the file holds."""
    text = _Buffer(file)
    text.next_character()
    text.at += 1  # past "["
    following = text.next_character()
    while following != "]":
        line = text.line_of(text.at)
        yield line, _parse_value(file, text)
        following = text.next_character()
        if following == ",":
            text.at += 1
            text.next_character()
        elif following != "]":
            raise _broken(file, text.line_of(text.at), "expected ',' or ']' after a row")
    text.at += 1
    if text.next_character():
        raise _broken(file, text.line_of(text.at), "text after the closing ']'")


def json_objects(file: DataFile) -> Iterator[tuple[int, object]]:
    """(line, value) of objects that stand one after the other, each over several lines."""
    text = _Buffer(file)
    while True:
        begin = text.next_character()
        if not begin:
            return
        line = text.line_of(text.at)
        if begin != "{":
            raise _broken(file, line, f"expected the '{{' of the next row, got {begin!r}")
        yield line, _parse_value(file, text)


class _Buffer:
    """A window on the text of a file: it grows while a value is cut off, and drops what was read.

    text    the window
    at      the place in `text` at which the next character is read
    """

    def __init__(self, file: DataFile) -> None:
        self.text = ""
        self.at = 0
        self._path = file.path
        self._chunks = iter(file.chunks())
        self._decoder = json.JSONDecoder(parse_float=Number)
        self._counted_to = 0  # the place in `text` up to which lines are counted
        self._line = 1  # the line of that place

    def line_of(self, at: int) -> int:
        """The line of a place in `text`, which must not lie before that of the last call."""
        self._line += self.text.count("\n", self._counted_to, at)
        self._counted_to = at
        return self._line

    def next_character(self) -> str:
        """Move `at` to the next character that is no space and return it; "" at the end."""
        while True:
            self.at = JSON_SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def parse(self) -> object:
        """Parse the JSON value that begins at `at`, and move past it.

        json.JSONDecodeError, with the place in `text`, where it is broken.
        """
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                is_at_the_end = error.pos > len(self.text) - CUT_OFF_WITHIN
                is_open_string = error.msg.startswith("Unterminated")
                if (is_at_the_end or is_open_string) and self._grow():
                    continue
                raise
            if end == len(self.text) and self._grow():  # the digits of a number may continue
                continue
            self.at = end
            return value

    def _grow(self) -> bool:
        """Drop the text before `at` and double the rest; False at the end of the file."""
        self.line_of(self.at)  # counts the lines that are dropped
        rest = self.text[self.at :]
        missing = len(rest) + 1  # characters
        check_size(self._path, missing)
        chunks = []
        for chunk in self._chunks:
            chunks.append(chunk)
            missing -= len(chunk)
            if missing <= 0:
                break
        added = "".join(chunks)
        self.text = rest + added
        self.at = 0
        self._counted_to = 0
        return bool(added)


def _parse_value(file: DataFile, text: _Buffer) -> object:
    """The value at `text.at`; ValueError naming file and line where it is broken."""
    try:
        return text.parse()
    except json.JSONDecodeError as error:
        raise _broken(file, text.line_of(error.pos), error.msg) from None
    except (ValueError, RecursionError) as error:
        raise _broken(file, text.line_of(text.at), str(error)) from None


def _broken(file: DataFile, line: int, fault: str) -> ValueError:
    return ValueError(
        f"{file.path}:{line}: bad JSON: {fault}; a broken file of this form cannot be read past "
        "this point (--skip-bad does not help): repair it, or write one row per line (JSONL)"
    )
