"""KL, reverse KL, agreement and NLL against the formulas in fp64; their means."""

import pytest
import torch

from engine.measure.divergence import compare, mean_drift
from engine.measure.intervals import bootstrap
from model.llama import Llama


def test_drift_against_the_formulas_in_fp64(tiny_llama_dir):
    """And: zero for the seed itself; over more than one chunk of positions."""
    model = Llama.from_pretrained(tiny_llama_dir())
    generator = torch.Generator().manual_seed(0)
    seed, tuned = (torch.randn(150, 64, generator=generator) for _ in range(2))
    ids = torch.randint(320, (150,), generator=generator)
    head = model.weights["head"].double()
    p, q = (torch.log_softmax(h.double() @ head.T, -1) for h in (seed, tuned))
    found = compare(model, seed, tuned, ids.tolist())
    kl_div = torch.nn.functional.kl_div
    assert found.kl == pytest.approx(kl_div(q, p.exp(), reduction="sum").item(), rel=1e-5)
    assert found.reverse_kl == pytest.approx(kl_div(p, q.exp(), reduction="sum").item(), rel=1e-5)
    assert abs(found.kl / found.reverse_kl - 1) > 1e-3  # the two are not one
    assert found.agree == (p.argmax(-1) == q.argmax(-1)).sum()
    nll = torch.nn.functional.nll_loss
    assert found.nll == pytest.approx(nll(q, ids, reduction="sum").item(), rel=1e-6)
    assert found.seed_nll == pytest.approx(nll(p, ids, reduction="sum").item(), rel=1e-6)
    same = compare(model, seed, seed, ids.tolist())
    assert same.kl == same.reverse_kl == 0 and same.agree == 150 and same.nll == same.seed_nll


def test_means_are_per_token_and_by_category():
    lines = [
        {"category": c, "tokens": n, "kl": kl, "reverse_kl": 2 * kl, "agree": n // 2, "nll": n,
         "seed_nll": n / 2}
        for c, n, kl in (("a", 10, 1.0), ("a", 30, 7.0), ("b", 10, 12.0))
    ]  # fmt: skip
    found = mean_drift(lines)
    assert found["kl"] == 20 / 50 and found["reverse_kl"] == 40 / 50 and found["agreement"] == 0.5
    assert (found["nll"], found["seed_nll"], found["tokens"], found["prompts"]) == (1, 0.5, 50, 3)
    assert found["categories"]["a"]["kl"] == 8 / 40 and found["categories"]["b"]["kl"] == 1.2
    assert found["kl_interval"] == bootstrap([1.0, 7.0, 12.0], [10, 30, 10])
