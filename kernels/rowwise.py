"""Functions of single numbers, applied so that a row's bits do not depend on the other rows

torch takes a vector form of exp for most numbers of a tensor and a scalar form, which may differ in
the last bit, for the few behind the last whole vector: at a row's end, but also in the middle of a
row where the work is split among threads. Here threads are given whole rows, and rows that lie end
to end are padded to whole vectors. (Sums and products are the same in both forms.)

On a GPU, and on one thread, the function is called as it is.
"""

# T = rows, F = columns

from __future__ import annotations

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
