"""The form of a matrix product that the sampler uses for a whole run on a CPU

Row i of a product must not depend on the number of rows (batch-invariant). The C form that holds
this is in panels.py; where it cannot be compiled, `Prepacked` is used: oneDNN with prepacked
weights. Elsewhere `prepack` returns the weight as it is; the form of a GPU is in
kernels/lora_linear/batch_invariant.py.

shapes     x (T, K)    weight (N, K)    product (T, N), fp32
"""

# T = tokens, K = inputs, N = outputs

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.panels import Panels

PROBES = (1, 2, 3, 5, 8, 9, 17, 33, 64, 257)  # rows that `Prepacked` compares
LEAST_ROWS = (1, 2, 8, 17)  # that `min_rows` is chosen from
MOST_PROBED = 8_000_000  # numbers of a probed product: 257 rows of a head take too long
HINT = 32  # rows the layout is chosen for: measured invariant, and fastest at few rows

# (N, K, threads) -> min_rows: measured once per matrix shape and process
_min_rows: dict[tuple[int, int, int], int] = {}


class Prepacked:
    """A weight in oneDNN's own layout, for fp32 inference on a CPU.

    A row's product is the same bits for any number of rows from `min_rows` on; fewer rows are
    padded to it. `min_rows` is measured per matrix shape, for CPUs differ: on one with AVX-512 a
    single row of the down projection takes another path than two rows.
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape = weight.shape
        self.dtype = weight.dtype
        self.device = weight.device
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), HINT)
        key = (*weight.shape, torch.get_num_threads())
        if key not in _min_rows:
            _min_rows[key] = self._measure()
        self.min_rows = _min_rows[key]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.packed.numel() * self.packed.element_size()

    @staticmethod
    def available(weight: Tensor) -> bool:
        """Whether this weight can be prepacked here."""
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        return on_cpu and torch.backends.mkldnn.is_available()

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")

    def _measure(self) -> int:
        """The number of rows from which on their number changes no bit of a row's product.

        RuntimeError where it goes on to change them.
        """
        N, K = self.shape
        probes = [m for m in PROBES if m * N < MOST_PROBED]
        x = torch.randn(max(probes), K, generator=torch.Generator().manual_seed(0))
        whole = self._product(x)  # (rows, N)
        equal: list[int] = []  # numbers of rows with the same bits as the most rows
        different: list[int] = []
        for m in probes:
            part = self._product(x[:m].contiguous())  # (m, N)
            same_bits = torch.equal(part, whole[:m])
            if same_bits:
                equal.append(m)
            else:
                different.append(m)
        for least in LEAST_ROWS:
            if all(m < least for m in different):
                return least
        raise RuntimeError(
            f"oneDNN's product of a {N} x {K} matrix depends on the number of rows on this CPU "
            f"(equal for: {equal}), so text would depend on --rows"
        )

    def unpack(self) -> Tensor:
        """The weight (N, K), bit for bit: packing only moves numbers."""
        return self.packed.to_dense()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, K) times the weight transposed, plus bias (N,): (T, N), fp32."""
        y = self._any_rows(x)
        # not by oneDNN, whose product was measured batch-invariant without a bias
        return y if bias is None else y.add_(bias)

    def _any_rows(self, x: Tensor) -> Tensor:
        """The product of any number of rows: fewer than `min_rows` are padded to it."""
        rows = x.shape[0]
        if rows >= self.min_rows:
            return self._product(x.contiguous())
        if rows == 0:
            return x.new_zeros(0, self.shape[0])
        padded = x.new_zeros(self.min_rows, x.shape[1])
        padded[:rows] = x
        return self._product(padded)[:rows]


PackedWeight = Prepacked | Panels


def prepack(weight: Tensor, panels: bool = False) -> Tensor | PackedWeight:
    """`weight` packed for the products of a sampling run; as it is where it cannot be packed."""
    if panels:
        return Panels(weight)
    if Prepacked.available(weight):
        return Prepacked(weight)
    return weight


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x (T, K) times weight (N, K) transposed, plus bias (N,): (T, N)."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    return weight(x, bias)


def linear_native(x: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """As `linear`, in panels; a weight that is not packed is packed for this one product."""
    if isinstance(weight, Tensor):
        weight = Panels(weight)
    return weight(x)
