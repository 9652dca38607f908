"""The tables, shapes and tensors that the tests of operations run over."""

import dataclasses
import random

import pytest
import torch

from kernels.registry import SPECS, TRITON, VARIANTS, functions

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

# The fields that an operation's contract lets it write: in-place outputs, gradient accumulators.
WRITTEN = {
    "lora_linear": {"da", "db"},
    "cached_attention": {"k", "v"},
    "adamw": {"params", "m", "v"},
}


def triton_tables(name):
    """(label, table) of TRITON and of its variants that run this spec in another way."""
    yield "triton", TRITON
    for label, ops in VARIANTS.items():
        if functions(ops, SPECS[name]) != functions(TRITON, SPECS[name]):
            yield label, ops


def kernel_shapes(spec):
    """The spec's shapes for kernels on this machine: fewer in the interpreter."""
    return spec.test_shapes if ON_GPU else spec.interpreter_shapes or spec.test_shapes


def triton_cases(shapes_of):
    """pytest parameters (name, ops, shape) for every spec, table and shape of `shapes_of`."""
    return [
        pytest.param(
            name, ops, shape, marks=pytest.mark.gpu if ON_GPU else (),
            id=f"{label}-{name}-{'x'.join(map(str, shape))[:50]}",
        )
        for name, spec in SPECS.items()
        for label, ops in triton_tables(name)
        for shape in shapes_of(spec)
    ]  # fmt: skip


def random_shapes(spec):
    """Eight shapes without a pattern, the same ones every time."""
    rng = random.Random(spec.name)
    pick = rng.randint

    def several(count, largest):
        return [pick(1, largest) for _ in range(count)]

    def attention_heads():
        G = pick(1, 2)
        H = G * pick(1, 8)
        return H, G, 8 * pick(2, 12)

    def cached_attention():
        heads = attention_heads()
        page_size, even, odd = 8 * pick(1, 3), pick(1, 6), pick(1, 40)
        return *heads, page_size, even, odd, *[pick(0, 60) for _ in range(pick(1, 3))]

    def sample():
        B, V = pick(1, 4), pick(2, 300)
        temperature = pick(0, 1) * rng.uniform(0.3, 2)
        return B, V, temperature, pick(0, 60), rng.uniform(0.3, 1)

    makers = {
        "rms_norm": lambda: (pick(1, 9), pick(1, 200)),
        "rope": lambda: (pick(1, 20), pick(1, 5), pick(1, 3), 2 * pick(8, 40)),
        "swiglu": lambda: (pick(1, 20), pick(1, 200)),
        "lora_linear": lambda: (pick(1, 40), pick(1, 90), pick(1, 70), *several(pick(1, 3), 50)),
        "linear": lambda: (pick(1, 40), pick(1, 90), pick(1, 120)),
        "attention": lambda: (*attention_heads(), *several(pick(1, 3), 50)),
        "cached_attention": cached_attention,
        "linear_cross_entropy": lambda: (pick(1, 40), pick(1, 80), pick(2, 400)),
        "adamw": lambda: (pick(1, 5000),),
        "sample": sample,
    }
    return [makers[spec.name]() for _ in range(8)]


def named_tensors(value, name=""):
    """(name of the field or key that holds it, tensor) of every tensor in a structure."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from named_tensors(getattr(value, field.name), field.name)
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from named_tensors(v, key)
    elif isinstance(value, tuple | list):
        for v in value:
            yield from named_tensors(v, name)
