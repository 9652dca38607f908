"""Attention of new tokens over a paged key/value cache, and the writing of that cache

    cache       k, v [page, kv head, token, d]; a sequence's tokens fill its pages in order
    sequence i  brings m new tokens to c cached ones; new token j attends to the first c + j + 1
                ("bottom-right causal")
    kv_write_         writes the new tokens' keys (rotated) and values into their pages
    cached_attention  o = softmax(q K^T / sqrt(d)) V over those keys; there is no backward: the
                      cache serves sampling alone

shapes     qkv (T, (H + 2G) d)    o (T, H d)    k, v of one layer (pages, G, page size, d)
           block_table (B, P): the pages of each sequence
precision  scores and softmax in max(fp32, dtype)
traffic    decoding reads each page once for all H / G query heads of a group
contract   A sequence's result depends neither on its neighbours, nor on which pages it has, nor on
           how its tokens were cut into forwards: bitwise (batch-invariant). The tests hold TORCH in
           fp32 on a CPU, NATIVE and TRITON to that.

reference.py       the definition: gather the keys of each sequence, then plain attention
torch_form.py      two fixed shapes of computation: decode, page by page; prefill, block by block
native_form.py     the same in C, for fp32 on a CPU
triton_forward.py  decode in parts of the context and their join; extend, for prompts
"""

# T = new tokens, B = sequences, P = pages of the longest sequence, size = tokens of a page
# H = query heads, G = key/value heads, d = head size

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from kernels.cached import Cached
from kernels.integers import cdiv
from kernels.spec import MODELS, Spec

# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    """Shape: H, G, d, page size, new tokens of even and of odd sequences, context of each one."""
    H, G, d, size, even, odd, *contexts = shape
    new = [odd if i % 2 else even for i in range(len(contexts))]
    counts = [cdiv(c + m, size) for c, m in zip(contexts, new, strict=True)]
    pages = sum(counts) + 3  # 3 pages that no sequence uses
    free = list(range(pages))
    random.Random(g.initial_seed()).shuffle(free)
    tables = []
    for count in counts:
        tables.append([free.pop() for _ in range(count)])
    k = torch.randn(pages, G, size, d, generator=g, dtype=torch.float64)
    v = torch.randn(pages, G, size, d, generator=g, dtype=torch.float64)
    qkv = torch.randn(sum(new), (H + 2 * G) * d, generator=g, dtype=torch.float64)
    cached = Cached.build(new, contexts, tables, size)
    return {"qkv": qkv, "k": k, "v": v, "cached": cached}


def _run(ops, inputs: dict) -> dict[str, Tensor]:
    qkv, k, v = inputs["qkv"], inputs["k"], inputs["v"]
    prefill = replace(inputs["cached"], decode=False, memo={})
    decode = replace(inputs["cached"], decode=True, memo={})
    ops.kv_write_(qkv, k, v, inputs["cached"])
    return {
        "k": k,
        "v": v,
        "prefill": ops.cached_attention(qkv, k, v, prefill),
        "decode": ops.cached_attention(qkv, k, v, decode),
    }


# new tokens of even and of odd sequences, then the context of each one
_BENCH_BATCHES = (
    (1, 1, 512),
    (1, 1, *([512] * 16)),
    (1, 1, *([512] * 64)),
    (1, 1, 4096),
    (256, 256, *([128] * 8)),
)
SPEC = Spec(
    "cached_attention",
    _make_inputs,
    _run,
    fields=("kv_write_", "cached_attention"),
    # H, G, d, page size, then as in _BENCH_BATCHES
    test_shapes=(
        (1, 1, 16, 8, 1, 1, 0),
        (9, 3, 64, 8, 1, 1, 0, 7, 8, 30, 63),
        (9, 3, 64, 8, 3, 6, 0, 5, 8, 17),
        (8, 1, 80, 8, 5, 5, 300),
        (4, 4, 16, 8, 1, 1, 1, 1, 2, 150),
        (4, 1, 96, 8, 1, 40, 31, 0, 64, 9),  # decode and extend; 32 and 65 tokens in all
        (3, 3, 128, 24, 16, 17, 16, 0, 7),  # parts and pages end together and apart
        (16, 2, 16, 8, 2, 3, 30, 29, 0),
        (6, 2, 64, 8, 1, 1, 15, 23),  # ends with its last page, inside a step
        (9, 3, 64, 8, 1, 1),  # no sequences
    ),
    bench_shapes=tuple(
        (m.H, m.G, m.d, 64, *batch) for m in MODELS.values() for batch in _BENCH_BATCHES
    ),
    model_shapes=lambda m: ((m.H, m.G, m.d, 64, 1, 70, 200, 130, 0, 9),),  # decode, extend
    slack=3.0,  # as attention; and the parts of a split context are each rounded
)
