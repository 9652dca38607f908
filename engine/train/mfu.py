"""Model FLOPs utilisation: the operations of a step, and the rates that vendors state."""


# T = tokens of a micro-batch, N = response tokens of it

from __future__ import annotations

from collections.abc import Sequence

from model.config import LlamaConfig

# dense bf16 rates that vendors state, operations/s; by a part of the card's name
STATED = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "MI300X": 1307e12}


def stated_rate(device: str) -> float | None:
    """The rate of a card by its name, None where none is stated here."""
    return next((rate for name, rate in STATED.items() if name in device), None)


def step_operations(config: LlamaConfig, lengths: Sequence[int]) -> float:
    """What a step must do: 4 P per token, and 7 L^2 H d per row of L tokens and layer.

    A LoRA step has no weight gradients: forward and gradient of the activations are two products
    each way, P the weights without the embedding. Attention: 2 products forward and 5 backward over
    half a square.
    """
    c = config
    layer = c.hidden_size * (sum(c.qkv_sizes) + c.qkv_sizes[0] + 3 * c.intermediate_size)
    weights = c.num_layers * layer + c.vocab_size * c.hidden_size
    squares = sum(n * n for n in lengths)
    return 4 * weights * sum(lengths) + 7 * squares * c.qkv_sizes[0] * c.num_layers
