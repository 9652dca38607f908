"""The contract of an operation (`Spec`), and the check that holds a table of operations to it.

An operation file ends in a `SPEC`. `check` runs one table of operations on the spec's inputs and
compares every output and every gradient with the definition (the REFERENCE table) in fp64:

    error(ours) <= slack * error(reference in the same dtype) + floor * max|truth|

So the tolerance is measured: it is the error that the dtype itself costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.cpu import onemkl_first_calls  # noqa: F401 imported for its effect


def autograd(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], douts: Any) -> list[Tensor]:
    """Gradients of `fn(*inputs)` by torch's autograd: the backward of the REFERENCE table.

    `douts` is the gradient of the output, or a tuple of them. Returns one gradient per input, in
    its shape and dtype.
    """
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        outs = fn(*leaves)
    return list(torch.autograd.grad(outs, leaves, douts, allow_unused=False))


@dataclass(frozen=True)
class Widths:
    """The sizes of a model that its kernels are compiled for."""

    D: int  # model width
    F: int  # feed-forward width
    H: int  # query heads
    G: int  # key/value heads
    d: int  # head size
    V: int  # vocabulary
    qk_norm: bool = False  # whether each head of q and k is normalised (kernels/norm_rope.py)


@dataclass(frozen=True)
class Spec:
    """The contract of one operation.

    `make_inputs(shape, generator)` returns fp64 inputs on the CPU. `run(ops, inputs)` calls the
    operation's functions from a table, forward and backward, and returns every output and gradient
    by name.
    """

    name: str
    make_inputs: Callable[[tuple[int, ...], torch.Generator], dict[str, Any]]
    run: Callable[[Any, dict[str, Any]], dict[str, Tensor]]
    fields: tuple[str, ...]  # the operation's functions: fields of kernels.registry.Ops
    test_shapes: tuple[tuple[int, ...], ...]  # odd and small: for correctness
    bench_shapes: tuple[tuple[int, ...], ...]  # large: for speed
    slack: float = 2.0  # raising it is a reviewed change with its reason in the file
    floor: float = 1e-6  # absolute tolerance, relative to max|truth|
    interpreter_shapes: tuple[tuple[int, ...], ...] = ()  # for kernels, where test_shapes are slow
    prefix_shapes: tuple[tuple[int, ...], ...] = ()  # with a shared prefix: TORCH and REFERENCE
    # few tokens at a model's own widths: `--ops auto` checks them beside test_shapes
    model_shapes: Callable[[Widths], tuple[tuple[int, ...], ...]] = lambda widths: ()
    # whether a model uses it: for one that does not, `--ops auto` does not check it
    used_by: Callable[[Widths], bool] = lambda widths: True


MODELS = {
    "smollm2-135m": Widths(576, 1536, 9, 3, 64, 49152),
    "llama-2-7b": Widths(4096, 11008, 32, 32, 128, 32000),
    "llama-3-8b": Widths(4096, 14336, 32, 8, 128, 128256),
}
TOKENS = (1, 16, 256, 4096, 8192)  # of benchmark shapes: from one decoded token to a train step


def cast(value: Any, dtype: torch.dtype | None, device: str | torch.device = "cpu") -> Any:
    """A copy of `value` on `device`, floating tensors in `dtype` (None: each in its own).

    Dataclasses, dictionaries, lists and tuples are copied with what they contain.
    """

    def copy_of(tensor: Tensor) -> Tensor:
        new_dtype = dtype if tensor.is_floating_point() else None
        return tensor.to(device, new_dtype, copy=True)

    return map_tensors(copy_of, value)


def map_tensors(fn: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with fn(tensor) in the place of every tensor in it.

    Dataclasses, dictionaries, lists and tuples are copied with what they contain; anything else is
    returned as it is.
    """
    if isinstance(value, Tensor):
        return fn(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {}
        for field in dataclasses.fields(value):
            if field.init:
                changes[field.name] = map_tensors(fn, getattr(value, field.name))
        return dataclasses.replace(value, **changes)
    if isinstance(value, dict):
        return {key: map_tensors(fn, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(fn, item) for item in value)
    return value


def check(
    spec: Spec,
    ops: Any,
    reference: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs,
) -> dict[str, tuple[float, float]]:
    """Output name -> (largest error, its bound). AssertionError names the first output over it.

    The inputs are rounded to `dtype` first, so the truth is that of the rounded inputs. `prepare`
    may change the memory layout of the inputs of the table under test (strides, guards).
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = cast(spec.make_inputs(shape, generator), dtype, device)
    truth = spec.run(reference, cast(inputs, torch.float64, device))
    yardstick = spec.run(reference, cast(inputs, dtype, device))
    ours = spec.run(ops, prepare(cast(inputs, dtype, device)))
    assert ours.keys() == truth.keys(), f"{spec.name}: outputs {ours.keys()}, not {truth.keys()}"
    report = {}
    for name, exact in truth.items():
        got = ours[name]
        assert got.shape == exact.shape, f"{spec.name} {name}: {got.shape}, not {exact.shape}"
        if exact.numel() == 0:
            continue
        if not exact.is_floating_point():
            assert torch.equal(got, exact), f"{spec.name} {name} {shape}: integers differ"
            continue
        error = _largest(got.double() - exact)
        reference_error = _largest(yardstick[name].double() - exact)
        floor = spec.floor * _largest(exact)
        if dtype == torch.float64:  # the yardstick is the truth itself; only rounding may remain
            floor = 1e-12 * max(1.0, _largest(exact))
        bound = spec.slack * reference_error + floor
        report[name] = (error, bound)
        assert error <= bound, (
            f"{spec.name} {name} {shape} {dtype}: error {error:.3g} over the bound {bound:.3g} "
            f"(reference in the same dtype: {reference_error:.3g})"
        )
    return report


def _largest(values: Tensor) -> float:
    """The largest absolute value."""
    return values.abs().max().item()
