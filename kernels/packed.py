"""Who attends to whom in training and scoring: rows laid end to end, without padding.

`Packed` travels beside the tokens of a forward, as `Cached` (kernels/cached.py) does over a cache.
It holds host lists, which are authoritative, beside device mirrors, so that nothing in a step has
to read from the device. It is built once per forward and shared by all layers.
"""

# T = tokens of this forward

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HIDDEN = -1e30  # score of a key that must not be attended to; finite, so that no row becomes NaN


def upload(values: Any, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """Host numbers (one, or lists of them) as a tensor on a device, without waiting for the device.

    On a GPU the copy is from pinned memory, queued after the work that is queued already.
    """
    host = torch.tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end; each attends to itself, causally.

    With a prefix, row 0 begins with `prefix` tokens that the other rows begin with too. They are
    computed once, in row 0, and every other row attends to them and then to itself. Rows of 5, 3
    and 4 tokens whose first 2 tokens are the same:

        tokens     a b c d e   f   g h        rows: abcde, abf, abgh
        row        0 0 0 0 0   1   2 2        starts (0, 5, 6, 8)
        positions  0 1 2 3 4   2   2 3
    """

    starts: tuple[int, ...]  # (rows + 1,) host: row i is tokens starts[i] .. starts[i + 1] - 1
    positions: Tensor  # (T,) int64, within the row; a row after the first begins at `prefix`
    cu_seqlens: Tensor  # (rows + 1,) int32 device mirror of `starts`
    row_keys: Tensor | None = None  # (T,) int64: 32-bit hash of the row id, for dropout
    step: Tensor | None = None  # () int64: the optimizer step, for dropout
    prefix: int = 0  # first tokens of row 0 that the other rows continue; 0: none are shared

    @classmethod
    def from_lengths(
        cls,
        lengths: list[int],
        device: str | torch.device = "cpu",
        row_keys: list[int] | None = None,
        step: int = 0,
        prefix: int = 0,
    ) -> Packed:
        """Describe rows of these lengths, all positive; those after row 0 without the prefix.

        `row_keys`: a hash per row, `step`: the optimizer step; both for dropout.
        """
        assert all(n > 0 for n in lengths), f"row lengths must be positive, got {lengths}"
        first_row = lengths[0] if lengths else 0
        assert 0 <= prefix <= first_row, f"a prefix of {prefix} in {lengths}"
        starts = [0]
        positions = []
        for row, n in enumerate(lengths):
            first = prefix if row > 0 else 0
            positions.extend(range(first, first + n))
            starts.append(starts[-1] + n)
        keys = None
        if row_keys is not None:
            assert len(row_keys) == len(lengths), f"{len(row_keys)} keys, {len(lengths)} rows"
            per_token = []
            for key, n in zip(row_keys, lengths, strict=True):
                per_token += [key] * n
            keys = upload(per_token, torch.int64, device)
        return cls(
            starts=tuple(starts),
            positions=upload(positions, torch.int64, device),
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
        """For every row: tokens of the shared prefix that come before it, 0 for row 0."""
        rows = len(self.starts) - 1
        contexts = [self.prefix] * rows
        if contexts:
            contexts[0] = 0
        return contexts
