"""Products that are batch-invariant on a GPU: the operation `linear`, and a form of lora_linear

    y   = x W^T                        the model's head; W is frozen
    y_i = x W_i^T + s (x A^T)_i B_i^T + bias_i
                                       a group of matrices with or without adapters and a bias, as
                                       lora_linear

A library picks its kernel by the number of rows: other tiles, another instruction, the sum over K
cut into parts. Here a row's result is one fixed chain of roundings, because
    tile    BM, BN, BK, warps and stages follow from dtype and rank alone. A tile that T does not
            fill is computed whole; the results of its idle rows are thrown away
    order   a program owns its outputs and walks over all of K in steps of BK: no split, no atomics.
            S = x A^T is made in the same loop, by every program for itself
    code    one compiled kernel for every T: T is no constant of it and is not specialised; x is
            contiguous and begins on 16 bytes (else it is copied), so neither alignment nor strides
            are specialised differently
The rest is up to the hardware: an element of a tile product has to be computed in one way wherever
in the tile it stands. `--invariant` checks that on the card (engine/sampling/batch_invariance.py).

shapes     x (T, K)    weight (N, K)    y (T, N)
precision  products accumulate in at least fp32 (fp32 operands: no TF32); one rounding to the dtype
traffic    T K + N K + T N elements must be moved. W is read anew by every BM rows (from L2, if it
           holds GROUP tiles of x and one of W), x by every BN columns
cost       one row is computed as BM rows: hidden behind the reading of W, which is the time that a
           decoding step takes. Prompts lose: a tile is small beside those of "many" in lora_linear
triton     the kernel is lora_linear_kernel, with RANK 0 for a plain product
tiles      shape classes of lora_linear_kernel: "fixed r16" (padded rank, 128 for more), "fixed"; in
           fp32 "fixed fp32 r16", "fixed fp32"; the interpreter's "any" serves all
"""

# T = tokens, K = inputs, N = outputs, R = ranks of all adapted members

from __future__ import annotations

import torch
from torch import Tensor

from kernels.integers import power_of_two
from kernels.launch.tile_config import tile_config
from kernels.launch.triton_launch import launch
from kernels.lora_linear.group import LoraGroup
from kernels.lora_linear.triton_forward import (
    count_tiles,
    lora_linear_forward_split_triton,
    lora_linear_kernel,
    members_of,
)
from kernels.philox import Dropout
from kernels.spec import MODELS, Spec, Widths

# ---- reference: the definition


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """y (T, N); differentiable."""
    return x @ weight.T


# ---- triton


def _fixed_tiles(
    x: Tensor, weight: Tensor, group: LoraGroup | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """y (T, N), and S (T, R) with a group."""
    T, K = x.shape
    N = weight.shape[0]
    assert weight.shape == (N, K), f"x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}"
    x = x.contiguous()
    if x.storage_offset() * x.element_size() % 16 != 0:
        x = x.clone()  # begins on 16 bytes
    weight = weight.contiguous()
    y = x.new_empty(T, N)
    if group is None:
        sizes = (N,)
        rank = 0
        scale = 1.0
        a = None
        b0 = b1 = b2 = None
        s = None
        members = {"N0": N, "N1": 0, "N2": 0, "S0": -1, "S1": -1, "S2": -1, "R": 0, "RANK": 0}
    else:
        assert group.a.shape[1] == K and sum(group.sizes) == N, (
            f"x {tuple(x.shape)}, W {(N, K)}, A {tuple(group.a.shape)}, {group.sizes}"
        )
        sizes = group.sizes
        rank = group.rank
        scale = group.scale
        a = group.a.contiguous()  # (R, K)
        (b0, b1, b2), members = members_of(group)
        s = x.new_empty(T, a.shape[0])  # (T, R)

    padded_rank = power_of_two(max(1, rank))
    kind = "fixed fp32" if x.dtype == torch.float32 else "fixed"
    classes = [kind]
    if rank > 0:
        classes.insert(0, f"{kind} r{min(128, padded_rank)}")
    config = tile_config("lora_linear_kernel", x.device, *classes)
    tiles = count_tiles(T, sizes, config)
    programs = tiles
    launch(
        lora_linear_kernel, (programs,),
        x, weight, a, b0, b1, b2, s, bias, y, T, K, scale, tiles, programs, K=K, **members,
        # by pointers, a program per tile: only aligned tensors have descriptors
        FUSED=True, DESCRIPTORS=False, BIAS=bias is not None, PERSISTENT=False,
        BR=padded_rank, **config,
    )  # fmt: skip
    return y, s


def linear_invariant_triton(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, K) times weight (N, K) transposed: (T, N), batch-invariant."""
    y, _ = _fixed_tiles(x, weight, None)
    return y


def lora_linear_forward_invariant_triton(
    x: Tensor,
    weight: Tensor,
    group: LoraGroup | None = None,
    dropout: Dropout | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `lora_linear_forward`, batch-invariant.

    Sampling uses no dropout; with dropout this is the split form, which is not batch-invariant.
    """
    if group is not None and dropout is not None:
        return lora_linear_forward_split_triton(x, weight, group, dropout, bias)
    return _fixed_tiles(x, weight, group, bias)


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    """Shape: T, K, N, and maybe the bits of the weight's significands.

    8 bits are a checkpoint's in bf16, 11 in fp16; a CPU has a form for each (cpu/panels.py).
    """
    T, K, N, *bits = shape
    x = torch.randn(T, K, generator=g, dtype=torch.float64)
    w = torch.randn(N, K, generator=g, dtype=torch.float64) / K**0.5
    if bits == [8]:
        w = w.to(torch.bfloat16).double()
    if bits == [11]:
        w = w.to(torch.float16).double()
    return {"x": x, "w": w}


def _run(ops, i: dict) -> dict[str, Tensor]:
    return {"y": ops.linear(i["x"], i["w"])}


def _heads(m: Widths, tokens: tuple[int, ...], *bits: int) -> tuple[tuple[int, ...], ...]:
    """The shapes, as `_make_inputs` takes them, of a model's head."""
    return tuple((t, m.D, m.V, *bits) for t in tokens)


SPEC = Spec(
    "linear",
    _make_inputs,
    _run,
    fields=("linear",),
    test_shapes=(
        (1, 16, 8),
        (3, 63, 21),
        (65, 96, 130),
        (17, 32, 300),
        (0, 16, 8),
        (17, 33, 70, 8),
        (65, 97, 131, 11),  # the largest, which `auto` checks beside the second (fp32)
    ),
    bench_shapes=tuple(s for m in MODELS.values() for s in _heads(m, (1, 16, 64))),
    model_shapes=lambda m: _heads(m, (17, 65), 8),
    floor=1e-5,  # a different summation order over K is not an error
)
