"""Cross-entropy of a linear head, without ever holding all logits

    z = hidden head^T      nll_i = logsumexp(z_i) - z_i[target_i]
    dhidden = (softmax(z) - onehot(target)) head       the gradient of sum_i nll_i

The rows handed in are those that carry loss; the caller scales (one number per step, or one per
row). The gradient is made in the forward, chunk by chunk: two products, no logits kept, no dhead
(the head is frozen).

shapes     hidden, dhidden (N, D)    head (V, D)    targets (N,) int64    nll (N,) fp32
precision  softmax in max(fp32, dtype)
traffic    a chunk of logits at most CHUNK_BYTES; 4 N D V operations
triton     chunks: vendor products around one kernel, a program per row of the chunk's logits
           (rounded to the dtype); it reads a row twice and writes the gradient over it
           fused: the sums are made inside the product and no logits are kept; the gradient is
           made again by windows of the vocabulary of at most WINDOW_BYTES; 6 N D V operations
           a target outside 0..V-1 reads nothing and makes its row NaN
tiles      chunks: the power of two that holds V, as "V65536"
           fused: "16-bit" elements in rows that descriptors can read
           SLICE, the columns of one program of the fused sums, is a multiple of BV
"""

# N = rows with loss, D = model width, V = vocabulary, S = slices of it, W = columns of a window

from __future__ import annotations

import torch
from torch import Tensor

from kernels._triton import cdiv, described, jit, launch, power_of_two, tl
from kernels.prepack import PackedWeight, linear
from kernels.spec import MODELS, TOKENS, Spec, accumulate_dtype, autograd
from kernels.tiles import device_class, tile

CHUNK_BYTES = {
    "cpu": 64 << 20,
    "cuda": 1 << 30,
}  # small chunks stay in cache, large ones fill a GPU
WINDOW_BYTES = 128 << 20  # small, for that is what the fused form is for
INTERPRETER_BYTES = 8 << 10  # so that small shapes take several chunks and windows

# ---- reference: the definition


def nll_reference(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """nll (N,); differentiable."""
    logits = (hidden @ head.T).to(accumulate_dtype(hidden.dtype))
    return torch.logsumexp(logits, dim=-1) - logits.gather(1, targets[:, None])[:, 0]


def linear_cross_entropy_reference(
    hidden: Tensor, head: Tensor, targets: Tensor, need_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """nll and, by autograd, dhidden."""
    nll = nll_reference(hidden, head, targets)
    if not need_grad:
        return nll, None
    ones = torch.ones_like(nll)
    return nll, autograd(lambda h: nll_reference(h, head, targets), (hidden,), ones)[0]


# ---- torch


def linear_cross_entropy(
    hidden: Tensor, head: Tensor | PackedWeight, targets: Tensor, need_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """nll (N,) and dhidden (N, D), the gradient of its sum; None without need_grad (scoring)."""
    n, v = hidden.shape[0], head.shape[0]
    assert targets.shape == (n,), f"targets {tuple(targets.shape)} for {n} rows"
    acc = accumulate_dtype(hidden.dtype)
    nll = hidden.new_empty(n, dtype=acc)
    dhidden = torch.empty_like(hidden) if need_grad else None
    chunk = max(1, CHUNK_BYTES[hidden.device.type] // (v * acc.itemsize))
    for i in range(0, n, chunk):
        rows = slice(i, min(i + chunk, n))
        target = targets[rows, None]
        logits = linear(hidden[rows], head).to(acc)
        picked = logits.gather(1, target)[:, 0]
        if need_grad:
            highest = logits.amax(-1)
            # One pass, over the logits; its own log-sum is had from its maximum. It adds one number
            # after the other: `total`, which torch.sum adds in pairs, is how far it is from 1, and
            # without it the gradient is twenty times as far from the truth (V = 49,152).
            p = torch.softmax(logits, dim=-1, out=logits)
            total = p.sum(-1)
            nll[rows] = highest - p.amax(-1).log_() + total.log() - picked
            p.scatter_add_(1, target, -total[:, None])
            dhidden[rows] = (p.to(hidden.dtype) @ head).div_(total[:, None])
        else:
            nll[rows] = torch.logsumexp(logits, dim=-1) - picked
    return nll, dhidden


# ---- triton


@jit(varying=("first",))
def cross_entropy_rows_kernel(
    logits_ptr, targets_ptr, nll_ptr, first, GRAD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    logits_ptr += tl.program_id(0).to(tl.int64) * V
    row = tl.program_id(0).to(tl.int64) + first  # the chunk's first row is row `first` of all
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < V)
    picked = tl.load(logits_ptr + target, mask=known, other=0.0).to(tl.float32)
    block = tl.arange(0, BV)
    highest = tl.full((), float("-inf"), tl.float32)
    sums = tl.zeros((BV,), tl.float32)  # a sum per lane: one reduction less per block
    for start in range(0, V, BV):
        cols = start + block
        z = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)  # (BV,)
        higher = tl.maximum(highest, tl.max(z, axis=0))
        sums = sums * tl.exp(highest - higher) + tl.exp(z - higher)
        highest = higher
    lse = tl.where(known, highest + tl.log(tl.sum(sums, axis=0)), float("nan"))
    tl.store(nll_ptr + row, lse - picked)
    if GRAD:
        for start in range(0, V, BV):
            cols = start + block
            z = tl.load(logits_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
            dz = tl.exp(z - lse) - tl.where(cols == target, 1.0, 0.0)
            tl.store(logits_ptr + cols, dz.to(logits_ptr.dtype.element_ty), mask=cols < V)


@jit
def matrix(
    ptr, count, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, DESCRIBED: tl.constexpr
):  # fmt: skip
    """The tensor (count, D), for `matrix_tile`."""
    if DESCRIBED:
        source = tl.make_tensor_descriptor(ptr, [count, D], [D, 1], [ROWS, BD])
    else:
        source = ptr
    return source


@jit
def matrix_tile(
    source, row, d, count,
    D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Rows from `row` and columns from d on, (ROWS, BD); zero from row `count`, column D on."""
    if DESCRIBED:
        tile = source.load([row, d])
    else:
        rows, cols = row + tl.arange(0, ROWS), d + tl.arange(0, BD)
        inside = (rows < count)[:, None] & (cols < D)[None, :]
        tile = tl.load(source + rows.to(tl.int64)[:, None] * D + cols, mask=inside, other=0.0)
    return tile


@jit
def logits_tile(
    hidden, head, row, column, N, D: tl.constexpr, V: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """hidden head^T at (row, column), zero outside: (BN, BV) fp32."""
    z = tl.zeros((BN, BV), tl.float32)
    for d in range(0, D, BD):
        x = matrix_tile(hidden, row, d, N, D, BN, BD, DESCRIBED)
        w = matrix_tile(head, column, d, V, D, BV, BD, DESCRIBED)
        z = tl.dot(x, w.T, z, input_precision="ieee")
    return z


@jit(varying=("N",))
def cross_entropy_slices_kernel(
    hidden_ptr, head_ptr, targets_ptr, highest_ptr, sums_ptr, picked_ptr, N,
    D: tl.constexpr, V: tl.constexpr, S: tl.constexpr, SLICE: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    hidden = matrix(hidden_ptr, N, D, BN, BD, DESCRIBED)
    head = matrix(head_ptr, V, D, BV, BD, DESCRIBED)
    row = tl.program_id(0) * BN
    rows = row + tl.arange(0, BN)
    targets = tl.load(targets_ptr + rows, mask=rows < N, other=-1)
    first = tl.program_id(1) * SLICE
    last = tl.minimum(first + SLICE, V)
    highest = tl.full((BN,), float("-inf"), tl.float32)
    sums = tl.zeros((BN,), tl.float32)
    picked = tl.zeros((BN,), tl.float32)
    for column in range(first, last, BV):
        cols = column + tl.arange(0, BV)
        z = logits_tile(hidden, head, row, column, N, D, V, BN, BV, BD, DESCRIBED)
        picked += tl.sum(tl.where(cols[None, :] == targets[:, None], z, 0.0), axis=1)
        z = tl.where(cols[None, :] < V, z, float("-inf"))
        higher = tl.maximum(highest, tl.max(z, axis=1))
        sums = sums * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher[:, None]), axis=1)
        highest = higher
    at = rows.to(tl.int64) * S + tl.program_id(1)
    tl.store(highest_ptr + at, highest, mask=rows < N)
    tl.store(sums_ptr + at, sums, mask=rows < N)
    tl.store(picked_ptr + rows, picked, mask=(targets >= first) & (targets < last))


@jit(varying=("N",))
def cross_entropy_combine_kernel(
    highest_ptr, sums_ptr, picked_ptr, targets_ptr, nll_ptr, lse_ptr, N,
    V: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rows < N
    at = tl.minimum(rows, N - 1).to(tl.int64)[:, None] * S + tl.arange(0, BS)[None, :]
    slices = (tl.arange(0, BS) < S)[None, :]
    parts = tl.load(highest_ptr + at, mask=slices, other=float("-inf"))  # (BN, BS)
    sums = tl.load(sums_ptr + at, mask=slices, other=0.0)
    highest = tl.max(parts, axis=1)
    lse = highest + tl.log(tl.sum(sums * tl.exp(parts - highest[:, None]), axis=1))
    targets = tl.load(targets_ptr + rows, mask=inside, other=-1)
    known = (targets >= 0) & (targets < V)
    lse = tl.where(known, lse, float("nan"))
    tl.store(lse_ptr + rows, lse, mask=inside)
    picked = tl.load(picked_ptr + rows, mask=known, other=0.0)
    tl.store(nll_ptr + rows, lse - picked, mask=inside)


@jit(varying=("N", "start"))
def cross_entropy_window_kernel(
    hidden_ptr, head_ptr, targets_ptr, lse_ptr, window_ptr, N, start, W,
    D: tl.constexpr, V: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    hidden = matrix(hidden_ptr, N, D, BN, BD, DESCRIBED)
    head = matrix(head_ptr, V, D, BV, BD, DESCRIBED)
    row = tl.program_id(0) * BN
    column = tl.program_id(1) * BV
    z = logits_tile(hidden, head, row, start + column, N, D, V, BN, BV, BD, DESCRIBED)
    rows = row + tl.arange(0, BN)
    cols = column + tl.arange(0, BV)
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
    targets = tl.load(targets_ptr + rows, mask=rows < N, other=-1)
    hit = (start + cols)[None, :] == targets[:, None]
    dz = tl.exp(z - lse[:, None]) - tl.where(hit, 1.0, 0.0)  # (BN, BV)
    at = rows.to(tl.int64)[:, None] * W + cols[None, :]
    inside = (rows < N)[:, None] & (cols < W)[None, :]
    tl.store(window_ptr + at, dz.to(window_ptr.dtype.element_ty), mask=inside)


def _budget(device: torch.device, gpu: int) -> int:
    return INTERPRETER_BYTES if device_class(device) == "interpreter" else gpu


def linear_cross_entropy_triton(
    hidden: Tensor, head: Tensor | PackedWeight, targets: Tensor, need_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As `linear_cross_entropy`; softmax and its gradient in one launch per chunk."""
    N, V = hidden.shape[0], head.shape[0]
    assert targets.shape == (N,), f"targets {tuple(targets.shape)} for {N} rows"
    targets = targets.contiguous()
    nll = hidden.new_empty(N, dtype=torch.float32)
    dhidden = torch.empty_like(hidden) if need_grad else None
    budget = _budget(hidden.device, CHUNK_BYTES["cuda"])
    chunk = min(N, max(1, budget // (V * hidden.element_size())))
    buffer = hidden.new_empty(chunk, V)
    row = tile("cross_entropy_rows_kernel", hidden.device, f"V{power_of_two(V)}")
    for i in range(0, N, max(1, chunk)):
        rows = slice(i, min(i + chunk, N))
        x, logits = hidden[rows], buffer[: rows.stop - i]
        if isinstance(head, Tensor):
            torch.mm(x, head.T, out=logits)
        else:
            logits.copy_(head(x))
        args = (logits, targets, nll, i)
        launch(cross_entropy_rows_kernel, logits.shape[:1], *args, GRAD=need_grad, V=V, **row)
        if need_grad:
            torch.mm(logits, head, out=dhidden[rows])
    return nll, dhidden


def linear_cross_entropy_fused_triton(
    hidden: Tensor, head: Tensor, targets: Tensor, need_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As `linear_cross_entropy`, holding no logits: for when memory is short."""
    (N, D), V = hidden.shape, head.shape[0]
    assert head.shape == (V, D), f"head {tuple(head.shape)} for hidden {tuple(hidden.shape)}"
    assert targets.shape == (N,), f"targets {tuple(targets.shape)} for {N} rows"
    hidden, head, targets = hidden.contiguous(), head.contiguous(), targets.contiguous()
    sizes = {"D": D, "V": V, "DESCRIBED": described(hidden, head)}
    shape = "16-bit" if sizes["DESCRIBED"] and hidden.element_size() == 2 else "any"
    row = tile("cross_entropy_slices_kernel", hidden.device, shape)
    S = 16 * cdiv(V, 16 * row["SLICE"])  # a row of parts is whole vectors; some slices are empty
    highest, sums = (hidden.new_empty(N, S, dtype=torch.float32) for _ in range(2))
    picked, nll, lse = (hidden.new_empty(N, dtype=torch.float32) for _ in range(3))
    args = (hidden, head, targets, highest, sums, picked, N)
    launch(cross_entropy_slices_kernel, (cdiv(N, row["BN"]), S), *args, S=S, **sizes, **row)
    row = tile("cross_entropy_combine_kernel", hidden.device)
    args = (highest, sums, picked, targets, nll, lse, N)
    slices = {"V": V, "S": S, "BS": power_of_two(S)}
    launch(cross_entropy_combine_kernel, (cdiv(N, row["BN"]),), *args, **slices, **row)
    if not need_grad:
        return nll, None

    row = tile("cross_entropy_window_kernel", hidden.device, shape)
    BN, BV = row["BN"], row["BV"]
    budget = _budget(hidden.device, WINDOW_BYTES) // max(1, N * hidden.element_size())
    width = max(BV, min(budget, V) // BV * BV)
    buffer = hidden.new_empty(N * min(width, V))
    product = torch.empty_like(hidden)
    dhidden = torch.zeros_like(hidden, dtype=torch.float32)
    for start in range(0, V, width):
        W = min(width, V - start)
        window = buffer[: N * W].view(N, W)
        args = (hidden, head, targets, lse, window, N, start, W)
        launch(cross_entropy_window_kernel, (cdiv(N, BN), cdiv(W, BV)), *args, **sizes, **row)
        dhidden += torch.mm(window, head[start : start + W], out=product)
    return nll, dhidden.to(hidden.dtype)


# ---- contract


def _make_inputs(shape: tuple[int, ...], g: torch.Generator) -> dict:
    n, d, v = shape
    return {
        "hidden": torch.randn(n, d, generator=g, dtype=torch.float64),
        "head": torch.randn(v, d, generator=g, dtype=torch.float64) / d**0.5,
        "targets": torch.randint(v, (n,), generator=g),
    }


def _run(ops, i: dict) -> dict[str, Tensor]:
    nll, dhidden = ops.linear_cross_entropy(i["hidden"], i["head"], i["targets"])
    scored, _ = ops.linear_cross_entropy(i["hidden"], i["head"], i["targets"], need_grad=False)
    return {"nll": nll, "dhidden": dhidden, "scored": scored}


SPEC = Spec(
    "linear_cross_entropy",
    _make_inputs,
    _run,
    test_shapes=((1, 16, 11), (63, 24, 257), (300, 16, 40_000), (0, 16, 11)),
    bench_shapes=tuple((n, m.D, m.V) for m in MODELS.values() for n in TOKENS[2:]),
    model_shapes=lambda m: ((9, 64, m.V),),  # of the default form's kernel: only V reaches it
    interpreter_shapes=((1, 16, 11), (17, 37, 64), (33, 24, 257), (0, 16, 11), (3, 16, 1100)),
    slack=3.0,  # logits summed in chunks of another size than the reference's
    floor=1e-5,
)
