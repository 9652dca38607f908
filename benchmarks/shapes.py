"""Models by the shapes of their matrices, with random weights: no checkpoint is needed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.spec import MODELS, Widths
from model.config import LlamaConfig
from model.weights import PlainWeights


class ModelShape(NamedTuple):
    """The sizes of a model."""

    widths: Widths
    layers: int
    rope_theta: float
    max_position: int
    tied: bool  # whether the head is the embedding


SHAPES = {
    "llama-2-7b": ModelShape(MODELS["llama-2-7b"], 32, 1e4, 4096, tied=False),
    "llama-3-8b": ModelShape(MODELS["llama-3-8b"], 32, 5e5, 8192, tied=False),
    "llama-3.2-1b": ModelShape(Widths(2048, 8192, 32, 8, 64, 128256), 16, 5e5, 8192, tied=True),
    "llama-2-13b": ModelShape(Widths(5120, 13824, 40, 40, 128, 32000), 40, 1e4, 4096, tied=False),
    "smollm2-135m": ModelShape(MODELS["smollm2-135m"], 30, 1e5, 8192, tied=True),
    "tiny": ModelShape(Widths(64, 96, 4, 2, 16, 320), 2, 1e4, 512, tied=False),
}


def model_config(name: str) -> LlamaConfig:
    """The configuration of a model of SHAPES."""
    shape = SHAPES[name]
    w = shape.widths
    return LlamaConfig(
        vocab_size=w.V,
        hidden_size=w.D,
        intermediate_size=w.F,
        num_layers=shape.layers,
        num_heads=w.H,
        num_kv_heads=w.G,
        head_dim=w.d,
        rms_norm_eps=1e-5,
        rope_theta=shape.rope_theta,
        max_position=shape.max_position,
        tie_embeddings=shape.tied,
    )


def random_weights(config: LlamaConfig, device: str, dtype: torch.dtype) -> PlainWeights:
    """Matrices that keep the variance, norms of one; named as in model/layout.py."""
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, device=device, dtype=dtype)
        return drawn.mul_(columns**-0.5)

    c, ones = config, torch.ones(config.hidden_size, device=device, dtype=dtype)
    weights = PlainWeights(embed=matrix(c.vocab_size, c.hidden_size), norm=ones)
    for i in range(c.num_layers):
        weights |= {
            f"{i}.attn_norm": ones,
            f"{i}.qkv": matrix(sum(c.qkv_sizes), c.hidden_size),
            f"{i}.o": matrix(c.hidden_size, c.qkv_sizes[0]),
            f"{i}.mlp_norm": ones,
            f"{i}.gate_up": matrix(2 * c.intermediate_size, c.hidden_size),
            f"{i}.down": matrix(c.hidden_size, c.intermediate_size),
        }
    tied = c.tie_embeddings
    weights["head"] = weights["embed"] if tied else matrix(c.vocab_size, c.hidden_size)
    return weights
