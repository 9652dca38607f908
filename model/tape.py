"""The tensors that the forward keeps for the backward, under three recomputation policies.

policy      kept per layer                                           computed again in the backward
none        h, qkv, o, lse, h_mid, gate_up, s                        the norms, swiglu
selective   the same without gate_up                                 and gate_up
full        h                                                        the layer; its output only
                                                                     where "down" is adapted,
                                                                     whose S comes with it
"""

# T = tokens, D = model width, F = feed-forward width, R = ranks of a group's adapted members
# H = query heads, G = key/value heads, d = head size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from kernels.lora_linear.group import LoraGroup
from kernels.packed import Packed
from kernels.philox import Dropout
from model.lora import Lora

POLICIES = ("none", "selective", "full")


class GroupAdapter(NamedTuple):
    """The adapter of one group of a layer, and the dropout of its input; None: there is none."""

    lora: LoraGroup | None
    dropout: Dropout | None


Adapters = Mapping[str, GroupAdapter]  # group -> its adapter


@dataclass
class Saved:
    """The tensors that the forward of one layer keeps for its backward; None: not kept.

    Activations are in the model's dtype, statistics in the accumulation dtype (at least fp32).
    """

    adapters: Adapters  # of this layer
    h: Tensor | None = None  # (T, D) residual stream at the layer's entry
    rstd1: Tensor | None = None  # (T,) 1 / root mean square of h
    # (T, (H + 2G) d) queries and keys rotated; where their heads are normalised first, as they
    # were before: the backward needs those, and computes the others again from them
    qkv: Tensor | None = None
    o: Tensor | None = None  # (T, H d) output of attention
    lse: Tensor | None = None  # (T, H) log-sum-exp of each query's scores
    h_mid: Tensor | None = None  # (T, D) residual stream after attention
    rstd2: Tensor | None = None  # (T,) 1 / root mean square of h_mid
    gate_up: Tensor | None = None  # (T, 2F)
    s: dict[str, Tensor | None] = field(default_factory=dict)  # group -> A x (T, R)
    needs_output: bool = True  # False where the layer is computed again, for its backward

    def drop(self, policy: str) -> None:
        """Free the tensors that the backward computes again under this policy."""
        if policy in ("selective", "full"):
            self.gate_up = None
        if policy == "full":
            self.needs_output = False
            self.qkv = None
            self.o = None
            self.lse = None
            self.h_mid = None
            self.rstd2 = None
            self.s = {}


@dataclass
class Tape:
    """The record of one training forward; used up by one backward."""

    policy: str = "none"
    layers: list[Saved] = field(default_factory=list)
    packed: Packed | None = None
    lora: Lora | None = None
    h: Tensor | None = None  # (T, D) residual stream before the last norm
    rstd: Tensor | None = None  # (T,) 1 / root mean square of h, accumulation dtype

    def __post_init__(self) -> None:
        assert self.policy in POLICIES, f"recompute policy {self.policy!r} is not in {POLICIES}"
