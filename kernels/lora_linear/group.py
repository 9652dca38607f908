"""The adapters of a group of matrices that read the same input."""

# K = inputs, N_i = outputs of member i, R = ranks of all adapted members

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LoraGroup:
    """The adapters of one group: views into the flat buffers of a `Lora`."""

    a: Tensor  # (R, K) compute dtype: the A of the adapted members, one below the other
    b: tuple[Tensor | None, ...]  # per member (N_i, rank) compute dtype, None where not adapted
    da: Tensor  # (R, K) accumulates
    db: tuple[Tensor | None, ...]  # per member (N_i, rank), accumulate
    sizes: tuple[int, ...]  # N_i
    rank: int
    scale: float  # s

    def members(self) -> list[tuple[int, slice, slice]]:
        """(i, columns of y, columns of S) of every adapted member."""
        adapted = []
        y_begin, s_begin = 0, 0
        for i, size in enumerate(self.sizes):
            if self.b[i] is not None:
                y_columns = slice(y_begin, y_begin + size)
                s_columns = slice(s_begin, s_begin + self.rank)
                adapted.append((i, y_columns, s_columns))
                s_begin += self.rank
            y_begin += size
        return adapted
