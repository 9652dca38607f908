"""Rows with tools, calls and thoughts: every notation is one conversation, with the right loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.data.config import DataConfig
from engine.data.conversation import check_turns
from engine.data.encode import EncodeRules, encode, template_takes
from engine.data.rows import load_rows
from engine.data.thinking import end_of_thoughts, without_thoughts
from model.chat import Chat
from model.messages import calls_of, tools_of
from model.tokenizer import load_tokenizer
from tests.helpers.data_files import bot, jsonl, system, user, write
from tests.helpers.llama_dirs import write_llama
from tests.helpers.tool_templates import (
    HERMES,
    LLAMA31,
    TOOLS,
    WEATHER,
    call,
    calling,
    result,
)

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = {"city": "Oslo", "days": 2}
CALL = call("get_weather", **ARGUMENTS)
MESSAGES = [user("Weather?"), calling(CALL), result("18"), bot("It is 18.")]
WITH_TOOLS = [{**MESSAGES[0], "tools": [WEATHER]}, *MESSAGES[1:]]


def openai(**of_call) -> list:
    """The conversation in OpenAI's notation, `of_call` in the call's message."""
    message = {"role": "assistant", "content": None, **of_call}
    return [user("Weather?"), message, {"role": "tool", "content": "18"}, bot("It is 18.")]


SHAREGPT = [
    {"from": "human", "value": "Weather?"},
    {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": ARGUMENTS})},
    {"from": "observation", "value": "18"},
    {"from": "gpt", "value": "It is 18."},
]
NOTATIONS = {
    "object arguments": {"messages": openai(tool_calls=[CALL]), "tools": [WEATHER]},
    "text arguments": {
        "messages": openai(
            tool_calls=[{"function": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}}]
        ),
        "tools": [WEATHER],
    },
    "bare calls, content absent": {
        "messages": [
            user("Weather?"),
            {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": ARGUMENTS}]},
            {"role": "tool", "content": 18},
            bot("It is 18."),
        ],
        "tools": json.dumps([WEATHER["function"]]),
    },
    "functions": {
        "messages": [
            user("Weather?"),
            {
                "role": "assistant",
                "content": "",
                "function_call": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)},
            },
            {"role": "function", "content": "18"},
            bot("It is 18."),
        ],
        "functions": [WEATHER["function"]],
    },
    "sharegpt": {"conversations": SHAREGPT, "tools": json.dumps([WEATHER])},
    "content as parts": {
        "messages": [
            user([{"type": "text", "text": "Weather?"}]),
            {"role": "assistant", "content": [], "tool_calls": [CALL]},
            {"role": "tool", "content": [{"type": "text", "text": "18"}]},
            bot("It is 18."),
        ],
        "tools": [WEATHER],
    },
}


@pytest.mark.parametrize("record", NOTATIONS.values(), ids=NOTATIONS)
def test_every_notation_of_calls_gives_the_same_conversation(tmp_path, record):
    (row,) = load_rows(jsonl(tmp_path / "a.jsonl", record))
    assert row.messages == tuple(WITH_TOOLS)
    assert row.turns == [1, 3] and row.reference == "It is 18."
    (prompt,) = load_rows(jsonl(tmp_path / "a.jsonl", record), need_reference=False)
    assert prompt.messages == tuple(WITH_TOOLS[:3])  # it ends with the tool's result


def test_tools_stand_in_the_first_message_and_can_be_left_out(tmp_path):
    record = {"messages": [system("Be brief."), *MESSAGES], "tools": TOOLS, "id": "r"}
    path = jsonl(tmp_path / "a.jsonl", record)
    (row,) = load_rows(path)
    assert row.messages[0] == {**system("Be brief."), "tools": TOOLS}
    (row,) = load_rows(path, columns={"tools": ""})
    assert row.messages == (system("Be brief."), *MESSAGES)
    other = jsonl(tmp_path / "b.jsonl", {"messages": MESSAGES, "api": TOOLS})
    (row,) = load_rows(other, columns={"tools": "api"})
    assert row.messages[0]["tools"] == TOOLS
    # named texts: a field of tools is not read, as it was not
    named = jsonl(tmp_path / "c.jsonl", {"q": "x", "a": "y", "tools": TOOLS})
    rows = load_rows(named, columns={"prompt": "q", "response": "a"})
    assert rows[0].messages == (user("x"), bot("y")) and rows.unused == ("tools",)


def test_the_ids_and_names_of_calls_and_results_stay(tmp_path):
    messages = [
        user("Weather?"),
        calling({**CALL, "id": "call_1"}),
        {"role": "tool", "content": {"celsius": 1.5}, "tool_call_id": "call_1", "name": "w"},
        bot("1.5"),
    ]
    (row,) = load_rows(jsonl(tmp_path / "a.jsonl", {"messages": messages}))
    assert row.messages[1]["tool_calls"][0]["id"] == "call_1"
    result_of_call = {**messages[2], "content": '{"celsius": 1.5}'}
    assert row.messages[2] == result_of_call
    arguments = row.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == ARGUMENTS and type(arguments["days"]) is int


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ("u c t t a", None),
        ("s u c t c t a u a", None),
        ("u a t a", None),  # its calls are spelled in its text
        ("u c", None),
        ("u c u a", "message 3 is the user's, expected the tool's"),
        ("u t a", "message 2 is the tool's, expected the assistant's"),
        ("t a", "message 1 is the tool's, expected the user's"),
        ("u c t", "the conversation does not end with the assistant"),
        ("u c t u a", "message 4 is the user's, expected the assistant's"),
    ],
)
def test_results_follow_calls(roles, reason):
    turns = {"s": system("x"), "u": user("x"), "a": bot("x"), "c": calling(CALL), "t": result("x")}
    messages = [turns[role] for role in roles.split()]
    if reason is None:
        check_turns(messages, last=("assistant",))
        return
    with pytest.raises(ValueError, match=reason):
        check_turns(messages, last=("assistant",))


def test_every_row_on_the_page_is_read(tmp_path):
    page = (ROOT / "engine" / "data" / "README.md").read_text(encoding="utf-8")
    examples = page.split("```jsonl\n")[1].split("```")[0]
    rows = load_rows(write(tmp_path / "a.jsonl", examples))
    assert len(rows) == len(examples.splitlines()) > 10 and not rows.unused
    called = [row for row in rows if any(calls_of(turn) for turn in row.messages)]
    assert len(called) == 2 and all(tools_of(row.messages) for row in called)
    assert rows[-1].messages == rows[-2].messages  # a thought beside the text, and inside of it


def test_a_row_of_no_shape_is_shown_beside_the_nearest_shape(tmp_path):
    row = {"instrction": "Add 1 and 2", "output": "3"}
    with pytest.raises(ValueError) as error:
        load_rows(jsonl(tmp_path / "a.jsonl", row))
    said = str(error.value)
    assert "the nearest is instruction/output, without 'instruction'" in said
    assert json.dumps(row) in said


# ---- the loss


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    path = write_llama(tmp_path_factory.mktemp("llama"), tokenizer=True)
    return Chat(HERMES, load_tokenizer(path))


def trained(chat, examples) -> list[str]:
    """The text that carries the loss of each example, its end token last."""
    texts = []
    for example in examples:
        answer = example.ids[example.n_prompt :]
        assert answer[-1] == chat.end_id
        texts.append(chat.tokenizer.decode(answer[:-1]))
    return texts


def test_calls_are_trained_on_and_results_are_not(chat, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"messages": MESSAGES, "tools": TOOLS})
    rows = load_rows(path, check=template_takes(chat))
    examples, counts = encode(rows, chat, EncodeRules(max_length=2000))
    first, second = trained(chat, examples)
    assert first == (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n'
        "</tool_call>"
    )
    assert second == "It is 18."
    assert examples[1].n_prompt == len(chat.prompt_ids(rows[0].messages[:3]))
    assert counts.examples == 2
    llama = Chat(LLAMA31, chat.tokenizer)
    examples, _ = encode(rows, llama, EncodeRules(max_length=4000))
    call_of_llama = '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 2}}'
    assert trained(llama, examples) == [call_of_llama, "It is 18."]


def test_weights_leave_calls_and_answers_out(chat, tmp_path):
    messages = [user("Weather?"), {**calling(CALL), "weight": 0}, *MESSAGES[2:]]
    rows = load_rows(jsonl(tmp_path / "a.jsonl", {"messages": messages}))
    examples, counts = encode(rows, chat, EncodeRules(max_length=2000))
    assert trained(chat, examples) == ["It is 18."] and counts.context == 1


def test_a_row_whose_calls_the_template_leaves_out_is_a_bad_row(chat, tmp_path):
    texts = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    without = Chat(texts + "{% endfor %}", chat.tokenizer)
    plain = {"messages": [user("a"), bot("b")]}
    path = jsonl(tmp_path / "a.jsonl", {"messages": MESSAGES}, plain)
    with pytest.raises(ValueError, match="a.jsonl:1 .row 1.: .* leaves out the assistant's tool"):
        load_rows(path, check=template_takes(without))
    assert len(load_rows(path, check=template_takes(without), skip_bad=True)) == 1


# ---- thoughts

THOUGHT = "<think>\nTwo and two.\n</think>\n\n"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (THOUGHT + "Four.", "Four."),
        ("<think></think>Four.", "Four."),
        ("<think>a</think>\n<think>b</think> Four.", "Four."),
        ("so it is\n</think>\n\nFour.", "Four."),  # the prompt opened it
        ("<think>never closed", ""),
        ("Four.", "Four."),
        ("Write <think>x</think> so.", "Write <think>x</think> so."),
    ],
)
def test_thoughts_are_what_an_answer_begins_with(text, answer):
    assert without_thoughts(text) == answer
    assert text[: end_of_thoughts(text)] + answer == text


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_beside_the_text_stands_before_it(tmp_path, key):
    beside = {"messages": [user("2 + 2?"), {**bot("Four."), key: "Two and two."}]}
    (row,) = load_rows(jsonl(tmp_path / "a.jsonl", beside))
    assert row.messages == (user("2 + 2?"), bot(THOUGHT + "Four."))


def thinking_file(tmp_path):
    """Two turns with thoughts."""
    turns = [user("2 + 2?"), bot(THOUGHT + "Four."), user("3 + 3?"), bot("<think>Hm.</think>Six.")]
    return jsonl(tmp_path / "a.jsonl", {"messages": turns})


def test_keep_strip_and_answer_only(chat, tmp_path):
    path = thinking_file(tmp_path)
    rows = {mode: load_rows(path, thinking=mode) for mode in ("keep", "strip", "answer-only")}
    assert rows["keep"][0].messages == rows["answer-only"][0].messages
    assert [turn["content"] for turn in rows["strip"][0].messages[1::2]] == ["Four.", "Six."]
    assert len({mode_rows[0].id for mode_rows in rows.values()}) == 1
    assert len({mode_rows.sha256 for mode_rows in rows.values()}) == 3
    assert rows["keep"].sha256 == load_rows(path).sha256
    texts = {}
    ids = {}
    for mode, mode_rows in rows.items():
        rules = EncodeRules(max_length=2000, answer_only=mode == "answer-only")
        examples, counts = encode(mode_rows, chat, rules)
        texts[mode] = trained(chat, examples)
        ids[mode] = [example.ids for example in examples]
        assert (counts.thought > 0) == (mode == "answer-only")
    assert texts["keep"] == [THOUGHT + "Four.", "<think>Hm.</think>Six."]
    assert texts["answer-only"] == texts["strip"] == ["Four.", "Six."]
    assert ids["answer-only"] == ids["keep"] != ids["strip"]  # what the model sees is the same


def test_a_truncated_answer_that_is_all_thought_is_no_example(chat, tmp_path):
    rows = load_rows(thinking_file(tmp_path), thinking="answer-only")
    examples, _ = encode(rows, chat, EncodeRules(max_length=2000, answer_only=True))
    first = examples[0]
    for left in (0, 1):  # tokens of the answer
        limit = first.n_prompt + left
        rules = EncodeRules(max_length=limit, truncate=True, drop_long=True, answer_only=True)
        kept, counts = encode(rows, chat, rules)
        assert [example.ids for example in kept] == ([first.ids[:limit]] if left else [])
        assert counts.dropped == 2 - left


@pytest.mark.parametrize("mode", ["strip", "answer-only"])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (THOUGHT, "message 2 is a thought without an answer behind it"),
        ("<think>never closed", "message 2 has a <think> that is not closed"),
        ("Four. <think>Or not?</think>", "behind the beginning of its text"),
    ],
)
def test_thoughts_that_cannot_be_told_are_bad_rows(tmp_path, mode, answer, reason):
    path = jsonl(tmp_path / "a.jsonl", {"messages": [user("2 + 2?"), bot(answer)]})
    assert len(load_rows(path)) == 1  # as text
    with pytest.raises(ValueError, match=f"a.jsonl:1 .*{reason}"):
        load_rows(path, thinking=mode)


def test_an_unknown_way_with_thoughts_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", "{}")
    with pytest.raises(ValueError, match="thinking='drop'; expected one of keep, strip, answer-on"):
        load_rows(path, thinking="drop")
    with pytest.raises(ValueError, match="thinking 'drop'"):
        DataConfig(str(path), thinking="drop").check()
