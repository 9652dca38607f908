"""The optimizer's state and the learning rate: one AdamW over one flat buffer."""

# P = trained parameters

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.adamw import AdamW
from kernels.registry import Ops
from model.lora import Lora

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate(schedule: str, step: int, steps: int, peak: float, warmup: float) -> float:
    """Learning rate of `step`, from 1 to `steps`: it rises linearly over the warm-up, then follows
    the schedule.

    warmup: share of the steps, from 0 to 1. The same rates as transformers' schedules of those
    names, whose first step has index 0: without warm-up the first step runs at the peak, and
    cosine and linear would reach 0 one step after the last.
    """
    warmup_steps = math.ceil(warmup * steps)
    index = step - 1
    if index < warmup_steps:
        return peak * index / max(1, warmup_steps)
    progress = (index - warmup_steps) / max(1, steps - warmup_steps)  # 0 at the peak, below 1
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    half_wave = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
    return peak * half_wave


def highest_rate(schedule: str, steps: int, peak: float, warmup: float) -> float:
    """The highest rate of steps 1 to `steps`; ValueError where the warm-up keeps all at 0."""
    highest = 0.0
    for step in range(1, steps + 1):
        highest = max(highest, learning_rate(schedule, step, steps, peak, warmup))
    if highest == 0:
        raise ValueError(
            f"warmup {warmup:g}: the warm-up is the whole run ({steps} steps), so the rate stays 0 "
            "and nothing is learned; --warmup 0, or more steps"
        )
    return highest


@dataclass
class Optimizer:
    """AdamW's two moments of one adapter, and the number of finished steps."""

    config: AdamW
    m: Tensor  # (P,)
    v: Tensor  # (P,)
    step: int = 0  # finished steps

    @classmethod
    def fresh(cls, lora: Lora, weight_decay: float) -> Optimizer:
        """Zero moments for this adapter."""
        zeros = torch.zeros_like(lora.params)
        return cls(AdamW(weight_decay=weight_decay), zeros, zeros.clone())

    def update(self, ops: Ops, lora: Lora, lr: float, scale: float, clip: float) -> Tensor:
        """One AdamW step on `scale * lora.grads`, clipped to norm `clip` (0: not clipped).

        Returns the norm before clipping, () fp64 on the device, without synchronising. Where the
        norm is not finite, the adapter is not finite afterwards either; a run ends then, and
        resumes from its last checkpoint (metrics.py).
        """
        step = self.step + 1
        norm = ops.grad_norm(lora.grads) * scale  # () fp64
        scalars = self.config.scalars(lr, step, scale, lora.params.device)
        if clip:
            # The factor joins the scale in fp64, before the kernel rounds the product to fp32.
            clip_factor = (clip / norm).clamp(max=1.0)  # () fp64
            scalars = scalars.clipped(clip_factor)
        # An fp32 model computes with the masters themselves; a 16-bit one with a copy of them.
        compute_copy = None if lora.compute is lora.params else lora.compute
        ops.adamw_(lora.params, lora.grads, self.m, self.v, scalars, self.config, compute_copy)
        self.step = step  # at the end: where memory was short before, nothing has changed
        return norm
