"""The table of rotary cosines and sines: RoFormer (Su et al. 2021) and two ways to stretch it.

inv_freq_i = theta^(-2i / d), i = 0 .. d/2 - 1        angle = position * inv_freq
linear     inv_freq / factor
llama3     wavelengths over old_context / low_freq_factor are divided by factor, those under
           old_context / high_freq_factor stay, between them a linear blend (Llama 3.1)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """(d/2,) fp32."""
    d, scaling = config.head_dim, config.rope_scaling
    exponents = torch.arange(0, d, 2, dtype=torch.float32) / d
    inv_freq = 1.0 / config.rope_theta**exponents
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        return _llama3(inv_freq, scaling)
    return inv_freq


def _llama3(inv_freq: Tensor, scaling: dict) -> Tensor:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    stretched = inv_freq / scaling["factor"]
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched + smooth * inv_freq
    result = torch.where(wavelength > context / low, stretched, inv_freq)
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(between, blended, result)


def cos_sin_table(
    config: LlamaConfig, positions: int, device: str | torch.device, dtype: torch.dtype
) -> Tensor:
    """(positions, d): cosines, then sines, in `dtype` (the accumulation dtype of the model).

    The angles are fp32 even for an fp64 model, as the checkpoints were trained and as transformers
    computes them: at position 8,000 a "better" angle would differ by 5e-4.
    """
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse_frequencies(config))
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(device, dtype)
