"""The tables of operations: which function does what. One is passed to `Llama(config, ops)`.

REFERENCE  the definitions, differentiable; their backwards by autograd. Slow, and the truth.
TORCH      hand-written forward and backward pairs on torch products: for CPUs, and the baseline on
           GPUs.
NATIVE     TORCH with the operations of sampling on a CPU in C (kernels/cpu/native.py), for fp32.
TRITON     the Triton kernels; operations that have none are TORCH's.
VARIANTS   TRITON with one operation in another form.

Which table runs on a machine is decided in kernels/select_ops.py.
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
    norm_rope,
    rms_norm,
    rope,
    sampling,
    swiglu,
)
from kernels.attention import reference as attention_reference
from kernels.attention import torch_form as attention_torch
from kernels.attention import triton_backward as attention_triton_backward
from kernels.attention import triton_forward as attention_triton
from kernels.cached_attention import native_form as cached_attention_native
from kernels.cached_attention import reference as cached_attention_reference
from kernels.cached_attention import torch_form as cached_attention_torch
from kernels.cached_attention import triton_forward as cached_attention_triton
from kernels.cpu import fused_layers, prepack
from kernels.lora_linear import batch_invariant as lora_linear_batch_invariant
from kernels.lora_linear import reference as lora_linear_reference
from kernels.lora_linear import torch_form as lora_linear_torch
from kernels.lora_linear import triton_backward as lora_linear_triton_backward
from kernels.lora_linear import triton_forward as lora_linear_triton
from kernels.sampling import native_form as sampling_native
from kernels.sampling import reference as sampling_reference
from kernels.sampling import torch_form as sampling_torch
from kernels.sampling import triton_forward as sampling_triton
from kernels.spec import Spec


@dataclass(frozen=True)
class Ops:
    """Every operation of the training and sampling path, by the name that its file documents."""

    name: str
    rms_norm_forward: Callable
    rms_norm_backward: Callable
    add_rms_norm_forward: Callable
    add_rms_norm_backward: Callable
    rope_: Callable
    norm_rope_forward: Callable
    norm_rope_backward_: Callable
    swiglu_forward: Callable
    swiglu_backward: Callable
    lora_linear_forward: Callable
    lora_linear_backward: Callable
    linear: Callable
    attention_forward: Callable
    attention_backward: Callable
    kv_write_: Callable
    cached_attention: Callable
    linear_cross_entropy: Callable
    adamw_: Callable
    grad_norm: Callable
    sample: Callable
    shares_prefix: tuple[str, ...] = ()  # device types whose attention supports Packed.prefix
    packs: str = ""  # "panels": products take weights as kernels/cpu/panels.py packs them
    # (weights, number of layers, layers that are not rotated) -> a callable for all layers over a
    # cache (FusedLayers)
    layers: Callable | None = None
    sampled: Ops | None = None  # the table of a sampling run; None: this one

    def table(self) -> dict[str, str]:
        """Field -> the function in it, as "module.function", for the run record."""
        names = {}
        for field in dataclasses.fields(self):
            function = getattr(self, field.name)
            if callable(function):
                names[field.name] = f"{function.__module__}.{function.__name__}"
        return names


REFERENCE = Ops(
    name="reference",
    rms_norm_forward=rms_norm.rms_norm_reference,
    rms_norm_backward=rms_norm.rms_norm_reference_backward,
    add_rms_norm_forward=rms_norm.add_rms_norm_reference,
    add_rms_norm_backward=rms_norm.add_rms_norm_reference_backward,
    rope_=rope.rope_reference,
    norm_rope_forward=norm_rope.norm_rope_reference,
    norm_rope_backward_=norm_rope.norm_rope_reference_backward_,
    swiglu_forward=swiglu.swiglu_reference,
    swiglu_backward=swiglu.swiglu_reference_backward,
    lora_linear_forward=lora_linear_reference.lora_linear_reference,
    lora_linear_backward=lora_linear_reference.lora_linear_reference_backward,
    linear=lora_linear_batch_invariant.linear_reference,
    attention_forward=attention_reference.attention_reference,
    attention_backward=attention_reference.attention_reference_backward,
    kv_write_=cached_attention_reference.kv_write_reference,
    cached_attention=cached_attention_reference.cached_attention_reference,
    linear_cross_entropy=linear_cross_entropy.linear_cross_entropy_reference,
    adamw_=adamw.adamw_reference_,
    grad_norm=adamw.grad_norm_reference,
    sample=sampling_reference.sample_reference,
)

TORCH = Ops(
    name="torch",
    rms_norm_forward=rms_norm.rms_norm_forward,
    rms_norm_backward=rms_norm.rms_norm_backward,
    add_rms_norm_forward=rms_norm.add_rms_norm_forward,
    add_rms_norm_backward=rms_norm.add_rms_norm_backward,
    rope_=rope.rope_,
    norm_rope_forward=norm_rope.norm_rope_forward,
    norm_rope_backward_=norm_rope.norm_rope_backward_,
    swiglu_forward=swiglu.swiglu_forward,
    swiglu_backward=swiglu.swiglu_backward,
    lora_linear_forward=lora_linear_torch.lora_linear_forward,
    lora_linear_backward=lora_linear_torch.lora_linear_backward,
    linear=prepack.linear,
    attention_forward=attention_torch.attention_forward,
    attention_backward=attention_torch.attention_backward,
    kv_write_=cached_attention_torch.kv_write_,
    cached_attention=cached_attention_torch.cached_attention,
    linear_cross_entropy=linear_cross_entropy.linear_cross_entropy,
    adamw_=adamw.adamw_,
    grad_norm=adamw.grad_norm,
    sample=sampling_torch.sample,
    shares_prefix=("cpu",),  # torch's flash attention, on GPUs, supports no shared prefix
)

NATIVE = dataclasses.replace(
    TORCH,
    name="native",
    packs="panels",
    layers=fused_layers.FusedLayers,
    rms_norm_forward=rms_norm.rms_norm_forward_native,
    add_rms_norm_forward=rms_norm.add_rms_norm_forward_native,
    rope_=rope.rope_native_,
    norm_rope_forward=norm_rope.norm_rope_forward_native,
    swiglu_forward=swiglu.swiglu_forward_native,
    linear=prepack.linear_native,
    kv_write_=cached_attention_native.kv_write_native_,
    cached_attention=cached_attention_native.cached_attention_native,
    sample=sampling_native.sample_native,
)

TRITON = dataclasses.replace(
    TORCH,
    name="triton",
    rms_norm_forward=rms_norm.rms_norm_forward_triton,
    rms_norm_backward=rms_norm.rms_norm_backward_triton,
    add_rms_norm_forward=rms_norm.add_rms_norm_forward_triton,
    add_rms_norm_backward=rms_norm.add_rms_norm_backward_triton,
    rope_=rope.rope_triton_,
    norm_rope_forward=norm_rope.norm_rope_forward_triton,
    norm_rope_backward_=norm_rope.norm_rope_backward_triton_,
    swiglu_forward=swiglu.swiglu_forward_triton,
    swiglu_backward=swiglu.swiglu_backward_triton,
    lora_linear_forward=lora_linear_triton.lora_linear_forward_triton,
    lora_linear_backward=lora_linear_triton_backward.lora_linear_backward_triton,
    kv_write_=cached_attention_triton.kv_write_triton_,
    cached_attention=cached_attention_triton.cached_attention_triton,
    attention_forward=attention_triton.attention_forward_triton,
    attention_backward=attention_triton_backward.attention_backward_triton,
    linear_cross_entropy=linear_cross_entropy.linear_cross_entropy_triton,
    adamw_=adamw.adamw_triton_,
    grad_norm=adamw.grad_norm_triton,
    sample=sampling_triton.sample_triton,
    shares_prefix=(),
)

OPS = {"reference": REFERENCE, "torch": TORCH, "native": NATIVE, "triton": TRITON}

OPERATION_MODULES = (
    rms_norm,
    rope,
    norm_rope,
    swiglu,
    lora_linear,
    lora_linear_batch_invariant,
    attention,
    cached_attention,
    linear_cross_entropy,
    adamw,
    sampling,
)
# Every operation's contract by its name; `fields` of each names its functions in a table.
SPECS: dict[str, Spec] = {module.SPEC.name: module.SPEC for module in OPERATION_MODULES}

# The operations of sampling besides matrix products. Their Triton forms are batch-invariant; their
# torch forms on a GPU may give a row other bits for another number of rows.
SAMPLING = ("rms_norm", "rope", "norm_rope", "swiglu", "cached_attention", "sample")


def functions(ops: Ops, spec: Spec) -> tuple[Callable, ...]:
    """The functions of a table that belong to one operation."""
    return tuple(getattr(ops, field) for field in spec.fields)


def invariant(ops: Ops) -> Ops:
    """`ops` for batch-invariant sampling: with matrix products of fixed tiles.

    A row's result then does not depend on the other rows, to the last bit. ValueError where another
    operation of sampling is not Triton's.
    """
    others = []
    for name in SAMPLING:
        spec = SPECS[name]
        if functions(ops, spec) != functions(TRITON, spec):
            others.append(name)
    if others:
        raise ValueError(
            f"invariant: {', '.join(others)} would run in a form that is not batch-invariant: a "
            f"row's result may depend on the number of rows (ops {ops.name}). On a GPU use --ops "
            "auto or triton; on a CPU float32 with --ops auto, which is batch-invariant anyway"
        )
    return dataclasses.replace(
        ops,
        name=f"{ops.name} (invariant)",
        lora_linear_forward=lora_linear_batch_invariant.lora_linear_forward_invariant_triton,
        linear=lora_linear_batch_invariant.linear_invariant_triton,
    )


# TRITON with one operation in another form, which the table of tile configurations or a flag may
# ask for.
VARIANTS: dict[str, Ops] = {
    "lora_linear fused": dataclasses.replace(
        TRITON,
        name="triton (lora_linear fused)",
        lora_linear_forward=lora_linear_triton.lora_linear_forward_fused_triton,
    ),
    "lora_linear split": dataclasses.replace(
        TRITON,
        name="triton (lora_linear split)",
        lora_linear_forward=lora_linear_triton.lora_linear_forward_split_triton,
    ),
    "invariant": invariant(TRITON),
}
