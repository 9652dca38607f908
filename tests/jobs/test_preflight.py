"""Preflight: its figures by hand and against fp64, its reasons, a run on a random model."""

import json

import pytest
import torch

from engine.data.distilled import load_distilled
from engine.distill.config import DistillConfig
from engine.distill.rewrite_prompts import TEMPLATES
from engine.jobs.preflight import copied, gap, hedges_per_100_words
from engine.jobs.preflight_reasons import reasons_that_hold
from engine.session import ModelConfig, Session
from tests.helpers.scripts import run_script as script


def test_copied_is_the_share_of_ngrams_that_occur_in_the_source():
    """5 words hold two 4-grams, one of them in the source."""
    assert copied("The cat sat down today", "Well, the cat sat down.") == 1 / 2
    assert copied("the cat SAT down!", "The cat sat down") == 1
    assert copied("a b c d", "e f") == 0
    assert copied("42", "It is 42") == 1
    assert copied("", "x") == copied("!", "x") == 0
    assert copied("one two", "") == 0


def test_hedging_expressions_are_counted_per_100_words():
    three_in_seven_words = ["Wait, maybe not. Hmm,", "it is so."]
    assert hedges_per_100_words(three_in_seven_words) == pytest.approx(100 * 3 / 7)
    assert hedges_per_100_words(["The waiter may be late"]) == 0


def test_the_gap_equals_log_softmax_of_the_logits_in_fp64(chat_dir, tmp_path):
    """KL(shown || plain), its reverse and the gap over the sampled tokens and their end."""
    session = Session.open(ModelConfig(str(chat_dir), dtype="float64"))
    chat, model = session.chat, session.model
    # a forced beginning does not count
    prefix = chat.prefix_ids("Great! Let's think step by step. ")
    sampled = [*prefix, *chat.response_ids("hello")]
    line = {
        "id": "a/0",
        "messages": [{"role": "user", "content": "Q?"}],
        "reference": "R r",
        "response": "hello",
        "response_ids": sampled,
        "target": "hello",
        "status": "accepted",
        "stage": "guided",
        "finish": "stop",
        "prompt_tokens": 9,
        "response_tokens": len(sampled),
    }
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(line))
    found = gap(session, DistillConfig(template="gsm8k"), load_distilled(file))

    answer = [*sampled, chat.end_id]
    system = TEMPLATES["gsm8k"].system
    assert system.endswith(
        "reference answer and write a response that appropriately answers the question."
    )
    shown = [{"role": "system", "content": system}, {"role": "user", "content": "Q?\n\nR r"}]

    def log_probabilities(messages):
        ids = chat.prompt_ids(messages)
        logits = model.logits([*ids, *answer])
        return torch.log_softmax(logits, -1)[len(ids) + len(prefix) - 1 : -1]

    p = log_probabilities(shown)  # (N, V)
    q = log_probabilities(line["messages"])
    n = len(answer) - len(prefix)
    assert len(p) == n == 6
    kl = (p.exp() * (p - q)).sum() / n
    reverse_kl = (q.exp() * (q - p)).sum() / n
    targets = torch.tensor(answer[len(prefix) :])[:, None]  # (N, 1)
    nll_gap = (p.gather(1, targets) - q.gather(1, targets)).mean()
    assert found["kl"] == pytest.approx(kl.item(), rel=1e-9)
    assert found["reverse_kl"] == pytest.approx(reverse_kl.item(), rel=1e-9)
    assert found["nll_gap"] == pytest.approx(nll_gap.item(), rel=1e-9)
    assert found["kl"] > 1e-3


@pytest.mark.parametrize(
    ("figures", "names", "go"),
    [
        ({}, [], True),
        ({"differ": 0.05}, ["differ"], False),
        ({"differ": 0.15}, ["differ"], True),
        ({"kl": 0.001}, ["kl"], False),
        ({"copy": 0.95}, ["copy"], False),
        ({"copy": 0.7}, ["copy"], True),
        ({"lift": -0.1, "own_nll": 3.0}, ["lift", "own_nll"], False),
        (
            {"ended": 0.1, "own_template": 0.0, "hedges_kept": 0.2},
            ["ended", "own_template", "hedges_kept"],
            True,
        ),
    ],
)
def test_a_figure_beyond_its_limit_is_a_reason(figures, names, go):
    sound = {
        "differ": 0.8,
        "kl": 0.7,
        "copy": 0.3,
        "lift": 0.4,
        "own_nll": 0.5,
        "garbled": 0.0,
        "ended": 1.0,
        "own_template": 1.0,
        "length": 1.2,
    }
    found = reasons_that_hold(sound | figures)
    assert [reason.figure for reason in found] == names
    assert go == (not any(reason.stops for reason in found))


def test_a_random_model_is_a_no_go_with_reasons(chat_dir, problems):
    """It prints NO-GO, the reasons, and a last line of JSON; it leaves no file behind."""
    before = sorted(problems.iterdir())
    args = ["--model", chat_dir, "--data", problems / "train.json", "--verify", "number"]
    args += ["--sample", "3"]
    printed = script("preflight", *args, "--max-new-tokens", "8", "--batch-rows", "2")
    found = json.loads(printed.splitlines()[-1])
    assert printed.splitlines()[-2].startswith("NO-GO: differ") and found["go"] is False
    assert "preflight on 3 of 8 rows" in printed and "right (number): 0% plain, 0% shown" in printed
    assert sum(found["status"].values()) == found["sample"] == 3 and found["own_nll"] > 1.5
    assert set(found["seconds"]) == {"distill", "score", "train sft", "train sdft"}
    assert all(seconds > 0 for seconds in found["seconds"].values()) and found["disk_mb"] > 0
    assert sorted(problems.iterdir()) == before
    assert "sample 1: expected at least 2" in script("preflight", *args[:-1], "1", code=2)
    # the checkpoint's own format, named or not, is no reason for a warning; another one is
    for form, own in (("own", 1.0), ("alpaca", 0.0)):
        printed = script("preflight", *args, "--max-new-tokens", "2", "--chat-format", form)
        assert json.loads(printed.splitlines()[-1])["own_template"] == own
        assert ("the chat format is not the checkpoint's own" in printed) == (own == 0.0)
