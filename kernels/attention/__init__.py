"""Causal grouped-query attention over packed rows

    for each row, each query head h with its key/value head g = h // (H / G):
        P = softmax(q K^T / sqrt(d) + causal mask)      o = P V      lse = log of the row sums
backward   delta = sum(do * o)      dV = P^T do      dS = P * (do V^T - delta) / sqrt(d)
           dq = dS K                dK = dS^T q      with P = exp(q K^T / sqrt(d) - lse) recomputed
shapes     qkv, dqkv (T, (H + 2G) d)    o, do (T, H d)    lse (T, H) accumulation dtype, saved
precision  a row's q, k, v are widened to max(fp32, dtype) and everything is computed there; flash
           attention and triton keep the operands of products in the dtype: P and dS are rounded
traffic    the torch form holds a block of scores; a row is cut into blocks of about PACKED_BLOCK
           queries, and a block looks at no key behind its last query, so long rows do about half
           the square. exp of an infinity, or to a denormal, takes a CPU seven times as long as
           another: scores are clamped to LOWEST, whose exp is lost in a sum >= 1
torch      on an NVIDIA GPU in 16 bits: torch's own variable-length flash attention, where a try on
           two short rows gives what the blocked form gives
A row's result depends on that row (and a prefix that all share, `Packed.prefix`) alone: rows are
handled one after the other.
The Triton kernels are in attention_triton.py.
"""


# T = tokens, L = tokens of a row, H = query heads, G = key/value heads, d = head size, n = H / G

from __future__ import annotations

import torch
from torch import Tensor

from kernels.packed import Packed
from kernels.spec import MODELS, Spec

# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    h, kv, d, *lengths = shape
    # a negative length in front: so many tokens of the first row are a prefix that all share
    prefix = max(0, -lengths[0]) if lengths else 0
    lengths = lengths[prefix > 0 :]
    t = sum(lengths)
    return {
        "qkv": torch.randn(t, (h + 2 * kv) * d, generator=g, dtype=torch.float64),
        "do": torch.randn(t, h * d, generator=g, dtype=torch.float64),
        "packed": Packed.from_lengths(lengths, prefix=prefix),
        "H": h,
        "G": kv,
    }


def _run(ops, i: dict) -> dict[str, Tensor]:
    o, lse = ops.attention_forward(i["qkv"], i["packed"], i["H"], i["G"])
    dqkv = ops.attention_backward(i["do"], i["qkv"], o, lse, i["packed"], i["H"], i["G"])
    return {"o": o, "lse": lse, "dqkv": dqkv}


SPEC = Spec(
    "attention",
    _make_inputs,
    _run,
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
        (2, 1, 20, 17, 30),  # heads begin on no 16 bytes
        (1, 1, 32, 257),
        (2, 1, 16, 130, 5),  # a row that begins behind the first PAD tokens
        (2, 1, 64),
    ),
    prefix_shapes=(
        (9, 3, 16, -30, 30, 150, 1, 40),
        (4, 1, 32, -1, 2, 1),
        (2, 2, 16, -130, 160, 3, 200),
    ),
    bench_shapes=tuple(
        (m.H, m.G, m.d, *lengths)
        for m in MODELS.values()
        for lengths in ((256,), (512,) * 8, (4096,), (2048,) * 4)
    ),
    model_shapes=lambda m: ((m.H, m.G, m.d, 200, 1, 70),),
    floor=1e-5,  # the order of the sums over keys is another than the reference's
)
