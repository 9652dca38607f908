"""The adapters of a group of matrices that read the same input."""

# K = inputs, N_i = outputs of member i, R = ranks of all adapted members

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Member(NamedTuple):
    """Where an adapted member of a group is found."""

    index: int  # in `sizes`, `b` and `db`
    y_columns: slice  # its outputs: columns of y (T, N), rows of the weight (N, K)
    s_columns: slice  # its ranks: columns of S (T, R), rows of A (R, K)


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

    def members(self) -> list[Member]:
        """Every member that has an adapter, in order."""
        adapted = []
        y_begin = 0
        s_begin = 0
        for i, size in enumerate(self.sizes):
            if self.b[i] is not None:
                y_columns = slice(y_begin, y_begin + size)
                s_columns = slice(s_begin, s_begin + self.rank)
                adapted.append(Member(i, y_columns, s_columns))
                s_begin += self.rank
            y_begin += size
        return adapted
