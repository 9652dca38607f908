"""Rows on disk, for more of them than memory holds

    rows = StoredRows(stream)          reads all rows of a RowStream, which keeps none
    rows[-1], len(rows), for row in rows: ...

The rows are JSON values, end to end, in a temporary file without a name (runtime/temporary.py),
which is as large as the data. What `Rows` says of its file, StoredRows says too.
"""

from __future__ import annotations

import json
import os
import weakref

from engine.data.rows import BadRow, Row, RowStream
from engine.runtime.on_demand import OnDemand
from engine.runtime.temporary import TemporaryNumbers, temporary_file, write_temporary

WRITTEN_AT_ONCE = 1 << 20  # bytes


class StoredRows(OnDemand[Row]):
    """The usable rows of a file as a sequence; each is read when it is asked for.

    path, sha256, unused, inputs    as in `Rows`
    bad                             the first unusable rows
    """

    def __init__(self, stream: RowStream) -> None:
        """Read the stream to its end; ValueError as it raises it."""
        self._file = temporary_file()
        weakref.finalize(self, self._file.close)
        self._begins = TemporaryNumbers()  # bytes before every row, and after the last one
        self._begins.append(0)
        unwritten: list[bytes] = []
        size = 0  # of `unwritten`
        end = 0
        for row in stream:
            data = _written(row)
            unwritten.append(data)
            size += len(data)
            end += len(data)
            self._begins.append(end)
            if size >= WRITTEN_AT_ONCE:
                write_temporary(self._file, b"".join(unwritten))
                unwritten.clear()
                size = 0
        write_temporary(self._file, b"".join(unwritten))
        self.path = stream.source.path
        self.sha256 = stream.sha256
        self.bad: list[BadRow] = stream.bad
        self.unused: tuple[str, ...] = tuple(stream.unused)
        self.inputs: tuple[str, ...] = tuple(stream.inputs)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def item(self, number: int) -> Row:
        begin = self._begins[number]
        return _read(os.pread(self._file.fileno(), self._begins[number + 1] - begin, begin))


def _written(row: Row) -> bytes:
    """A row as one JSON value."""
    values = [row.id, row.messages, row.tests, sorted(row.context_only), row.thinking]
    # JSON can write texts that UTF-8 cannot
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _read(data: bytes) -> Row:
    """The row that `_written` made a JSON value of."""
    text = data.decode("utf-8", "surrogatepass")
    name, messages, tests, context_only, thinking = json.loads(text)
    return Row(name, tuple(messages), tests, frozenset(context_only), thinking)
