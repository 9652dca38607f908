"""KL, reverse KL, agreement and NLL against the formulas in fp64; their means."""

import pytest
import torch
from torch.nn.functional import kl_div, nll_loss

from engine.measure.divergence import compare, mean_drift
from engine.measure.intervals import bootstrap
from model.llama import Llama

POSITIONS = 150  # more than two chunks
WIDTH = 64
VOCABULARY = 320


def test_drift_equals_the_formulas_in_fp64_and_is_zero_for_the_seed_itself(tiny_llama_dir):
    model = Llama.from_pretrained(tiny_llama_dir())
    generator = torch.Generator().manual_seed(0)
    seed = torch.randn(POSITIONS, WIDTH, generator=generator)
    tuned = torch.randn(POSITIONS, WIDTH, generator=generator)
    ids = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    head = model.weights["head"].double()
    log_p = torch.log_softmax(seed.double() @ head.T, -1)
    log_q = torch.log_softmax(tuned.double() @ head.T, -1)

    drift = compare(model, seed, tuned, ids.tolist())
    kl = kl_div(log_q, log_p.exp(), reduction="sum").item()
    reverse_kl = kl_div(log_p, log_q.exp(), reduction="sum").item()
    assert drift.kl == pytest.approx(kl, rel=1e-5)
    assert drift.reverse_kl == pytest.approx(reverse_kl, rel=1e-5)
    assert abs(drift.kl / drift.reverse_kl - 1) > 1e-3, "the two directions differ"
    assert drift.agree == (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    nll = nll_loss(log_q, ids, reduction="sum").item()
    seed_nll = nll_loss(log_p, ids, reduction="sum").item()
    assert drift.nll == pytest.approx(nll, rel=1e-6)
    assert drift.seed_nll == pytest.approx(seed_nll, rel=1e-6)

    same = compare(model, seed, seed, ids.tolist())
    assert same.kl == same.reverse_kl == 0
    assert same.agree == POSITIONS
    assert same.nll == same.seed_nll


def line(category: str, tokens: int, kl: float) -> dict:
    """A line of a retention file."""
    return {
        "category": category,
        "tokens": tokens,
        "kl": kl,
        "reverse_kl": 2 * kl,
        "agree": tokens // 2,
        "nll": tokens,
        "seed_nll": tokens / 2,
    }


def test_means_are_per_token_and_by_category():
    lines = [line("a", 10, 1.0), line("a", 30, 7.0), line("b", 10, 12.0)]
    means = mean_drift(lines)
    assert means["kl"] == 20 / 50
    assert means["reverse_kl"] == 40 / 50
    assert means["agreement"] == 0.5
    assert means["nll"] == 1
    assert means["seed_nll"] == 0.5
    assert means["tokens"] == 50
    assert means["prompts"] == 3
    assert means["categories"]["a"]["kl"] == 8 / 40
    assert means["categories"]["b"]["kl"] == 1.2
    assert means["kl_interval"] == bootstrap([1.0, 7.0, 12.0], [10, 30, 10])
