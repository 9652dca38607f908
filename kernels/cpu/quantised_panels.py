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


def _code_bits(codes: Tensor, has_minima: bool) -> int:
    """4 where all codes fit: those with minima have no sign, the others have one."""
    lowest, highest = (0, 15) if has_minima else (-8, 7)
    if codes.numel() == 0:
        return 4
    fit = int(codes.min()) >= lowest and int(codes.max()) <= highest
    return 4 if fit else 8
