"""Divergence of a tuned model from its seed, token by token, over the same answers."""

# N = positions (answer tokens), D = hidden size, V = vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.measure.intervals import bootstrap
from kernels.packed import Packed
from model.llama import Llama
from model.lora import Lora

CHUNK = 64  # positions whose distributions are in memory at once


@dataclass(frozen=True)
class Drift:
    """Sums over the positions of one answer, in nats; `agree` counts positions."""

    kl: float  # KL(seed || tuned)
    reverse_kl: float  # KL(tuned || seed)
    agree: int  # positions at which both have the same likeliest token
    nll: float  # of the answer's tokens under the tuned model
    seed_nll: float  # and under the seed


def hidden_states(model: Llama, ids: Sequence[int], start: int, lora: Lora | None) -> Tensor:
    """Hidden states (N, D) from which the tokens ids[start:] are predicted."""
    tokens = torch.tensor(ids, device=model.device)
    packed = Packed.from_lengths([len(ids)], model.device)
    return model.forward(tokens, packed, lora=lora)[start - 1 : -1]


def compare(model: Llama, seed: Tensor, tuned: Tensor, ids: Sequence[int]) -> Drift:
    """Two models, or two contexts of one, over the same tokens.

    seed, tuned: hidden states (N, D); ids: the N tokens. The distributions are taken in fp32 at
    least, the sums over positions in fp64.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=seed.device)
    targets = torch.tensor(ids, device=seed.device)[:, None]  # (N, 1)
    for start in range(0, len(seed), CHUNK):
        chunk = slice(start, start + CHUNK)
        log_p = _log_softmax(model.head(seed[chunk]))  # (chunk, V)
        log_q = _log_softmax(model.head(tuned[chunk]))
        difference = log_p - log_q
        by_position = (
            (log_p.exp() * difference).sum(-1),
            -(log_q.exp() * difference).sum(-1),
            log_p.argmax(-1) == log_q.argmax(-1),
            -log_q.gather(1, targets[chunk]),
            -log_p.gather(1, targets[chunk]),
        )
        sums += torch.stack([values.double().sum() for values in by_position])
    kl, reverse_kl, agree, nll, seed_nll = sums.tolist()
    return Drift(kl, reverse_kl, int(agree), nll, seed_nll)


def _log_softmax(logits: Tensor) -> Tensor:
    """In fp32 at least."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def mean_drift(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means per token over answers, all together and by category.

    lines: one per answer, with `category`, `tokens` and the fields of `Drift`. The result has kl,
    kl_interval (95 %, bootstrap over answers), reverse_kl, agreement, nll, seed_nll (nats per
    token), tokens and prompts; and the same for each category under `categories`.
    """
    by_category: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_category.setdefault(line["category"], []).append(line)
    means = _means(lines)
    means["categories"] = {name: _means(group) for name, group in by_category.items()}
    return means


def _means(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tokens = [line["tokens"] for line in lines]
    total = sum(tokens)

    def per_token(name: str) -> float:
        return sum(line[name] for line in lines) / total

    return {
        "kl": per_token("kl"),
        "reverse_kl": per_token("reverse_kl"),
        "agreement": per_token("agree"),
        "nll": per_token("nll"),
        "seed_nll": per_token("seed_nll"),
        "kl_interval": bootstrap([line["kl"] for line in lines], tokens),
        "tokens": total,
        "prompts": len(lines),
    }
