"""Repetition penalty, min-p, top-k, top-p: by hand and against the definition."""

import dataclasses

import pytest
import torch

from kernels.launch import triton_launch
from kernels.registry import REFERENCE, TORCH, TRITON
from kernels.sampling import triton_forward
from kernels.sampling.sample_rows import SampleRows
from tests.helpers import interpreter

NEVER = float("-inf")


def rows(count, history=None, **settings):
    """Rows whose random numbers differ by their position."""
    zero = torch.zeros(count, dtype=torch.int64)
    if history is not None:
        history = torch.tensor(history)
    return SampleRows(torch.arange(count), zero, zero, 3, history=history, **settings)


def drawn(logits, count=400, history=None, **settings):
    """The distinct tokens of `count` draws from one row of logits; both tables must agree."""
    many = torch.tensor([logits]).expand(count, -1)
    history = None if history is None else [history] * count
    tokens, _ = TORCH.sample(many, rows(count, history, **settings))
    assert torch.equal(tokens, REFERENCE.sample(many, rows(count, history, **settings))[0])
    return set(tokens.tolist())


SETTINGS = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "temperature": 1.0},
    {"min_p": 0.1, "temperature": 1.5},
    {"min_p": 1.0, "temperature": 1.0},
    {"min_p": 0.05, "temperature": 1.1, "top_k": 40, "top_p": 0.9},
    {"repetition_penalty": 1.2, "min_p": 0.02, "temperature": 0.9, "top_k": 60, "top_p": 0.95},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(s))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_torchs_form_draws_what_the_reference_draws(settings, dtype):
    generator = torch.Generator().manual_seed(5)
    logits = (3 * torch.randn(100, 211, generator=generator)).to(dtype)
    history = torch.randint(-1, 211, (100, 150), generator=generator)
    wanted = rows(100, history.tolist(), **settings)
    before = logits.clone(), history.clone()
    tokens, logprobs = TORCH.sample(logits, wanted)
    want, want_logprobs = REFERENCE.sample(logits, wanted)
    assert torch.equal(tokens, want)
    torch.testing.assert_close(logprobs, want_logprobs, rtol=0, atol=1e-5)
    assert torch.equal(logits, before[0]) and torch.equal(history, before[1])


@pytest.mark.parametrize("table", [REFERENCE, TORCH], ids=lambda t: t.name)
def test_a_repetition_penalty_equals_the_one_computed_by_hand(table):
    """Penalty 2: 4 becomes 2, -1 becomes -2, once however often the id was seen; -1 is padding."""
    logits = torch.tensor([[4.0, 3.0, 1.9, -1.0]]).repeat(6, 1)
    logits[4:] = torch.tensor([-1.0, -1.5, -9.0, -9.0])
    history = [
        [-1, -1, -1],  # nothing seen: 4 wins
        [0, -1, -1],  # 4 -> 2 < 3
        [0, 1, -1],  # 2, 1.5, 1.9: the first again
        [0, 0, 1],  # a repeat counts once: 2 and not 1, so still above 1.9
        [0, -1, -1],  # -1 -> -2 < -1.5
        [0, 1, 0],  # -2, -3
    ]
    tokens, logprobs = table.sample(logits, rows(6, history, repetition_penalty=2.0))
    assert tokens.tolist() == [0, 1, 0, 0, 1, 0]
    plain = torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, plain)  # of the logits as they came


def test_a_penalty_below_one_makes_tokens_likelier():
    assert drawn([1.0, 1.1, NEVER], history=[0], repetition_penalty=0.5) == {0}


def test_the_penalty_comes_before_top_k():
    """6 -> 3 falls out of the two largest."""
    logits = [6.0, 5.0, 4.0, NEVER]
    settings = {"repetition_penalty": 2.0, "temperature": 1.0, "top_k": 2}
    assert drawn(logits, history=[0, -1], **settings) == {1, 2}


def test_min_p_keeps_the_tokens_found_by_hand():
    """Probabilities 0.5, 0.3, 0.15, 0.05."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert drawn(logits, temperature=1.0) == {0, 1, 2, 3}
    assert drawn(logits, temperature=1.0, min_p=0.2) == {0, 1, 2}  # 0.1 is the least
    assert drawn(logits, temperature=1.0, min_p=0.5) == {0, 1}
    assert drawn(logits, temperature=1.0, min_p=1.0) == {0}
    # temperature 1/2 squares: 0.09 / 0.25 = 0.36 is now below a half
    assert drawn(logits, temperature=0.5, min_p=0.5) == {0}


def test_min_p_keeps_ties_of_the_largest():
    assert drawn([2.0, 2.0, 1.99, NEVER], temperature=1.0, min_p=1.0) == {0, 1}


def test_top_k_takes_the_lowest_ids_of_a_tie():
    """Also across the last place; on sixteen-bit logits that is common."""
    assert drawn([0.0] * 40, temperature=1.0, top_k=3) == {0, 1, 2}
    assert drawn([0.0, 0.5] + [0.0] * 40, temperature=1.0, top_k=3) == {0, 1, 2}


def test_top_p_reached_exactly_takes_no_more():
    assert drawn([0.0] * 100, temperature=1.0, top_p=0.1) == set(range(10))


def test_default_settings_are_the_plain_draw():
    """A penalty of 1 with a history and a min_p of 0 are the plain draw."""
    logits = torch.randn(50, 64)
    plain = rows(50, temperature=1.0, top_k=30)
    same = dataclasses.replace(plain, history=torch.randint(-1, 64, (50, 9)))
    assert torch.equal(TORCH.sample(logits, plain)[0], TORCH.sample(logits, same)[0])


def test_settings_out_of_range_are_refused():
    with pytest.raises(AssertionError, match="history"):
        rows(1, repetition_penalty=1.1)
    with pytest.raises(AssertionError, match="min_p"):
        rows(1, min_p=1.5)
    with pytest.raises(AssertionError, match="repetition_penalty 0"):
        rows(1, [[0]], repetition_penalty=0)


@pytest.mark.skipif(not triton_launch.INTERPRETED, reason="runs in the interpreter")
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9}, {"temperature": 0.9, "top_k": 5}])
def test_broken_logits_give_a_token_of_the_vocabulary(settings):
    """NaN and +inf name no likeliest token, but must not send the kernel outside the row."""
    interpreter.install()
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    logits[0], logits[1, 7], logits[2, 3] = torch.nan, torch.nan, torch.inf
    buffers = []
    tokens, _ = TRITON.sample(interpreter.guarded(logits, buffers), rows(4, **settings))
    assert ((0 <= tokens) & (tokens < 100)).all()


@pytest.mark.skipif(not triton_launch.INTERPRETED, reason="runs in the interpreter")
def test_an_id_beyond_the_vocabulary_penalises_no_token():
    """Neither one of this row nor the first of the next row."""
    interpreter.install()
    logits = torch.ones(3, 100)  # all equal, so an id 0 that is penalised loses to id 1
    tokens, _ = TRITON.sample(logits, rows(3, [[100, 5]] * 3, repetition_penalty=2.0))
    assert tokens.tolist() == [0, 0, 0]


FIRST_TOKENS = [  # how many tokens are looked at first, settings
    (8, {"temperature": 1.0}),
    (8, {"temperature": 0.8, "top_p": 0.6}),
    (4, {"temperature": 1.3, "min_p": 0.01, "top_p": 0.99}),
    (8, {"temperature": 0.9, "top_k": 7, "top_p": 0.8}),
    (8, {"temperature": 0.9, "top_k": 30, "top_p": 0.8}),  # more than are looked at first
    (256, {"temperature": 1.0, "top_k": 1}),
    (256, {"temperature": 1.3, "min_p": 0.3}),
    (256, {"temperature": 1.2, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.4}),
    (256, {"temperature": 1.0, "top_p": 0.95}),
]


def rows_of_every_kind():
    """(7, 37): ties, peaks, flat rows, few finite logits, one; 37 is no multiple of a block."""
    logits = 3 * torch.randn(7, 37, generator=torch.Generator().manual_seed(1))
    logits[0] = -logits[0].abs().round()  # ties, also across the last place; -0 is 0
    logits[1] = 0.0
    logits[2] *= 0.01  # the draw is rarely among the first
    logits[3, 3:] = NEVER
    logits[4, :] = NEVER
    logits[4, 9] = 1.0
    logits[5] *= 4
    logits[6, ::2] = NEVER
    return logits


@pytest.mark.skipif(not triton_launch.INTERPRETED, reason="runs in the interpreter")
@pytest.mark.parametrize(("first", "settings"), FIRST_TOKENS, ids=str)
def test_tritons_first_tokens_give_what_the_reference_draws(first, settings, monkeypatch):
    """Whether a row's token is among those that are looked at first, or behind them."""
    interpreter.install()
    monkeypatch.setattr(triton_forward, "FIRST", first)
    logits = rows_of_every_kind()
    history = None
    if "repetition_penalty" in settings:
        history = torch.randint(-1, 37, (7, 20)).tolist()
    wanted = rows(7, history, **settings)
    tokens, logprobs = TRITON.sample(logits, wanted)
    want, want_logprobs = REFERENCE.sample(logits, wanted)
    assert torch.equal(tokens, want)
    torch.testing.assert_close(logprobs, want_logprobs, rtol=0, atol=1e-5)


@pytest.mark.skipif(not triton_launch.INTERPRETED, reason="runs in the interpreter")
def test_a_row_whose_token_is_among_its_first_is_not_searched(monkeypatch):
    """Here the peaked rows; and none is where top_k leaves no others."""
    interpreter.install()
    monkeypatch.setattr(triton_forward, "FIRST", 8)
    logits = torch.zeros(4, 40)
    logits[2:, 4] = 12.0
    found = []
    launch = triton_forward.launch

    def noted(kernel, grid, *args, **options):
        if kernel is triton_forward.sample_draw_kernel:
            found.append(args[-2].tolist())
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(triton_forward, "launch", noted)
    wanted = rows(4, temperature=1.0, top_p=0.9)
    tokens, _ = TRITON.sample(logits, wanted)
    assert found == [[0, 0, 1, 1]]
    assert torch.equal(tokens, REFERENCE.sample(logits, wanted)[0])
    TRITON.sample(logits, rows(4, temperature=1.0, top_k=8))
    assert len(found) == 1


@pytest.mark.skipif(not triton_launch.INTERPRETED, reason="runs in the interpreter")
@pytest.mark.parametrize("kept", [{"top_p": 0.6}, {"top_p": 0.5}, {"min_p": 0.59}, {"min_p": 0.61}])
def test_triton_keeps_as_many_tokens_as_the_reference(kept):
    """Of 0.5, 0.3, 0.2: 12 draws meet every token that is kept."""
    interpreter.install()
    logits = torch.full((12, 20), NEVER)
    logits[:, [7, 3, 11]] = torch.tensor([0.5, 0.3, 0.2]).log()
    wanted = rows(12, temperature=1.0, **kept)
    tokens, _ = TRITON.sample(logits, wanted)
    assert torch.equal(tokens, REFERENCE.sample(logits, wanted)[0])
    assert set(tokens.tolist()) == ({7} if kept in ({"top_p": 0.5}, {"min_p": 0.61}) else {7, 3})
