"""The packed form of one weight, for the products of sampling on a CPU.

A matrix, the embedding too, is in panels for our own C (kernels/cpu/panels.py) where the table of
operations reads them. A matrix that the model's GGUF has quantised stays quantised there
(kernels/cpu/quantised_panels.py): its numbers are the same bits in 5 to 12 bits each. Without C it
is in oneDNN's layout (kernels/cpu/prepack.py), and the embedding stays plain.
"""

# N = rows of a matrix, K = its columns

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.panels import Panels
from kernels.cpu.prepack import PackedWeight, prepack
from kernels.cpu.quantised_panels import QuantisedPanels, has_right_products
from kernels.registry import Ops
from model.layout import GROUPS
from model.quantised_file import QuantisedFile

ROWS_AT_ONCE = 4096  # rows of a matrix that are compared at a time


def samples_from_panels(ops: Ops, dtype: torch.dtype) -> bool:
    """Whether sampling with this table of operations takes matrices in panels."""
    sampled = ops.sampled or ops
    return sampled.packs == "panels" and dtype == torch.float32


def has_packed_form(name: str, uses_panels: bool) -> bool:
    """Whether a weight of this name is packed: the embedding only in panels, norms never."""
    if name == "embed":
        return uses_panels
    _, _, parameter = name.partition(".")
    return name == "head" or parameter in GROUPS


def packed_form(
    name: str, weight: Tensor, uses_panels: bool, quantised: QuantisedFile | None
) -> Tensor | PackedWeight:
    """A matrix packed: quantised, if `quantised` holds exactly this matrix by our name."""
    if uses_panels and quantised is not None:
        panels = _quantised_panels(name, weight, quantised)
        if panels is not None:
            return panels
    return prepack(weight, uses_panels)


def _quantised_panels(
    name: str, weight: Tensor, quantised: QuantisedFile
) -> QuantisedPanels | None:
    """The matrix from its blocks; None, saying why, where they cannot stand for it."""
    matrix = quantised.matrix(name)
    if matrix is None:
        return None
    panels = QuantisedPanels(matrix)
    if not has_right_products(panels.form):
        print(
            f"weights: products with the quantised {name} are wrong here (form {panels.form}): it "
            "is packed as it is in fp32"
        )
        return None
    if _holds(panels, weight):
        return panels
    print(
        f"weights: {quantised.path} holds other numbers for {name} than the weights beside it: "
        "they are packed without it; delete it, or import the GGUF again"
    )
    return None


def _holds(panels: Panels, weight: Tensor) -> bool:
    """Whether panels unpack to this fp32 weight (N, K), bit for bit."""
    for rows in torch.arange(len(weight)).split(ROWS_AT_ONCE):
        expected = weight[rows[0] : rows[-1] + 1].contiguous()
        if not torch.equal(panels[rows].view(torch.int32), expected.view(torch.int32)):
            return False
    return True
