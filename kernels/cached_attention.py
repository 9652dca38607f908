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

from kernels._triton import cdiv, jit, launch, power_of_two, tl
from kernels.attention import attention_reference
from kernels.context import HIDDEN, Block, Cached, Packed, Pass
from kernels.native import at, library
from kernels.rowwise import alone_width
from kernels.spec import MODELS, Spec, accumulate_dtype
from kernels.tiles import tile

DECODED = 16  # queries (heads of a group x new tokens) of a decoding tile: the least of a product

# ---- reference: the definition


def kv_write_reference(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> None:
    """Token by token."""
    G, size, d = k.shape[1:]
    for t, (page, offset) in enumerate(
        zip(cached.write_page.tolist(), cached.write_offset.tolist(), strict=True)
    ):
        k[page, :, offset] = qkv[t, -2 * G * d : -G * d].view(G, d)
        v[page, :, offset] = qkv[t, -G * d :].view(G, d)


def cached_attention_reference(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """o (T, H d): each row's keys and values gathered, then plain attention of the whole row."""
    G, d = k.shape[1], k.shape[3]
    H = qkv.shape[1] // d - 2 * G
    outs, start = [], 0
    for new, context, table in zip(
        cached.query_lens, cached.context_lens, cached.tables, strict=True
    ):
        total = context + new
        pages = torch.tensor(table, device=k.device)
        row = [c[pages].transpose(1, 2).flatten(0, 1)[:total].flatten(1) for c in (k, v)]
        q = qkv.new_zeros(total, H * d)
        q[context:] = qkv[start : start + new, : H * d]
        whole = torch.cat((q, *row), dim=1)
        outs.append(attention_reference(whole, Packed.from_lengths([total]), H, G)[0][context:])
        start += new
    return torch.cat(outs) if outs else qkv[:, : H * d]


# ---- torch


def kv_write_(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> None:
    """Write the new tokens' keys (rotated) and values into the pages of one layer."""
    G, d = k.shape[1], k.shape[3]
    assert qkv.shape[0] == len(cached.write_page), f"{qkv.shape[0]} tokens, not as described"
    heads = qkv.unflatten(1, (-1, d))
    k[cached.write_page, :, cached.write_offset] = heads[:, -2 * G : -G]
    v[cached.write_page, :, cached.write_offset] = heads[:, -G:]


def cached_attention(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """o (T, H d) of the new tokens, which `kv_write_` has already put into the cache."""
    G, size, d = k.shape[1:]
    H = qkv.shape[1] // d - 2 * G
    if not qkv.shape[0]:
        return qkv.new_empty(0, H * d)
    q = qkv[:, : H * d] * d**-0.5
    o = torch.empty_like(q)
    if cached.alone:
        for one in cached.passes(alone_width(H // G, size, d, q.dtype, q.device.type)):
            part, tokens = _decode(q, k, v, one), one.tokens
            if tokens is None:
                return part
            if one.live is not None:
                part, tokens = part.index_select(0, one.live), tokens.index_select(0, one.live)
            o.index_copy_(0, tokens, part)
        return o
    for block in cached.blocks:
        part = _prefill(q, k, v, block)
        o.index_copy_(0, block.scatter, part.index_select(0, block.source))
    return o


def _decode(q: Tensor, k: Tensor, v: Tensor, one: Pass) -> Tensor:
    """(B W, H d), W queries per row: scores by page, softmax by row, values by page, added in page
    order."""
    acc = accumulate_dtype(q.dtype)
    (G, size, d), W = k.shape[1:], one.width
    n = q.shape[1] // (G * d)
    L = G * W * n
    k, v = (c[: one.pages].view(-1, size, d) for c in (k, v))
    if one.tokens is not None:
        q = q.index_select(0, one.tokens).view(-1, W, G, n * d).transpose(1, 2).reshape(-1, L * d)
    there, back = one.spread(L)
    scores = torch.bmm(q.index_select(0, one.owner).view(-1, W * n, d), k.transpose(1, 2))
    scores = scores.to(acc).view(-1, size)
    weights = [
        torch.softmax(
            scores.index_select(0, lines)
            .view(-1, G, W, n, rows.hidden.shape[2])
            .add_(rows.hidden[:, None, :, None]),
            dim=-1,
        ).view(-1, size)
        for rows, lines in zip(one.groups, there, strict=True)
    ]
    p = (weights[0] if len(weights) == 1 else torch.cat(weights)).to(v.dtype)
    parts = v.new_empty(one.pages + 1, L * d)
    parts[-1] = 0  # what the padding of the table adds
    p = p.index_select(0, back).view(-1, W * n, size)
    torch.bmm(p, v, out=parts[:-1].view(-1, W * n, d))
    sums = [
        parts.index_select(0, rows.table.flatten()).view(*rows.table.shape, -1).to(acc).sum(1)
        for rows in one.groups
    ]
    o = sums[0] if one.order is None else torch.cat(sums).index_select(0, one.order)
    return o.to(q.dtype).view(-1, G, W, n * d).transpose(1, 2).reshape(-1, G * n * d)


def _prefill(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
    """A whole page of queries of each row, (rows * page size, H d); causal within the last page."""
    acc = accumulate_dtype(q.dtype)
    G, size, d = k.shape[1:]
    n, keys = q.shape[1] // (G * d), block.pages * size
    q = q.index_select(0, block.gather).view(-1, size, G, n, d).transpose(1, 2)
    heads = torch.arange(G, device=q.device)[:, None]
    lines = (block.table[:, None] * G + heads).flatten()  # (rows, G, pages): a head's page each
    k, v = (c.view(-1, size * d).index_select(0, lines).view(-1, keys, d) for c in (k, v))
    scores = torch.bmm(q.reshape(-1, size * n, d), k.transpose(1, 2)).to(acc)
    tokens = torch.arange(size, device=q.device)
    later = tokens > tokens.repeat_interleave(n)[:, None]
    scores[..., -size:].masked_fill_(later, HIDDEN)
    o = torch.bmm(torch.softmax(scores, dim=-1).to(v.dtype), v)
    return o.view(-1, G, size, n, d).transpose(1, 2).reshape(-1, G * n * d)


# ---- what the native and the Triton forms ask of shapes


def _head_counts(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> tuple[int, int, int]:
    """H, G and d, after a look at the shapes."""
    G, size, d = k.shape[1:]
    H = qkv.shape[1] // d - 2 * G
    assert qkv.shape == (len(cached.write_page), (H + 2 * G) * d) and H % G == 0, (
        f"qkv {tuple(qkv.shape)}, {len(cached.write_page)} tokens, {G} key/value heads of {d}"
    )
    assert v.shape == k.shape and size == cached.page_size, (
        f"k {tuple(k.shape)}, v {tuple(v.shape)}, pages of {cached.page_size} tokens"
    )
    assert k.is_contiguous() and v.is_contiguous() and qkv.stride(1) == 1, "rows with gaps"
    return H, G, d


# ---- native: fp32 on a CPU


def kv_write_native_(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> None:
    """As `kv_write_`, in C (native/attention.c)."""
    H, G, d = _head_counts(qkv, k, v, cached)
    places = (at(cached.write_page, torch.int64), at(cached.write_offset, torch.int64))
    library().kv_write(at(qkv), at(k), at(v), *places, qkv.shape[0], H, G, d, cached.page_size)


def cached_attention_native(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """As `cached_attention`, in C: every query is computed as if alone, prompts too.

    d has to be whole vectors (16 numbers with AVX-512, 8 with AVX2).
    """
    H, G, d = _head_counts(qkv, k, v, cached)
    assert d % (library().panel_columns() // 2) == 0, f"heads of {d} are no whole vectors"
    o = torch.empty(qkv.shape[0], H * d)
    rows = (at(cached.block_table, torch.int64), at(cached.cu_queries, torch.int32))
    pointers = (at(qkv), at(k), at(v), o.data_ptr(), *rows, at(cached.contexts, torch.int32))
    B, P = cached.block_table.shape
    library().cached_attention(*pointers, B, P, H, G, d, cached.page_size)
    return o


# ---- triton


@jit
def kv_write_kernel(
    qkv_ptr, k_ptr, v_ptr, page_ptr, offset_ptr, stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BW + tl.arange(0, BW)  # of the token's G heads end to end
    inside = cols < G * D
    first = tl.load(page_ptr + token) * G * PAGE + tl.load(offset_ptr + token)
    to = (first + cols // D * PAGE) * D + cols % D
    source = qkv_ptr + token * stride + H * D + cols
    tl.store(k_ptr + to, tl.load(source, mask=inside, other=0.0), mask=inside)
    tl.store(v_ptr + to, tl.load(source + G * D, mask=inside, other=0.0), mask=inside)


@jit
def _queries(
    qkv_ptr, start, new, stride, flat, g,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Queries `flat` of key/value head g: (BM, BD)."""
    cols = tl.arange(0, BD)
    at = (start + flat // N).to(tl.int64) * stride + (g * N + flat % N) * D
    live = (flat < new * N)[:, None] & (cols < D)[None, :]
    return tl.load(qkv_ptr + at[:, None] + cols[None, :], mask=live, other=0.0)


@jit
def _step(
    q, top, total, acc, k_ptr, v_ptr, table_ptr, begin, end, positions, g, scale,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys begin .. begin + BN - 1 of a row of `end` tokens, base 2."""
    keys, cols = begin + tl.arange(0, BN), tl.arange(0, BD)
    page = tl.load(table_ptr + keys // PAGE, mask=keys < end, other=0)  # (BN,) int64
    at = ((page * G + g) * PAGE + keys % PAGE)[:, None] * D + cols[None, :]
    live = (keys < end)[:, None] & (cols < D)[None, :]
    k = tl.load(k_ptr + at, mask=live, other=0.0)  # (BN, BD)
    scores = tl.dot(q, k.T, input_precision="ieee") * scale  # (BM, BN)
    scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    e = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    v = tl.load(v_ptr + at, mask=live, other=0.0)
    acc = tl.dot(e.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return new_top, total * fade + tl.sum(e, axis=1), acc


@jit(varying=("P", "S", "W"))
def cached_decode_kernel(
    qkv_ptr, k_ptr, v_ptr, table_ptr, cu_ptr, contexts_ptr, top_ptr, total_ptr, acc_ptr,
    stride, P, S, W, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, g, part = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    start, context = tl.load(cu_ptr + row), tl.load(contexts_ptr + row)
    new = tl.load(cu_ptr + row + 1) - start
    end = context + new
    if part * SPLIT >= end:
        return
    flat = tl.arange(0, BM)
    q = _queries(qkv_ptr, start, new, stride, flat, g, N, D, BD)
    positions = context + flat // N
    top = tl.full((BM,), -1e30, tl.float32)  # finite: a query may see no key of its last part
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    table_ptr += row.to(tl.int64) * P
    for begin in range(part * SPLIT, tl.minimum(part * SPLIT + SPLIT, end), BN):
        top, total, acc = _step(
            q, top, total, acc, k_ptr, v_ptr, table_ptr, begin, end, positions, g, scale,
            G, D, BD, PAGE, BN,
        )  # fmt: skip
    at = (tl.program_id(0).to(tl.int64) * W + flat) * S + part
    cols = tl.arange(0, BD)
    live = flat < new * N
    tl.store(top_ptr + at, top, mask=live)
    tl.store(total_ptr + at, total, mask=live)
    acc_at = at[:, None] * D + cols[None, :]
    tl.store(acc_ptr + acc_at, acc, mask=live[:, None] & (cols < D)[None, :])


@jit(varying=("S", "W"))
def cached_join_kernel(
    top_ptr, total_ptr, acc_ptr, cu_ptr, contexts_ptr, o_ptr, S, W,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SPLIT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    row, g, flat = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    start, context = tl.load(cu_ptr + row), tl.load(contexts_ptr + row)
    new = tl.load(cu_ptr + row + 1) - start
    if flat >= new * N:
        return
    first = (tl.program_id(0).to(tl.int64) * W + flat) * S
    parts, cols = (context + new + SPLIT - 1) // SPLIT, tl.arange(0, BD)
    top, total, out = -1e30, 0.0, tl.zeros((BD,), tl.float32)
    for begin in range(0, parts, BS):
        part = begin + tl.arange(0, BS)
        part_top = tl.load(top_ptr + first + part, mask=part < parts, other=-1e30)  # (BS,)
        part_total = tl.load(total_ptr + first + part, mask=part < parts, other=0.0)
        live = (part < parts)[:, None] & (cols < D)[None, :]
        at = (first + part)[:, None] * D + cols[None, :]
        acc = tl.load(acc_ptr + at, mask=live, other=0.0)  # (BS, BD)
        new_top = tl.maximum(top, tl.max(part_top, axis=0))
        fade, weight = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        total = total * fade + tl.sum(part_total * weight, axis=0)
        out = out * fade + tl.sum(acc * weight[:, None], axis=0)
        top = new_top
    at = ((start + flat // N).to(tl.int64) * G * N + g * N + flat % N) * D + cols
    tl.store(o_ptr + at, (out / total).to(o_ptr.dtype.element_ty), mask=cols < D)


@jit(varying=("P",))
def cached_extend_kernel(
    qkv_ptr, k_ptr, v_ptr, table_ptr, cu_ptr, contexts_ptr, o_ptr, stride, P, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, g = tl.program_id(0) // G, tl.program_id(0) % G
    start, context = tl.load(cu_ptr + row), tl.load(contexts_ptr + row)
    new = tl.load(cu_ptr + row + 1) - start
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM  # the longest walks begin first
    if first >= new * N:
        return
    flat = first + tl.arange(0, BM)
    q = _queries(qkv_ptr, start, new, stride, flat, g, N, D, BD)
    positions = context + flat // N
    top = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    table_ptr += row.to(tl.int64) * P
    end = context + new
    for begin in range(0, tl.minimum(context + (first + BM - 1) // N + 1, end), BN):
        top, total, acc = _step(
            q, top, total, acc, k_ptr, v_ptr, table_ptr, begin, end, positions, g, scale,
            G, D, BD, PAGE, BN,
        )  # fmt: skip
    cols = tl.arange(0, BD)
    at = (start + flat // N).to(tl.int64) * (G * N * D) + (g * N + flat % N) * D
    live = (flat < new * N)[:, None] & (cols < D)[None, :]
    out = (acc / total[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + at[:, None] + cols[None, :], out, mask=live)


def kv_write_triton_(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> None:
    """As `kv_write_`, in one launch."""
    H, G, d = _head_counts(qkv, k, v, cached)
    row = tile("kv_write_kernel", qkv.device)
    args = (qkv, k, v, cached.write_page, cached.write_offset, qkv.stride(0))
    grid = (qkv.shape[0], cdiv(G * d, row["BW"]))
    launch(kv_write_kernel, grid, *args, H=H, G=G, D=d, PAGE=cached.page_size, **row)


def cached_attention_triton(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """As `cached_attention`: decode and join for tokens that are alone, extend for prompts."""
    H, G, d = _head_counts(qkv, k, v, cached)
    n, BD = H // G, power_of_two(d)
    if cached.alone:
        cached = cached.pieces(max(1, DECODED // n))
    B, W = len(cached.query_lens), n * max(cached.query_lens, default=0)
    o = qkv.new_empty(qkv.shape[0], H * d)
    shapes = (f"D{BD}x{qkv.element_size()}", f"x{qkv.element_size()}")
    sizes = {"N": n, "G": G, "D": d, "BD": BD}
    cache = (qkv, k, v, cached.block_table, cached.cu_queries, cached.contexts)
    stride, P, scale = qkv.stride(0), cached.block_table.shape[1], d**-0.5 * 1.4426950408889634
    if cached.alone:
        row = tile("cached_decode_kernel", qkv.device, *shapes)
        SPLIT = row["SPLIT"]
        assert SPLIT % row["BN"] == 0, f"parts of {SPLIT} tokens in steps of {row['BN']}"
        rows = zip(cached.query_lens, cached.context_lens, strict=True)
        S = cdiv(max((new + context for new, context in rows), default=0), SPLIT)
        top, total = (qkv.new_empty(B, G, W, S, dtype=torch.float32) for _ in range(2))
        acc = qkv.new_empty(B, G, W, S, d, dtype=torch.float32)
        launch(
            cached_decode_kernel, (B * G, S), *cache, top, total, acc, stride, P, S, W, scale,
            BM=power_of_two(n), PAGE=cached.page_size, **sizes, **row,
        )  # fmt: skip
        launch(
            cached_join_kernel, (B * G, W), top, total, acc, *cache[4:], o, S, W,
            SPLIT=SPLIT, **sizes, **tile("cached_join_kernel", qkv.device),
        )  # fmt: skip
    else:
        row = tile("cached_extend_kernel", qkv.device, *shapes)
        grid = (B * G, cdiv(W, row["BM"]))
        launch(
            cached_extend_kernel, grid, *cache, o, stride, P, scale,
            PAGE=cached.page_size, **sizes, **row,
        )  # fmt: skip
    return o


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
