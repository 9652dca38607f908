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


def test_copying_by_hand():
    """5 words hold two 4-grams, one of them in the source."""
    assert copied("The cat sat down today", "Well, the cat sat down.") == 1 / 2
    assert copied("the cat SAT down!", "The cat sat down") == 1 and copied("a b c d", "e f") == 0
    assert copied("42", "It is 42") == 1 and copied("", "x") == copied("!", "x") == 0
    assert copied("one two", "") == 0


def test_hedging_by_hand():
    assert hedges_per_100_words(["Wait, maybe not. Hmm,", "it is so."]) == pytest.approx(
        100 * 3 / 7
    )
    assert hedges_per_100_words(["The waiter may be late"]) == 0


def test_the_gap_against_fp64(chat_dir, tmp_path):
    """KL(shown || plain), its reverse and the gap over the sampled tokens and their end."""
    session = Session.open(ModelConfig(str(chat_dir), dtype="float64"))
    chat, model = session.chat, session.model
    line = {"id": "a/0", "messages": [{"role": "user", "content": "Q?"}], "reference": "R r",
            "response": "hello", "response_ids": chat.response_ids("hello"), "target": "hello",
            "status": "accepted", "stage": "guided", "finish": "stop", "prompt_tokens": 9,
            "response_tokens": 5}  # fmt: skip
    file = tmp_path / "d.jsonl"
    # a forced beginning does not count
    prefix = chat.prefix_ids("Great! Let's think step by step. ")
    forced = [*prefix, *chat.response_ids("hello")]
    file.write_text(json.dumps(line | {"response_ids": forced, "response_tokens": len(forced)}))
    lines = load_distilled(file)
    found = gap(session, DistillConfig(template="gsm8k"), lines)
    answer = [*forced, chat.end_id]
    system = "reference answer and write a response that appropriately answers the question."
    shown = [{"role": "user", "content": "Q?\n\nR r"}]
    assert TEMPLATES["gsm8k"].system.endswith(system)
    shown = [{"role": "system", "content": TEMPLATES["gsm8k"].system}, *shown]
    logs = []
    for messages in (shown, line["messages"]):
        ids = chat.prompt_ids(messages)
        logits = model.logits([*ids, *answer])
        logs.append(torch.log_softmax(logits, -1)[len(ids) + len(prefix) - 1 : -1])
    p, q = logs
    n = len(answer) - len(prefix)
    assert len(p) == n == 6
    there = torch.tensor(answer[len(prefix) :])[:, None]
    assert found["kl"] == pytest.approx(((p.exp() * (p - q)).sum() / n).item(), rel=1e-9)
    assert found["reverse_kl"] == pytest.approx(((q.exp() * (q - p)).sum() / n).item(), rel=1e-9)
    want = (p.gather(1, there) - q.gather(1, there)).mean().item()
    assert found["nll_gap"] == pytest.approx(want, rel=1e-9) and found["kl"] > 1e-3


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
        ({"ended": 0.1, "own_template": 0.0, "hedges_kept": 0.2}, 3, True),
    ],
)
def test_reasons(figures, names, go):
    sound = {"differ": 0.8, "kl": 0.7, "copy": 0.3, "lift": 0.4, "own_nll": 0.5, "garbled": 0.0,
             "ended": 1.0, "own_template": 1.0, "length": 1.2}  # fmt: skip
    found = reasons_that_hold(sound | figures)
    assert len(found) == 3 if names == 3 else [reason.figure for reason in found] == names
    assert go == (not any(reason.stops for reason in found))


def test_a_preflight_of_a_random_model(chat_dir, problems):
    """It says NO, why, and as JSON in the last line; it leaves nothing behind."""
    before = sorted(problems.iterdir())
    args = [
        "--model",
        chat_dir,
        "--data",
        problems / "train.json",
        "--verify",
        "number",
        "--sample",
        "3",
    ]
    printed = script("preflight", *args, "--max-new-tokens", "8", "--batch-rows", "2")
    found = json.loads(printed.splitlines()[-1])
    assert printed.splitlines()[-2].startswith("NO-GO: differ") and found["go"] is False
    assert "preflight on 3 of 8 rows" in printed and "right (number): 0% plain, 0% shown" in printed
    assert sum(found["status"].values()) == found["sample"] == 3 and found["own_nll"] > 1.5
    assert set(found["seconds"]) == {"distill", "score", "train sft", "train sdft"}
    assert all(seconds > 0 for seconds in found["seconds"].values()) and found["disk_mb"] > 0
    assert sorted(problems.iterdir()) == before
    assert "sample 1: expected at least 2" in script("preflight", *args[:-1], "1", code=2)
    # the checkpoint's own format, named or not, is no reason to worry; another one is
    for form, own in (("own", 1.0), ("alpaca", 0.0)):
        printed = script("preflight", *args, "--max-new-tokens", "2", "--chat-format", form)
        assert json.loads(printed.splitlines()[-1])["own_template"] == own
        assert ("the chat format is not the checkpoint's own" in printed) == (own == 0.0)
