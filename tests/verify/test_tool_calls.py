"""Verdicts for answers that call tools: calls compared as objects, and written as asked."""

from __future__ import annotations

import json

import pytest

from engine.data.rows import Row
from engine.verify.tool_calls import calls_in, notation, verdict, verify_tool_calls
from engine.verify.tool_calls import verify_written_calls as written
from engine.verify.verifiers import get_verifier
from tests.helpers.data_files import bot, user
from tests.helpers.tool_templates import call, calling

CALLS = [call("find", city="Oslo", price=10, open=True)]
AS_TEMPLATE = '{"name": "find", "parameters": {"city": "Oslo", "price": 10, "open": true}}'
PAIR = [call("find", city="Oslo"), call("find", city="Rome")]

SAME = [
    AS_TEMPLATE,
    '{"parameters": {"open": true, "price": 10.0, "city": "Oslo"}, "name": "find"}',
    '{"name": "find", "parameters": {"price": 1e1, "city": "\\u004fslo", "open": true}}',
    '<tool_call>{"name": "find", "arguments": {"city":"Oslo","price":10,"open":true}}</tool_call>',
    json.dumps(
        {"name": "find", "arguments": json.dumps({"city": "Oslo", "price": 10, "open": True})}
    ),
    '[{"type": "function", "function": ' + AS_TEMPLATE + "}]",
    'I look: find(price=10, city="Oslo", open=True)',
    "<function=find>\n<parameter=open>\ntrue\n</parameter>\n<parameter=city>Oslo</parameter>\n"
    "<parameter=price>\n10.0\n</parameter></function>",
    "<think>" + AS_TEMPLATE + "</think>" + AS_TEMPLATE,
]
OTHER = {
    AS_TEMPLATE.replace("Oslo", "oslo"): "mismatch",
    AS_TEMPLATE.replace("10", '"10"'): "mismatch",
    AS_TEMPLATE.replace("true", "1"): "mismatch",
    AS_TEMPLATE.replace("find", "find2"): "mismatch",
    AS_TEMPLATE.replace(', "open": true', ""): "mismatch",
    AS_TEMPLATE + AS_TEMPLATE: "mismatch",
    AS_TEMPLATE + ' {"name": "other", "parameters": {}}': "mismatch",
    "It is 18 degrees.": "no_call",
    'find("Oslo", 10, True)': "no_call",
    AS_TEMPLATE[:-1]: "no_call",
    "<function=find><parameter=city>Rome</parameter></function>": "mismatch",
    "<function=find><parameter=city>Oslo</parameter>": "no_call",
    "<think>" + AS_TEMPLATE + "</think>I do not know.": "no_call",
}


@pytest.mark.parametrize("text", SAME)
def test_equal_calls_are_accepted_however_they_are_written(text):
    assert verify_tool_calls(CALLS, text) == (True, "ok")


@pytest.mark.parametrize(("text", "reason"), OTHER.items())
def test_other_calls_are_rejected(text, reason):
    assert verify_tool_calls(CALLS, text) == (False, reason)


def test_the_order_of_parallel_calls_does_not_count_and_their_number_does():
    first = json.dumps(PAIR[0]["function"])
    second = json.dumps(PAIR[1]["function"])
    assert verify_tool_calls(PAIR, second + "\n" + first)[0]
    assert not verify_tool_calls(PAIR, first)[0]
    assert not verify_tool_calls(PAIR, first + second + second)[0]
    assert sum(calls_in(first + first).values()) == 2


def test_arguments_in_tags_are_compared_by_what_they_can_be_read_as():
    values = ("2", 2, 2.0, True, None, [1, {"a": "b"}], "two\nlines", "None", "<b>x</b>", "")
    calls = [call("f", a=value) for value in values]
    written = [value if isinstance(value, str) else json.dumps(value) for value in values]
    for value, text in zip(calls, written, strict=True):
        in_tags = f"<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>"
        assert verify_tool_calls([value], in_tags) == (True, "ok")
        assert verify_tool_calls([value], in_tags.replace("=a>", "=b>")) == (False, "mismatch")
        twice = (False, "mismatch")
        assert verify_tool_calls([value], in_tags + in_tags) == twice
    python_style = "<function=f><parameter=a>True</parameter></function>"
    assert verify_tool_calls([call("f", a=True)], python_style) == (True, "ok")
    assert verify_tool_calls([call("f", a=1)], python_style) == (False, "mismatch")
    text = "<function=f><parameter=a>x</parameter></function>"
    in_json = [call("write", code=text)]
    assert verify_tool_calls(in_json, json.dumps(in_json[0]["function"])) == (True, "ok")
    endless = "<function=f>" * 20000 + "<parameter=a>" * 20000
    assert verify_tool_calls(in_json, endless) == (False, "no_call")


HERMES = '<tool_call>\n{"name": "find", "arguments": {"city": "Oslo"}}\n</tool_call>'


TAGS = (
    "<tool_call>\n<function=find>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
)


@pytest.mark.parametrize(
    ("alone", "text", "has_text", "reason"),
    [
        (HERMES, '<tool_call>{"arguments":{"city":"Oslo"},"name":"find"}</tool_call>', False, "ok"),
        (HERMES, "I look it up.\n" + HERMES, True, "ok"),
        (HERMES, "I look it up.\n" + HERMES, False, "notation"),
        (HERMES, HERMES.replace("tool_call", "call"), False, "notation"),
        (HERMES, HERMES.replace("arguments", "parameters"), True, "notation"),
        (HERMES, '{"name": "find", "arguments": {"city": "Oslo"}}', True, "notation"),
        (
            HERMES,
            HERMES.replace('{"city": "Oslo"}', '"{\\"city\\": \\"Oslo\\"}"'),
            False,
            "notation",
        ),
        (HERMES, 'find(city="Oslo")', False, "notation"),
        ('[find(city="Oslo")]', '[find(city = "Oslo")]', False, "ok"),
        ('[find(city="Oslo")]', '```find(city = "Oslo")```', False, "notation"),
        (TAGS, TAGS.replace("\n", ""), False, "ok"),
        (TAGS, TAGS.replace("tool_call", "call"), False, "notation"),
        (TAGS, HERMES, False, "notation"),
        (HERMES, TAGS, False, "notation"),
        (HERMES, "<think>Oslo?</think>\n" + HERMES, False, "ok"),
        (HERMES, HERMES.replace("Oslo", "Rome"), False, "mismatch"),
    ],
)
def test_a_call_must_be_written_as_the_template_writes_it(alone, text, has_text, reason):
    calls = [call("find", city="Oslo")]
    row = Row("", (user("x"), calling(*calls)))
    assert written(calls, alone, has_text, row, text) == (reason == "ok", reason)


def test_notation_is_what_stands_around_calls():
    assert notation(HERMES) == "<tool_call>{arguments,name:text}</tool_call>"
    assert notation('x [find(city="Oslo"), f()] y') == "x[(),()]y"
    assert notation("{1, 2} and [3]") == "{1,2}and[3]"


def makes_a_call(row, text):
    """A user's verifier: the row's answer is a message with calls."""
    return bool(row.messages[-1]["tool_calls"]), "asked"


def test_a_verdict_looks_at_calls_and_behind_thoughts():
    number = get_verifier("number")
    row = Row("", (user("x"), calling(*CALLS)))
    assert verdict(number, row, AS_TEMPLATE) == (True, "ok")  # whatever --verify says
    assert verdict(number, row, "10") == (False, "no_call")
    thinking = (user("2 + 2?"), bot("<think>3? no</think>It is 4."))
    text = "<think>Perhaps 4.</think>It is 5."
    assert verdict(number, Row("", thinking), "5 <think>4</think>") == (True, "ok")  # text
    for mode in ("answer-only", "strip"):
        assert verdict(number, Row("", thinking, thinking=mode), text) == (False, "mismatch")
        right = text.replace("5", "4")
        assert verdict(number, Row("", thinking, thinking=mode), right) == (True, "ok")
    own = get_verifier("tests.verify.test_tool_calls:makes_a_call")
    assert verdict(own, row, "anything") == (True, "asked")
    exact = get_verifier("exact")
    assert verdict(exact, Row("", thinking, thinking="answer-only"), "It is 4.") == (True, "ok")
    assert verdict(exact, Row("", thinking), "It is 4.") == (False, "mismatch")
