"""`--drop-rejected`: rejection-sampling fine-tuning trains on accepted rewrites alone."""

from __future__ import annotations

import pytest

from engine.data.distilled import Distilled
from engine.data.encode import EncodeRules, encode
from engine.data.rows import Row
from model.chat import Chat
from model.tokenizer import load_tokenizer


@pytest.fixture
def chat(chat_dir):
    return Chat.from_dir(chat_dir, load_tokenizer(chat_dir))


def line(id, status, context=(), reference="no"):
    """A distilled line whose response is "yes"."""
    kept = status in ("accepted", "identical")
    return Distilled(
        id=id,
        messages=[*context, {"role": "user", "content": f"Say {id}"}],
        reference=reference,
        response="yes",
        response_ids=[121, 101, 115],
        target="yes" if kept else reference,
        status=status,
        stage="guided" if kept else "reference",
        finish="stop",
        prompt_tokens=1,
        response_tokens=3,
    )


STATUSES = ["accepted", "mismatch", "identical", "truncated", "context_only", "not_asked"]


def test_rejected_rows_leave_and_are_counted(chat):
    """Rows for which no rewrite was asked stay: nothing of theirs was rejected."""
    lines = [line(f"r{i}/0", status) for i, status in enumerate(STATUSES)]
    plain, before = encode(lines, chat, EncodeRules(max_length=99))
    examples, counts = encode(lines, chat, EncodeRules(max_length=99, drop_rejected=True))
    assert [example.id for example in examples] == ["r0/0", "r2/0", "r5/0"]
    assert (counts.examples, counts.rejected, counts.context) == (3, 2, 1)
    assert (before.examples, before.rejected) == (5, 0)
    assert examples == [example for example in plain if example.id in ("r0/0", "r2/0", "r5/0")]


def test_a_rejected_turn_stays_in_the_context_of_later_ones(chat):
    context = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "no"}]
    lines = [line("r/0", "mismatch"), line("r/1", "accepted", context)]
    (example,), _ = encode(lines, chat, EncodeRules(max_length=99, drop_rejected=True))
    assert example.id == "r/1"
    assert example.ids[: example.n_prompt] == chat.prompt_ids(lines[1].messages)


def test_nothing_left_says_why_and_what_to_do(chat):
    rules = EncodeRules(max_length=99, drop_rejected=True)
    lines = [line("a/0", "mismatch"), line("b/0", "banned"), line("c/0", "mismatch")]
    expected = r"all 3 rewrites were rejected \(mismatch 2, banned 1\).*leave out --drop-rejected"
    with pytest.raises(ValueError, match=expected):
        encode(lines, chat, rules)
    row = Row("a", ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}))
    plain = EncodeRules(max_length=99, drop_rejected=True, target="reference")
    with pytest.raises(ValueError, match="--drop-rejected: these rows have no rewrites"):
        encode([row], chat, plain)
