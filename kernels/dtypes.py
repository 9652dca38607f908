"""The dtype in which sums, statistics and softmax are taken."""

from __future__ import annotations

import torch

from kernels.cpu import onemkl_first_calls  # noqa: F401 every operation is right from its first call on


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and softmax: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
