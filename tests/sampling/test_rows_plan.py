"""How many sequences a GPU decodes together, against arithmetic done by hand."""

import pytest
import torch

from engine.sampling import scheduler
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.rows_plan import planned_pages, planned_rows
from engine.sampling.sampler import Sampler
from model.kv_cache import KVCache
from model.layout import parameter_count
from model.llama import Llama
from tests.helpers.configs import hand_counted
from tests.helpers.sampling import text

ROWS = """
        1B      7B      13B
24 GB   256     32      1
48 GB   256     160     64
80 GB   256     256     160
"""


def test_rows_of_24_48_and_80_gb_cards():
    """Sequences of 150 + 140 tokens, five pages of 64, bf16; 13B does not fit 24 GB at all."""
    header, *lines = ROWS.strip().splitlines()
    for line in lines:
        gigabytes, _, *counts = line.split()
        total = 10**9 * int(gigabytes)
        for name, count in zip(header.split(), counts, strict=True):
            made = hand_counted(name)
            assert parameter_count(made.config) == made.weights
            room = 0.9 * total - 2 * made.weights  # bytes
            fitting = max(0, room) // (5 * made.page)  # sequences
            by_hand = max(1, min(256, fitting - fitting % 32))
            pages = planned_pages(made.config, torch.bfloat16, 64, total, kv_memory=0.0)
            assert planned_rows(pages, [5]) == by_hand == int(count), (line, name)
    seven = hand_counted("7B")
    pages = planned_pages(seven.config, torch.bfloat16, 64, 80 * 10**9, kv_memory=3.4)
    assert pages == 101, "33.6 MB each of the GB that the user allows"


@pytest.mark.parametrize(
    ("pages", "expected", "rows"),
    [(0, [5], 1), (9, [5], 1), (10, [5], 2), (155, [5], 31), (160, [5], 32), (315, [5], 32)]
    + [(320, [5], 64), (10**6, [5], 256), (320, [1, 9], 64), (100, [1, 1, 2], 32)],
)
def test_rows_are_what_pages_hold_in_the_mean(pages, expected, rows):
    assert planned_rows(pages, expected) == rows


def test_a_sampler_plans_its_rows_at_the_expected_lengths(tiny_llama_dir, monkeypatch, capsys):
    """A pretended card holds 20 pages beside the weights; a request is expected to take 5."""
    model = Llama.from_pretrained(tiny_llama_dir(layers=1))
    page = KVCache.page_bytes(model.config, 16, torch.float32)
    weights = 4 * parameter_count(model.config)
    total = (weights + 20.5 * page) / 0.9
    monkeypatch.setattr(scheduler, "total_memory", lambda device: total)
    monkeypatch.setattr(SamplerConfig, "for_device", lambda self, kind: self)
    requests = [Request(f"r{i}", [5 + i] * 60, 180, expected_tokens=20) for i in range(9)]
    config = SamplerConfig(page_size=16, prefill_tokens=64, draft="off")
    most = 0
    with Sampler(model, text, (), config) as sampler:
        for _ in sampler.run(requests):
            most = max(most, len(sampler.scheduler.running))
        assert sampler.scheduler.rows == 4
    assert most <= 4
    line = "sampling: up to 4 sequences at a time, prompts in pieces of 64 tokens"
    assert capsys.readouterr().out.count(line) == 1
