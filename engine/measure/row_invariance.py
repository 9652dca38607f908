"""Does a row of tokens have the same bits alone and beside others? Tried, not assumed

A product of torch may sum a row of its input in another order when more rows stand beside it: that
depends on the processor and on the library that torch was built with. Norms, rotation and SwiGLU
work on one token at a time; the products and the attention of a layer are all that has to be tried.
"""

# T = tokens, K = inputs of a product

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kernels.packed import Packed
from model.layout import GROUPS
from model.llama import Llama
from model.lora import Lora

LEAST_TOKENS = 8  # of a row; products of fewer tokens are sums in another order
LENGTHS = (128, 90, 61, 33, 23, 16)  # tokens of the rows that are tried
PREFIX = 8  # tokens that they begin with, where the attention can share them


def rows_keep_their_bits(model: Llama, loras: Iterable[Lora | None]) -> bool:
    """Whether rows of LENGTHS have the same bits together and alone, in the first layer.

    loras    of the forwards that are to be made; None stands for the seed model
    """
    assert not model.is_sharded, "the first layer's weights must be here"
    random = torch.Generator().manual_seed(0)
    for lora in loras:
        if lora is not None:
            model.ensure_bound(lora)
        for name in GROUPS:
            if not _product_keeps_bits(model, name, lora, random):
                return False
    return _attention_keeps_bits(model, random)


def _product_keeps_bits(
    model: Llama, name: str, lora: Lora | None, random: torch.Generator
) -> bool:
    """The same of one group of matrices with its adapter."""
    weight = model.weights[f"0.{name}"]  # (N, K)
    group = None if lora is None else lora.group(0, name)
    x = _normal((sum(LENGTHS), weight.shape[1]), model, random)  # (T, K)
    together, _ = model.ops.lora_linear_forward(x, weight, group)  # (T, N)
    for row in _rows(LENGTHS):
        alone, _ = model.ops.lora_linear_forward(x[row].clone(), weight, group)
        if not torch.equal(together[row], alone):
            return False
    return True


def _attention_keeps_bits(model: Llama, random: torch.Generator) -> bool:
    """The same of attention, where rows share a prefix if it can be shared."""
    heads = model.config.num_heads
    kv_heads = model.config.num_kv_heads
    width = (heads + 2 * kv_heads) * model.config.head_dim
    shares = model.device.type in model.ops.shares_prefix
    prefix = PREFIX if shares else 0
    first, *others = LENGTHS
    own = [first] + [length - prefix for length in others]  # tokens after the prefix
    qkv = _normal((sum(own), width), model, random)  # (T, (H + 2G) d)
    packed = Packed.from_lengths(own, model.device, prefix=prefix)
    together, _ = model.ops.attention_forward(qkv, packed, heads, kv_heads)  # (T, H d)
    for number, row in enumerate(_rows(own)):
        shared = qkv[:prefix] if number > 0 else qkv[:0]
        whole = torch.cat((shared, qkv[row]))  # a row with its prefix
        alone = Packed.from_lengths([len(whole)], model.device)
        result, _ = model.ops.attention_forward(whole, alone, heads, kv_heads)
        if not torch.equal(together[row], result[len(shared) :]):
            return False
    return True


def _normal(shape: tuple[int, int], model: Llama, random: torch.Generator) -> Tensor:
    """Normal numbers, the same in every run."""
    return torch.randn(shape, generator=random).to(model.device, model.dtype)


def _rows(lengths: Iterable[int]) -> Iterator[slice]:
    """The places of rows that lie end to end."""
    begin = 0
    for length in lengths:
        yield slice(begin, begin + length)
        begin += length
