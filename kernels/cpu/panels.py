"""A weight for products on a CPU in C: panels of rows, in as few bytes as hold it exactly

    y = x W^T      every y a sum of chains of 128 fused multiply-adds, in fp32 (native/linear.c)

so that row i of a product is the same bits for any number of rows and threads. What is multiplied
are the weight's fp32 numbers; only their way from memory is shorter where the low bits of all of
them are 0. A checkpoint in bf16, as nearly all are, takes two bytes a number, one in fp16 or with
most 4-bit quantised weights three, one in fp32, or with an adapter merged into it, four.

shapes     x (T, K)    weight (N, K)    y (T, N), fp32
traffic    T K + T N elements and W once per 528 tokens (264 with AVX2)
"""

# T = tokens, K = inputs, N = outputs

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu import native

CHUNK = 1 << 22  # numbers that are looked at together


def bytes_needed(weight: Tensor) -> int:
    """2, 3 or 4: how many upper bytes of the numbers hold this contiguous fp32 weight exactly."""
    needed = 2
    for part in weight.view(torch.int32).flatten().split(CHUNK):
        while needed < 4 and bool(part.bitwise_and((1 << 8 * (4 - needed)) - 1).any()):
            needed += 1
    return needed


class Panels:
    """A weight (N, K) in panels. Calling it multiplies; indexing it looks rows up, as they were."""

    def __init__(self, weight: Tensor) -> None:
        lib, weight = native.library(), weight.contiguous()
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.bytes = bytes_needed(weight)
        (n, k), columns = weight.shape, lib.panel_columns()
        size = -(-n // columns) * columns * k * self.bytes + 64  # a last load may read beyond
        self.packed = torch.empty(size, dtype=torch.uint8)
        self.pointer, self._product = self.packed.data_ptr(), lib.linear
        lib.pack(native.at(weight), self.pointer, self.bytes, n, k)

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.packed.nbytes

    @staticmethod
    def available(weight: Tensor) -> bool:
        """Whether this weight can be packed here."""
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        return on_cpu and not native.usable()

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows (n,) int64 of the weight: (n, K), bit for bit."""
        n, k = self.shape
        assert rows.dim() == 1 and (not len(rows) or 0 <= int(rows.min()) <= int(rows.max()) < n), (
            f"rows {tuple(rows.shape)} of {n}"
        )
        rows, y = rows.contiguous(), torch.empty(len(rows), k)
        places = native.at(rows, torch.int64)
        native.library().look_up(self.pointer, self.bytes, places, y.data_ptr(), len(rows), k)
        return y

    def unpack(self) -> Tensor:
        """The weight (N, K) as it was, bit for bit: packing only moves numbers."""
        return self[torch.arange(self.shape[0])]

    def __call__(self, x: Tensor) -> Tensor:
        n, k = self.shape
        assert x.dim() == 2 and x.shape[1] == k, f"x {tuple(x.shape)} does not fit {n} x {k}"
        T, x = x.shape[0], x.contiguous()
        y = torch.empty(T, n)
        self._product(native.at(x), self.pointer, y.data_ptr(), self.bytes, T, k, n)
        return y
