"""llama.cpp's blocks of quantised numbers, split into codes, scales and minima

A row of a quantised matrix is blocks of 32 or 256 numbers, one after the other. A block holds the
codes of its numbers and a scale in fp16, some a minimum too; those of 256 numbers (the k-quants)
hold small integers by which the scale, and the minimum, of every 16 or 32 numbers is multiplied. In
all of them a number is

    scale * code - minimum     in fp32, rounded after each of the two steps

so one form serves them all (kernels/cpu/quantised_panels.py). The layouts of the bytes are facts of
llama.cpp's ggml-common.h and ggml-quants.c; tests/model/test_ggml_blocks.py compares every number
with the package gguf, and that package is compared with llama.cpp in tests/jobs/test_gguf_doors.py.
"""

# N = rows, K = numbers of a row, B = blocks, n = numbers of a block, s = scales of a block

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.quantised_panels import Quantised

# codes (B, n) int8, scales (B, s) fp32, minima (B, s) fp32 or None
Parts = tuple[Tensor, Tensor, Tensor | None]
LARGE = 256  # numbers of a k-quant's block
IQ4_NUMBERS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Format:
    """A format of quantised numbers."""

    numbers: int  # of a block
    size: int  # bytes of a block
    split: Callable[[Tensor], Parts]  # of blocks (B, size) uint8


def quantised(rows: Tensor, format_name: str) -> Quantised:
    """The weight (N, K) that rows of blocks (N, bytes of a row) uint8 hold.

    format_name: one of FORMATS. ValueError where the rows are not whole blocks.
    """
    form = FORMATS[format_name]
    N, row_bytes = rows.shape
    if row_bytes % form.size != 0:
        raise ValueError(
            f"rows of {row_bytes} bytes are no whole blocks of {format_name} ({form.size} bytes)"
        )
    codes, scales, minima = form.split(rows.reshape(-1, form.size))
    if minima is not None:
        minima = minima.reshape(N, -1).contiguous()
    return Quantised(codes.reshape(N, -1).contiguous(), scales.reshape(N, -1).contiguous(), minima)


# ---- parts of blocks


def _fp16(two_bytes: Tensor) -> Tensor:
    """Numbers (B, 1) in fp32 of their bytes (B, 2)."""
    return two_bytes.contiguous().view(torch.float16).float()


def _fields(packed: Tensor, bits: int, count: int) -> Tensor:
    """`count` fields of so many bits of every byte, the lowest first: (B, n) -> (B, count, n)."""
    mask = (1 << bits) - 1
    fields = [(packed >> (bits * i)) & mask for i in range(count)]
    return torch.stack(fields, dim=1)


def _in_groups(packed: Tensor, width: int, bits: int) -> Tensor:
    """Fields of bytes (B, n) where each run of `width` bytes holds one field of `width` numbers
    after the other: (B, n * 8 / bits)."""
    groups = packed.unflatten(1, (-1, width))  # (B, n / width, width)
    fields = _fields(groups.flatten(0, 1), bits, 8 // bits)  # (B n / width, 8 / bits, width)
    return fields.reshape(len(packed), -1)


def _fifth_bits(four_bytes: Tensor) -> Tensor:
    """Bit i of a 32-bit word belongs to number i: (B, 4) -> (B, 32), each 0 or 16."""
    bits = _fields(four_bytes, 1, 8)  # (B, bit, byte)
    return bits.transpose(1, 2).flatten(1) << 4


def _signed(codes: Tensor, offset: int) -> Tensor:
    """Codes minus the offset, as int8."""
    return codes.to(torch.int8) - offset


# ---- blocks of 32 numbers


def _q4_0(blocks: Tensor) -> Parts:
    scale, packed = blocks.split((2, 16), dim=1)
    return _signed(_in_groups(packed, 16, 4), 8), _fp16(scale), None


def _q4_1(blocks: Tensor) -> Parts:
    scale, added, packed = blocks.split((2, 2, 16), dim=1)
    return _in_groups(packed, 16, 4).to(torch.int8), _fp16(scale), -_fp16(added)


def _q5_0(blocks: Tensor) -> Parts:
    scale, high, packed = blocks.split((2, 4, 16), dim=1)
    codes = _in_groups(packed, 16, 4) | _fifth_bits(high)
    return _signed(codes, 16), _fp16(scale), None


def _q5_1(blocks: Tensor) -> Parts:
    scale, added, high, packed = blocks.split((2, 2, 4, 16), dim=1)
    codes = _in_groups(packed, 16, 4) | _fifth_bits(high)
    return codes.to(torch.int8), _fp16(scale), -_fp16(added)


def _q8_0(blocks: Tensor) -> Parts:
    scale, codes = blocks.split((2, 32), dim=1)
    return codes.contiguous().view(torch.int8), _fp16(scale), None


def _iq4_nl(blocks: Tensor) -> Parts:
    scale, packed = blocks.split((2, 16), dim=1)
    return _looked_up(_in_groups(packed, 16, 4)), _fp16(scale), None


def _looked_up(indices: Tensor) -> Tensor:
    """The numbers that IQ4's codes stand for, int8."""
    return torch.tensor(IQ4_NUMBERS, dtype=torch.int8)[indices.long()]


# ---- blocks of 256 numbers


def _q2_k(blocks: Tensor) -> Parts:
    factors, packed, scale, minimum = blocks.split((16, 64, 2, 2), dim=1)
    scales = _fp16(scale) * (factors & 15).float()  # (B, 16)
    minima = _fp16(minimum) * (factors >> 4).float()
    return _in_groups(packed, 32, 2).to(torch.int8), scales, minima


def _q3_k(blocks: Tensor) -> Parts:
    high, packed, factors, scale = blocks.split((32, 64, 12, 2), dim=1)
    low_4 = _fields(factors[:, :8], 4, 2).flatten(1)  # (B, 16)
    high_2 = _fields(factors[:, 8:], 2, 4).flatten(1)  # (B, 16)
    scales = _fp16(scale) * _signed(low_4 | (high_2 << 4), 32).float()
    third_bits = _fields(high, 1, 8).flatten(1) << 2  # (B, 256), each 0 or 4
    return _signed(_in_groups(packed, 32, 2) | third_bits, 4), scales, None


def _factors_of_6_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of eight scales and of eight minima, (B, 8) each, of their 12 bytes.

    Bytes 0-3 and 4-7 hold the first four of both in their lower six bits; bytes 8-11 the lower four
    bits of the others, whose upper two are those left in bytes 0-7.
    """
    first, second, lower = packed.split(4, dim=1)
    scales = torch.cat((first & 63, (lower & 15) | ((first >> 6) << 4)), dim=1)
    minima = torch.cat((second & 63, (lower >> 4) | ((second >> 6) << 4)), dim=1)
    return scales.float(), minima.float()


def _q4_k(blocks: Tensor) -> Parts:
    scale, minimum, factors, packed = blocks.split((2, 2, 12, 128), dim=1)
    of_scales, of_minima = _factors_of_6_bits(factors)
    codes = _in_groups(packed, 32, 4).to(torch.int8)
    return codes, _fp16(scale) * of_scales, _fp16(minimum) * of_minima


def _q5_k(blocks: Tensor) -> Parts:
    scale, minimum, factors, high, packed = blocks.split((2, 2, 12, 32, 128), dim=1)
    of_scales, of_minima = _factors_of_6_bits(factors)
    fifth_bits = _fields(high, 1, 8).flatten(1) << 4  # (B, 256), each 0 or 16
    codes = (_in_groups(packed, 32, 4) | fifth_bits).to(torch.int8)
    return codes, _fp16(scale) * of_scales, _fp16(minimum) * of_minima


def _q6_k(blocks: Tensor) -> Parts:
    low, high, factors, scale = blocks.split((128, 64, 16, 2), dim=1)
    upper_bits = _in_groups(high, 32, 2) << 4  # (B, 256)
    codes = _in_groups(low, 64, 4) | upper_bits
    scales = _fp16(scale) * factors.contiguous().view(torch.int8).float()  # (B, 16)
    return _signed(codes, 32), scales, None


def _iq4_xs(blocks: Tensor) -> Parts:
    scale, high, low, packed = blocks.split((2, 2, 4, 128), dim=1)
    low_4 = _fields(low, 4, 2).transpose(1, 2).flatten(1)  # (B, 8)
    high_2 = _fields(high, 2, 4).transpose(1, 2).flatten(1)  # (B, 8)
    scales = _fp16(scale) * _signed(low_4 | (high_2 << 4), 32).float()
    return _looked_up(_in_groups(packed, 16, 4)), scales, None


FORMATS = {
    "Q4_0": Format(32, 18, _q4_0),
    "Q4_1": Format(32, 20, _q4_1),
    "Q5_0": Format(32, 22, _q5_0),
    "Q5_1": Format(32, 24, _q5_1),
    "Q8_0": Format(32, 34, _q8_0),
    "IQ4_NL": Format(32, 18, _iq4_nl),
    "Q2_K": Format(LARGE, 84, _q2_k),
    "Q3_K": Format(LARGE, 110, _q3_k),
    "Q4_K": Format(LARGE, 144, _q4_k),
    "Q5_K": Format(LARGE, 176, _q5_k),
    "Q6_K": Format(LARGE, 210, _q6_k),
    "IQ4_XS": Format(LARGE, 136, _iq4_xs),
}
