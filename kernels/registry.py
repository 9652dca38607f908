"""The tables of operations. One is passed to `Llama(config, ops)`; nothing is ever patched in.

REFERENCE  the definitions, differentiable; their backwards by autograd. Slow, and the truth.
TORCH      hand-written pairs on torch products: CPUs, and the honest baseline on GPUs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from kernels import (
    adamw,
    attention,
    cached_attention,
    linear_cross_entropy,
    lora_linear,
    rms_norm,
    rope,
    sampling,
    swiglu,
)


@dataclass(frozen=True)
class Ops:
    """Every operation of the training and sampling path, by the name its file documents."""

    name: str
    rms_norm_forward: Callable
    rms_norm_backward: Callable
    add_rms_norm_forward: Callable
    add_rms_norm_backward: Callable
    rope_: Callable
    swiglu_forward: Callable
    swiglu_backward: Callable
    lora_linear_forward: Callable
    lora_linear_backward: Callable
    attention_forward: Callable
    attention_backward: Callable
    kv_write_: Callable
    cached_attention: Callable
    linear_cross_entropy: Callable
    adamw_: Callable
    grad_norm: Callable
    sample: Callable

    def table(self) -> dict[str, str]:
        """Operation -> the function that does it, for the log."""
        fields = [f.name for f in dataclasses.fields(self) if f.name != "name"]
        functions = {name: getattr(self, name) for name in fields}
        return {name: f"{f.__module__}.{f.__name__}" for name, f in functions.items()}


REFERENCE = Ops(
    name="reference",
    rms_norm_forward=rms_norm.rms_norm_reference,
    rms_norm_backward=rms_norm.rms_norm_reference_backward,
    add_rms_norm_forward=rms_norm.add_rms_norm_reference,
    add_rms_norm_backward=rms_norm.add_rms_norm_reference_backward,
    rope_=rope.rope_reference,
    swiglu_forward=swiglu.swiglu_reference,
    swiglu_backward=swiglu.swiglu_reference_backward,
    lora_linear_forward=lora_linear.lora_linear_reference,
    lora_linear_backward=lora_linear.lora_linear_reference_backward,
    attention_forward=attention.attention_reference,
    attention_backward=attention.attention_reference_backward,
    kv_write_=cached_attention.kv_write_reference,
    cached_attention=cached_attention.cached_attention_reference,
    linear_cross_entropy=linear_cross_entropy.linear_cross_entropy_reference,
    adamw_=adamw.adamw_reference_,
    grad_norm=adamw.grad_norm_reference,
    sample=sampling.sample_reference,
)

TORCH = Ops(
    name="torch",
    rms_norm_forward=rms_norm.rms_norm_forward,
    rms_norm_backward=rms_norm.rms_norm_backward,
    add_rms_norm_forward=rms_norm.add_rms_norm_forward,
    add_rms_norm_backward=rms_norm.add_rms_norm_backward,
    rope_=rope.rope_,
    swiglu_forward=swiglu.swiglu_forward,
    swiglu_backward=swiglu.swiglu_backward,
    lora_linear_forward=lora_linear.lora_linear_forward,
    lora_linear_backward=lora_linear.lora_linear_backward,
    attention_forward=attention.attention_forward,
    attention_backward=attention.attention_backward,
    kv_write_=cached_attention.kv_write_,
    cached_attention=cached_attention.cached_attention,
    linear_cross_entropy=linear_cross_entropy.linear_cross_entropy,
    adamw_=adamw.adamw_,
    grad_norm=adamw.grad_norm,
    sample=sampling.sample,
)

OPS = {"reference": REFERENCE, "torch": TORCH}
SPECS = {
    module.SPEC.name: module.SPEC
    for module in (
        rms_norm,
        rope,
        swiglu,
        lora_linear,
        attention,
        cached_attention,
        linear_cross_entropy,
        adamw,
        sampling,
    )
}


def choose(name: str = "auto") -> Ops:
    """The table of that name; `auto` is TORCH until a GPU table has passed its checks there."""
    if name == "auto":
        return TORCH
    if name not in OPS:
        raise ValueError(f"--ops {name!r} is not known; choose one of auto, {', '.join(OPS)}")
    return OPS[name]
