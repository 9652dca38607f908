"""Many rows in one forward: the states and the drift of each are those of the row alone."""

from __future__ import annotations

import random

import pytest
import torch

from engine.measure import packed_rows
from engine.measure.divergence import compare, compare_all, hidden_states
from engine.measure.packed_rows import (
    AnsweredRow,
    SeedRow,
    drift_of_rows,
    states_in_memory,
    states_of,
)
from engine.measure.row_invariance import LEAST_TOKENS
from model.llama import Llama
from tests.helpers.adapters import new_lora


@pytest.fixture
def exact(tiny_llama_dir):
    """A model in fp64, and an adapter that changes it."""
    model = Llama.from_pretrained(tiny_llama_dir(), dtype=torch.float64)
    lora = new_lora(model, rank=2, modules="all")
    lora.params.add_(0.05)
    return model, lora


def rows_of(lengths, kind=AnsweredRow, prefix=20, seed=0):
    """Rows of these (prompt, answer) tokens, whose prompts begin with the same `prefix` tokens."""
    rng = random.Random(seed)
    system = [rng.randrange(320) for _ in range(prefix)]
    made = []
    for n_prompt, n_answer in lengths:
        own = [rng.randrange(320) for _ in range(n_prompt - prefix + n_answer)]
        made.append(kind(ids=system + own, n_prompt=n_prompt))
    return made


SHORT = [(30, 12), (21, 1), (40, 25), (22, 3)]
LONG = [(150, 30), (30, 12), (200, 1)]


def forward_lengths(model, monkeypatch):
    """The list to which every forward will add its number of tokens."""
    lengths = []
    forward = model.forward

    def counted(tokens, *args, **settings):
        lengths.append(len(tokens))
        return forward(tokens, *args, **settings)

    monkeypatch.setattr(model, "forward", counted)
    return lengths


@pytest.mark.parametrize("lengths", [SHORT, LONG, SHORT[1:2]])
def test_states_are_those_of_the_row_alone(exact, lengths):
    """fp64, of the seed and of an adapter; with a shared prefix and without one."""
    model, lora = exact
    rows = rows_of(lengths)
    for adapter in (None, lora):
        together = states_of(model, rows, adapter)
        for row, states in zip(rows, together, strict=True):
            alone = hidden_states(model, row.ids, row.n_prompt, adapter)
            assert states.shape == alone.shape == (len(row.ids) - row.n_prompt, 64)
            assert (states - alone).abs().max() < 1e-12 * alone.abs().max()


def test_short_rows_compute_the_system_message_once_and_long_ones_each(exact, monkeypatch):
    """A long row is computed in blocks that would begin elsewhere: its bits would be others."""
    model, _ = exact
    forwards = forward_lengths(model, monkeypatch)
    rows = rows_of(SHORT)
    states_of(model, rows, None)
    tokens = sum(len(row.ids) for row in rows)
    shared = 22 - LEAST_TOKENS  # of the 20: the shortest row has 22 and computes so many itself
    assert forwards == [tokens - 3 * shared]
    states_of(model, rows_of(LONG), None)
    assert forwards[1:] == [180 + 42 + 201]
    states_of(model, rows_of(SHORT, prefix=5), None)  # too short to share
    assert forwards[2] == tokens


def test_where_memory_is_short_a_group_is_tried_again_and_then_halved(exact, monkeypatch, capsys):
    model, lora = exact
    rows = rows_of(SHORT)
    expected = states_of(model, rows, lora)
    monkeypatch.setattr("gc.collect", lambda: 0)  # half a second each beside all of torch
    monkeypatch.setattr("engine.runtime.short_memory.give_back_freed_memory", lambda _: None)
    fitting = 4  # rows
    tried, room = [], []

    def short(model, rows, lora):
        tried.append(len(rows))
        if len(rows) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return states_of(model, rows, lora)

    monkeypatch.setattr(packed_rows, "states_of", short)
    halves = [2, 2]
    rows_alone = [2, 2, 1, 1]
    for fitting, attempts in ((4, [4]), (2, [4, 4, *halves]), (1, [4, 4, *2 * rows_alone])):
        tried.clear()
        found = states_in_memory("drift", model, rows, lora, lambda: room.append(1))
        assert tried == attempts and fitting
        for states, other in zip(found, expected, strict=True):
            torch.testing.assert_close(states, other, rtol=1e-12, atol=1e-12)
    assert len(room) == 4 and "drift: out of memory again; continuing with half" in (
        capsys.readouterr().out
    )
    fitting = 0
    with pytest.raises(torch.OutOfMemoryError):
        states_in_memory("drift", model, rows, lora)


def test_drift_is_that_of_each_row_and_arm_and_the_seeds_states_are_kept(exact, monkeypatch):
    model, lora = exact
    forwards = forward_lengths(model, monkeypatch)
    rows = rows_of(SHORT, SeedRow)
    adapters = {"one": lora, "half": lora.scaled(0.5)}
    found = drift_of_rows("drift", model, rows, adapters, keep=False)
    assert len(forwards) == 3 and all(row.states is None for row in rows)
    for row, drifts in zip(rows, found, strict=True):
        seed = hidden_states(model, row.ids, row.n_prompt, None)
        for arm, adapter in adapters.items():
            tuned = hidden_states(model, row.ids, row.n_prompt, adapter)
            alone = compare(model, seed, tuned, row.ids[row.n_prompt :])
            assert drifts[arm].kl == pytest.approx(alone.kl, rel=1e-9) and alone.kl > 0
            assert drifts[arm].agree == alone.agree
    forwards.clear()
    assert drift_of_rows("drift", model, rows, adapters) == found and len(forwards) == 3
    forwards.clear()
    assert drift_of_rows("drift", model, rows, {"one": lora})[0]["one"] == found[0]["one"]
    assert len(forwards) == 1


def test_several_tuned_models_are_compared_as_each_alone(tiny_llama_dir):
    """Bit for bit, over more than one chunk of positions."""
    model = Llama.from_pretrained(tiny_llama_dir())
    generator = torch.Generator().manual_seed(0)
    seed, one, other = torch.randn(3, 90, 64, generator=generator)
    ids = torch.randint(320, (90,), generator=generator).tolist()
    alone = [compare(model, seed, states, ids) for states in (one, other)]
    assert compare_all(model, seed, [one, other], ids) == alone and alone[0] != alone[1]
    assert compare_all(model, seed, [], ids) == []
