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
    marks = pytest.mark.gpu if ON_GPU else ()
    cases = []
    for name, spec in SPECS.items():
        for label, ops in triton_tables(name):
            for shape in shapes_of(spec):
                case_id = f"{label}-{name}-{shape_text(shape)[:50]}"
                cases.append(pytest.param(name, ops, shape, marks=marks, id=case_id))
    return cases


def shape_text(shape):
    """A shape as "3x63x9"."""
    return "x".join(map(str, shape))


# ---- random shapes: a function per operation, from a random.Random to a shape of its SPEC


def _several(rng, count, largest):
    return [rng.randint(1, largest) for _ in range(count)]


def _heads(rng):
    """H, G, d: up to 8 query heads for a key/value head, head sizes that are multiples of 8."""
    G = rng.randint(1, 2)
    H = G * rng.randint(1, 8)
    d = 8 * rng.randint(2, 12)
    return H, G, d


def _rms_norm(rng):
    T = rng.randint(1, 9)
    D = rng.randint(1, 200)
    return T, D


def _rope(rng):
    T = rng.randint(1, 20)
    H = rng.randint(1, 5)
    G = rng.randint(1, 3)
    d = 2 * rng.randint(8, 40)
    return T, H, G, d


def _swiglu(rng):
    T = rng.randint(1, 20)
    F = rng.randint(1, 200)
    return T, F


def _lora_linear(rng):
    T = rng.randint(1, 40)
    K = rng.randint(1, 90)
    rank = rng.randint(1, 70)
    members = rng.randint(1, 3)
    return T, K, rank, *_several(rng, members, 50)


def _linear(rng):
    T = rng.randint(1, 40)
    K = rng.randint(1, 90)
    N = rng.randint(1, 120)
    return T, K, N


def _attention(rng):
    heads = _heads(rng)
    rows = rng.randint(1, 3)
    return *heads, *_several(rng, rows, 50)


def _cached_attention(rng):
    heads = _heads(rng)
    page_size = 8 * rng.randint(1, 3)
    even = rng.randint(1, 6)
    odd = rng.randint(1, 40)
    rows = rng.randint(1, 3)
    contexts = [rng.randint(0, 60) for _ in range(rows)]
    return *heads, page_size, even, odd, *contexts


def _linear_cross_entropy(rng):
    T = rng.randint(1, 40)
    D = rng.randint(1, 80)
    V = rng.randint(2, 400)
    return T, D, V


def _adamw(rng):
    P = rng.randint(1, 5000)
    return (P,)


def _sample(rng):
    B = rng.randint(1, 4)
    V = rng.randint(2, 300)
    temperature = rng.randint(0, 1) * rng.uniform(0.3, 2)  # every other one is greedy
    top_k = rng.randint(0, 60)
    top_p = rng.uniform(0.3, 1)
    return B, V, temperature, top_k, top_p


RANDOM_SHAPE = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "norm_rope": _rope,
    "swiglu": _swiglu,
    "lora_linear": _lora_linear,
    "linear": _linear,
    "attention": _attention,
    "cached_attention": _cached_attention,
    "linear_cross_entropy": _linear_cross_entropy,
    "adamw": _adamw,
    "sample": _sample,
}


def random_shapes(spec):
    """Eight shapes without a pattern, the same ones every time."""
    rng = random.Random(spec.name)
    make_shape = RANDOM_SHAPE[spec.name]
    return [make_shape(rng) for _ in range(8)]


# ---- inputs


def named_tensors(value, name=""):
    """(name of the field or key that holds it, tensor) of every tensor in a structure."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from named_tensors(getattr(value, field.name), field.name)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from named_tensors(item, key)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from named_tensors(item, name)
