"""Model FLOPs utilisation: the operations of a step, and the peak rates that vendors state."""

from __future__ import annotations

from collections.abc import Sequence

from model.config import LlamaConfig

# dense bf16 operations/s by a part of the card's name, as vendors state them
STATED = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "MI300X": 1307e12}


def stated_rate(device: str) -> float | None:
    """The stated peak of a card in operations/s, by its name; None where it is not listed here."""
    for part, rate in STATED.items():
        if part in device:
            return rate
    return None


def step_operations(config: LlamaConfig, lengths: Sequence[int]) -> float:
    """Operations that a step on rows of these lengths must do: 4 P T + 7 H d sum(L^2) layers.

    P    weights that are multiplied: those of the layers and the head, not the embedding
    T    all tokens; L: tokens of one row; H: query heads; d: head size

    A LoRA step has no weight gradients: each weight is used in two products of 2 operations, one in
    the forward and one in the backward. Causal attention: 2 products forward and 5 backward, each
    over half a square, 2 operations.
    """
    heads_width = config.qkv_sizes[0]  # H d
    qkv_width = sum(config.qkv_sizes)
    widths = qkv_width + heads_width + 3 * config.intermediate_size  # of all linears together
    layers = config.num_layers * config.hidden_size * widths
    head = config.vocab_size * config.hidden_size
    weights = layers + head  # P
    sum_of_squares = sum(length * length for length in lengths)
    products = 4 * weights * sum(lengths)
    attention = 7 * sum_of_squares * heads_width * config.num_layers
    return products + attention
