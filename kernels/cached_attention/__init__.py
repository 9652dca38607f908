"""Attention of new tokens over a paged key/value cache, and the writing of that cache

    cache    k, v [page, kv head, token, d]; row i's tokens fill its pages in order
    row i    brings m new tokens to c cached ones; new token j attends to the first c + j + 1
             ("bottom-right causal")

The torch form has two fixed shapes of computation, so that a row's result depends neither on its
neighbours nor on where its pages lie nor on where its tokens were cut into forwards (bitwise, as
long as the batched product and the row-wise softmax treat each matrix and row alone; torch's do,
and tests hold them to that):
    alone    decoding and drafts, each token a query of its own. Scores of every page where it
             lies, softmax over the row's pages side by side (what is hidden adds exact zeros),
             values of every page, and the sum over a row's pages in page order. How many queries
             meet a page together must not matter: `alone_width` measures that on a CPU, and where
             it does, drafts are computed one depth after the other
    prompts  a page of query places (those that are not there are idle) against all pages up to it

shapes     qkv (T, (H + 2G) d)    o (T, H d)    k, v of one layer (pages, G, page size, d)
precision  scores and softmax in max(fp32, dtype)
traffic    decoding reads each page once for all H / G query heads of a group
triton     the n heads of a group and a row's new tokens are one list of n m queries, query f being
           head f % n of token f / n, so a tile of BM queries reads the group's keys once for all.
           decode  `alone`: a tile takes 16 / n tokens of a row; its context is cut every SPLIT
                   tokens, a program per part, and `cached_join` adds the parts in order
           extend  prompts: a program per BM queries walks over their whole context
           Cuts and steps lie at fixed tokens of the row, and a step in which a query sees no key
           changes no bit of it (weights are exact zeros, a factor is exactly 1), so a query's
           result does not depend on the tokens that share its tile. Every step is the same code:
           one without the mask would be faster, and might be contracted to other roundings.
           A key's page is looked up lane by lane: any page size will do.
tiles      shape classes: padded head size x bytes of an element, as "D128x2"; else the bytes, as
           "x4"; SPLIT is in the decode row; `kv_write` and `cached_join` have one row for all
"""


# T = new tokens, B = rows, H = query heads, G = key/value heads, d = head size, n = H / G
# P = pages of the longest row, S = parts of the longest decode row, W = queries of the widest

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from kernels.cached import Cached
from kernels.spec import MODELS, Spec

# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    """Rows with these contexts; even rows bring `even` new tokens each, odd rows `odd`."""
    h, kv, d, size, even, odd, *contexts = shape
    new = [odd if i % 2 else even for i in range(len(contexts))]
    need = [-(-(c + m) // size) for c, m in zip(contexts, new, strict=True)]
    order = list(range(sum(need) + 3))  # 3 pages belong to nobody
    random.Random(g.initial_seed()).shuffle(order)
    tables = [[order.pop() for _ in range(count)] for count in need]
    k, v = (
        torch.randn(sum(need) + 3, kv, size, d, generator=g, dtype=torch.float64) for _ in range(2)
    )
    qkv = torch.randn(sum(new), (h + 2 * kv) * d, generator=g, dtype=torch.float64)
    return {"qkv": qkv, "k": k, "v": v, "cached": Cached.build(new, contexts, tables, size)}


def _run(ops, i: dict) -> dict[str, Tensor]:
    ops.kv_write_(i["qkv"], i["k"], i["v"], i["cached"])
    out = {"k": i["k"], "v": i["v"]}
    for name, alone in (("prompts", False), ("alone", True)):
        cached = replace(i["cached"], alone=alone, memo={}, cut={})
        out[name] = ops.cached_attention(i["qkv"], i["k"], i["v"], cached)
    return out


_BENCH_ROWS = (
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
    test_shapes=(
        (1, 1, 16, 8, 1, 1, 0),
        (9, 3, 64, 8, 1, 1, 0, 7, 8, 30, 63),
        (9, 3, 64, 8, 3, 6, 0, 5, 8, 17),
        (8, 1, 80, 8, 5, 5, 300),
        (4, 4, 16, 8, 1, 1, 1, 1, 2, 150),
        (4, 1, 96, 8, 1, 40, 31, 0, 64, 9),  # decode and extend rows; 32 and 65 tokens in all
        (3, 3, 128, 24, 16, 17, 16, 0, 7),  # parts and pages end together and apart
        (16, 2, 16, 8, 2, 3, 30, 29, 0),
        (6, 2, 64, 8, 1, 1, 15, 23),  # ends with its last page, inside a step
        (9, 3, 64, 8, 1, 1),  # no rows
    ),
    bench_shapes=tuple((m.H, m.G, m.d, 64, *rows) for m in MODELS.values() for rows in _BENCH_ROWS),
    model_shapes=lambda m: ((m.H, m.G, m.d, 64, 1, 70, 200, 130, 0, 9),),  # decode, extend
    slack=3.0,  # as attention; and the parts of a split context are each rounded
)
