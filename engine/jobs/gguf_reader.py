"""Reading a GGUF file: its metadata with every length checked, and its tensors in fp32.

The package `gguf` is optional and imported where it is used.
"""

from __future__ import annotations

import importlib
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from model.file_checks import check_file

# The value types of GGUF metadata: bytes of each scalar type, then the two others
SCALAR_BYTES = {
    0: 1,  # uint8
    1: 1,  # int8
    2: 2,  # uint16
    3: 2,  # int16
    4: 4,  # uint32
    5: 4,  # int32
    6: 4,  # float32
    7: 1,  # bool
    10: 8,  # uint64
    11: 8,  # int64
    12: 8,  # float64
}
STRING = 8  # its length in bytes (uint64), then the bytes
ARRAY = 9  # the type of its elements (uint32), their number (uint64), then the elements
LARGEST_ARRAY = 1 << 24  # elements: no vocabulary has as many
DEEPEST_ARRAY = 4  # levels of arrays in arrays
LONGEST_KEY = 1 << 16  # bytes
# the name of one file of a model in several
PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

# values of general.architecture, which are model_types of config.json too (model/families.py)
ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")


def optional(package: str) -> Any:
    """Import `gguf` or `tokenizers`; ImportError says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(
            f"importing a GGUF needs the package {package} -> "
            "pip install 'gguf>=0.16' 'tokenizers>=0.20'"
        ) from None


def parts_of(source: Path) -> list[Path]:
    """The files of a model: `source`, or all its parts in order.

    One of several parts has a name like NAME-00001-of-00003.gguf. ValueError naming the first part
    that is missing.
    """
    match = PART.fullmatch(source.name)
    if match is None:
        return [source]
    count = int(match["count"])
    parts = []
    for number in range(1, count + 1):
        part = source.with_name(f"{match['name']}-{number:05d}-of-{count:05d}.gguf")
        if not part.exists():
            raise ValueError(f"{part} is missing: {source.name} is one of {count} parts")
        check_file(part)
        parts.append(part)
    return parts


def read_gguf(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata values by key, and the memory-mapped tensors of the package `gguf` by name.

    Of a model in several parts the metadata are those of the first part. ValueError for a damaged
    or missing file, and for a model of another architecture.
    """
    parts = parts_of(source)
    meta, tensors = _read_file(parts[0])
    architecture = meta.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{source}: architecture {architecture!r}; only {', '.join(ARCHITECTURES)} can be "
            "imported (Mistral is stored as llama)"
        )
    _check_part(parts[0], meta, 0, len(parts))
    for number, part in enumerate(parts[1:], start=1):
        of_part, further = _read_file(part)
        _check_part(part, of_part, number, len(parts))
        twice = sorted(set(further) & set(tensors))
        if twice:
            raise ValueError(f"{part}: the tensor {twice[0]} is in another part too")
        tensors |= further
    return meta, tensors


def _check_part(part: Path, meta: dict[str, Any], number: int, count: int) -> None:
    """ValueError unless the metadata say that this is part `number` (from 0) of `count`."""
    stated = (meta.get("split.no", 0), max(1, meta.get("split.count", 1)))
    if stated != (number, count):
        raise ValueError(
            f"{part} says that it is part {stated[0] + 1} of {stated[1]}, its name says part "
            f"{number + 1} of {count}; give the parts their names back (NAME-00001-of-0000N.gguf)"
        )


def _read_file(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of one file."""
    gguf = optional("gguf")
    try:
        check_lengths(source)
        reader = gguf.GGUFReader(source)
    except (ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
        raise ValueError(f"{source} is not a readable GGUF file: {error}") from error
    meta = {key: field.contents() for key, field in reader.fields.items()}
    return meta, {tensor.name: tensor for tensor in reader.tensors}


def need(meta: dict[str, Any], key: str, source: Path) -> Any:
    """The value of a key; ValueError where it is missing."""
    if key not in meta:
        raise ValueError(f"{source}: {key} is missing from the metadata")
    return meta[key]


def check_lengths(source: Path) -> None:
    """ValueError where the metadata state more than the file holds.

    The reader of the package gguf trusts every length and makes an object per element before it
    reads the elements.
    """
    with source.open("rb") as file:
        header = _Header(file, size=source.stat().st_size)
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = header.number("I")
        if version & 0xFFFF == 0:  # a small number whose bytes stand in the other order
            header.order = ">"
        tensors = header.number("Q")
        keys = header.number("Q")
        if max(tensors, keys) > header.size // 12:
            raise ValueError(f"{tensors} tensors and {keys} keys have no room in the file")
        for _ in range(keys):
            length = header.number("Q")
            if length > LONGEST_KEY:
                raise ValueError(f"a key of {length} bytes")
            key = file.read(length).decode("utf-8", errors="replace")
            kind = header.number("I")
            header.skip_value(kind, key)


@dataclass
class _Header:
    """A cursor in the metadata; every length is compared with the bytes that are left."""

    file: BinaryIO
    size: int  # of the file, in bytes
    order: str = "<"  # byte order, as struct names it

    def number(self, form: str) -> int:
        """Read a number. form: its format character of the module struct."""
        form = self.order + form
        data = self.file.read(struct.calcsize(form))
        (value,) = struct.unpack(form, data)
        return value

    def left(self) -> int:
        """Bytes from here to the end."""
        return self.size - self.file.tell()

    def skip(self, count: int, key: str) -> None:
        """Move on by `count` bytes."""
        if count > self.left():
            raise ValueError(f"{key} goes beyond the end of the file: it is damaged or cut")
        self.file.seek(count, 1)

    def skip_value(self, kind: int, key: str, depth: int = 0) -> None:
        """Move past a value of that type."""
        if kind in SCALAR_BYTES:
            self.skip(SCALAR_BYTES[kind], key)
        elif kind == STRING:
            self.skip(self.number("Q"), key)
        elif kind == ARRAY and depth < DEEPEST_ARRAY:
            self.skip_array(key, depth)
        else:
            raise ValueError(f"{key} has a value of the unknown type {kind}")

    def skip_array(self, key: str, depth: int) -> None:
        """Move past the elements of an array."""
        inner = self.number("I")
        count = self.number("Q")
        least_bytes = SCALAR_BYTES.get(inner, 8)  # a string and an array begin with a length
        if count > LARGEST_ARRAY or count * least_bytes > self.left():
            raise ValueError(f"{key} is an array of {count} elements: more than the file can hold")
        if inner in SCALAR_BYTES:
            self.skip(count * least_bytes, key)
            return
        for _ in range(count):
            self.skip_value(inner, key, depth + 1)


def dequantised(tensor: Any, rows: slice) -> np.ndarray:
    """Rows of a tensor as contiguous fp32; ValueError for an unknown format, NaN or infinity."""
    gguf = optional("gguf")
    try:
        values = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
    except NotImplementedError:
        raise ValueError(
            f"{tensor.name} is {tensor.tensor_type.name}, which the gguf package cannot dequantise"
        ) from None
    values = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{tensor.name} holds numbers that are NaN or infinite: it is damaged")
    return values
