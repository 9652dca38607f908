"""Attention of new tokens over a paged key/value cache, and the writing of that cache

    cache    k, v [page, kv head, token, d]; row i's tokens fill its pages in order
    row i    brings m new tokens to c cached ones; new token j attends to the first c + j + 1
             ("bottom-right causal")

Decoding (one new token in every row) splits the context by page and joins the parts in page order:
    per page   mx = max of the scores, e = exp(scores - mx), l = sum e, o = e V
    per row    M = max over its pages of mx, w = exp(mx - M), out = sum w o / sum w l
The split size is the page and the sum runs page by page, so a row's result does not depend on its
neighbours or on where its pages lie (bitwise, as long as the batched product treats each matrix
alone; torch's does, and a test holds it to that). All pages in use are read where they lie.

Prefill and extension handle one row after the other.

shapes     qkv (T, (H + 2G) d)    o (T, H d)    k, v of one layer (pages, G, page size, d)
precision  scores and softmax in max(fp32, dtype)
traffic    decoding reads each page once for all H / G query heads of a group
"""

# T = new tokens, B = rows, H = query heads, G = key/value heads, d = head size, n = H / G

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import attend, attention_reference, split_heads
from kernels.context import Cached, Packed
from kernels.spec import Spec, accumulate_dtype

HIDDEN = -1e30  # score of a token that must not be attended to; finite, so that no row is NaN

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
    return torch.cat(outs)


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
    G, d = k.shape[1], k.shape[3]
    H = qkv.shape[1] // d - 2 * G
    if cached.pool is not None:
        return _decode(qkv[:, : H * d], k, v, cached)
    out = qkv.new_empty(qkv.shape[0], H * d)
    start = 0
    for i, (new, context) in enumerate(zip(cached.query_lens, cached.context_lens, strict=True)):
        q, row_k, row_v = split_heads(qkv[start : start + new], H, G)
        if context:
            row_k, row_v = _gather(k, v, cached, i, context + new)
        out[start : start + new] = attend(q, row_k, row_v, context)[0].flatten(1)
        start += new
    return out


def _gather(
    k: Tensor, v: Tensor, cached: Cached, row: int, total: int
) -> tuple[Tensor, Tensor]:  # (G, total, d) each
    pages = cached.block_table[row, : -(-total // cached.page_size)]
    k, v = (c.index_select(0, pages).transpose(0, 1).flatten(1, 2)[:, :total] for c in (k, v))
    return k, v


def _decode(q: Tensor, k: Tensor, v: Tensor, cached: Cached) -> Tensor:
    """One query per row, the context split by page."""
    pool, acc = cached.pool, accumulate_dtype(q.dtype)
    rows, (G, size, d) = q.shape[0], k.shape[1:]
    q = (q * d**-0.5).unflatten(1, (G, -1, d))  # (B, G, n, d)
    n = q.shape[2]
    flat = (pool.pages * G, size, d)
    k, v = k[: pool.pages].view(flat), v[: pool.pages].view(flat)
    scores = torch.bmm(q[pool.owner].view(-1, n, d), k.transpose(1, 2)).to(acc)
    scores.view(pool.pages, G * n, size).masked_fill_(pool.hidden[:, None], HIDDEN)
    top = scores.amax(-1, keepdim=True)
    e = scores.sub_(top).exp_()
    part = torch.bmm(e.to(v.dtype), v).view(pool.pages, G * n, d)
    total, top = (t.view(pool.pages, G * n) for t in (e.sum(-1), top))

    table, used = cached.block_table, cached.pages_used[..., None]  # (B, P), (B, P, 1)
    row_top = top[table].masked_fill_(~used, HIDDEN)  # (B, P, H)
    weight = (row_top - row_top.amax(1, keepdim=True)).exp_().mul_(used)
    out = part.new_zeros(rows, G * n, d, dtype=acc)
    norm = out.new_zeros(rows, G * n)
    for p in range(table.shape[1]):  # in page order: the sum must not depend on the neighbours
        page, w = table[:, p], weight[:, p]
        out.addcmul_(part[page].to(acc), w[..., None])
        norm.addcmul_(total[page], w)
    return out.div_(norm[..., None]).flatten(1).to(q.dtype)


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    h, kv, d, decode, *contexts = shape
    size = 8
    new = [1 if decode else 1 + i % 5 for i in range(len(contexts))]
    need = [-(-(c + m) // size) for c, m in zip(contexts, new, strict=True)]
    order = (torch.randperm(sum(need) + 3, generator=g)).tolist()  # 3 pages belong to nobody
    tables = [[order.pop() for _ in range(count)] for count in need]
    k, v = (
        torch.randn(sum(need) + 3, kv, size, d, generator=g, dtype=torch.float64) for _ in range(2)
    )
    qkv = torch.randn(sum(new), (h + 2 * kv) * d, generator=g, dtype=torch.float64)
    return {"qkv": qkv, "k": k, "v": v, "cached": Cached.build(new, contexts, tables, size)}


def _run(ops, i: dict) -> dict[str, Tensor]:
    ops.kv_write_(i["qkv"], i["k"], i["v"], i["cached"])
    o = ops.cached_attention(i["qkv"], i["k"], i["v"], i["cached"])
    return {"k": i["k"], "v": i["v"], "o": o}


SPEC = Spec(
    "cached_attention",
    _make_inputs,
    _run,
    test_shapes=(
        (1, 1, 16, True, 0),
        (9, 3, 64, True, 0, 7, 8, 30, 63),
        (9, 3, 64, False, 0, 5, 8, 17),
        (8, 1, 80, False, 300),
        (4, 4, 16, True, 1, 1, 2),
    ),
    bench_shapes=((9, 3, 64, True, *([300] * 32)), (32, 8, 128, True, *([512] * 64))),
    slack=3.0,  # as attention; and the parts of a split context are each rounded
    floor=1e-5,
)
