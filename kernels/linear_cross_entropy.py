"""Cross-entropy of a linear head, without ever holding all logits

    z = hidden head^T      nll_i = logsumexp(z_i) - z_i[target_i]
    dhidden = (softmax(z) - onehot(target)) head       the gradient of sum_i nll_i

The rows handed in are those that carry loss; the caller scales (one number per step, or one per
row). The gradient is made in the forward, chunk by chunk: two products, no logits kept, no dhead
(the head is frozen).

On request it also measures how sure the model is: with p the softmax over the K = LIKELIEST largest
logits of a row alone (over all V, if they are fewer)

    entropy_i = -sum_k p_k log p_k     between 0 and log K, in nats; not differentiated

shapes     hidden, dhidden (N, D)    head (V, D)    targets (N,) int64    nll, entropy (N,) fp32
precision  softmax in max(fp32, dtype)
traffic    a chunk of logits at most CHUNK_BYTES; 4 N D V operations
           the entropy adds no product: torch.topk reads each chunk of logits before the gradient
           is written over it, once on a CPU, a few times on a GPU (radix selection)
triton     vendor products around one kernel, a program per row of the chunk's logits (rounded to
           the dtype); it reads a row twice and writes the gradient over it
           a target outside 0..V-1 reads nothing and makes its row NaN
           the entropy is torch.topk's on the same logits: no kernel of ours, none compiled for it
tiles      shape class: the power of two that holds V, as "V65536"
"""

# N = rows with loss, chunk = rows whose logits are computed at a time
# D = model width, V = vocabulary, BV = logits of a step

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.prepack import PackedWeight, linear
from kernels.dtypes import accumulate_dtype
from kernels.integers import power_of_two
from kernels.launch.tile_config import device_class, tile_config
from kernels.launch.triton_launch import jit, launch, tl
from kernels.spec import MODELS, TOKENS, Spec, autograd

# Bytes of a chunk of logits: small chunks stay in a CPU's cache, large ones fill a GPU.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
INTERPRETER_BYTES = 8 << 10  # so that small shapes take several chunks
LIKELIEST = 20  # K: tokens of a row whose entropy is measured (arXiv 2601.02151)

# ---- reference: the definition


def nll_reference(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """nll (N,); differentiable."""
    acc = accumulate_dtype(hidden.dtype)
    logits = (hidden @ head.T).to(acc)  # (N, V)
    picked = logits.gather(1, targets[:, None])[:, 0]  # (N,)
    return torch.logsumexp(logits, dim=-1) - picked


def entropy_reference(hidden: Tensor, head: Tensor) -> Tensor:
    """entropy (N,) of the LIKELIEST tokens."""
    acc = accumulate_dtype(hidden.dtype)
    logits = (hidden @ head.T).to(acc)  # (N, V)
    likeliest = logits.topk(min(LIKELIEST, len(head)), dim=-1).values  # (N, K)
    log_p = torch.log_softmax(likeliest, dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def linear_cross_entropy_reference(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    need_grad: bool = True,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """nll (N,) and, by autograd, dhidden (N, D); writes `entropy` (N,), if given."""
    nll = nll_reference(hidden, head, targets)
    if entropy is not None:
        entropy.copy_(entropy_reference(hidden, head))
    if not need_grad:
        return nll, None

    def of_hidden(hidden: Tensor) -> Tensor:
        return nll_reference(hidden, head, targets)

    (dhidden,) = autograd(of_hidden, (hidden,), torch.ones_like(nll))
    return nll, dhidden


# ---- torch


def entropy_of_likeliest(logits: Tensor) -> Tensor:
    """entropy (n,) of the LIKELIEST tokens of logits (n, V), in the accumulation dtype."""
    count = min(LIKELIEST, logits.shape[-1])
    likeliest = logits.topk(count, dim=-1).values  # (n, K)
    log_p = torch.log_softmax(likeliest.to(accumulate_dtype(logits.dtype)), dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor | PackedWeight,
    targets: Tensor,
    need_grad: bool = True,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """nll (N,) and dhidden (N, D), the gradient of its sum; None without need_grad (scoring).

    hidden (N, D), head (V, D), targets (N,) int64 in 0 .. V - 1. nll is in the accumulation dtype.
    entropy: (N,) in that dtype, receives the entropy of the likeliest tokens; None: not computed.
    """
    N = hidden.shape[0]
    V = head.shape[0]
    assert targets.shape == (N,), f"targets {tuple(targets.shape)} for {N} rows"
    acc = accumulate_dtype(hidden.dtype)
    nll = hidden.new_empty(N, dtype=acc)
    dhidden = torch.empty_like(hidden) if need_grad else None
    row_bytes = V * acc.itemsize  # of logits
    chunk = max(1, CHUNK_BYTES[hidden.device.type] // row_bytes)
    for first in range(0, N, chunk):
        rows = slice(first, min(first + chunk, N))
        target = targets[rows, None]  # (chunk, 1)
        logits = linear(hidden[rows], head).to(acc)  # (chunk, V)
        picked = logits.gather(1, target)[:, 0]  # (chunk,)
        if entropy is not None:
            entropy[rows] = entropy_of_likeliest(logits)
        if not need_grad:
            nll[rows] = torch.logsumexp(logits, dim=-1) - picked
            continue
        # Softmax in place, in one pass. Its largest probability is exp(highest - lse), which gives
        # lse. torch.softmax adds its sum one number after the other; the sum of its results, which
        # torch.sum adds in pairs, says how far that sum was off. Without this correction the
        # gradient is twenty times as far from the truth (V = 49,152).
        highest = logits.amax(-1)  # (chunk,)
        p = torch.softmax(logits, dim=-1, out=logits)  # (chunk, V)
        total = p.sum(-1)  # (chunk,), nearly 1
        lse = highest - p.amax(-1).log_() + total.log()
        nll[rows] = lse - picked
        dlogits = p.scatter_add_(1, target, -total[:, None])  # (chunk, V), times total
        dx = dlogits.to(hidden.dtype) @ head  # (chunk, D), times total
        dhidden[rows] = dx.div_(total[:, None])
    return nll, dhidden


# ---- triton


@jit(varying=("first",))
def cross_entropy_rows_kernel(
    logits_ptr,  # (chunk, V), overwritten by softmax - onehot if GRAD
    targets_ptr,  # (N,) int64
    nll_ptr,  # (N,) fp32, written
    first,  # row of targets and nll that the chunk's row 0 is
    GRAD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """nll, and if GRAD the gradient of the logits, of one row.

    grid: (rows of the chunk,)
    """
    logits_ptr += tl.program_id(0).to(tl.int64) * V
    row = tl.program_id(0).to(tl.int64) + first
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < V)
    picked = tl.load(logits_ptr + target, mask=known, other=0.0).to(tl.float32)
    block = tl.arange(0, BV)
    m_i = tl.full((), float("-inf"), tl.float32)
    l_i = tl.zeros((BV,), tl.float32)  # a sum per lane: one reduction less per step
    for start in range(0, V, BV):
        cols = start + block
        z = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf"))  # (BV,)
        z = z.to(tl.float32)
        m_new = tl.maximum(m_i, tl.max(z, axis=0))
        l_i = l_i * tl.exp(m_i - m_new) + tl.exp(z - m_new)
        m_i = m_new
    lse = m_i + tl.log(tl.sum(l_i, axis=0))
    lse = tl.where(known, lse, float("nan"))
    tl.store(nll_ptr + row, lse - picked)
    if GRAD:
        for start in range(0, V, BV):
            cols = start + block
            z = tl.load(logits_ptr + cols, mask=cols < V, other=0.0)
            p = tl.exp(z.to(tl.float32) - lse)
            onehot = tl.where(cols == target, 1.0, 0.0)
            dz = (p - onehot).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + cols, dz, mask=cols < V)


def linear_cross_entropy_triton(
    hidden: Tensor,
    head: Tensor | PackedWeight,
    targets: Tensor,
    need_grad: bool = True,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `linear_cross_entropy`; softmax and its gradient in one launch per chunk."""
    N = hidden.shape[0]
    V = head.shape[0]
    assert targets.shape == (N,), f"targets {tuple(targets.shape)} for {N} rows"
    targets = targets.contiguous()
    nll = hidden.new_empty(N, dtype=torch.float32)
    dhidden = torch.empty_like(hidden) if need_grad else None
    interpreted = device_class(hidden.device) == "interpreter"
    budget = INTERPRETER_BYTES if interpreted else CHUNK_BYTES["cuda"]
    row_bytes = V * hidden.element_size()  # of logits
    chunk = max(1, budget // row_bytes)
    buffer = hidden.new_empty(min(N, chunk), V)
    config = tile_config("cross_entropy_rows_kernel", hidden.device, f"V{power_of_two(V)}")
    for first in range(0, N, chunk):
        rows = slice(first, min(first + chunk, N))
        count = rows.stop - first
        x = hidden[rows]  # (count, D)
        logits = buffer[:count]  # (count, V)
        if isinstance(head, Tensor):
            torch.mm(x, head.T, out=logits)
        else:
            logits.copy_(head(x))
        if entropy is not None:  # before the kernel writes the gradient over the logits
            entropy[rows] = entropy_of_likeliest(logits)
        launch(
            cross_entropy_rows_kernel, (count,), logits, targets, nll, first,
            GRAD=need_grad, V=V, **config,
        )  # fmt: skip
        if need_grad:
            torch.mm(logits, head, out=dhidden[rows])
    return nll, dhidden


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    """Shape: N, D, V."""
    N, D, V = shape
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64)
    head = torch.randn(V, D, generator=g, dtype=torch.float64) / D**0.5
    targets = torch.randint(V, (N,), generator=g)
    return {"hidden": hidden, "head": head, "targets": targets}


def _run(ops, inputs: dict) -> dict[str, Tensor]:
    hidden, head, targets = inputs["hidden"], inputs["head"], inputs["targets"]
    nll, dhidden = ops.linear_cross_entropy(hidden, head, targets)
    entropy = torch.empty_like(nll)
    scored, _ = ops.linear_cross_entropy(hidden, head, targets, need_grad=False, entropy=entropy)
    return {"nll": nll, "dhidden": dhidden, "scored": scored, "entropy": entropy}


SPEC = Spec(
    "linear_cross_entropy",
    _make_inputs,
    _run,
    fields=("linear_cross_entropy",),
    # N, D, V
    test_shapes=(
        (1, 16, 11),
        (63, 24, 257),
        (300, 16, 40_000),
        (0, 16, 11),
    ),
    interpreter_shapes=(
        (1, 16, 11),
        (17, 37, 64),
        (33, 24, 257),
        (0, 16, 11),
        (3, 16, 1100),
    ),
    bench_shapes=tuple((N, m.D, m.V) for m in MODELS.values() for N in TOKENS[2:]),
    model_shapes=lambda m: ((9, 64, m.V),),  # only V reaches the kernel
    slack=3.0,  # logits summed in chunks of another size than the reference's
    floor=1e-5,
)
