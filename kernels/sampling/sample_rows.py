"""The inputs of sampling beside the logits: the key of every row, and the settings."""

# B = rows of logits, L = length of the longest history

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SampleRows:
    """The key of each row's random number, and the settings that all rows share."""

    positions: Tensor  # (B,) int64: position of the token to be drawn
    samples: Tensor  # (B,) int64: which of several samples of the row
    row_keys: Tensor  # (B,) int64: 64-bit hash of the row id
    seed: int
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # 1 is none
    min_p: float = 0.0
    history: Tensor | None = None  # (B, L) int64: ids seen, padded with -1; for the penalty

    def __post_init__(self) -> None:
        assert self.repetition_penalty > 0 and 0 < self.top_p and 0 <= self.min_p <= 1, (
            f"repetition_penalty {self.repetition_penalty}, top_p {self.top_p}, min_p {self.min_p}"
        )
        assert self.repetition_penalty == 1 or self.history is not None, (
            f"repetition_penalty {self.repetition_penalty} needs the history"
        )
