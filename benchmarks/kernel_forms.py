"""The forms of an operation that benchmarks/kernels.py times beside each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.clock import first_line
from benchmarks.operations import DIFFERENTIABLE, Call, on_device
from kernels import registry
from kernels.registry import REFERENCE, SPECS, TORCH, Ops, functions
from kernels.spec import check

# operations whose torch form reads nothing on the host, so that it can be captured as a CUDA graph
# (engine/sampling/cuda_graphs.py); a capture that fails would end all further ones
CAPTURED_IN_TORCH = ("rms_norm", "rope", "norm_rope", "swiglu", "lora_linear", "linear", "sample")


def compiled(operation: str) -> Ops:
    """The REFERENCE table with this operation's forwards through torch.compile."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # a backward is called again and again on one forward
    if hasattr(dynamo, "fail_on_recompile_limit_hit"):
        dynamo.fail_on_recompile_limit_hit = True  # else it would go on uncompiled
    forwards = {}
    for name in SPECS[operation].fields:
        if "backward" not in name:
            forwards[name] = torch.compile(getattr(REFERENCE, name), fullgraph=True)
    return dataclasses.replace(REFERENCE, name="compiled", **forwards)


def our_tables(operation: str) -> list[Ops]:
    """TRITON and its variants, as far as they have their own form of this operation."""
    spec = SPECS[operation]
    known = {functions(TORCH, spec)}
    tables = []
    named = {"triton": registry.TRITON}
    for variant, ops in registry.VARIANTS.items():
        name = f"triton {variant.removeprefix(operation).strip()}"
        named[name] = dataclasses.replace(ops, name=name)
    for ops in named.values():
        form = functions(ops, spec)
        if form not in known:
            known.add(form)
            tables.append(ops)
    return tables


def is_capturable(operation: str, ops: Ops) -> bool:
    """Whether a table's form of an operation can be captured: our kernels, and some of torch's."""
    if ops.name in DIFFERENTIABLE:
        return False  # autograd's
    return ops.name != TORCH.name or operation in CAPTURED_IN_TORCH


def why_failing(
    operation: str, ops: Ops, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> str | None:
    """Why this table's form must not be timed; None when it passes its check at the shape."""
    try:
        check(on_device(SPECS[operation], device), ops, REFERENCE, shape, dtype, device)
    except Exception as error:  # whatever compiling, launching or checking may raise
        return first_line(error)
    return None


class TimedForm:
    """One form of a call, without arguments.

    Its graph or saved tensors are made by the first call, so that `Clock.measure` reports a form
    that fails there. The backward of a differentiable table is autograd's.
    """

    def __init__(self, how: Call, ops: Ops, inputs: dict) -> None:
        self.how = how
        self.ops = ops
        self.inputs = inputs
        self.ready: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        if self.ready is None:
            self.ready = self.prepare()
        return self.ready()

    def prepare(self) -> Callable[[], Any]:
        how, ops, inputs = self.how, self.ops, self.inputs
        if how.graph is not None and ops.name in DIFFERENTIABLE:
            outputs, leaves, gradients = how.graph(ops, inputs)
            return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
        saved = how.saved(ops, inputs)
        return lambda: how.run(ops, inputs, saved)
