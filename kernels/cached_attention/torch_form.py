"""Attention over a paged cache on torch operations

There are two fixed shapes of computation, so that a sequence's result depends neither on its
neighbours nor on where its pages lie nor on where its tokens were cut into forwards. (Bitwise, as
long as the batched product and the row-wise softmax treat each matrix and row alone. torch's do,
and tests hold them to that.)

decode     sampled and draft tokens, each a query of its own. Every page is read where it lies, for
           the queries of the sequence that owns it: scores page by page; softmax over a sequence's
           pages side by side (hidden places add exact zeros); values page by page; then the sum
           over the sequence's pages in page order. The number of queries that meet a page together
           must not matter: `decode_width` measures that on a CPU, and where it does, draft tokens
           are computed one depth after the other.
prefill    prompts: the queries of one page of each sequence (places without a token stay idle)
           against all pages up to it
"""

# T = new tokens, B = sequences of a pass or a block, b = sequences of a group
# H = query heads, G = key/value heads, d = head size, n = H / G
# P = pages of a sequence, W = queries of a sequence in one pass, size = tokens of a page
# L = G W n: the lines (one per query and head) that a page is met by
# pages = pages of the cache that a pass reads

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cached import Cached
from kernels.cpu.paged_layout import Block, Pass, blocks, passes
from kernels.cpu.rowwise import decode_width
from kernels.dtypes import accumulate_dtype
from kernels.packed import HIDDEN


def head_counts(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> tuple[int, int, int]:
    """H, G and d, after a check of the shapes that the native and the Triton forms rely on."""
    G, size, d = k.shape[1:]
    H = qkv.shape[1] // d - 2 * G
    T = len(cached.write_page)
    assert qkv.shape == (T, (H + 2 * G) * d) and H % G == 0, (
        f"qkv {tuple(qkv.shape)}, {T} tokens, {G} key/value heads of {d}"
    )
    assert v.shape == k.shape and size == cached.page_size, (
        f"k {tuple(k.shape)}, v {tuple(v.shape)}, pages of {cached.page_size} tokens"
    )
    assert k.is_contiguous() and v.is_contiguous() and qkv.stride(1) == 1, (
        f"k, v and the columns of qkv must lie without gaps: strides {k.stride()}, {v.stride()}, "
        f"{qkv.stride()}"
    )
    return H, G, d


def kv_write_(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> None:
    """Write the new tokens' keys (rotated) and values into the pages of one layer.

    From qkv (T, (H + 2G) d) into k and v (pages, G, size, d).
    """
    G, d = k.shape[1], k.shape[3]
    T = len(cached.write_page)
    assert qkv.shape[0] == T, f"qkv has {qkv.shape[0]} tokens, the description {T}"
    heads = qkv.unflatten(1, (-1, d))  # (T, H + 2G, d)
    k[cached.write_page, :, cached.write_offset] = heads[:, -2 * G : -G]
    v[cached.write_page, :, cached.write_offset] = heads[:, -G:]


def cached_attention(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """o (T, H d) of the new tokens in qkv (T, (H + 2G) d).

    `kv_write_` has already put them into the cache k, v (pages, G, size, d).
    """
    G, size, d = k.shape[1:]
    H = qkv.shape[1] // d - 2 * G
    if not qkv.shape[0]:
        return qkv.new_empty(0, H * d)
    q = qkv[:, : H * d] * d**-0.5  # (T, H d)
    if cached.decode:
        width = decode_width(H // G, size, d, q.dtype, q.device.type)
        return _decode(q, k, v, passes(cached, width))
    return _prefill(q, k, v, blocks(cached))


# ---- decode


def _decode(q: Tensor, k: Tensor, v: Tensor, all_passes: list[Pass]) -> Tensor:
    """o (T, H d) of q (T, H d), pass by pass."""
    o = torch.empty_like(q)
    for one in all_passes:
        part = _decode_pass(q, k, v, one)  # (B W, H d)
        tokens = one.tokens  # (B W,)
        if tokens is None:  # one query per sequence, in order: this is the only pass
            return part
        if one.live is not None:  # some are repeats that fill a sequence up to W queries
            part = part.index_select(0, one.live)
            tokens = tokens.index_select(0, one.live)
        o.index_copy_(0, tokens, part)
    return o


def _decode_pass(q: Tensor, k: Tensor, v: Tensor, one: Pass) -> Tensor:
    """(B W, H d) for the W queries per sequence of one pass over q (T, H d).

    A page's L lines are ordered by key/value head, query, query head of the group.
    """
    acc = accumulate_dtype(q.dtype)
    G, size, d = k.shape[1:]
    n = q.shape[1] // (G * d)
    W = one.width
    L = G * W * n
    k = k[: one.pages].view(-1, size, d)  # (pages G, size, d)
    v = v[: one.pages].view(-1, size, d)

    # The queries of each sequence as lines, then those that each page meets: its owner's.
    if one.tokens is not None:  # else W = 1, and q already lies so
        q = q.index_select(0, one.tokens)  # (B W, H d)
        q = q.view(-1, W, G, n * d)
        q = q.transpose(1, 2)  # (B, G, W, n d)
        q = q.reshape(-1, L * d)  # (B, L d)
    q_of_page = q.index_select(0, one.owner)  # (pages, L d)
    q_of_page = q_of_page.view(-1, W * n, d)  # (pages G, W n, d)

    scores = torch.bmm(q_of_page, k.transpose(1, 2))  # (pages G, W n, size)
    scores = scores.to(acc).view(-1, size)  # (pages L, size)
    p = _weights(scores, one, G, n, v.dtype)  # (pages L, size)
    p = p.view(-1, W * n, size)  # (pages G, W n, size)

    parts = v.new_empty(one.pages + 1, L * d)
    parts[-1] = 0  # the padding of the block table points there
    by_page = parts[:-1].view(-1, W * n, d)  # (pages G, W n, d)
    torch.bmm(p, v, out=by_page)
    o = _sum_of_pages(parts, one).to(q.dtype)  # (B, L d)
    o = o.view(-1, G, W, n * d)
    o = o.transpose(1, 2)  # (B, W, G, n d)
    return o.reshape(-1, G * n * d)


def _weights(scores: Tensor, one: Pass, G: int, n: int, dtype: torch.dtype) -> Tensor:
    """The softmax of scores (pages L, size) over all pages of a sequence, in `dtype`.

    The pages of a sequence are put side by side for it: b sequences of P pages at a time.
    """
    size = scores.shape[1]
    W = one.width
    # `from_pages` is where each group finds its lines in page order, `to_pages` the way back.
    from_pages, to_pages = one.spread(G * W * n)
    weights = []
    for group, lines in zip(one.groups, from_pages, strict=True):
        keys = group.hidden.shape[2]  # P size
        own = scores.index_select(0, lines)  # (b L P, size)
        own = own.view(-1, G, W, n, keys)  # (b, G, W, n, P size)
        own.add_(group.hidden[:, None, :, None])
        own = torch.softmax(own, dim=-1)
        weights.append(own.view(-1, size))  # (b L P, size)
    end_to_end = weights[0] if len(weights) == 1 else torch.cat(weights)
    return end_to_end.to(dtype).index_select(0, to_pages)


def _sum_of_pages(parts: Tensor, one: Pass) -> Tensor:
    """The sum of parts (pages + 1, L d) over each sequence's pages, in page order: (B, L d)."""
    acc = accumulate_dtype(parts.dtype)
    sums = []
    for group in one.groups:
        b, P = group.table.shape
        own = parts.index_select(0, group.table.flatten())  # (b P, L d)
        own = own.view(b, P, -1).to(acc)  # (b, P, L d)
        sums.append(own.sum(1))  # (b, L d)
    if one.order is None:
        return sums[0]
    return torch.cat(sums).index_select(0, one.order)


# ---- prefill


def _prefill(q: Tensor, k: Tensor, v: Tensor, all_blocks: list[Block]) -> Tensor:
    """o (T, H d) of q (T, H d), block by block."""
    o = torch.empty_like(q)
    for block in all_blocks:
        part = _prefill_block(q, k, v, block)  # (B size, H d)
        part = part.index_select(0, block.source)  # without the places that have no token
        o.index_copy_(0, block.scatter, part)
    return o


def _prefill_block(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
    """(B size, H d): a whole page of queries of each of B sequences, over q (T, H d).

    They attend to all keys of the earlier pages and, causally, to those of their own page.
    """
    acc = accumulate_dtype(q.dtype)
    G, size, d = k.shape[1:]
    n = q.shape[1] // (G * d)
    keys = block.pages * size
    q = q.index_select(0, block.gather)  # (B size, H d)
    q = q.view(-1, size, G, n, d)
    q = q.transpose(1, 2)  # (B, G, size, n, d)
    q = q.reshape(-1, size * n, d)  # (B G, size n, d)

    # Gather the keys of each sequence and head: the cache as (pages G, size d), a page a line.
    heads = torch.arange(G, device=q.device)[:, None]  # (G, 1)
    lines = block.table[:, None] * G + heads  # (B, G, P)
    lines = lines.flatten()
    k = k.view(-1, size * d).index_select(0, lines)  # (B G P, size d)
    v = v.view(-1, size * d).index_select(0, lines)
    k = k.view(-1, keys, d)  # (B G, keys, d)
    v = v.view(-1, keys, d)

    scores = torch.bmm(q, k.transpose(1, 2)).to(acc)  # (B G, size n, keys)
    places = torch.arange(size, device=q.device)
    query_places = places.repeat_interleave(n)[:, None]  # (size n, 1)
    own_page = scores[..., -size:]  # (B G, size n, size)
    own_page.masked_fill_(places > query_places, HIDDEN)
    p = torch.softmax(scores, dim=-1).to(v.dtype)
    o = torch.bmm(p, v)  # (B G, size n, d)
    o = o.view(-1, G, size, n, d)
    o = o.transpose(1, 2)  # (B, size, G, n, d)
    return o.reshape(-1, G * n * d)
