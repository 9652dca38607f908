"""Divergence of a tuned model from its seed, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.measure.intervals import bootstrap
from kernels.packed import Packed
from model.llama import Llama

CHUNK = 64  # positions whose distributions are held at once


@dataclass(frozen=True)
class Drift:
    """Sums over the positions of one answer, in nats; `agree` counts positions."""

    kl: float  # KL(seed || tuned)
    reverse_kl: float  # KL(tuned || seed)
    agree: int  # positions at which both have the same likeliest token
    nll: float  # of the answer's tokens under the tuned model
    seed_nll: float  # and under the seed


def hidden_states(model: Llama, ids: Sequence[int], start: int, lora: Any) -> Tensor:
    """Hidden states from which the answer's tokens are predicted: (answer tokens, D)."""
    tokens = torch.tensor(ids, device=model.device)
    packed = Packed.from_lengths([len(ids)], model.device)
    return model.forward(tokens, packed, lora=lora)[start - 1 : -1]


def compare(model: Llama, seed: Tensor, tuned: Tensor, ids: Sequence[int]) -> Drift:
    """Two models, or two contexts of one, over the same N tokens: hidden states (N, D), ids (N,).

    The distributions are taken in fp32 at least, the sums over positions in fp64.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=seed.device)
    wanted = torch.tensor(ids, device=seed.device)[:, None]
    for i in range(0, len(seed), CHUNK):
        logits = [model.head(h[i : i + CHUNK]) for h in (seed, tuned)]
        dtype = torch.promote_types(logits[0].dtype, torch.float32)
        p, q = (torch.log_softmax(x.to(dtype), dim=-1) for x in logits)
        apart, there = p - q, wanted[i : i + CHUNK]
        found = (
            (p.exp() * apart).sum(-1),
            -(q.exp() * apart).sum(-1),
            p.argmax(-1) == q.argmax(-1),
            -q.gather(1, there),
            -p.gather(1, there),
        )
        sums += torch.stack([value.double().sum() for value in found])
    kl, reverse, agree, nll, seed_nll = sums.tolist()
    return Drift(kl, reverse, int(agree), nll, seed_nll)


def means(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per token over prompts: kl with its 95 % interval (bootstrap over prompts), reverse_kl,
    agreement, nll, seed_nll; the same by category under `categories`."""
    found = _means(lines)
    found["categories"] = {
        name: _means([line for line in lines if line["category"] == name])
        for name in dict.fromkeys(line["category"] for line in lines)
    }
    return found


def _means(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tokens = [line["tokens"] for line in lines]
    names = {"kl": "kl", "reverse_kl": "reverse_kl", "agree": "agreement"}
    names |= {"nll": "nll", "seed_nll": "seed_nll"}
    found: dict[str, Any] = {
        name: sum(line[key] for line in lines) / sum(tokens) for key, name in names.items()
    }
    found["kl_interval"] = bootstrap([line["kl"] for line in lines], tokens)
    return found | {"tokens": sum(tokens), "prompts": len(lines)}
