"""Who attends to whom in training and scoring: packed rows."""


# T = tokens of this forward, B = rows, P = pages of the longest row

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HIDDEN = -1e30  # added to the score of a token that must not be attended to; finite: no row is NaN


def upload(values: Any, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """Host numbers as a tensor on a device, without waiting for the device.

    A GPU's copy is made from pinned memory behind what is queued already.
    """
    host = torch.tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end: row i is tokens starts[i] .. starts[i + 1].

    With a prefix, row 0 begins with `prefix` tokens that all other rows begin with too: they are
    computed there, once, and every other row attends to them before itself.
    """

    starts: tuple[int, ...]  # (rows + 1,) host, starts[0] = 0, starts[-1] = T
    positions: Tensor  # (T,) int64, restarts at 0 (behind the prefix) in every row
    cu_seqlens: Tensor  # (rows + 1,) int32 device mirror of `starts`
    row_keys: Tensor | None = None  # (T,) int64: 32-bit hash of the row id, for dropout
    step: Tensor | None = None  # () int64: the optimizer step, for dropout
    prefix: int = 0  # first tokens of row 0 that the others continue; 0: every row is alone

    @classmethod
    def from_lengths(
        cls,
        lengths: list[int],
        device: str | torch.device = "cpu",
        row_keys: list[int] | None = None,
        step: int = 0,
        prefix: int = 0,
    ) -> Packed:
        """Describe rows of the given lengths (all positive), without a prefix from row 1 on."""
        assert all(n > 0 for n in lengths), f"row lengths must be positive, got {lengths}"
        starts = [0]
        for n in lengths:
            starts.append(starts[-1] + n)
        assert 0 <= prefix <= max(lengths[:1], default=0), f"a prefix of {prefix} in {lengths}"
        places = [i + prefix * (r > 0) for r, n in enumerate(lengths) for i in range(n)]
        keys = None
        if row_keys is not None:
            assert len(row_keys) == len(lengths), f"{len(row_keys)} keys, {len(lengths)} rows"
            each = [key for key, n in zip(row_keys, lengths, strict=True) for _ in range(n)]
            keys = upload(each, torch.int64, device)
        return cls(
            starts=tuple(starts),
            positions=upload(places, torch.int64, device),
            cu_seqlens=upload(starts, torch.int32, device),
            row_keys=keys,
            step=upload(step, torch.int64, device),
            prefix=prefix,
        )

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(start, end) of every row."""
        return list(zip(self.starts[:-1], self.starts[1:], strict=True))

    @property
    def contexts(self) -> list[int]:
        """Tokens of the prefix that come before every row."""
        return [self.prefix * (row > 0) for row in range(len(self.starts) - 1)]
