"""The file tokenizer.model: its pieces read and written, without the package protobuf.

It is a serialized message (protobuf's wire format) of sentencepiece's ModelProto:

    1  pieces, repeated     1 spelling, 2 score (fp32), 3 type
    2  trainer settings     3 kind of model, 4 number of pieces, 35 byte fallback,
                            40 to 43 ids of unk, bos, eos and pad, 45 to 47 spellings of the first
                            three
    3  normalizer           1 name, 2 compiled rules, 3 space before a text, 4 spaces merged,
                            5 spaces spelled as U+2581
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# the types of a piece, which GGUF's tokenizer.ggml.token_type numbers alike
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6

BPE = 2  # a kind of model: pieces are merged by score
UNIGRAM = 1  # another, and what a file without the field is
# the wire types of a field: a number of variable length, 8 bytes, bytes with a length, 4 bytes
VARINT, EIGHT_BYTES, WITH_LENGTH, FOUR_BYTES = 0, 1, 2, 5


class Piece(NamedTuple):
    """One token of a sentencepiece vocabulary; its id is its place in the list."""

    spelling: str
    score: float
    kind: int  # NORMAL, UNKNOWN, ...


class Model(NamedTuple):
    """What of a tokenizer.model decides how text is cut."""

    pieces: list[Piece]
    kind: int  # BPE, UNIGRAM, ...
    has_rules: bool  # whether text is normalised (NFKC and the like) before it is cut


def write_model(
    pieces: Sequence[Piece], *, space_before: bool, bos: int | None, eos: int | None
) -> bytes:
    """The content of a tokenizer.model: BPE by score, no normalisation but of spaces."""
    unknown = [id for id, piece in enumerate(pieces) if piece.kind == UNKNOWN]
    has_bytes = any(piece.kind == BYTE for piece in pieces)
    parts = []
    for piece in pieces:
        fields = _bytes_field(1, piece.spelling.encode())
        fields += _key(2, FOUR_BYTES) + struct.pack("<f", piece.score)
        fields += _number_field(3, piece.kind)
        parts.append(_bytes_field(1, fields))
    trainer = _number_field(3, BPE) + _number_field(4, len(pieces))
    trainer += _number_field(35, int(has_bytes)) + _number_field(40, unknown[0])
    trainer += _number_field(41, -1 if bos is None else bos)
    trainer += _number_field(42, -1 if eos is None else eos) + _number_field(43, -1)
    # readers look bos and eos up by their spellings
    for number, id in ((45, unknown[0]), (46, bos), (47, eos)):
        if id is not None:
            trainer += _bytes_field(number, pieces[id].spelling.encode())
    parts.append(_bytes_field(2, trainer))
    normalizer = _bytes_field(1, b"identity") + _number_field(3, int(space_before))
    normalizer += _number_field(4, 0) + _number_field(5, 1)
    parts.append(_bytes_field(3, normalizer))
    return b"".join(parts)


def read_model(data: bytes) -> Model:
    """The pieces of a tokenizer.model; ValueError for bytes that are not such a message."""
    pieces: list[Piece] = []
    kind = UNIGRAM
    has_rules = False
    try:
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_piece(value))
            elif number == 2:
                kind = dict(_fields(value)).get(3, UNIGRAM)
            elif number == 3:
                has_rules = bool(dict(_fields(value)).get(2))
    except (IndexError, struct.error, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a sentencepiece model: {error}") from None
    return Model(pieces, kind, has_rules)


def _piece(data: bytes) -> Piece:
    """One piece of its serialized message."""
    values = dict(_fields(data))
    (score,) = struct.unpack("<f", values.get(2, bytes(4)))
    return Piece(values[1].decode(), score, values.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The number and the value of every field of a message; ints are those of variable length."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        sizes = {EIGHT_BYTES: 8, FOUR_BYTES: 4}
        if wire == WITH_LENGTH:
            size, at = _varint(data, at)
        elif wire in sizes:
            size = sizes[wire]
        else:
            raise TypeError(f"a field of wire type {wire}")
        if at + size > len(data):
            raise IndexError("it ends within a field")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of variable length (7 bits a byte, the lowest first), and where it ends."""
    value = 0
    for place in range(10):
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise TypeError("a number of more than 10 bytes")


def _encoded(value: int) -> bytes:
    """A number as 7 bits a byte; a negative one as its 64-bit complement."""
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _key(number: int, wire: int) -> bytes:
    return _encoded(number << 3 | wire)


def _number_field(number: int, value: int) -> bytes:
    return _key(number, VARINT) + _encoded(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _key(number, WITH_LENGTH) + _encoded(len(value)) + value
