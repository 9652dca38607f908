"""The table of rotary cosines and sines: RoFormer (Su et al. 2021) and two kinds of scaling.

inv_freq_i = theta^(-2i / d), i = 0 .. d/2 - 1        angle = position * inv_freq
linear     inv_freq / factor
llama3     wavelengths over old_context / low_freq_factor are divided by factor, those under
           old_context / high_freq_factor stay, between them a linear blend (Llama 3.1)
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from model.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """inv_freq (d/2,) fp32, in radians per position."""
    d, scaling = config.head_dim, config.rope_scaling
    exponents = torch.arange(0, d, 2, dtype=torch.float32) / d
    inv_freq = 1.0 / config.rope_theta**exponents
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        return _llama3(inv_freq, scaling)
    return inv_freq


def _llama3(inv_freq: Tensor, scaling: dict) -> Tensor:
    """inv_freq (d/2,) scaled as in Llama 3.1, in transformers' order of operations."""
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


def why_table_differs(config: LlamaConfig, kind: str, table: Tensor) -> str | None:
    """How a checkpoint's rotary table differs from the one of the config, None if it does not.

    kind is inv_freq (d/2,), or cos_cached or sin_cached (..., positions, d or d/2). Tables may have
    been rounded to 16 bits on the way. A linearly scaled model has stored the unscaled inv_freq.
    """
    want = inverse_frequencies(config)
    if kind == "inv_freq":
        plain = inverse_frequencies(replace(config, rope_scaling={"rope_type": "default"}))
        made = [want, plain] if config.rope_scaling["rope_type"] == "linear" else [want]
        if table.shape != want.shape:
            return f"is {tuple(table.shape)}, config.json makes {tuple(want.shape)}"
        if any(torch.allclose(table.float(), m, rtol=0.01, atol=1e-7) for m in made):
            return None
        at = int((table.float() / want - 1).abs().nan_to_num(math.inf).argmax())
        return f"has {table[at].item():.4g} at {at}, where config.json makes {want[at].item():.4g}"
    width = table.shape[-1] if table.dim() else 0
    if width not in (len(want), 2 * len(want)):
        return f"is {tuple(table.shape)}, config.json makes rows of {2 * len(want)}"
    table = table.reshape(-1, width).float()
    angles = torch.outer(torch.arange(len(table), dtype=torch.float32), want)
    angles = angles if width == len(want) else torch.cat((angles, angles), dim=1)
    made = angles.cos() if kind == "cos_cached" else angles.sin()
    if torch.allclose(table, made, rtol=0, atol=0.05):
        return None
    at = int((table - made).abs().amax(dim=1).nan_to_num(math.inf).argmax())
    return f"is another at position {at} than config.json makes"
