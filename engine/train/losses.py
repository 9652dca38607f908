"""Losses that weigh the response tokens: `--loss`

    sft    stm:TAU    dft    eaft[:ALPHA]    psft:EPS    k3:BETA

The gradient of every loss here is that of sum_t w_t n_t / N, with one number w_t for each response
token t that is not differentiated:

    n_t   negative log-likelihood of the token under the adapter now, nats
    s_t   the same under the seed model (the frozen weights without an adapter)
    H_t   entropy of the 20 likeliest tokens now, renormalised, nats
    r_t   exp(s_t - n_t): how many times likelier the token is now than under the seed

    loss         weight w_t                 value, whose mean is reported
    sft          1                          n_t
    stm:TAU      1 where s_t <= ln TAU      w_t n_t
    dft          exp(-n_t)                  w_t n_t
    eaft:ALPHA   (H_t / ln 20)^ALPHA        w_t n_t
    psft:EPS     r_t where r_t <= 1 + EPS   -min(r_t, 1 + EPS)
    k3:BETA      1 - BETA (1 - 1 / r_t)     n_t + BETA (1 / r_t - 1 + ln r_t)

Sums are divided by all N response tokens of the step, those of weight 0 among them. So what a token
counts depends neither on the division into micro-batches and processes nor on which other tokens
are left out. The function of each method says how its paper divides.

|ln r_t| is taken as LARGEST_LOG_RATIO where it is larger, so a weight is never infinite.
"""

# N = response tokens, of a micro-batch or of a step

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.linear_cross_entropy import LIKELIEST

LARGEST_LOG_RATIO = 10.0  # nats: ratios lie between 4.5e-5 and 22,026


@dataclass(frozen=True)
class Tokens:
    """What the losses know of response tokens: (N,) each, in nats; not differentiated."""

    nll: Tensor  # n
    seed_nll: Tensor | None = None  # s
    entropy: Tensor | None = None  # H


class Weighed(NamedTuple):
    """The loss of response tokens, (N,) each."""

    weights: Tensor  # factors of the gradients of the tokens' nll
    values: Tensor  # the loss of each token, whose sum over N is reported


# ---- the methods: a function of Tokens and of the number behind the colon


def stm(tokens: Tokens, tau: float) -> Weighed:
    """Selective token masking: tokens that the seed finds unlikely carry no loss.

    tau: the highest perplexity of a token under the seed, exp(s), that is still learnt; 2.5 in the
    paper. The tokens are chosen once: the mask does not follow the training.

    Source: arXiv 2501.14315 (NeurIPS 2025). Its code (appier-research/robust-llm-finetunes)
    divides by the kept tokens, K: its loss and gradient are N / K times these, a higher rate.
    Pitfalls: what a row teaches may lie in the masked tokens (a result, a name), which are then
    never learnt. The KL baseline published with it (`train_with_kl.py`) is added with the wrong
    sign, so it rewards leaving the seed, and takes each token's probability from the logits of the
    position after the right one.
    """
    weights = (tokens.seed_nll <= math.log(tau)).to(tokens.nll.dtype)
    return Weighed(weights, weights * tokens.nll)


def dft(tokens: Tokens) -> Weighed:
    """Dynamic fine-tuning: every token is weighed by its own probability now.

    Source: arXiv 2508.05629; divided by all N, as here and in TRL (`loss_type="dft"`).
    Pitfalls: -p ln p is not monotonous, so the value falls also where p goes to 0: watch the plain
    loss. A token that the model finds impossible is never learnt, and gradients are small: rates
    of SFT do not transfer.
    """
    weights = torch.exp(-tokens.nll)
    return Weighed(weights, weights * tokens.nll)


def eaft(tokens: Tokens, alpha: float) -> Weighed:
    """Entropy-adaptive fine-tuning: a token counts less, the surer the model is, rightly or not.

    alpha: exponent; 1 in the paper.

    Source: arXiv 2601.02151; H over the 20 likeliest tokens, divided by ln 20, so that a weight is
    at most 1. Divided by all N, as here. LLaMA-Factory (`use_eaft_loss`) divides H by 3.0 instead
    of ln 20 = 2.9957: its loss is (ln 20 / 3)^alpha times this one.
    Pitfalls: a token already learnt has no entropy either, so gradients fade as training goes on;
    knowledge that the model is to replace (a confident conflict) is what it declines to learn.
    """
    weights = (tokens.entropy / math.log(LIKELIEST)).clamp(min=0) ** alpha
    return Weighed(weights, weights * tokens.nll)


def psft(tokens: Tokens, epsilon: float) -> Weighed:
    """Proximal SFT: the clipped objective of PPO with every advantage 1 and the seed as old policy.

    epsilon: a token that has become 1 + epsilon times likelier than under the seed is left alone;
    0.28 in the published code. (Its lower bound, 1 - 0.2, changes nothing where advantages are
    positive.)

    Source: arXiv 2508.17784 (ICLR 2026): the loss is -mean min(r, clip(r)), over all N.
    Pitfalls: the value is -r, about -1, and no nll. The paper renews the old policy as it trains
    (every 256 rows in its `run_psft.sh`); here it stays the seed, so a token is pushed up by
    ln(1 + epsilon) nats at most, and unlikely tokens stay unlikely: a small epsilon learns little.
    """
    ratio = torch.exp(log_ratio(tokens))  # r
    weights = torch.where(ratio <= 1 + epsilon, ratio, 0.0)
    return Weighed(weights, -ratio.clamp(max=1 + epsilon))


def k3(tokens: Tokens, beta: float) -> Weighed:
    """SFT with a penalty on leaving the seed: beta times an estimate of KL(adapter || seed).

    beta: weight of the penalty; 0.005 to 0.03 in NeMo-RL (PR 3302).

    With d = n - s the estimate is k3 = exp(d) - 1 - d (Schulman, joschu.net/blog/kl-approx.html),
    which is never negative; d k3 / dn = exp(d) - 1. The mean is over all N, as here.
    Pitfalls: k3 is an estimate of the KL for tokens sampled from the adapter. These are given ones,
    so it is a penalty on their probabilities alone: what happens to other tokens it does not see.
    With beta above 1 a token's weight may be negative (it is unlearnt).
    """
    log_r = log_ratio(tokens)
    inverse = torch.exp(-log_r)  # 1 / r = exp(d)
    weights = 1 - beta * (1 - inverse)
    return Weighed(weights, tokens.nll + beta * (inverse - 1 + log_r))


def log_ratio(tokens: Tokens) -> Tensor:
    """ln r = s - n (N,), within -LARGEST_LOG_RATIO .. LARGEST_LOG_RATIO."""
    difference = tokens.seed_nll - tokens.nll
    return difference.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


# ---- the flag


class Method(NamedTuple):
    """A loss that `--loss` can name, and the number that it takes."""

    weigh: Callable[..., Weighed] | None = None  # None: every weight is 1
    number: str = ""  # name of the number behind the colon; "": it takes none
    meaning: str = ""  # of the number, for messages
    above: float = 0.0  # the number must be above this
    most: float = 0.0
    default: float | None = None  # None: the number must be given
    needs_seed: bool = False  # likelihoods under the seed
    needs_entropy: bool = False


METHODS = {
    "sft": Method(),
    "stm": Method(
        stm,
        number="TAU",
        meaning="the highest perplexity of a token under the seed that is learnt, as in stm:2.5",
        above=1.0,
        most=1e6,
        needs_seed=True,
    ),
    "dft": Method(dft),
    "eaft": Method(
        eaft,
        number="ALPHA",
        meaning="the exponent of the entropy, as in eaft:1",
        most=10.0,
        default=1.0,
        needs_entropy=True,
    ),
    "psft": Method(
        psft,
        number="EPS",
        meaning="by which share a token may become likelier than under the seed, as in psft:0.2",
        most=100.0,
        needs_seed=True,
    ),
    "k3": Method(
        k3,
        number="BETA",
        meaning="the weight of the KL to the seed, as in k3:0.02",
        most=100.0,
        needs_seed=True,
    ),
}


@dataclass(frozen=True)
class Loss:
    """A loss as `--loss` names it: a method, with its number where it takes one."""

    name: str  # a key of METHODS
    number: float | None = None

    @classmethod
    def parse(cls, text: str) -> Loss:
        """The loss that a text names, as in "sft", "stm:2.5" or "eaft".

        ValueError, which quotes the text, for an unknown method, a number that is missing, not
        wanted or no number, and one out of range.
        """
        name, colon, number = text.partition(":")
        method = METHODS.get(name)
        if method is None:
            raise ValueError(f"loss {text!r}: expected one of {', '.join(spellings())}")
        if not method.number:
            if colon:
                raise ValueError(f"loss {text!r}: {name} takes no number, expected {name}")
            return cls(name)
        if not colon and method.default is not None:
            return cls(name, method.default)
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not method.above < value <= method.most:  # False for nan
            raise ValueError(
                f"loss {text!r}: expected {name}:{method.number}, where {method.number} is above "
                f"{method.above:g} and at most {method.most:g}: {method.meaning}"
            )
        return cls(name, value)

    def __str__(self) -> str:
        """The text that `parse` reads; every spelling of a loss has the same."""
        if self.number is None:
            return self.name
        return f"{self.name}:{self.number!r}".removesuffix(".0")

    @property
    def method(self) -> Method:
        """The entry of METHODS."""
        return METHODS[self.name]

    @property
    def is_plain(self) -> bool:
        """Whether every token has weight 1: the loss is the mean nll."""
        return self.method.weigh is None

    @property
    def needs_seed(self) -> bool:
        """Whether it needs the seed's likelihood of every response token."""
        return self.method.needs_seed

    @property
    def needs_entropy(self) -> bool:
        """Whether it needs the entropy of the likeliest tokens."""
        return self.method.needs_entropy

    def weigh(self, tokens: Tokens) -> Weighed:
        """Weights and values of response tokens; not for a plain loss."""
        assert self.method.weigh is not None, "every weight of a plain loss is 1"
        if self.number is None:
            return self.method.weigh(tokens)
        return self.method.weigh(tokens, self.number)


def spellings() -> list[str]:
    """How each method is written: "sft", "stm:TAU", "eaft[:ALPHA]"."""
    found = []
    for name, method in METHODS.items():
        text = name
        if method.number:
            text = f"{name}:{method.number}"
        if method.default is not None:
            text = f"{name}[:{method.number}]"
        found.append(text)
    return found
