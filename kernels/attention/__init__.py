"""Causal grouped-query attention over packed rows

    for each row, each query head h with its key/value head g = h // (H / G):
        P = softmax(q K^T / sqrt(d) + causal mask)      o = P V      lse = log of the row sums
backward   delta = sum(do * o)      dV = P^T do      dS = P * (do V^T - delta) / sqrt(d)
           dq = dS K                dK = dS^T q      with P = exp(q K^T / sqrt(d) - lse) recomputed
shapes     qkv, dqkv (T, (H + 2G) d)    o, do (T, H d)    lse (T, H) accumulation dtype, saved
precision  scores, softmax and sums in max(fp32, dtype). The torch form widens q, k and v too; flash
           attention and Triton keep the operands of products in the dtype and round P and dS to it
traffic    at least 2 T (H + G) d elements forward and twice that backward; no form keeps the scores
           of a whole row (torch: a block of them; Triton and flash attention: none)
contract   a row's result depends on that row alone, and on the prefix that all rows share if there
           is one (`Packed.prefix`; only REFERENCE and TORCH accept a prefix)

reference.py        the definition
torch_form.py       blocks of queries on torch products; torch's own flash attention on NVIDIA GPUs
triton_forward.py   the forward kernel, and the helpers that the backward kernels share with it
triton_backward.py  dq, then dk and dv
"""

# T = tokens, L = tokens of a row, H = query heads, G = key/value heads, d = head size, n = H / G

from __future__ import annotations

import torch
from torch import Tensor

from kernels.packed import Packed
from kernels.spec import MODELS, Spec

# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    """Shape: H, G, d and the length of every row.

    A negative number before the lengths: that many tokens of the first row are a prefix that all
    rows share.
    """
    H, G, d, *lengths = shape
    prefix = 0
    if lengths and lengths[0] < 0:
        prefix = -lengths[0]
        lengths = lengths[1:]
    T = sum(lengths)
    qkv = torch.randn(T, (H + 2 * G) * d, generator=g, dtype=torch.float64)
    do = torch.randn(T, H * d, generator=g, dtype=torch.float64)
    packed = Packed.from_lengths(lengths, prefix=prefix)
    return {"qkv": qkv, "do": do, "packed": packed, "H": H, "G": G}


def _run(ops, inputs: dict) -> dict[str, Tensor]:
    qkv, packed = inputs["qkv"], inputs["packed"]
    H, G = inputs["H"], inputs["G"]
    o, lse = ops.attention_forward(qkv, packed, H, G)
    dqkv = ops.attention_backward(inputs["do"], qkv, o, lse, packed, H, G)
    return {"o": o, "lse": lse, "dqkv": dqkv}


# lengths of the rows
_BENCH_BATCHES = (
    (256,),
    (512,) * 8,
    (4096,),
    (2048,) * 4,
)

SPEC = Spec(
    "attention",
    _make_inputs,
    _run,
    fields=("attention_forward", "attention_backward"),
    # H, G, d, then the lengths of the rows (see _make_inputs)
    test_shapes=(
        (1, 1, 16, 1),
        (4, 4, 80, 3, 1, 63),
        (9, 3, 64, 257, 40, 2),
        (8, 2, 128, 63, 1, 257),
        (4, 1, 96, 130),
        (8, 1, 16, 520),
        (2, 1, 64),  # no rows
    ),
    interpreter_shapes=(
        (1, 1, 16, 1),
        (4, 4, 80, 3, 1, 63),
        (9, 3, 64, 40, 2),
        (8, 2, 128, 1, 37),
        (8, 1, 96, 34),
        (2, 1, 20, 17, 30),  # heads are not aligned to 16 bytes
        (1, 1, 32, 257),
        (2, 1, 16, 130, 5),  # the second row begins after the first PAD tokens
        (2, 1, 64),
    ),
    prefix_shapes=(
        (9, 3, 16, -30, 30, 150, 1, 40),
        (4, 1, 32, -1, 2, 1),
        (2, 2, 16, -130, 160, 3, 200),
    ),
    bench_shapes=tuple(
        (m.H, m.G, m.d, *lengths) for m in MODELS.values() for lengths in _BENCH_BATCHES
    ),
    model_shapes=lambda m: ((m.H, m.G, m.d, 200, 1, 70),),
    floor=1e-5,  # sums over keys run in another order than the reference's
)
