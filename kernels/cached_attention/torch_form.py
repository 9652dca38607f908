"""Attention over a paged cache on torch products."""


# T = new tokens, B = rows, H = query heads, G = key/value heads, d = head size, n = H / G
# P = pages of the longest row, S = parts of the longest decode row, W = queries of the widest

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cached import Block, Cached, Pass
from kernels.cpu.rowwise import alone_width
from kernels.dtypes import accumulate_dtype
from kernels.packed import HIDDEN

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
