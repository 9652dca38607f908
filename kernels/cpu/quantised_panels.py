"""A quantised weight packed for products on a CPU in C: its codes, scales and minima

    w = scale q - minimum    q a code of 4 or 8 bits; scale and minimum those of a block of inputs

This is how llama.cpp's formats with 2 to 8 bits a number are made (model/ggml_blocks.py). The C
product decodes a number in registers (native/quantised.c) to the fp32 number that llama.cpp makes
of it, and adds in the order of native/linear.c: the results are those of `Panels` of the decoded
weight, bit for bit.

    codes       blocks of 32    of 16
    4 bits         5 (6)         6 (8)      bits a number, in brackets with minima
    8 bits         9 (10)       10 (12)
"""

# N = outputs, K = inputs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu import native
from kernels.cpu.panels import Panels

BLOCKS = (16, 32)  # inputs that have a scale in common
SCALE_BITS = 32
TRIED = (65, 160)  # the matrix (N, K) on which a form is tried
TRIED_ROWS = (1, 5, 50)


@dataclass(frozen=True)
class Quantised:
    """A weight (N, K) as codes with a scale, and maybe a minimum, for each block of inputs.

    The number is scale * code, rounded to fp32, and then minus the minimum, rounded again.
    """

    codes: Tensor  # (N, K) int8
    scales: Tensor  # (N, K / block) fp32
    minima: Tensor | None = None  # (N, K / block) fp32; None: nothing is subtracted

    @property
    def block(self) -> int:
        """Inputs that have a scale in common."""
        return self.codes.shape[1] // self.scales.shape[1]

    def decoded(self) -> Tensor:
        """The weight (N, K) in fp32: the definition, in torch."""
        blocks = self.codes.float().unflatten(1, (-1, self.block))  # (N, K / block, block)
        numbers = self.scales[..., None] * blocks
        if self.minima is not None:
            numbers = numbers - self.minima[..., None]
        return numbers.flatten(1)


def stacked(parts: list[Quantised]) -> Quantised:
    """One weight of several, one below the other, in a form that all of them fit."""
    if len(parts) == 1:
        return parts[0]
    block = min(part.block for part in parts)
    has_minima = any(part.minima is not None for part in parts)
    scales = []
    minima = []
    for part in parts:
        times = part.block // block
        scales.append(part.scales.repeat_interleave(times, dim=1))
        minimum = part.minima
        if minimum is None:
            minimum = torch.zeros_like(part.scales)  # w - 0 is w, also where w is -0
        minima.append(minimum.repeat_interleave(times, dim=1))
    codes = torch.cat([part.codes for part in parts])
    return Quantised(codes, torch.cat(scales), torch.cat(minima) if has_minima else None)


class QuantisedPanels(Panels):
    """As `Panels`, of a quantised weight."""

    def __init__(self, weight: Quantised) -> None:
        N, K = weight.codes.shape
        block = weight.block
        assert block in BLOCKS and weight.scales.shape == (N, K // block), (
            f"codes {(N, K)}, scales {tuple(weight.scales.shape)}"
        )
        has_minima = weight.minima is not None
        code_bits = _code_bits(weight.codes, has_minima)
        bits = code_bits + SCALE_BITS // block
        form = block * 16 + code_bits  # native/panel.h
        if has_minima:
            bits += SCALE_BITS // block
            form += 1
        self._allocate((N, K), form, bits)
        minima = None  # a null pointer
        if weight.minima is not None:
            assert weight.minima.shape == weight.scales.shape
            minima = native.at(weight.minima)
        codes = native.at(weight.codes, torch.int8)
        scales = native.at(weight.scales)
        native.library().pack_quantised(codes, scales, minima, self.pointer, form, N, K)


# (library, form) -> whether its products are right: found once per process
_is_right: dict[tuple[str, int], bool] = {}


def has_right_products(form: int) -> bool:
    """Whether products in this form are those of `Panels`, bit for bit, on this machine.

    Tried once, on a small matrix, at a row, a whole tile and so many rows that panels are decoded
    first: as the other C kernels are checked before they are used (kernels/select_ops.py).
    """
    key = (native.name(), form)
    if key not in _is_right:
        _is_right[key] = _try_products(form)
    return _is_right[key]


def _try_products(form: int) -> bool:
    """As `has_right_products`, tried now."""
    block = form // 16
    has_minima = form % 2 == 1
    is_long = form & 8 != 0  # codes of 8 bits, else of 4
    lowest, highest = (-128, 127) if is_long else _range_of_4_bits(has_minima)
    generator = torch.Generator().manual_seed(0)
    N, K = TRIED
    codes = torch.randint(lowest, highest + 1, (N, K), generator=generator, dtype=torch.int8)
    codes[0, 0] = highest
    codes[0, 1] = lowest
    scales = torch.randn(N, K // block, generator=generator)
    minima = torch.randn(N, K // block, generator=generator) if has_minima else None
    weight = Quantised(codes, scales, minima)
    packed = QuantisedPanels(weight)
    assert packed.form == form, f"form {packed.form}, expected {form}"
    plain = Panels(weight.decoded())
    x = torch.randn(max(TRIED_ROWS), K, generator=generator)
    return all(torch.equal(packed(x[:rows]), plain(x[:rows])) for rows in TRIED_ROWS)


def _range_of_4_bits(has_minima: bool) -> tuple[int, int]:
    """The least and the greatest code of 4 bits: with minima they have no sign."""
    return (0, 15) if has_minima else (-8, 7)


def _code_bits(codes: Tensor, has_minima: bool) -> int:
    """4 where all codes fit: those with minima have no sign, the others have one."""
    lowest, highest = _range_of_4_bits(has_minima)
    if codes.numel() == 0:
        return 4
    fit = int(codes.min()) >= lowest and int(codes.max()) <= highest
    return 4 if fit else 8
