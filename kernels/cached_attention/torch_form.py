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

# T = new tokens, B = sequences, H = query heads, G = key/value heads, d = head size, n = H / G
# P = pages of a sequence, W = queries of a sequence in one pass, size = tokens of a page
# L = G W n: the lines (one per query and head) that a page is met by

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
    assert qkv.shape == (len(cached.write_page), (H + 2 * G) * d) and H % G == 0, (
        f"qkv {tuple(qkv.shape)}, {len(cached.write_page)} tokens, {G} key/value heads of {d}"
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
    """Write the new tokens' keys (rotated) and values into the pages of one layer."""
    G, d = k.shape[1], k.shape[3]
    assert qkv.shape[0] == len(cached.write_page), (
        f"qkv has {qkv.shape[0]} tokens, the description {len(cached.write_page)}"
    )
    heads = qkv.unflatten(1, (-1, d))  # (T, H + 2G, d)
    k[cached.write_page, :, cached.write_offset] = heads[:, -2 * G : -G]
    v[cached.write_page, :, cached.write_offset] = heads[:, -G:]


def cached_attention(qkv: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """o (T, H d) of the new tokens, which `kv_write_` has already put into the cache."""
    G, size, d = k.shape[1:]
    H = qkv.shape[1] // d - 2 * G
    if not qkv.shape[0]:
        return qkv.new_empty(0, H * d)
    q = qkv[:, : H * d] * d**-0.5  # (T, H d)
    o = torch.empty_like(q)
    if cached.decode:
        width = decode_width(H // G, size, d, q.dtype, q.device.type)
        for one in passes(cached, width):
            part = _decode(q, k, v, one)  # (B W, H d)
            tokens = one.tokens
            if tokens is None:  # one query per sequence, in order
                return part
            if one.live is not None:  # some are repeats that fill a sequence up to W queries
                part = part.index_select(0, one.live)
                tokens = tokens.index_select(0, one.live)
            o.index_copy_(0, tokens, part)
        return o
    for block in blocks(cached):
        part = _prefill(q, k, v, block)  # (sequences * page size, H d)
        o.index_copy_(0, block.scatter, part.index_select(0, block.source))
    return o


def _decode(q: Tensor, k: Tensor, v: Tensor, one: Pass) -> Tensor:
    """(B W, H d) for the W queries per sequence of one pass over q (T, H d)."""
    acc = accumulate_dtype(q.dtype)
    G, size, d = k.shape[1:]
    n = q.shape[1] // (G * d)
    W = one.width
    L = G * W * n
    k = k[: one.pages].view(-1, size, d)  # (pages G, size, d)
    v = v[: one.pages].view(-1, size, d)
    # A page's lines are ordered by key/value head, query, query head of the group. `from_pages` is
    # where each group of sequences finds its lines in page order, `to_pages` the way back.
    from_pages, to_pages = one.spread(L)

    # The queries of each sequence as lines, then those that each page meets: its owner's.
    if one.tokens is not None:  # else W = 1, and q already lies so
        q = q.index_select(0, one.tokens).view(-1, W, G, n * d)  # (B, W, G, n d)
        q = q.transpose(1, 2).reshape(-1, L * d)  # (B, L d)
    q_of_page = q.index_select(0, one.owner).view(-1, W * n, d)  # (pages G, W n, d)
    scores = torch.bmm(q_of_page, k.transpose(1, 2))  # (pages G, W n, size)
    scores = scores.to(acc).view(-1, size)  # (pages L, size)

    # Softmax over the pages of a sequence, side by side; b sequences of P pages at a time.
    weights = []
    for rows, lines in zip(one.groups, from_pages, strict=True):
        keys = rows.hidden.shape[2]  # P size
        own = scores.index_select(0, lines).view(-1, G, W, n, keys)  # (b, G, W, n, P size)
        own.add_(rows.hidden[:, None, :, None])
        weights.append(torch.softmax(own, dim=-1).view(-1, size))  # (b L P, size)
    p = weights[0] if len(weights) == 1 else torch.cat(weights)
    p = p.to(v.dtype).index_select(0, to_pages).view(-1, W * n, size)  # (pages G, W n, size)

    # Values page by page, then the sum over each sequence's pages in page order.
    parts = v.new_empty(one.pages + 1, L * d)
    parts[-1] = 0  # the padding of the block table points there
    torch.bmm(p, v, out=parts[:-1].view(-1, W * n, d))
    sums = []
    for rows in one.groups:
        b, P = rows.table.shape
        own = parts.index_select(0, rows.table.flatten()).view(b, P, -1)  # (b, P, L d)
        sums.append(own.to(acc).sum(1))  # (b, L d)
    o = sums[0] if one.order is None else torch.cat(sums).index_select(0, one.order)  # (B, L d)
    o = o.to(q.dtype).view(-1, G, W, n * d).transpose(1, 2)  # (B, W, G, n d)
    return o.reshape(-1, G * n * d)


def _prefill(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
    """(b * size, H d): a whole page of queries of each of b sequences, over q (T, H d).

    They attend to all keys of the earlier pages and, causally, to those of their own page.
    """
    acc = accumulate_dtype(q.dtype)
    G, size, d = k.shape[1:]
    n = q.shape[1] // (G * d)
    keys = block.pages * size
    q = q.index_select(0, block.gather).view(-1, size, G, n, d)  # (b, size, G, n, d)
    q = q.transpose(1, 2).reshape(-1, size * n, d)  # (b G, size n, d)

    # Gather the keys of each sequence and head: the cache as (pages G, size d), a page a line.
    heads = torch.arange(G, device=q.device)[:, None]
    lines = (block.table[:, None] * G + heads).flatten()  # (b G P,)
    k = k.view(-1, size * d).index_select(0, lines).view(-1, keys, d)  # (b G, keys, d)
    v = v.view(-1, size * d).index_select(0, lines).view(-1, keys, d)

    scores = torch.bmm(q, k.transpose(1, 2)).to(acc)  # (b G, size n, keys)
    places = torch.arange(size, device=q.device)
    later = places > places.repeat_interleave(n)[:, None]  # (size n, size)
    scores[..., -size:].masked_fill_(later, HIDDEN)
    o = torch.bmm(torch.softmax(scores, dim=-1).to(v.dtype), v)  # (b G, size n, d)
    return o.view(-1, G, size, n, d).transpose(1, 2).reshape(-1, G * n * d)
