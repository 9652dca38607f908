"""How torch on a CPU is called so that its results are batch-invariant

`rowwise`       an elementwise function of a matrix
`decode_width`  how many queries per row attention must compute together

torch computes exp of most numbers of a tensor in a vector form, and of the few after the last whole
vector in a scalar form that may differ in the last bit. Such a tail is at the end of a row, but
also in the middle of one where the work is split among threads. Here threads are given whole rows,
and rows that lie end to end are padded to whole vectors. (Sums and products are the same in both
forms.)

On a GPU the function is called as it is.
"""

# T = rows, F = columns

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.integers import cdiv

GRAIN = 32768  # numbers from which on torch splits a loop (at::internal::GRAIN_SIZE)
LANES = 32  # two 512-bit vectors of fp32: torch's loops take two at a time


def rowwise(function: Callable, x: Tensor) -> Tensor:
    """function(x) for x (T, F); `function` takes `out=`, as torch.exp does."""
    if x.device.type != "cpu":
        return function(x)
    T, columns = x.shape
    lie_end_to_end = x.stride(0) == columns  # for T = 1 too, or it would depend on T
    if columns % LANES != 0 and lie_end_to_end:
        padded_columns = cdiv(columns, LANES) * LANES
        x = F.pad(x, (0, padded_columns - columns))
    out = torch.empty(x.shape, dtype=x.dtype)
    for rows in _slices(T, x.shape[1]):
        function(x[rows], out=out[rows])
    return out[:, :columns]


def _slices(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that torch splits among its threads at the ends of rows."""
    threads = torch.get_num_threads()
    if threads == 1 or rows * columns < GRAIN:
        yield slice(0, rows)
        return
    start = 0
    while start < rows:
        count = rows - start
        while not _splits_evenly(count, columns, threads):
            count -= 1
        yield slice(start, start + count)
        start += count


def _splits_evenly(rows: int, columns: int, threads: int) -> bool:
    """Whether torch gives every thread whole rows of these, or there is but one."""
    if rows == 1:
        return True  # wherever it is split, no other row is involved
    threads_used = min(threads, cdiv(rows * columns, GRAIN))
    return rows % threads_used == 0


@functools.cache
def decode_width(n: int, size: int, d: int, dtype: torch.dtype, device: str) -> int | None:
    """The least number of queries per row that a page of keys must meet together.

    n query heads share a key head, so w queries of a row are a product of w n rows with the `size`
    keys of a page, of d numbers each. A CPU's library takes other paths for one or two rows than
    for more. Measured: from the width returned on, the number of queries changes no bit of a
    query's result. None where every number gave other bits. On a GPU nothing is promised and 1 is
    returned.
    """
    if device != "cpu":
        return 1
    generator = torch.Generator().manual_seed(0)
    most = max(48, 16 * n)  # rows of the product that smaller ones are compared with

    def randn(rows: int) -> Tensor:
        return torch.randn(4, rows, d, generator=generator).to(dtype)

    q = randn(most)  # (4, most, d)
    k = randn(size)  # (4, size, d)
    v = randn(size)  # (4, size, d)
    p = torch.rand(4, most, size, generator=generator).to(dtype)
    scores = torch.bmm(q, k.transpose(1, 2))  # (4, most, size)
    values = torch.bmm(p, v)  # (4, most, d)
    different = []  # numbers of rows that give other bits than the largest
    for m in range(n, most, n):
        few_scores = torch.bmm(q[:, :m].contiguous(), k.transpose(1, 2))  # (4, m, size)
        few_values = torch.bmm(p[:, :m].contiguous(), v)  # (4, m, d)
        same_scores = torch.equal(few_scores, scores[:, :m])
        if not (same_scores and torch.equal(few_values, values[:, :m])):
            different.append(m)
    for m in range(n, min(most, 8 * n + 1), n):
        if all(other < m for other in different):
            return m // n
    return None
