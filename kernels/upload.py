"""Numbers of the host as tensors of a device, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A tensor of these numbers on the device.

    To a GPU it is copied from pinned memory, in the order of the stream: the host goes on at once,
    while a copy from ordinary memory would first wait for all that was launched before. torch keeps
    the pinned memory until the copy is done.
    """
    if torch.device(device).type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    pinned = torch.tensor(values, dtype=dtype, pin_memory=True)
    return pinned.to(device, non_blocking=True)
