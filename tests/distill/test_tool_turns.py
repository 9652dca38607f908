"""Rewriting conversations with tools and thoughts: prompts, verdicts, lines, targets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.data.distilled import load_distilled
from engine.data.encode import EncodeRules, encode
from engine.data.rows import Row, load_rows
from engine.distill import writer as writer_module
from engine.distill.cascade import AssistantTurn, TurnAttempts
from engine.distill.config import DistillConfig
from engine.distill.rewrite_prompts import TEMPLATES, prompt
from engine.distill.writer import judged_attempt, status_of_text
from engine.runtime.files import read_jsonl
from engine.sampling.requests import Completion
from model.chat import Chat
from model.tokenizer import load_tokenizer
from tests.helpers.data_files import bot, jsonl, system, user
from tests.helpers.distillation import CONFIG, run_distillation
from tests.helpers.llama_dirs import write_llama
from tests.helpers.tool_templates import (
    CONVERSATION,
    HERMES,
    THINKING,
    TOOLS,
    call,
    calling,
    result,
)

CALL = call("get_weather", city="Oslo")
MESSAGES = [user("Weather?"), calling(CALL), result("18"), bot("It is 18 degrees.")]
WITH_TOOLS = ({**MESSAGES[0], "tools": TOOLS}, *MESSAGES[1:])
WRITTEN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random Llama with a template of Hermes' style."""
    path = write_llama(
        tmp_path_factory.mktemp("llama"), tokenizer=True, max_position_embeddings=4096
    )
    (path / "chat_template.jinja").write_text(HERMES, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chat(directory):
    return Chat.from_dir(directory, load_tokenizer(directory))


# ---- prompts that ask for a rewrite


def test_the_users_last_message_asks_and_what_follows_it_stays(chat):
    for template in TEMPLATES.values():
        context = (system("Be brief."), *WITH_TOOLS[:3])
        asked = prompt(chat, template, context, "REFERENCE")
        assert asked[0]["tools"] == TOOLS and sum("tools" in turn for turn in asked) == 1
        (question,) = [turn for turn in asked if turn["role"] == "user"]
        assert "Weather?" in question["content"] and "REFERENCE" in question["content"]
        assert asked[-2:] == [calling(CALL), result("18")]
        assert any("Be brief." in turn["content"] for turn in asked)
        assert "get_time" in chat.render(asked, add_generation_prompt=True)


def test_a_reference_that_calls_is_shown_as_the_template_writes_it(chat):
    row = Row("r", WITH_TOOLS)
    turn = AssistantTurn.first(row)
    assert turn.shown_reference(chat) == WRITTEN
    following = turn.following("whatever was sampled")
    assert following.context == list(WITH_TOOLS[:3])  # the results belong to the data's calls
    assert following.shown_reference(chat) == "It is 18 degrees."


# ---- verdicts


def status(chat, row, number, text, verify="none", finish="stop"):
    turn = AssistantTurn.first(row)
    for _ in range(number):
        turn = turn.following("x")
    config = DistillConfig(verify=verify)
    return status_of_text(chat, config, turn, text, finish)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WRITTEN, "identical"),
        (WRITTEN.replace(": ", ":").replace("\n", ""), "accepted"),
        ("I will look up the weather in Oslo.", "no_call"),
        (WRITTEN.replace("Oslo", "Rome"), "mismatch"),
        (WRITTEN.replace("<tool_call>", "```").replace("</tool_call>", "```"), "notation"),
    ],
)
@pytest.mark.parametrize("verify", ["none", "number"])
def test_a_rewrite_of_a_call_must_make_the_same_call(chat, text, expected, verify):
    assert status(chat, Row("r", WITH_TOOLS), 0, text, verify) == expected


def test_a_users_own_verifier_judges_calls_itself(chat):
    own = "tests.verify.test_tool_calls:makes_a_call"
    assert status(chat, Row("r", WITH_TOOLS), 0, "no call at all", own) == "accepted"


def test_a_thought_before_a_call_is_no_text_beside_it(chat):
    """Under keep it is kept; a call in a thought is none."""
    thought = "<think>\nOslo it is.\n</think>\n\n"
    for mode, text, expected in (
        ("keep", thought + WRITTEN, "accepted"),
        ("keep", f"<think>{WRITTEN}</think>", "no_call"),
        ("answer-only", thought + WRITTEN, "identical"),
        ("strip", thought + WRITTEN, "thinks"),
        ("strip", "<think>\n\n</think>\n\n" + WRITTEN, "identical"),
        ("keep", "Oslo it is.\n" + WRITTEN, "notation"),
    ):
        row = Row("r", WITH_TOOLS, thinking=mode)
        assert status(chat, row, 0, text) == expected, (mode, text)


def test_an_empty_thought_of_the_template_is_not_shown_as_a_reference(chat):
    thinking = Chat(THINKING, chat.tokenizer)
    turn = AssistantTurn.first(Row("r", WITH_TOOLS))
    assert turn.shown_reference(thinking) == WRITTEN
    assert status(thinking, turn.row, 0, WRITTEN) == "identical"


def test_control_tokens_of_calls_must_be_sampled_too(chat):
    """Mistral's templates put one before calls, which no text shows."""
    with_control = HERMES.replace("'\\n<tool_call>", "'\\n<|endoftext|><tool_call>")
    marked = Chat(with_control, chat.tokenizer)
    turn = AssistantTurn.first(Row("r", WITH_TOOLS))
    ids = marked.target(turn.context, turn.answer).answer
    control = marked.tokenizer.special["<|endoftext|>"]
    assert ids.count(control) == 1
    without = [id for id in ids if id != control]
    config = DistillConfig(verify="none")
    for sampled, expected in ((ids, "identical"), (without, "notation")):
        attempts = TurnAttempts(turn, config.stages)
        completion = Completion("r/0", 0, sampled, "", "stop", [], 9)
        assert judged_attempt(marked, config, attempts, completion).status == expected


def test_an_answer_after_a_result_is_judged_by_the_verifier(chat):
    row = Row("r", WITH_TOOLS)
    assert status(chat, row, 1, "18 degrees.", "number") == "accepted"
    assert status(chat, row, 1, "17 degrees.", "number") == "mismatch"
    assert status(chat, row, 1, "Weather?", "none") == "repeats_prompt"


def test_thoughts_in_rewrites_are_judged_as_thinking_says(chat):
    reference = "<think>Two and two.</think>It is 4."
    said = "<think>5? No.</think>So: 4."
    for mode, text, expected in (
        ("keep", said, "accepted"),
        ("keep", "<think>It is 4.</think>5", "mismatch"),
        ("answer-only", said, "accepted"),
        ("answer-only", "<think>Hm.</think>It is 4.", "identical"),
        ("answer-only", "<think>4", "empty"),
        ("answer-only", "<think>4</think>It is 5.", "mismatch"),
        ("strip", said, "thinks"),
        ("strip", "So: 4.", "accepted"),
    ):
        row = Row("r", (user("2 + 2?"), bot(reference)), thinking=mode)
        assert status(chat, row, 0, text, "number") == expected, (mode, text)


# ---- lines


def test_lines_of_calls_are_trained_on_as_the_template_writes_them(
    directory, chat, tmp_path, monkeypatch
):
    """With a stand-in for the verdict: the first turn's rewrite is rejected, the second's kept."""

    def judge(chat, config, turn, text, finish):
        return "accepted" if turn.number == 1 else "mismatch"

    monkeypatch.setattr(writer_module, "status_of_text", judge)
    out = tmp_path / "d.jsonl"
    rows = [Row("r", WITH_TOOLS), Row("s", (user("Hi"), bot("Hello")))]
    run_distillation(directory, out, CONFIG, given=rows)
    first, second, plain = load_distilled(out)
    assert first.answer == calling(CALL) and first.reference == first.target == WRITTEN
    assert second.messages == list(WITH_TOOLS[:3]) and second.answer == {}
    assert second.target == second.response
    records = read_jsonl(out)
    assert ["answer" in record for record in records] == [True, False, False]

    examples, counts = encode([first, second], chat, EncodeRules(max_length=4000))
    whole = chat.target(WITH_TOOLS[:1], WITH_TOOLS[1])
    assert examples[0].ids == [*whole.prompt, *whole.answer, chat.end_id]
    assert chat.tokenizer.decode(whole.answer) == WRITTEN
    assert examples[1].ids[examples[1].n_prompt :][:-1] == second.response_ids
    assert counts.from_response == 1
    of_references, _ = encode(
        [first, second], chat, EncodeRules(max_length=4000, target="reference")
    )
    of_rows, _ = encode(rows[:1], chat, EncodeRules(max_length=4000))
    assert of_references == of_rows


def test_thoughts_of_sampled_ids_carry_no_loss(chat):
    """The mask of sampled tokens, by hand: one token a byte."""
    text = "<think>Hm.</think>\nSo: 4."
    ids = list(text.encode())
    line = SimpleNamespace(
        id="r/0",
        messages=[user("2 + 2?")],
        reference="4",
        response=text,
        response_ids=ids,
        target=text,
        status="accepted",
        stage="guided",
        finish="stop",
        answer={},
    )
    (example,), _ = encode([line], chat, EncodeRules(max_length=999, answer_only=True))
    assert example.ids[example.n_prompt :] == [*b"So: 4.", chat.end_id]
    assert example.ids[: example.n_prompt] == [*chat.prompt_ids(line.messages), *ids[:-6]]


def test_distilled_data_with_thoughts_cannot_be_stripped_afterwards(tmp_path):
    from engine.data.distilled import check_without_thoughts
    from tests.data.test_encode import line

    thinking = line(reference="<think>a</think>b")
    with pytest.raises(ValueError, match="r/0 has thoughts.*--thinking strip must be given"):
        check_without_thoughts(load_distilled(jsonl(tmp_path / "d.jsonl", thinking))[0], tmp_path)
    check_without_thoughts(load_distilled(jsonl(tmp_path / "e.jsonl", line()))[0], tmp_path)


def test_conversations_with_tools_load_as_they_are_written(tmp_path):
    (row,) = load_rows(jsonl(tmp_path / "a.jsonl", {"messages": CONVERSATION, "tools": TOOLS}))
    assert row.messages == ({**CONVERSATION[0], "tools": TOOLS}, *CONVERSATION[1:])
