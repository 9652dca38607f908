"""llama.cpp's blocks, split into codes, scales and minima: every number as the package gguf's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.cpu import native
from kernels.cpu.panels import Panels
from kernels.cpu.quantised_panels import QuantisedPanels, stacked
from model.ggml_blocks import FORMATS, quantised

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra `demo`)")

from tests.helpers.gguf_files import random_blocks  # noqa: E402

BITS = {  # of a number in panels, with its part of a scale and a minimum
    "Q4_0": 5, "Q4_1": 6, "Q5_0": 9, "Q5_1": 10, "Q8_0": 9, "IQ4_NL": 9, "Q2_K": 8, "Q3_K": 6,
    "Q4_K": 6, "Q5_K": 10, "Q6_K": 10, "IQ4_XS": 9,
}  # fmt: skip


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def blocks_and_numbers(name, rows, columns, seed=0):
    """Random rows of a format, and their numbers in fp32 as gguf decodes them."""
    kind = gguf.GGMLQuantizationType[name]
    blocks = random_blocks(kind, rows, columns, seed)
    numbers = np.ascontiguousarray(gguf.dequantize(blocks, kind), dtype=np.float32)
    return torch.from_numpy(blocks), torch.from_numpy(numbers)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_scales_and_minima_give_gguf_s_numbers_bit_for_bit(name):
    """Of random bytes, among which are scales below 0 with codes of 0: that number is -0."""
    form = FORMATS[name]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (form.numbers, form.size)
    blocks, numbers = blocks_and_numbers(name, 67, 512)
    split = quantised(blocks, name)
    assert same_bits(split.decoded(), numbers)
    if name in ("Q4_0", "Q8_0", "Q6_K"):
        is_minus_zero = numbers.view(torch.int32) == -(2**31)
        assert is_minus_zero.any()


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="rows of 35 bytes are no whole blocks of Q4_0 .18 bytes"):
        quantised(torch.zeros(2, 35, dtype=torch.uint8), "Q4_0")


@pytest.mark.skipif(native.why_unavailable() is not None, reason="no native kernels")
@pytest.mark.parametrize("name", FORMATS)
def test_products_with_packed_blocks_equal_those_of_the_decoded_weight(name):
    """Bit for bit, for every number of rows and at sizes that fill no panel."""
    blocks, numbers = blocks_and_numbers(name, 77, 512, seed=1)
    packed = QuantisedPanels(quantised(blocks, name))
    assert packed.bits == BITS[name] and same_bits(packed.unpack(), numbers)
    plain = Panels(numbers)
    x = torch.randn(60, 512, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(77, generator=torch.Generator().manual_seed(3))
    for T in (1, 2, 6, 7, 13, 25, 60):
        assert same_bits(packed(x[:T]), plain(x[:T])), f"{T} rows"
        assert same_bits(packed(x[:T], bias), plain(x[:T], bias)), f"{T} rows, biased"


MIXED = {  # members of a group -> bits of a number of the one matrix that they become
    ("Q4_K", "Q4_K", "Q6_K"): 12,
    ("Q4_0", "Q4_1", "Q4_0"): 10,
    ("Q4_0", "Q3_K"): 6,
    ("Q8_0", "Q6_K"): 10,
}


@pytest.mark.skipif(native.why_unavailable() is not None, reason="no native kernels")
@pytest.mark.parametrize("names", MIXED, ids=" ".join)
def test_members_of_several_formats_become_one_matrix(names):
    """As llama.cpp mixes them in the q, k and v of one layer."""
    made = [blocks_and_numbers(name, 24 + i, 512, seed=i) for i, name in enumerate(names)]
    numbers = torch.cat([number for _, number in made])
    parts = [quantised(blocks, name) for name, (blocks, _) in zip(names, made, strict=True)]
    packed = QuantisedPanels(stacked(parts))
    assert packed.bits == MIXED[names]
    assert same_bits(packed.unpack(), numbers)
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(2))
    assert same_bits(packed(x), Panels(numbers)(x))
