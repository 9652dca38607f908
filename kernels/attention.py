"""Causal grouped-query attention over packed rows

    for each row, each query head h with its key/value head g = h // (H / G):
        P = softmax(q K^T / sqrt(d) + causal mask)      o = P V      lse = log of the row sums
backward   delta = sum(do * o)      dV = P^T do      dS = P * (do V^T - delta) / sqrt(d)
           dq = dS K                dK = dS^T q      with P = exp(q K^T / sqrt(d) - lse) recomputed
shapes     qkv, dqkv (T, (H + 2G) d)    o, do (T, H d)    lse (T, H) accumulation dtype, saved
precision  a row's q, k, v are widened to max(fp32, dtype) and everything is computed there
traffic    the torch form holds a block of scores; a row is cut into blocks of BLOCK queries, and a
           block looks at no key behind its last query, so long rows do about half the square
A row's result depends on that row alone: rows are handled one after the other.
"""

# T = tokens, L = tokens of a row, H = query heads, G = key/value heads, d = head size, n = H / G

from __future__ import annotations

import torch
from torch import Tensor

from kernels.context import Packed
from kernels.spec import Spec, accumulate_dtype, autograd

BLOCK = 256  # queries of a row handled together: (G, n * BLOCK, L) scores are held

# ---- reference: the definition


def attention_reference(qkv: Tensor, packed: Packed, H: int, G: int) -> tuple[Tensor, Tensor]:
    """o (T, H d) and lse (T, H); differentiable."""
    heads = qkv.unflatten(1, (H + 2 * G, -1))
    outs, sums = [], []
    for start, end in packed.rows:
        row = heads[start:end].to(accumulate_dtype(qkv.dtype)).transpose(0, 1)  # (H + 2G, L, d)
        q, k, v = row.split((H, G, G))
        k, v = (t.repeat_interleave(H // G, dim=0) for t in (k, v))
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
        outs.append((torch.softmax(scores, dim=-1) @ v).transpose(0, 1).flatten(1))
        sums.append(torch.logsumexp(scores, dim=-1).T)
    if not outs:
        return qkv[:, : H * heads.shape[2]], qkv.new_zeros(0, H)
    return torch.cat(outs).to(qkv.dtype), torch.cat(sums)


def attention_reference_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, packed: Packed, H: int, G: int
) -> Tensor:
    """By autograd."""
    if not packed.rows:
        return torch.zeros_like(qkv)
    return autograd(lambda qkv: attention_reference(qkv, packed, H, G)[0], (qkv,), do)[0]


# ---- torch


def split_heads(row: Tensor, H: int, G: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a row's qkv (L, (H + 2G) d): q (L, G, n, d), k and v (G, L, d)."""
    heads = row.unflatten(1, (H + 2 * G, -1))
    q = heads[:, :H].unflatten(1, (G, H // G))
    return q, heads[:, H : H + G].transpose(0, 1), heads[:, H + G :].transpose(0, 1)


def _scores(q: Tensor, k: Tensor, first: int) -> Tensor:
    """Masked scores (G, n * m, keys) of a block of m queries, the first at position `first`."""
    groups, m, keys = q.shape[0], q.shape[1], k.shape[1]
    scores = torch.bmm(q, k.transpose(1, 2))
    count = keys - first  # queries first .. keys - 1 attend to keys up to themselves
    corner = scores.view(groups, m // count, count, keys)[..., first:]
    future = torch.ones(count, count, dtype=torch.bool, device=q.device).triu_(1)
    corner.masked_fill_(future, -torch.inf)
    return scores


def _block(q: Tensor, begin: int, end: int) -> Tensor:
    """Queries begin .. end - 1 of q (L, G, n, d) as (G, n * m, d): a group's heads together."""
    return q[begin:end].permute(1, 2, 0, 3).flatten(1, 2)


def _unblock(t: Tensor, m: int) -> Tensor:
    """(G, n * m, d) back to (m, G, n, d)."""
    return t.unflatten(1, (-1, m)).permute(2, 0, 1, 3)


def attend(q: Tensor, k: Tensor, v: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """The new queries of one row against all of its keys, causal at the bottom right.

    q (m, G, n, d); k, v (G, context + m, d). Returns o (m, G, n, d) and lse (m, G, n), both in the
    accumulation dtype.
    """
    total, acc = q.shape[0], accumulate_dtype(q.dtype)
    q, k, v = q.to(acc) * q.shape[-1] ** -0.5, k.to(acc), v.to(acc)
    o = torch.empty(q.shape, dtype=acc, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=acc, device=q.device)
    for begin in range(0, total, BLOCK):
        end = min(begin + BLOCK, total)
        keys = context + end
        scores = _scores(_block(q, begin, end), k[:, :keys], context + begin)
        sums = torch.logsumexp(scores, dim=-1, keepdim=True)
        p = scores.sub_(sums).exp_()
        o[begin:end] = _unblock(torch.bmm(p, v[:, :keys]), end - begin)
        lse[begin:end] = _unblock(sums, end - begin)[..., 0]
    return o, lse


def attention_forward(qkv: Tensor, packed: Packed, H: int, G: int) -> tuple[Tensor, Tensor]:
    """o (T, H d) and lse (T, H) for the backward."""
    assert qkv.shape[0] == packed.starts[-1] and qkv.shape[1] % (H + 2 * G) == 0, (
        f"qkv {tuple(qkv.shape)} for {packed.starts[-1]} tokens and {H} + 2 x {G} heads"
    )
    d = qkv.shape[1] // (H + 2 * G)
    o = qkv.new_empty(qkv.shape[0], H * d)
    lse = qkv.new_empty(qkv.shape[0], H, dtype=accumulate_dtype(qkv.dtype))
    for start, end in packed.rows:
        q, k, v = split_heads(qkv[start:end], H, G)
        o_row, lse_row = attend(q, k, v, context=0)
        o[start:end] = o_row.flatten(1)
        lse[start:end] = lse_row.flatten(1)
    return o, lse


def attention_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, packed: Packed, H: int, G: int
) -> Tensor:
    """dqkv (T, (H + 2G) d), one buffer."""
    dqkv = torch.empty_like(qkv)
    acc = lse.dtype
    scale = (qkv.shape[1] // (H + 2 * G)) ** -0.5
    delta = (do.to(acc) * o.to(acc)).unflatten(1, (H, -1)).sum(-1)  # (T, H)
    for start, end in packed.rows:
        q, k, v = split_heads(qkv[start:end].to(acc), H, G)
        dq, dk, dv = split_heads(dqkv[start:end], H, G)
        heads = (end - start, G, H // G, -1)
        do_row = do[start:end].to(acc).unflatten(1, heads[1:])
        sums, deltas = (t[start:end].reshape(heads) for t in (lse, delta))
        q = q * scale
        dk_sum, dv_sum = k.new_zeros(k.shape), k.new_zeros(k.shape)
        for begin in range(0, end - start, BLOCK):
            stop = min(begin + BLOCK, end - start)
            q_b, do_b = _block(q, begin, stop), _block(do_row, begin, stop)
            p = _scores(q_b, k[:, :stop], begin).sub_(_block(sums, begin, stop)).exp_()
            dv_sum[:, :stop] += torch.bmm(p.transpose(1, 2), do_b)
            dp = torch.bmm(do_b, v[:, :stop].transpose(1, 2))
            ds = dp.sub_(_block(deltas, begin, stop)).mul_(p)
            dq[begin:stop] = _unblock(torch.bmm(ds, k[:, :stop]), stop - begin) * scale
            dk_sum[:, :stop] += torch.bmm(ds.transpose(1, 2), q_b)
        dk.copy_(dk_sum)
        dv.copy_(dv_sum)
    return dqkv


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    h, kv, d, *lengths = shape
    t = sum(lengths)
    return {
        "qkv": torch.randn(t, (h + 2 * kv) * d, generator=g, dtype=torch.float64),
        "do": torch.randn(t, h * d, generator=g, dtype=torch.float64),
        "packed": Packed.from_lengths(lengths),
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
    test_shapes=((1, 1, 16, 1), (4, 4, 80, 3, 1, 63), (9, 3, 64, 257, 40, 2), (8, 1, 16, 520)),
    bench_shapes=((9, 3, 64, 512, 512, 512, 512), (32, 8, 128, 2048, 2048)),
    floor=1e-5,  # the order of the sums over keys is another than the reference's
)
