"""The table of rotary cosines and sines: RoFormer (Su et al. 2021) and two kinds of scaling.

    inv_freq_i = theta^(-2i / d), i = 0 .. d/2 - 1        angle = position * inv_freq_i

linear     inv_freq / factor
llama3     (Llama 3.1) by the wavelength 2 pi / inv_freq:
               over old_context / low_freq_factor     inv_freq / factor
               under old_context / high_freq_factor   inv_freq
               between them                           a linear blend of the two
"""

# d = head size

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from model.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """inv_freq (d/2,) fp32, in radians per position."""
    d = config.head_dim
    scaling = config.rope_scaling
    exponents = torch.arange(0, d, 2, dtype=torch.float32) / d  # (d/2,)
    inv_freq = 1.0 / config.rope_theta**exponents  # (d/2,)
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        return _llama3(inv_freq, scaling)
    return inv_freq


def _llama3(inv_freq: Tensor, scaling: dict) -> Tensor:
    """inv_freq (d/2,) scaled as in Llama 3.1, in transformers' order of operations."""
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    old_context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq  # (d/2,) tokens per turn
    longest_blended = old_context / low
    shortest_blended = old_context / high
    stretched = inv_freq / scaling["factor"]  # (d/2,)
    smooth = (old_context / wavelength - low) / (high - low)  # (d/2,) 0: stretched, 1: inv_freq
    blended = (1 - smooth) * stretched + smooth * inv_freq  # (d/2,)
    result = torch.where(wavelength > longest_blended, stretched, inv_freq)
    between = (wavelength >= shortest_blended) & (wavelength <= longest_blended)
    return torch.where(between, blended, result)


def cos_sin_table(
    config: LlamaConfig, positions: int, device: str | torch.device, dtype: torch.dtype
) -> Tensor:
    """(positions, d): cosines, then sines, in `dtype` (the accumulation dtype of the model).

    The angles are fp32 even for an fp64 model, as the checkpoints were trained and as transformers
    computes them: at position 8,000 an angle in fp64 would differ by 5e-4.
    """
    angles = _angles(positions, inverse_frequencies(config))  # (positions, d/2)
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(device, dtype)


def _angles(positions: int, inv_freq: Tensor) -> Tensor:
    """The angles (positions, d/2) fp32, in radians, of the positions 0, 1, ..."""
    return torch.outer(torch.arange(positions, dtype=torch.float32), inv_freq)


def why_table_differs(config: LlamaConfig, kind: str, table: Tensor) -> str | None:
    """How a checkpoint's rotary table differs from the one of the config, None if it does not.

    kind is inv_freq (d/2,), or cos_cached or sin_cached (..., positions, d or d/2). Tables may have
    been rounded to 16 bits before they were stored.
    """
    if kind == "inv_freq":
        return _why_frequencies_differ(config, table)
    return _why_cached_table_differs(config, kind, table)


def _why_frequencies_differ(config: LlamaConfig, table: Tensor) -> str | None:
    """How a stored inv_freq differs from that of the config, None if it does not."""
    expected = inverse_frequencies(config)  # (d/2,)
    if table.shape != expected.shape:
        return f"is {tuple(table.shape)}, config.json makes {tuple(expected.shape)}"
    accepted = [expected]
    if config.rope_scaling["rope_type"] == "linear":  # such checkpoints store it without scaling
        unscaled = replace(config, rope_scaling={"rope_type": "default"})
        accepted.append(inverse_frequencies(unscaled))
    stored = table.float()
    if any(torch.allclose(stored, each, rtol=0.01, atol=1e-7) for each in accepted):
        return None
    relative_error = (stored / expected - 1).abs().nan_to_num(math.inf)  # (d/2,)
    worst = int(relative_error.argmax())
    return (
        f"has {table[worst].item():.4g} at {worst}, "
        f"where config.json makes {expected[worst].item():.4g}"
    )


def _why_cached_table_differs(config: LlamaConfig, kind: str, table: Tensor) -> str | None:
    """How a stored cos_cached or sin_cached differs from the config's, None if it does not."""
    inv_freq = inverse_frequencies(config)  # (d/2,)
    half = len(inv_freq)
    width = table.shape[-1] if table.dim() else 0
    if width not in (half, 2 * half):
        return f"is {tuple(table.shape)}, config.json makes rows of {2 * half}"
    stored = table.reshape(-1, width).float()  # (positions, d or d/2)
    angles = _angles(len(stored), inv_freq)  # (positions, d/2)
    if width == 2 * half:
        angles = torch.cat((angles, angles), dim=1)  # (positions, d)
    expected = angles.cos() if kind == "cos_cached" else angles.sin()
    if torch.allclose(stored, expected, rtol=0, atol=0.05):
        return None
    error = (stored - expected).abs().amax(dim=1).nan_to_num(math.inf)  # (positions,)
    worst = int(error.argmax())
    return f"differs at position {worst} from the table that config.json makes"
