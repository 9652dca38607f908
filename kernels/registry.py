"""The tables of operations. One is passed to `Llama(config, ops)`; nothing is ever patched in.

REFERENCE  the definitions, differentiable; their backwards by autograd. Slow, and the truth.
TORCH      hand-written pairs on torch products: CPUs, and the honest baseline on GPUs.
NATIVE     TORCH with what a sampling run on a CPU consists of in C (native.py), for fp32.
TRITON     our kernels; what has none yet is TORCH's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

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
from kernels.attention import reference as attention_reference
from kernels.attention import torch_form as attention_torch
from kernels.attention import triton_backward as attention_triton_backward
from kernels.attention import triton_forward as attention_triton
from kernels.cached_attention import native_form as cached_attention_native
from kernels.cached_attention import reference as cached_attention_reference
from kernels.cached_attention import torch_form as cached_attention_torch
from kernels.cached_attention import triton_forward as cached_attention_triton
from kernels.cpu import fused_layers, native, prepack
from kernels.launch import triton_launch
from kernels.lora_linear import batch_invariant as lora_linear_batch_invariant
from kernels.lora_linear import reference as lora_linear_reference
from kernels.lora_linear import torch_form as lora_linear_torch
from kernels.lora_linear import triton_backward as lora_linear_triton_backward
from kernels.lora_linear import triton_forward as lora_linear_triton
from kernels.sampling import native_form as sampling_native
from kernels.sampling import reference as sampling_reference
from kernels.sampling import torch_form as sampling_torch
from kernels.sampling import triton_forward as sampling_triton
from kernels.select_ops import checked, described
from kernels.spec import Widths


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
    linear: Callable
    attention_forward: Callable
    attention_backward: Callable
    kv_write_: Callable
    cached_attention: Callable
    linear_cross_entropy: Callable
    adamw_: Callable
    grad_norm: Callable
    sample: Callable
    shares_prefix: tuple[str, ...] = ()  # device types where attention takes a Packed.prefix fast
    packs: str = ""  # "panels": products want weights in panels.py's form
    layers: Callable | None = None  # (weights, count) -> all layers of a decoding step in one call
    sampled: Ops | None = None  # the table for a sampling run, where it is another

    def table(self) -> dict[str, str]:
        """Operation -> the function that does it, for the log."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        functions = {name: value for name, value in values.items() if callable(value)}
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
    shares_prefix=("cpu",),  # flash attention, on a GPU, knows no prefix
)

NATIVE = dataclasses.replace(
    TORCH,
    name="native",
    packs="panels",
    layers=fused_layers.LayersNative,
    rms_norm_forward=rms_norm.rms_norm_forward_native,
    add_rms_norm_forward=rms_norm.add_rms_norm_forward_native,
    rope_=rope.rope_native_,
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

# What a sampled row meets beside products. In Triton's form a row's bits are its own; in torch's on
# a GPU they may depend on the number of rows.
SAMPLED = ("rms_norm", "rope", "swiglu", "cached_attention", "sample")


def invariant(ops: Ops) -> Ops:
    """`ops` for sampling in which a row's bits are its own: with products of fixed tiles.

    ValueError where another operation that a sampled row meets is not Triton's.
    """
    others = [
        s for s in SAMPLED if any(getattr(ops, f) is not getattr(TRITON, f) for f in FIELDS[s])
    ]
    if others:
        raise ValueError(
            f"invariant: {', '.join(others)} would run in a form in which a row's bits may depend "
            f"on the number of rows (ops {ops.name}). On a GPU use --ops auto or triton; on a CPU "
            "float32 with --ops auto, where a row's bits are its own anyway"
        )
    return dataclasses.replace(
        ops,
        name=f"{ops.name} (invariant)",
        lora_linear_forward=lora_linear_batch_invariant.lora_linear_forward_invariant_triton,
        linear=lora_linear_batch_invariant.linear_invariant_triton,
    )


# TRITON with an operation in another form: the tiles or a flag may ask for it.
VARIANTS = {
    name: dataclasses.replace(TRITON, name=f"triton ({name})", **{field: function})
    for name, field, function in (
        (
            "lora_linear fused",
            "lora_linear_forward",
            lora_linear_triton.lora_linear_forward_fused_triton,
        ),
        (
            "lora_linear split",
            "lora_linear_forward",
            lora_linear_triton.lora_linear_forward_split_triton,
        ),
    )
}

OPS = {"reference": REFERENCE, "torch": TORCH, "native": NATIVE, "triton": TRITON}
SPECS = {
    module.SPEC.name: module.SPEC
    for module in (
        rms_norm,
        rope,
        swiglu,
        lora_linear,
        lora_linear_batch_invariant,
        attention,
        cached_attention,
        linear_cross_entropy,
        adamw,
        sampling,
    )
}


# Which functions of a table each SPEC holds to account.
FIELDS: dict[str, tuple[str, ...]] = {
    "rms_norm": (
        "rms_norm_forward",
        "rms_norm_backward",
        "add_rms_norm_forward",
        "add_rms_norm_backward",
    ),
    "rope": ("rope_",),
    "swiglu": ("swiglu_forward", "swiglu_backward"),
    "lora_linear": ("lora_linear_forward", "lora_linear_backward"),
    "linear": ("linear",),
    "attention": ("attention_forward", "attention_backward"),
    "cached_attention": ("kv_write_", "cached_attention"),
    "linear_cross_entropy": ("linear_cross_entropy",),
    "adamw": ("adamw_", "grad_norm"),
    "sample": ("sample",),
}

VARIANTS["invariant"] = invariant(TRITON)


def sum_products_in_fp32() -> None:
    """Have cuBLAS add the parts of a 16-bit product in fp32, as every file here promises.

    Unless it is told so, it may add them in 16 bits where it splits a long sum (split-K).
    """
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = False
    products.allow_fp16_reduced_precision_reduction = False


def choose(
    name: str = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    widths: Widths | None = None,
) -> Ops:
    """The table of that name for a model on this device; the result's name says what is in it.

    `auto` on a CPU is TORCH, and in fp32 NATIVE for sampling if that compiles and passes its checks
    here at the model's widths (kernels/select_ops.py); on a GPU it is TRITON as far as it passes,
    operation by operation. Where `auto` takes a slower form than others may have, it prints why.
    ValueError for an unknown name, and for `native` and `triton` where they cannot run, with the
    reason.
    """
    device = torch.device(device)
    if device.type == "cuda":
        sum_products_in_fp32()
    if name not in ("auto", *OPS):
        raise ValueError(f"--ops {name!r} is not known; choose one of auto, {', '.join(OPS)}")
    if name == "native" or (name == "auto" and device.type == "cpu"):
        return _with_native(name, device, dtype, widths)
    reason = triton_launch.usable(device)
    if name == "triton" and reason:
        raise ValueError(f"--ops triton cannot run here: {reason}; use --ops auto or torch")
    if name == "auto" and dtype == torch.float64:
        reason = reason or "they compute in fp32, and float64 was asked for"
    if name == "auto" and reason:
        print(f"ops: all runs in torch's slower form on {device}, without Triton kernels: {reason}")
        return TORCH
    ops, reasons = OPS.get(name), {}
    if ops is None:
        ops, reasons = checked(TRITON, TORCH, REFERENCE, SPECS, FIELDS, device, dtype, widths)
    elif ops is not TRITON:
        return ops
    name = described(ops, [TORCH, TRITON], FIELDS, reasons)
    return dataclasses.replace(ops, name=name)


def _with_native(name: str, device: torch.device, dtype: torch.dtype, widths: Widths | None) -> Ops:
    """NATIVE, or for "auto" TORCH that samples with it; all of it or nothing."""
    wanted = device.type == "cpu" and dtype == torch.float32
    reason = native.usable() if wanted else f"they are for fp32 on a CPU, not {dtype} on {device}"
    if not reason:
        reasons = checked(NATIVE, TORCH, REFERENCE, SPECS, FIELDS, device, dtype, widths)[1]
        reason = "; ".join(f"{operation}: {why}" for operation, why in reasons.items())
    if not reason:
        sampling = dataclasses.replace(TORCH, name="torch, sampling native", sampled=NATIVE)
        return NATIVE if name == "native" else sampling
    if name == "native":
        raise ValueError(f"--ops native cannot run here: {reason}; use --ops auto or torch")
    print(f"ops: sampling goes the slower way of torch, without native kernels: {reason}")
    return TORCH
