"""The sampler's benchmark: its floor is arithmetic, its comparison finds the first other token."""

from __future__ import annotations

import pytest

from benchmarks import floor, sampler
from model.config import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=3,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
LAYERS = 2 * (4 * (4 + 2 + 2) + 4 * 4 + 3 * 4 * 3)  # qkv, o, gate, up, down
HEAD = 40


def test_weights_are_counted():
    assert floor.weights(CONFIG) == (LAYERS, HEAD)


def test_the_floor_of_a_generation():
    """Two rows of 2 and 4 new tokens, products 1 operation/s, reading weights free or ruinous."""
    prompts, new = [[1, 2, 3], [4, 5]], [2, 4]
    free = {"flops": 1.0, "bytes": float("inf")}
    products = 2 * (5 * LAYERS + 2 * HEAD) + 2 * 4 * (LAYERS + HEAD)
    assert floor.generation_floor(CONFIG, prompts, new, 2, free) == products
    reading = {"flops": float("inf"), "bytes": 1.0}
    context = 4 + (3 + 4 + 5)
    for rows, steps in ((2, 3), (1, 4)):
        want = steps * 4 * (LAYERS + HEAD) + context * 2 * (2 * 2 * 4)
        assert floor.generation_floor(CONFIG, prompts, new, rows, reading) == want


def test_a_common_beginning_is_computed_once():
    head = list(range(100))
    assert (
        floor.computed_prompt_tokens([[*head, 1000], [*head, 1001, 5], [1002]]) == 100 + 1 + 2 + 1
    )
    assert floor.computed_prompt_tokens([[1, 2], [1, 3]]) == 4  # not worth a forward


def test_running_per_step():
    assert list(floor.running_per_step([4, 1, 2, 3], 2)) == [2, 2, 2]
    assert list(floor.running_per_step([4, 1, 2, 3], 9)) == [3, 2, 1]


def test_diverging_names_rows_and_the_first_position_that_differs():
    assert sampler.diverging([[1, 2], [3], [4, 5]], [[1, 2], [3, 4], [9, 5]]) == {1: 1, 2: 0}


def test_ratios_of_what_ran():
    def result(rate: float, rss: int) -> dict:
        return {"tokens_s": rate, "rss": rss}

    results = {
        "ours, 64 rows, draft off": result(100.0, 6),
        "ours, 1 rows, draft off": result(30.0, 5),
        "transformers, batch 16": result(25.0, 12),
        "transformers, batch 1": result(10.0, 8),
        "transformers, batch 16, malloc": result(40.0, 12),
    }
    assert sampler.ratios(results) == {
        "ours / transformers' best": 4.0,
        "ours / transformers' best with malloc settings": 2.5,
        "ours, 1 row, draft off / transformers, batch 1": 3.0,
        "peak RSS, ours / transformers' best batch": 0.5,
    }


def test_a_busy_machine_gets_no_times():
    with sampler.Quiet("then", allowed=True) as quiet:
        quiet.machine_before -= 1e6  # the machine seems to have worked 1e6 core-seconds more
    assert quiet.others > 1
    with pytest.raises(SystemExit, match="busy.*no times"):
        with sampler.Quiet("then", allowed=False) as quiet:
            quiet.machine_before -= 1e6  # the machine seems to have worked 1e6 core-seconds more
