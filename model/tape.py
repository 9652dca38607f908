"""What the forward pass keeps for the backward."""


# T = tokens, D = model width, V = vocabulary, H = query heads, G = key/value heads, d = head size

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kernels.packed import Packed
from model.lora import Lora

POLICIES = ("none", "selective", "full")


@dataclass
class Saved:
    """What the forward of one layer keeps for its backward."""

    h: Tensor | None = None  # (T, D) residual stream at the layer's entry
    rstd1: Tensor | None = None
    qkv: Tensor | None = None  # rotated
    o: Tensor | None = None
    lse: Tensor | None = None
    h_mid: Tensor | None = None  # (T, D) residual stream after attention
    rstd2: Tensor | None = None
    gate_up: Tensor | None = None
    s: dict[str, Tensor | None] = field(default_factory=dict)  # group -> S


@dataclass
class Tape:
    """The record of one training forward; used up by one backward."""

    policy: str = "none"
    layers: list[Saved] = field(default_factory=list)
    packed: Packed | None = None
    lora: Lora | None = None
    h: Tensor | None = None  # (T, D) residual stream before the last norm
    rstd: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.policy in POLICIES, f"recompute policy {self.policy!r} is not in {POLICIES}"
