"""The adapters of a group of matrices that read the same input."""


# T = tokens, K = inputs, N = outputs of all members, R = ranks of all adapted members

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LoraGroup:
    """The adapters of one group: views into the flat buffers of a `Lora`."""

    a: Tensor  # (R, K) compute dtype
    b: tuple[Tensor | None, ...]  # per member (N_i, rank) compute dtype, None where not adapted
    da: Tensor  # (R, K) accumulates
    db: tuple[Tensor | None, ...]  # per member (N_i, rank), accumulate
    sizes: tuple[int, ...]  # N_i
    rank: int
    scale: float  # s

    def members(self) -> list[tuple[int, slice, slice]]:
        """(i, columns of y, columns of S) of every adapted member."""
        found, column, s_column = [], 0, 0
        for i, size in enumerate(self.sizes):
            if self.b[i] is not None:
                columns = slice(column, column + size)
                found.append((i, columns, slice(s_column, s_column + self.rank)))
                s_column += self.rank
            column += size
        return found
