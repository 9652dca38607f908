"""What it costs to measure an arm with the 900 instructions: counted over the task itself."""

from __future__ import annotations

import pytest

from benchmarks import instructions
from engine.session import ModelConfig, Session


def test_items_tokens_and_seconds_of_an_arm_are_counted(tiny_llama_dir):
    session = Session.open(ModelConfig(str(tiny_llama_dir(tokenizer=True))))
    found = instructions.document(session, 3)
    assert found["items"] == found["scores"]["n"] == 3 and 3 <= found["tokens"] <= 3 * 64
    assert found["cut_short"] <= 3 and found["environment"]["threads"]
    assert found["items_s"] == pytest.approx(3 / found["seconds"])
    assert found["tokens_s"] == pytest.approx(found["tokens"] / found["seconds"])
    assert 0 < found["processor_seconds"] and 0 < found["seconds"]
