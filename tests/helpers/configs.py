"""Configurations of models that are too large for a test to load."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from model.config import LlamaConfig


class HandCounted(NamedTuple):
    """A Llama's sizes, and what follows from them by hand: bf16, an adapter of r 8 on q and v."""

    config: LlamaConfig
    weights: int  # parameters, as published
    saved: int  # bytes that all layers keep per token between forward and backward
    work: int  # bytes per token of the widest part of a layer's backward
    adapter: int  # parameters
    page: int  # bytes of keys and values of 64 tokens


def hand_counted(name: str) -> HandCounted:
    """One of "1B" (Llama 3.2), "7B" and "13B" (Llama 2)."""
    return {
        # saved: layers x (2 bytes x (h D, qkv, o H d, h_mid D, gate_up 2F, S 16) + 4 x (2 + H))
        # work: 2 bytes x (4 D and 4 F of the feed-forward half, D of the loss's gradient)
        # adapter: layers x 8 x (q: D + H d, v: D + G d);  page: 2 x layers x G d x 64 x 2 bytes
        "1B": HandCounted(
            _llama(128256, 2048, 8192, layers=16, heads=32, kv_heads=8, tied=True),
            weights=1_235_814_400,
            saved=16 * (2 * (2048 + 3072 + 2048 + 2048 + 16384 + 16) + 4 * 34),
            work=2 * (4 * 2048 + 4 * 8192 + 2048),
            adapter=16 * 8 * (4096 + 2560),
            page=2 * 16 * 512 * 64 * 2,
        ),
        "7B": HandCounted(
            _llama(32000, 4096, 11008, layers=32, heads=32, kv_heads=32),
            weights=6_738_415_616,
            saved=32 * (2 * (4096 + 12288 + 4096 + 4096 + 22016 + 16) + 4 * 34),
            work=2 * (4 * 4096 + 4 * 11008 + 4096),
            adapter=32 * 8 * (8192 + 8192),
            page=2 * 32 * 4096 * 64 * 2,
        ),
        "13B": HandCounted(
            _llama(32000, 5120, 13824, layers=40, heads=40, kv_heads=40),
            weights=13_015_864_320,
            saved=40 * (2 * (5120 + 15360 + 5120 + 5120 + 27648 + 16) + 4 * 42),
            work=2 * (4 * 5120 + 4 * 13824 + 5120),
            adapter=40 * 8 * (10240 + 10240),
            page=2 * 40 * 5120 * 64 * 2,
        ),
    }[name]


def _llama(
    vocab: int, width: int, feed: int, layers: int, heads: int, kv_heads: int, tied: bool = False
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=feed,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position=4096,
        tie_embeddings=tied,
    )


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
