"""A weight packed for products on a CPU in C: panels of rows, in as few bytes as hold it exactly

    y = x W^T + b  every y a sum of chains of 128 fused multiply-adds, in fp32 (native/linear.c)

The product is batch-invariant: row i of it is the same bits for any number of rows and threads. It
multiplies the weight's fp32 numbers; where their low bits are all 0, these are not stored. A number
takes two bytes for a checkpoint in bf16 (as nearly all are), three for one in fp16, four for one in
fp32 or with an adapter merged into it. A quantised weight stays quantised: 5 to 12 bits a number
(quantised_panels.py).

shapes     x (T, K)    weight (N, K)    bias (N,), or none    y (T, N), fp32
traffic    T K + T N elements and W once per 528 tokens (264 with AVX2)
"""

# T = tokens, K = inputs, N = outputs, n = rows of the weight that are looked up

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
            num_dropped = 8 * (4 - needed)
            dropped_bits = (1 << num_dropped) - 1  # a mask of the low bits that are not stored
            if not part.bitwise_and(dropped_bits).any():
                break
            needed += 1
    return needed


class Panels:
    """A weight (N, K) in panels. Calling it multiplies; indexing it returns rows, unpacked."""

    def __init__(self, weight: Tensor) -> None:
        weight = weight.contiguous()
        self.bytes = bytes_needed(weight)  # per number
        self._allocate(weight.shape, self.bytes, 8 * self.bytes)
        N, K = weight.shape
        native.library().pack(native.at(weight), self.pointer, self.bytes, N, K)

    def _allocate(self, shape: tuple[int, int], form: int, bits: int) -> None:
        """Set every field but `bytes`; memory for panels of so many bits a number."""
        library = native.library()
        self.shape = torch.Size(shape)
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.form = form  # how the numbers are stored (native/panel.h)
        self.bits = bits  # of a number, with its part of a scale and a minimum
        N, K = shape
        panel_rows = library.panel_columns()  # rows of the weight, columns of y
        padded_rows = cdiv(N, panel_rows) * panel_rows
        size = padded_rows * K * bits // 8 + PADDING
        self.packed = torch.empty(size, dtype=torch.uint8)
        self.pointer = self.packed.data_ptr()
        self._product = library.linear

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
        N, K = self.shape
        assert rows.dim() == 1, f"rows {tuple(rows.shape)} of {N}: expected one dimension"
        n = len(rows)
        y = torch.empty(n, K)
        if n == 0:
            return y
        lowest = int(rows.min())
        highest = int(rows.max())
        assert lowest >= 0 and highest < N, f"rows {lowest} to {highest} of {N}"
        rows = rows.contiguous()
        indices = native.at(rows, torch.int64)
        native.library().look_up(self.pointer, self.form, indices, y.data_ptr(), n, K)
        return y

    def unpack(self) -> Tensor:
        """The weight (N, K), bit for bit: packing only moves numbers."""
        return self[torch.arange(self.shape[0])]

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, K) times the weight transposed, plus bias (N,): (T, N), fp32."""
        N, K = self.shape
        assert x.dim() == 2 and x.shape[1] == K, f"x {tuple(x.shape)} does not fit {N} x {K}"
        x = x.contiguous()
        T = x.shape[0]
        y = torch.empty(T, N)
        bias_pointer = None  # a null pointer: no bias
        if bias is not None:
            assert bias.shape == (N,), f"bias {tuple(bias.shape)} of {N} outputs"
            bias_pointer = native.at(bias)
        pointers = (native.at(x), self.pointer, bias_pointer, y.data_ptr())
        self._product(*pointers, self.form, T, K, N)
        return y
