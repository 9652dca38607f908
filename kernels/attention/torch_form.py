"""Attention of packed rows on torch operations, forward and backward written out

blocks     The rows are computed one after the other, in blocks of about PACKED_BLOCK queries. A
           block reads the keys up to its own last query and no further, so a long row computes
           about half of its square of scores, and only one block of scores exists at a time.
clamp      exp of -infinity, or of a number whose exp is denormal, takes a CPU seven times as long
           as any other. Scores less their maximum are clamped to LOWEST: exp(LOWEST) is lost in a
           sum that is at least 1.
flash      On an NVIDIA GPU in 16 bits this is torch's own variable-length flash attention, provided
           that a trial on two short rows gives the result of the blocked form.
"""

# T = tokens, L = tokens of a row, context = tokens of the shared prefix that come before it
# H = query heads, G = key/value heads, d = head size, n = H / G
# m = queries of a block, keys = keys that its last query sees
# acc = accumulation dtype: fp32, or fp64 for fp64 inputs

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor

from kernels.dtypes import accumulate_dtype
from kernels.packed import HIDDEN, Packed

PACKED_BLOCK = {"cpu": 96, "cuda": 512}  # small blocks skip more of the square, launch more often
LOWEST = -87.0  # its exp is just above the smallest normal fp32 number


def attention_forward(qkv: Tensor, packed: Packed, H: int, G: int) -> tuple[Tensor, Tensor]:
    """o (T, H d) and lse (T, H) of qkv (T, (H + 2G) d).

    lse: the logarithms of the softmax sums, in the accumulation dtype; the backward needs them.
    """
    if _can_use_flash(qkv, packed, H, G):
        return _flash_forward(qkv, packed, H, G)
    return _blocked_forward(qkv, packed, H, G)


def attention_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, packed: Packed, H: int, G: int
) -> Tensor:
    """dqkv (T, (H + 2G) d), the gradients of q, k and v in one buffer, for do (T, H d)."""
    if _can_use_flash(qkv, packed, H, G):
        return _flash_backward(do, qkv, o, lse, packed, H, G)
    return _blocked_backward(do, qkv, o, lse, packed, H, G)


def head_size(qkv: Tensor, packed: Packed, H: int, G: int) -> int:
    """d, after a check that qkv (T, (H + 2G) d) fits the description and the numbers of heads."""
    tokens = packed.starts[-1]
    heads = H + 2 * G
    T, columns = qkv.shape
    assert T == tokens and columns % heads == 0 and H % G == 0, (
        f"qkv {tuple(qkv.shape)} for {tokens} tokens and {H} + 2 x {G} heads"
    )
    return columns // heads


def longest_row(packed: Packed) -> int:
    """Tokens of the longest row."""
    return max((end - start for start, end in packed.rows), default=0)


# ---- the blocked form


def split_heads(row: Tensor, H: int, G: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a row's qkv (L, (H + 2G) d): q (L, G, n, d), k (G, L, d), v (G, L, d)."""
    n = H // G
    heads = row.unflatten(1, (H + 2 * G, -1))  # (L, H + 2G, d)
    q, k, v = heads.split((H, G, G), dim=1)  # (L, H or G, d)
    return q.unflatten(1, (G, n)), k.transpose(0, 1), v.transpose(0, 1)


def _row_operands(
    qkv: Tensor, start: int, end: int, context: int, H: int, G: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q (L, G, n, d) of a row; k and v (G, context + L, d) of the shared prefix and the row.

    All in the accumulation dtype. `context`: tokens of the prefix, 0 if there is none.
    """
    acc = accumulate_dtype(qkv.dtype)
    q, k, v = split_heads(qkv[start:end].to(acc), H, G)
    if context:
        _, prefix_k, prefix_v = split_heads(qkv[:context].to(acc), H, G)
        k = torch.cat((prefix_k, k), dim=1)
        v = torch.cat((prefix_v, v), dim=1)
    return q, k, v


def _query_blocks(tokens: int, device: torch.device) -> list[tuple[int, int]]:
    """(begin, stop) of the blocks of queries of a row, in nearly equal sizes."""
    count = max(1, round(tokens / PACKED_BLOCK[device.type]))
    bounds = [tokens * i // count for i in range(count + 1)]
    return list(pairwise(bounds))


def _largest_block(blocks: list[tuple[int, int]]) -> int:
    """Queries of the largest block."""
    return max(stop - begin for begin, stop in blocks)


def _block(t: Tensor, begin: int, end: int) -> Tensor:
    """Tokens begin .. end - 1 of t (L, G, n, d) as (G, n m, d): the heads of a group together."""
    by_head = t[begin:end].permute(1, 2, 0, 3)  # (G, n, m, d)
    return by_head.flatten(1, 2)


def _unblock(t: Tensor, m: int) -> Tensor:
    """The opposite of `_block`: (G, n m, d) to (m, G, n, d)."""
    by_head = t.unflatten(1, (-1, m))  # (G, n, m, d)
    return by_head.permute(2, 0, 1, 3)


def _own_keys(scores: Tensor, m: int) -> Tensor:
    """View of scores (G, n m, keys) where the block's queries meet its own keys: (G, n, m, m).

    Only there does the causal mask hide anything.
    """
    by_head = scores.unflatten(1, (-1, m))  # (G, n, m, keys)
    return by_head[..., -m:]


def _blocked_forward(qkv: Tensor, packed: Packed, H: int, G: int) -> tuple[Tensor, Tensor]:
    T = qkv.shape[0]
    n = H // G
    d = head_size(qkv, packed, H, G)
    acc = accumulate_dtype(qkv.dtype)
    o = qkv.new_empty(T, G, n, d)
    lse = qkv.new_empty(T, G, n, dtype=acc)
    for (start, end), context in zip(packed.rows, packed.contexts, strict=True):
        q, k, v = _row_operands(qkv, start, end, context, H, G)
        scaled_k = (k * d**-0.5).transpose(1, 2)  # (G, d, context + L)
        blocks = _query_blocks(end - start, qkv.device)
        largest = _largest_block(blocks)
        future = torch.full((largest, largest), HIDDEN, dtype=acc, device=qkv.device)
        future.triu_(1)  # added to scores: HIDDEN for keys after the query
        for begin, stop in blocks:
            m = stop - begin
            keys = context + stop
            q_block = _block(q, begin, stop)  # (G, n m, d)
            scores = torch.bmm(q_block, scaled_k[..., :keys])  # (G, n m, keys)
            _own_keys(scores, m).add_(future[:m, :m])
            m_i = scores.amax(-1, keepdim=True)  # (G, n m, 1) largest score of each query
            p = scores.sub_(m_i).clamp_(min=LOWEST).exp_()
            l_i = p.sum(-1, keepdim=True)  # (G, n m, 1)
            out = torch.bmm(p, v[:, :keys]).div_(l_i)  # (G, n m, d)
            log_sums = m_i.add_(l_i.log_())
            o[start + begin : start + stop] = _unblock(out, m)
            lse[start + begin : start + stop] = _unblock(log_sums, m)[..., 0]
    return o.flatten(1), lse.flatten(1)


def _delta(do: Tensor, o: Tensor, H: int) -> Tensor:
    """(T, H): the sum of do * o over each head, for do and o (T, H d)."""
    products = (do * o).unflatten(1, (H, -1))  # (T, H, d)
    return products.sum(-1)


def _blocked_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, packed: Packed, H: int, G: int
) -> Tensor:
    n = H // G
    d = head_size(qkv, packed, H, G)
    acc = lse.dtype
    scale = d**-0.5
    dqkv = torch.empty_like(qkv)
    delta = _delta(do.to(acc), o.to(acc), H)  # (T, H)
    prefix_dk = qkv.new_zeros(G, packed.prefix, d, dtype=acc)  # from the rows after the first
    prefix_dv = torch.zeros_like(prefix_dk)
    for (start, end), context in zip(packed.rows, packed.contexts, strict=True):
        L = end - start
        q, k, v = _row_operands(qkv, start, end, context, H, G)
        dq, dk, dv = split_heads(dqkv[start:end], H, G)  # views to be written
        do_row = do[start:end].to(acc)  # (L, H d)
        do_row = do_row.unflatten(1, (G, n, -1))  # (L, G, n, d)
        lse_row = lse[start:end].reshape(L, G, n, 1)
        delta_row = delta[start:end].reshape(L, G, n, 1)
        scaled_k = k * scale  # (G, context + L, d)
        dk_sum = k.new_zeros(k.shape)  # (G, context + L, d)
        dv_sum = k.new_zeros(k.shape)  # (G, context + L, d)
        blocks = _query_blocks(L, qkv.device)
        largest = _largest_block(blocks)
        past = torch.ones(largest, largest, dtype=acc, device=qkv.device)
        past.tril_()  # a factor of weights: 0 for keys after the query
        for begin, stop in blocks:
            m = stop - begin
            keys = context + stop
            q_block = _block(q, begin, stop)  # (G, n m, d)
            do_block = _block(do_row, begin, stop)  # (G, n m, d)
            lse_block = _block(lse_row, begin, stop)  # (G, n m, 1)
            delta_block = _block(delta_row, begin, stop)  # (G, n m, 1)
            k_block = scaled_k[:, :keys]  # (G, keys, d)
            v_block = v[:, :keys]  # (G, keys, d)
            scores = torch.bmm(q_block, k_block.transpose(1, 2))  # (G, n m, keys)
            # The clamp keeps the scores of future keys, which may be anything, finite in exp.
            p = scores.sub_(lse_block).clamp_(LOWEST, 1.0).exp_()
            _own_keys(p, m).mul_(past[:m, :m])
            dv_sum[:, :keys].baddbmm_(p.transpose(1, 2), do_block)
            dp = torch.bmm(do_block, v_block.transpose(1, 2))  # (G, n m, keys)
            ds = dp.sub_(delta_block).mul_(p)
            dq_block = torch.bmm(ds, k_block)  # (G, n m, d)
            dq[begin:stop] = _unblock(dq_block, m)
            dk_sum[:, :keys].baddbmm_(ds.transpose(1, 2), q_block)
        dk.copy_(dk_sum[:, context:].mul_(scale))
        dv.copy_(dv_sum[:, context:])
        if context:
            prefix_dk += dk_sum[:, :context].mul_(scale)
            prefix_dv += dv_sum[:, :context]
    if packed.prefix:  # row 0 has written its own share there; the other rows' shares are added
        _, dk, dv = split_heads(dqkv[: packed.prefix], H, G)
        dk += prefix_dk
        dv += prefix_dv
    return dqkv


# ---- torch's flash attention


def _can_use_flash(qkv: Tensor, packed: Packed, H: int, G: int) -> bool:
    """Whether torch's variable-length flash attention accepts this and passed its trial."""
    d = head_size(qkv, packed, H, G)
    if not _flash_accepts(qkv, packed, d):
        return False
    return _why_flash_fails(qkv.device, qkv.dtype, H, G, d) is None


def _flash_accepts(qkv: Tensor, packed: Packed, d: int) -> bool:
    """Whether it is made for this: NVIDIA from sm_80 on, 16 bits, no shared prefix.

    Not where every row has one token: there it reorders heads, and the log-sums with them.
    """
    return (
        qkv.is_cuda
        and not packed.prefix
        and torch.version.hip is None  # the layout of its log-sums was never examined
        and qkv.dtype in (torch.float16, torch.bfloat16)
        and d % 8 == 0
        and d <= 256
        and longest_row(packed) > 1
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(qkv.device)[0] >= 8
    )


@functools.cache
def _why_flash_fails(
    device: torch.device, dtype: torch.dtype, H: int, G: int, d: int
) -> str | None:
    """Why torch's flash attention cannot be used for these heads; None if it can. Tried once.

    The operators are not part of torch's public interface: their arguments and the layout of the
    log-sums may change with its version, and the supported heads may change with the card.
    """
    g = torch.Generator().manual_seed(0)
    lengths = [5, 2]
    T = sum(lengths)
    packed = Packed.from_lengths(lengths, device)
    qkv = torch.randn(T, (H + 2 * G) * d, generator=g).to(device, dtype)
    do = torch.randn(T, H * d, generator=g).to(device, dtype)
    try:
        o, lse = _flash_forward(qkv, packed, H, G)
        dqkv = _flash_backward(do, qkv, o, lse, packed, H, G)
        got = {"o": o, "lse": lse, "dqkv": dqkv}
        o, lse = _blocked_forward(qkv, packed, H, G)
        dqkv = _blocked_backward(do, qkv, o, lse, packed, H, G)
        expected = {"o": o, "lse": lse, "dqkv": dqkv}
        for name, want in expected.items():
            largest = want.abs().max()
            error = ((got[name] - want).abs().max() / largest).item()
            assert error < 0.05, f"its {name} differs from the definition's by {error:.1%}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # another version of torch may raise anything for these arguments
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(
            "ops: attention runs in blocks of queries, slower than torch's flash attention, which "
            f"cannot be used with {H} + 2 x {G} heads of {d} here: {lines[0][:200]}"
        )
        return lines[0]
    return None


def _flash_forward(qkv: Tensor, packed: Packed, H: int, G: int) -> tuple[Tensor, Tensor]:
    """The operator under torch.nn.attention.varlen, with the arguments that torch 2.13 gives it.

    varlen_attn itself takes is_causal in torch 2.10, a window in 2.11, enable_gqa from 2.12 on, and
    its backward is autograd's; the operator's first ten arguments are the same in all of them.
    Run on an H100 with torch 2.11; for other versions the shapes of the results are checked.
    """
    T = len(qkv)
    heads = qkv.unflatten(1, (H + 2 * G, -1))  # (T, H + 2G, d)
    q, k, v = heads.split((H, G, G), dim=1)  # (T, H or G, d)
    cu = packed.cu_seqlens
    longest = longest_row(packed)
    dropout = 0.0
    causal = True
    debug_mask = False
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, dropout, causal, debug_mask
    )
    assert o.shape == q.shape and lse.shape == (H, T) and lse.dtype == torch.float32, (
        f"torch {torch.__version__} gave o {tuple(o.shape)}, lse {tuple(lse.shape)} {lse.dtype}; "
        f"expected {tuple(q.shape)} and {(H, T)} float32"
    )
    return o.flatten(1), lse.T


def _flash_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, packed: Packed, H: int, G: int
) -> Tensor:
    """dqkv (T, (H + 2G) d), by the operator of that forward's backward.

    Its dq has atomic sums: the bits differ from run to run unless
    torch.use_deterministic_algorithms is on.
    """
    heads = qkv.unflatten(1, (H + 2 * G, -1))  # (T, H + 2G, d)
    q, k, v = heads.split((H, G, G), dim=1)  # (T, H or G, d)
    do = do.unflatten(1, (H, -1))  # (T, H, d)
    o = o.unflatten(1, (H, -1))  # (T, H, d)
    cu = packed.cu_seqlens
    longest = longest_row(packed)
    dropout = 0.0
    causal = True
    rng_state = torch.zeros(2, dtype=torch.uint64, device=qkv.device)  # unread without dropout
    unused = torch.empty(0, device=qkv.device)
    grads = torch.ops.aten._flash_attention_backward(
        do, q, k, v, o, lse.T.contiguous(), cu, cu, longest, longest, dropout, causal,
        rng_state, unused,
    )  # fmt: skip
    got = [t.shape for t in grads]
    want = [t.shape for t in (q, k, v)]
    assert got == want, f"torch {torch.__version__} gave gradients {got}, not {want}"
    return torch.cat(grads, dim=1).flatten(1)
