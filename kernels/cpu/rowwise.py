"""What a CPU's library must be asked for, so that a row's bits do not depend on the other rows

`rowwise`      a function of single numbers
`alone_width`  how many queries may meet a page of keys together

torch takes a vector form of exp for most numbers of a tensor and a scalar form, which may differ in
the last bit, for the few behind the last whole vector: at a row's end, but also in the middle of a
row where the work is split among threads. Here threads are given whole rows, and rows that lie end
to end are padded to whole vectors. (Sums and products are the same in both forms.)

On a GPU the function is called as it is.
"""

# T = rows, F = columns

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

GRAIN = 32768  # numbers from which on torch splits a loop (at::internal::GRAIN_SIZE)
LANES = 32  # two 512-bit vectors of fp32: torch's loops take two at a time


def _slices(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows which torch splits among its threads between two rows."""
    threads, start = torch.get_num_threads(), 0
    if threads == 1 or rows * columns < GRAIN:
        yield slice(0, rows)
        return
    while start < rows:
        take = rows - start
        while take > 1 and take % min(threads, -(-take * columns // GRAIN)):
            take -= 1
        yield slice(start, start + take)
        start += take


def rowwise(function: Callable, x: Tensor) -> Tensor:
    """function(x) for x (T, F); `function` takes `out=`, as torch.exp does."""
    rows, columns = x.shape
    if x.device.type != "cpu":
        return function(x)
    if columns % LANES and x.stride(0) == columns:  # of one row too, however many there are
        x = F.pad(x, (0, -columns % LANES))
    out = torch.empty(x.shape, dtype=x.dtype)
    for part in _slices(*x.shape):
        function(x[part], out=out[part])
    return out[:, :columns]


@functools.cache
def alone_width(n: int, size: int, d: int, dtype: torch.dtype, device: str) -> int | None:
    """Queries per row from which on their number changes no bit of a query's result.

    n heads share a page's keys, so w queries are a product of w n rows. Measured (a CPU's library
    takes other paths for one or two rows than for more); None where every number gave other bits.
    On a GPU nothing is promised and 1 is given.
    """
    if device != "cpu":
        return 1
    g = torch.Generator().manual_seed(0)
    most = max(48, 16 * n)
    q, k, v = (torch.randn(4, m, d, generator=g).to(dtype) for m in (most, size, size))
    p = torch.rand(4, most, size, generator=g).to(dtype)
    whole = torch.bmm(q, k.transpose(1, 2)), torch.bmm(p, v)
    same = {}
    for m in range(n, most, n):
        few = (
            torch.bmm(q[:, :m].contiguous(), k.transpose(1, 2)),
            torch.bmm(p[:, :m].contiguous(), v),
        )
        same[m] = all(torch.equal(a, b[:, :m]) for a, b in zip(few, whole, strict=True))
    least = next((m for m in same if all(ok for w, ok in same.items() if w >= m)), None)
    return None if least is None or least > 8 * n else least // n
