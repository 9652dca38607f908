"""Attention of packed rows on torch products, forward and backward written out."""


# T = tokens, L = tokens of a row, H = query heads, G = key/value heads, d = head size, n = H / G

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels.dtypes import accumulate_dtype
from kernels.packed import Packed

PACKED_BLOCK = {"cpu": 96, "cuda": 512}  # small blocks skip more of the square, launch more often
LOWEST = -87.0  # exp of it is the smallest normal fp32, almost


# ---- torch


def head_size(qkv: Tensor, packed: Packed, H: int, G: int) -> int:
    """d, from shapes that are looked at."""
    tokens = packed.starts[-1]
    assert qkv.shape[0] == tokens and qkv.shape[1] % (H + 2 * G) == 0 and H % G == 0, (
        f"qkv {tuple(qkv.shape)} for {tokens} tokens and {H} + 2 x {G} heads"
    )
    return qkv.shape[1] // (H + 2 * G)


def longest_row(packed: Packed) -> int:
    """Tokens of the longest row."""
    return max((end - start for start, end in packed.rows), default=0)


def _flash(qkv: Tensor, packed: Packed, H: int, G: int) -> bool:
    """Whether torch's variable-length flash attention takes this, and was right when it was tried.

    Not where every row has one token: there it reorders heads, and the log-sums with them.
    """
    d = head_size(qkv, packed, H, G)
    return _flash_takes(qkv, packed, d) and not _flash_failure(qkv.device, qkv.dtype, H, G, d)


def _flash_takes(qkv: Tensor, packed: Packed, d: int) -> bool:
    """Whether it is made for this: NVIDIA from sm_80 on, 16 bits."""
    return (
        qkv.is_cuda
        and not packed.prefix
        and torch.version.hip is None  # its log-sum-exp has a layout nobody here has seen
        and qkv.dtype in (torch.float16, torch.bfloat16)
        and (d % 8 == 0 and d <= 256)
        and longest_row(packed) > 1
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(qkv.device)[0] >= 8
    )


@functools.cache
def _flash_failure(device: torch.device, dtype: torch.dtype, H: int, G: int, d: int) -> str:
    """Why torch's flash attention is not used for such heads, "" where it is; tried once.

    The operators are not part of torch's public interface: their arguments and the layout of the
    log-sums may change with its version, and so may the heads that a card's form takes.
    """
    g = torch.Generator().manual_seed(0)
    packed = Packed.from_lengths([5, 2], device)
    qkv, do = (torch.randn(7, heads * d, generator=g).to(device, dtype) for heads in (H + 2 * G, H))
    try:
        o, lse = _flash_forward(qkv, packed, H, G)
        found = {"o": o, "lse": lse, "dqkv": _flash_backward(do, qkv, o, lse, packed, H, G)}
        o, lse = _blocked_forward(qkv, packed, H, G)
        wanted = {"o": o, "lse": lse, "dqkv": _blocked_backward(do, qkv, o, lse, packed, H, G)}
        for name, want in wanted.items():
            error = ((found[name] - want).abs().max() / want.abs().max()).item()
            assert error < 0.05, f"its {name} differs from the definition's by {error:.1%}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever another version raises for arguments it does not know
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(
            "ops: attention runs in blocks of queries, slower than torch's flash attention, which "
            f"cannot be used with {H} + 2 x {G} heads of {d} here: {lines[0][:200]}"
        )
        return lines[0]
    return ""


def _flash_forward(qkv: Tensor, packed: Packed, H: int, G: int) -> tuple[Tensor, Tensor]:
    """The operator under torch.nn.attention.varlen, with the arguments that torch 2.13 gives it.

    varlen_attn itself takes is_causal in torch 2.10, a window in 2.11, enable_gqa from 2.12 on, and
    its backward is autograd's; the operator's first ten arguments are the same in all of them.
    Run on an H100 with torch 2.11; of other versions, what it must return is looked at.
    """
    q, k, v = qkv.unflatten(1, (H + 2 * G, -1)).split((H, G, G), dim=1)  # (T, H or G, d)
    cu, longest = packed.cu_seqlens, longest_row(packed)
    forward = torch.ops.aten._flash_attention_forward
    o, lse, *_ = forward(q, k, v, cu, cu, longest, longest, 0.0, True, False)
    assert o.shape == q.shape and lse.shape == (H, len(qkv)) and lse.dtype == torch.float32, (
        f"torch {torch.__version__} gave o {tuple(o.shape)}, lse {tuple(lse.shape)} {lse.dtype}; "
        f"wanted {tuple(q.shape)} and {(H, len(qkv))} float32"
    )
    return o.flatten(1), lse.T


def _flash_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, packed: Packed, H: int, G: int
) -> Tensor:
    """dqkv. Its dq has atomic sums, so the bits differ from run to run unless
    torch.use_deterministic_algorithms is on.
    """
    q, k, v = qkv.unflatten(1, (H + 2 * G, -1)).split((H, G, G), dim=1)
    do, o = (t.unflatten(1, (H, -1)) for t in (do, o))
    cu, longest = packed.cu_seqlens, longest_row(packed)
    random = torch.zeros(2, dtype=torch.uint64, device=qkv.device)  # unread without dropout
    unused = torch.empty(0, device=qkv.device)
    backward = torch.ops.aten._flash_attention_backward
    lengths = (cu, cu, longest, longest)
    grads = backward(do, q, k, v, o, lse.T.contiguous(), *lengths, 0.0, True, random, unused)
    got, want = [t.shape for t in grads], [t.shape for t in (q, k, v)]
    assert got == want, f"torch {torch.__version__} gave gradients {got}, not {want}"
    return torch.cat(grads, dim=1).flatten(1)


def split_heads(row: Tensor, H: int, G: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a row's qkv (L, (H + 2G) d): q (L, G, n, d), k and v (G, L, d)."""
    heads = row.unflatten(1, (H + 2 * G, -1))
    q = heads[:, :H].unflatten(1, (G, H // G))
    return q, heads[:, H : H + G].transpose(0, 1), heads[:, H + G :].transpose(0, 1)


def _block(q: Tensor, begin: int, end: int) -> Tensor:
    """Queries begin .. end - 1 of q (L, G, n, d) as (G, n * m, d): a group's heads together."""
    return q[begin:end].permute(1, 2, 0, 3).flatten(1, 2)


def _unblock(t: Tensor, m: int) -> Tensor:
    """(G, n * m, d) back to (m, G, n, d)."""
    return t.unflatten(1, (-1, m)).permute(2, 0, 1, 3)


def _blocks(tokens: int, device: torch.device) -> list[tuple[int, int]]:
    """(first, end) of a row's blocks of queries, of nearly equal sizes."""
    count = max(1, round(tokens / PACKED_BLOCK[device.type]))
    return [(tokens * i // count, tokens * (i + 1) // count) for i in range(count)]


def _corner(scores: Tensor, queries: int) -> Tensor:
    """The part of a block's scores (G, n * queries, keys) where queries meet their own keys."""
    return scores.unflatten(1, (-1, queries))[..., -queries:]


def _with_prefix(qkv: Tensor, start: int, end: int, context: int, H: int, G: int):
    """q of a row, and k and v (G, context + L, d) of the prefix and the row; accumulation dtype."""
    acc = accumulate_dtype(qkv.dtype)
    q, k, v = split_heads(qkv[start:end].to(acc), H, G)
    if context:
        _, *before = split_heads(qkv[:context].to(acc), H, G)
        k, v = (torch.cat((t, own), dim=1) for t, own in zip(before, (k, v), strict=True))
    return q, k, v


def attention_forward(qkv: Tensor, packed: Packed, H: int, G: int) -> tuple[Tensor, Tensor]:
    """o (T, H d) and lse (T, H) for the backward."""
    if _flash(qkv, packed, H, G):
        return _flash_forward(qkv, packed, H, G)
    return _blocked_forward(qkv, packed, H, G)


def _blocked_forward(qkv: Tensor, packed: Packed, H: int, G: int) -> tuple[Tensor, Tensor]:
    d, acc = head_size(qkv, packed, H, G), accumulate_dtype(qkv.dtype)
    o = qkv.new_empty(qkv.shape[0], G, H // G, d)
    lse = qkv.new_empty(qkv.shape[0], G, H // G, dtype=acc)
    for (start, end), context in zip(packed.rows, packed.contexts, strict=True):
        q, k, v = _with_prefix(qkv, start, end, context, H, G)
        k = (k * d**-0.5).transpose(1, 2)
        blocks = _blocks(end - start, qkv.device)
        most = max(stop - begin for begin, stop in blocks)
        future = torch.full((most, most), -1e30, dtype=acc, device=qkv.device).triu_(1)
        for begin, stop in blocks:
            m, keys = stop - begin, context + stop
            scores = torch.bmm(_block(q, begin, stop), k[..., :keys])
            _corner(scores, m).add_(future[:m, :m])
            highest = scores.amax(-1, keepdim=True)
            p = scores.sub_(highest).clamp_(min=LOWEST).exp_()
            total = p.sum(-1, keepdim=True)
            out = torch.bmm(p, v[:, :keys]).div_(total)
            o[start + begin : start + stop] = _unblock(out, m)
            sums = highest.add_(total.log_())
            lse[start + begin : start + stop] = _unblock(sums, m)[..., 0]
    return o.flatten(1), lse.flatten(1)


def attention_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, packed: Packed, H: int, G: int
) -> Tensor:
    """dqkv (T, (H + 2G) d), one buffer."""
    if _flash(qkv, packed, H, G):
        return _flash_backward(do, qkv, o, lse, packed, H, G)
    return _blocked_backward(do, qkv, o, lse, packed, H, G)


def _blocked_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, packed: Packed, H: int, G: int
) -> Tensor:
    d, dqkv = head_size(qkv, packed, H, G), torch.empty_like(qkv)
    acc, scale = lse.dtype, d**-0.5
    delta = (do.to(acc) * o.to(acc)).unflatten(1, (H, -1)).sum(-1)  # (T, H)
    shared = qkv.new_zeros(2, G, packed.prefix, d, dtype=acc)  # dk, dv of the prefix
    for (start, end), context in zip(packed.rows, packed.contexts, strict=True):
        q, k, v = _with_prefix(qkv, start, end, context, H, G)
        dq, dk, dv = split_heads(dqkv[start:end], H, G)
        heads = (end - start, G, H // G, -1)
        do_row = do[start:end].to(acc).unflatten(1, heads[1:])
        sums, deltas = (t[start:end].reshape(heads) for t in (lse, delta))
        k = k * scale
        dk_sum, dv_sum = k.new_zeros(k.shape), k.new_zeros(k.shape)
        blocks = _blocks(end - start, qkv.device)
        most = max(stop - begin for begin, stop in blocks)
        past = torch.ones(most, most, dtype=acc, device=qkv.device).tril_()
        for begin, stop in blocks:
            m, keys = stop - begin, context + stop
            q_b, do_b = _block(q, begin, stop), _block(do_row, begin, stop)
            p = torch.bmm(q_b, k[:, :keys].transpose(1, 2)).sub_(_block(sums, begin, stop))
            p.clamp_(LOWEST, 1.0).exp_()  # the future's may be anything until it is masked
            _corner(p, m).mul_(past[:m, :m])
            dv_sum[:, :keys].baddbmm_(p.transpose(1, 2), do_b)
            dp = torch.bmm(do_b, v[:, :keys].transpose(1, 2))
            ds = dp.sub_(_block(deltas, begin, stop)).mul_(p)
            dq[begin:stop] = _unblock(torch.bmm(ds, k[:, :keys]), m)
            dk_sum[:, :keys].baddbmm_(ds.transpose(1, 2), q_b)
        dk.copy_(dk_sum[:, context:].mul_(scale))
        dv.copy_(dv_sum[:, context:])
        if context:
            shared[0] += dk_sum[:, :context].mul_(scale)
            shared[1] += dv_sum[:, :context]
    if packed.prefix:  # behind the rows: what they sent to the prefix, beside what it sent itself
        _, dk, dv = split_heads(dqkv[: packed.prefix], H, G)
        dk += shared[0]
        dv += shared[1]
    return dqkv
