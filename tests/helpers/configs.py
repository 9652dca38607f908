"""Configurations of models that are too large for a test to load."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from model.config import LlamaConfig


def llama_2_7b(tiny_llama_dir: Callable[..., Path]) -> LlamaConfig:
    """The sizes of Llama-2-7B in the configuration of a small model."""
    return dataclasses.replace(
        LlamaConfig.from_dir(tiny_llama_dir()),
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
    )
