"""Divergence of a tuned model from its seed, token by token, over the same answers

At every position p is the seed's distribution over the vocabulary and q the tuned model's:

    KL(seed || tuned) = sum p (log p - log q)
    KL(tuned || seed) = sum q (log q - log p)
"""

# N = positions (answer tokens), D = hidden size, V = vocabulary, C = positions at a time (CHUNK)

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
    nll: float  # negative log-likelihood of the answer's tokens under the tuned model
    seed_nll: float  # and under the seed


def hidden_states(model: Llama, ids: Sequence[int], start: int, lora: Lora | None) -> Tensor:
    """Hidden states (N, D) from which the N tokens ids[start:] are predicted."""
    tokens = torch.tensor(ids, device=model.device)
    packed = Packed.from_lengths([len(ids)], model.device)
    hidden = model.forward(tokens, packed, lora=lora)  # (len(ids), D)
    return hidden[start - 1 : -1]


def compare(model: Llama, seed: Tensor, tuned: Tensor, ids: Sequence[int]) -> Drift:
    """The divergence of two models over the same N tokens, or of one model in two contexts.

    model         gives the head, which both share
    seed, tuned   hidden states (N, D)
    ids           the N tokens

    The distributions are computed in fp32 at least, the sums over positions in fp64.
    """
    (drift,) = compare_all(model, seed, [tuned], ids)
    return drift


def compare_all(
    model: Llama, seed: Tensor, tuned: Sequence[Tensor], ids: Sequence[int]
) -> list[Drift]:
    """`compare` with each of several tuned models; the seed's distributions are computed once."""
    # (tuned models, 5), in the order of Drift
    sums = torch.zeros(len(tuned), 5, dtype=torch.float64, device=seed.device)
    targets = torch.tensor(ids, device=seed.device)[:, None]  # (N, 1)
    for start in range(0, len(seed), CHUNK):
        chunk = slice(start, start + CHUNK)
        log_p = _log_softmax(model.head(seed[chunk]))  # (C, V)
        p = log_p.exp()  # (C, V)
        likeliest = log_p.argmax(-1)  # (C,)
        seed_nll = -log_p.gather(1, targets[chunk])  # (C, 1)
        for number, states in enumerate(tuned):
            log_q = _log_softmax(model.head(states[chunk]))  # (C, V)
            difference = log_p - log_q
            kl = (p * difference).sum(-1)  # (C,)
            reverse_kl = -(log_q.exp() * difference).sum(-1)  # (C,)
            agree = likeliest == log_q.argmax(-1)  # (C,)
            nll = -log_q.gather(1, targets[chunk])  # (C, 1)
            by_position = (kl, reverse_kl, agree, nll, seed_nll)
            sums[number] += torch.stack([values.double().sum() for values in by_position])
    return [
        Drift(kl=kl, reverse_kl=reverse_kl, agree=int(agree), nll=nll, seed_nll=seed_nll)
        for kl, reverse_kl, agree, nll, seed_nll in sums.tolist()
    ]


def _log_softmax(logits: Tensor) -> Tensor:
    """Log probabilities (C, V) of logits (C, V), in fp32 at least."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits.to(dtype), dim=-1)


def mean_drift(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means per token over answers, all together and by category.

    lines: one per answer, with `category`, `tokens` and the fields of `Drift`.

    The result has the means kl, reverse_kl, nll and seed_nll in nats per token, kl_interval (95 %,
    bootstrap over answers), agreement (a share of positions), and the counts tokens and prompts;
    under `categories` the same for each category.
    """
    by_category: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_category.setdefault(line["category"], []).append(line)
    means = means_per_token(lines)
    means["categories"] = {name: means_per_token(group) for name, group in by_category.items()}
    return means


def means_per_token(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means of one group of lines, each with `tokens` and the fields of `Drift`.

    Sums over all answers are divided by the number of all tokens.
    """
    kl = [line["kl"] for line in lines]
    tokens = [line["tokens"] for line in lines]
    total_tokens = sum(tokens)

    def per_token(name: str) -> float:
        return sum(line[name] for line in lines) / total_tokens

    return {
        "kl": per_token("kl"),
        "reverse_kl": per_token("reverse_kl"),
        "agreement": per_token("agree"),
        "nll": per_token("nll"),
        "seed_nll": per_token("seed_nll"),
        "kl_interval": bootstrap(kl, tokens),
        "tokens": total_tokens,
        "prompts": len(lines),
    }
