"""A weight packed for products on a CPU in C: panels of rows, in as few bytes as hold it exactly

    y = x W^T      every y a sum of chains of 128 fused multiply-adds, in fp32 (native/linear.c)

The product is batch-invariant: row i of it is the same bits for any number of rows and threads. It
multiplies the weight's fp32 numbers; where their low bits are all 0, these are not stored. A number
takes two bytes for a checkpoint in bf16 (as nearly all are), three for one in fp16 or with most
4-bit quantised weights, four for one in fp32 or with an adapter merged into it.

shapes     x (T, K)    weight (N, K)    y (T, N), fp32
traffic    T K + T N elements and W once per 528 tokens (264 with AVX2)
"""

# T = tokens, K = inputs, N = outputs

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu import native
from kernels.integers import cdiv

CHUNK = 1 << 22  # numbers that are examined together
PADDING = 64  # bytes after the last panel: a last load may read beyond it


def bytes_needed(weight: Tensor) -> int:
    """2, 3 or 4: how many upper bytes of each number hold this contiguous fp32 weight exactly."""
    needed = 2
    for part in weight.view(torch.int32).flatten().split(CHUNK):
        while needed < 4:
            dropped_bits = (1 << 8 * (4 - needed)) - 1
            if not part.bitwise_and(dropped_bits).any():
                break
            needed += 1
    return needed


class Panels:
    """A weight (N, K) in panels. Calling it multiplies; indexing it returns rows, unpacked."""

    def __init__(self, weight: Tensor) -> None:
        library, weight = native.library(), weight.contiguous()
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.bytes = bytes_needed(weight)  # per number
        n, k = weight.shape
        columns = library.panel_columns()  # rows of the weight in a panel
        size = cdiv(n, columns) * columns * k * self.bytes + PADDING
        self.packed = torch.empty(size, dtype=torch.uint8)
        self.pointer, self._product = self.packed.data_ptr(), library.linear
        library.pack(native.at(weight), self.pointer, self.bytes, n, k)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.packed.nbytes

    @staticmethod
    def available(weight: Tensor) -> bool:
        """Whether this weight can be packed here."""
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        return on_cpu and native.why_unavailable() is None

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows (n,) int64 of the weight: (n, K), bit for bit."""
        n, k = self.shape
        assert rows.dim() == 1, f"rows {tuple(rows.shape)} of {n}: expected one dimension"
        in_range = not len(rows) or (int(rows.min()) >= 0 and int(rows.max()) < n)
        assert in_range, f"rows {int(rows.min())} to {int(rows.max())} of {n}"
        rows, y = rows.contiguous(), torch.empty(len(rows), k)
        indices = native.at(rows, torch.int64)
        native.library().look_up(self.pointer, self.bytes, indices, y.data_ptr(), len(rows), k)
        return y

    def unpack(self) -> Tensor:
        """The weight (N, K), bit for bit: packing only moves numbers."""
        return self[torch.arange(self.shape[0])]

    def __call__(self, x: Tensor) -> Tensor:
        """x (T, K) times the weight transposed: (T, N), fp32."""
        n, k = self.shape
        assert x.dim() == 2 and x.shape[1] == k, f"x {tuple(x.shape)} does not fit {n} x {k}"
        T, x = x.shape[0], x.contiguous()
        y = torch.empty(T, n)
        self._product(native.at(x), self.pointer, y.data_ptr(), self.bytes, T, k, n)
        return y
