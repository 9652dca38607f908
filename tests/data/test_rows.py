"""Files to rows (engine/data/rows.py): every shape, every kind of bad row with its line, ids,
encodings.

The real files of ../shared/data are loaded where they are present.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.data.config import DataConfig
from engine.data.data_file import DataFile
from engine.data.distilled import is_distilled, load_distilled
from engine.data.encode import prompts_of
from engine.data.record_shapes import parse_columns
from engine.data.rows import load_rows
from tests.helpers.data_files import bot, jsonl, system, user, write

# ---- shapes

SHAPES = {
    "alpaca": ({"instruction": "Add", "input": "1 2", "output": "3"}, [user("Add\n1 2"), bot("3")]),
    "alpaca without input": ({"instruction": "Hi", "output": "Yo"}, [user("Hi"), bot("Yo")]),
    "alpaca, blank input": (
        {"instruction": "Hi", "input": " \n", "output": "Yo", "history": None},
        [user("Hi"), bot("Yo")],
    ),
    "alpaca with history": (
        {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "s"},
        [system("s"), user("a"), bot("b"), user("c"), bot("d")],
    ),
    "question": ({"question": "q", "answer": "a"}, [user("q"), bot("a")]),
    "response": ({"prompt": "q", "response": "a"}, [user("q"), bot("a")]),
    "completion": ({"prompt": "q", "completion": "a"}, [user("q"), bot("a")]),
    "messages": (
        {"messages": [system(""), user("a"), bot("b"), user("c"), bot("d")]},
        [system(""), user("a"), bot("b"), user("c"), bot("d")],
    ),
    "messages beside a prompt": (
        {"prompt": "x", "messages": [user("a"), bot("b")]},
        [user("a"), bot("b")],
    ),
    "sharegpt": (
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        },
        [system("s"), user("a"), bot("b")],
    ),
    "text as it is": (
        {"question": " q\u2028\n", "answer": "\ta "},
        [user(" q\u2028\n"), bot("\ta ")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("record, messages", SHAPES.values(), ids=SHAPES)
def test_the_shape_of_a_record_is_found_by_its_field_names(tmp_path, record, messages):
    for path in (
        write(tmp_path / "a.json", json.dumps([record])),
        jsonl(tmp_path / "a.jsonl", record),
    ):
        (row,) = load_rows(path)
        assert list(row.messages) == messages
        assert row.reference == messages[-1]["content"]
        assert [row.messages[i]["role"] for i in row.turns] == ["assistant"] * len(row.turns)
        (prompt,) = load_rows(path, need_reference=False)
        assert list(prompt.messages) == messages[:-1]
        with pytest.raises(ValueError, match="prompt only"):
            _ = prompt.reference


def test_columns_name_fields_and_unused_fields_are_listed(tmp_path):
    path = write(
        tmp_path / "a.csv", 'goal,target,note\r\n"do, ""it""\ntwice",sure,x\r\n\r\nb,ok,y\r\n'
    )
    with pytest.raises(ValueError, match="'goal', 'target', 'note' fit no known shape"):
        load_rows(path)
    rows = load_rows(path, columns=parse_columns("prompt=goal, response=target"))
    assert [row.messages[0]["content"] for row in rows] == ['do, "it"\ntwice', "b"]
    assert rows[1].reference == "ok" and rows.unused == ("note",)
    prompts = load_rows(path, columns={"prompt": "goal", "id": "note"}, need_reference=False)
    assert [row.id for row in prompts] == ["x", "y"] and prompts.unused == ("target",)

    named = jsonl(tmp_path / "a.jsonl", {"q": "a", "context": "b", "r": "c", "input": "not asked"})
    rows = load_rows(named, columns=parse_columns("prompt=q,input=context,response=r"))
    assert rows[0].messages[0]["content"] == "a\nb" and rows.unused == ("input",)


@pytest.mark.parametrize(
    "text", ["", "prompt", "prompt=", "=a", "prompt=a,prompt=b", "goal=prompt", "prompt=a,,"]
)
def test_columns_that_cannot_be_parsed_are_refused(text):
    with pytest.raises(ValueError, match="expected ROLE=FIELD"):
        parse_columns(text)


@pytest.mark.parametrize(
    "columns", [{"response": "a"}, {"prompt": "a"}, {"prompt": "a", "messages": "b"}, {"goal": "a"}]
)
def test_columns_from_which_no_row_can_be_made_are_refused(tmp_path, columns):
    with pytest.raises(ValueError, match="columns"):
        load_rows(jsonl(tmp_path / "a.jsonl", {"a": "b"}), columns=columns)


# ---- bad rows

BAD = [  # (line of a JSONL file, part of the reason)
    ('{"question": "q", "answer": "  "}', "'answer' is empty"),
    ('{"question": "", "answer": "a"}', "'question' is empty"),
    ('{"question": "q", "answer": NaN}', "'answer' is a number, expected text"),
    ('{"question": "q", "answer": null}', "'answer' is null, expected text"),
    ('{"question": "q", "answer": true}', "'answer' is a boolean, expected text"),
    ('{"question": ["q"], "answer": "a"}', "'question' is a list, expected text"),
    ('{"question": "q"}', "fields 'question' fit no known shape"),
    ("{}", "fields (none) fit no known shape"),
    ('{"question": "q", "answer": "a", "prompt": "p", "response": "r"}', "fits question/answer"),
    ('{"prompt": "p", "response": "r", "completion": "c"}', "fits prompt/response and"),
    ('["q", "a"]', "the row is a list, expected an object"),
    ('{"question": "q", "answer": "a"', "bad JSON: Expecting ',' delimiter (column 33)"),
    ("nonsense", "bad JSON: Expecting value (column 1)"),
    ('{"question": "q", "answer": ' + "[" * 100_000 + "}", "bad JSON"),
    ('{"question": "q", "answer": ' + "9" * 9_999 + "}", "bad JSON"),
    ('{"question": "\\ud83d", "answer": "a"}', "half of a surrogate pair"),
    ('{"question": "q", "answer": "a", "id": 1.5}', "'id' is a number, expected text or an integ"),
    ('{"question": "q", "answer": "a", "id": ""}', "'id' is empty"),
    ('{"question": "q", "answer": "a", "id": false}', "'id' is a boolean"),
    ('{"instruction": "i", "input": [7], "output": "o"}', "'input' is a list"),
    ('{"instruction": "i", "output": "o", "history": "h"}', "not a list of [user, assistant]"),
    ('{"instruction": "i", "output": "o", "history": [["a"]]}', "not a list of [user, assistant]"),
    ('{"instruction": "i", "output": "o", "history": [["a", " "]]}', "'history 1, assistant' is"),
    ('{"instruction": "i", "output": "o", "system": 5}', "'system' is a number"),
    ('{"messages": []}', "'messages' is empty, expected a list of messages"),
    ('{"messages": "hi"}', "'messages' is text, expected a list of messages"),
    ('{"messages": ["hi"]}', "message 1 is text, expected an object"),
    ('{"messages": [{"role": "critic", "content": "x"}]}', "message 1: unknown role 'critic'"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', "message 1: unknown role ['user']"),
    ('{"messages": [{"content": "x"}]}', "message 1: unknown role None"),
    ('{"messages": [{"role": "user", "content": [{"text": "x"}]}]}', "'message 1' is a list"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "does not end with the assistant"),
    ('{"messages": [{"role": "system", "content": "x"}]}', "does not end with the assistant"),
    (
        '{"messages": [{"role": "assistant", "content": "x"}]}',
        "message 1 is the assistant's, expected the user's",
    ),
    (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}',
        "message 2 is the user's, expected the assistant's",
    ),
    (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}',
        "message 2 is the system's, expected the assistant's",
    ),
    (
        '{"system": "s", "messages": [{"role": "system", "content": "x"},'
        '{"role": "user", "content": "y"}, {"role": "assistant", "content": "z"}]}',
        "both a system message and a 'system' field",
    ),
]  # fmt: skip
GOOD = '{"question": "how many?", "answer": "two"}'


def said(**assistant) -> str:
    """A row whose assistant's message has further keys, or other values."""
    answer = {"role": "assistant", "content": "Let me look that up.", **assistant}
    return json.dumps({"messages": [{"role": "user", "content": "x"}, answer]})


BAD += [  # texts that would be lost, or trained on although the row says otherwise
    (said(tool_calls=[{"id": "1"}]), "message 2, 'tool_calls', call 1 has no name of a function"),
    (said(tool_calls="[1"), "message 2, 'tool_calls': not valid JSON"),
    (said(function_call={"name": "f", "arguments": "{"}), "the arguments of 'f': not valid JSON"),
    (said(function_call={"name": "f", "arguments": [1]}), "the arguments of 'f' are a list"),
    (said(tool_calls=[{"name": "f"}], function_call={"name": "f"}), "has both 'tool_calls' and"),
    (
        said(role="function_call", content='{"name": "f"}', tool_calls=[{"name": "f"}]),
        "message 2 has calls in its text and calls beside it",
    ),
    (said(reasoning_content=["Hm."]), "message 2: 'reasoning_content' is a list, expected text"),
    (said(thinking="Hm.", reasoning="Ah."), "message 2: reasoning, thinking contradict each other"),
    (said(content="<think>a</think>b", thinking="c"), "one thought in its text and another"),
    (said(role="tool"), "message 2 is the tool's, expected the assistant's"),
    (said(role="user", tool_calls=[{"name": "f"}]), "message 2 is the user's and has 'tool_calls'"),
    (said(weight=0), "no message of the assistant is to be trained on"),
    (said(weight=0.5), "message 2: 'weight' is 0.5; expected 0 or 1 (false or true)"),
    (said(train="no"), "message 2: 'train' is 'no'; expected 0 or 1"),
    (said(weight=1, trainable=False), "message 2: weight, trainable contradict each other"),
    (said(content=[{"type": "image_url"}]), "a part that is no text (image_url)"),
    (
        '{"messages": [{"role": "user", "content": "x", "train": true},'
        '{"role": "assistant", "content": "y"}]}',
        "message 1 is the user's and asks to be trained on",
    ),
    ('{"tools": [{"title": "f"}], ' + said()[1:], "tool 1 of 'tools' has no name"),
    ('{"question": "q", "answer": "a", "tools": ["f"]}', "tool 1 of 'tools' is text, expected an"),
    ('{"tools": [{"name": "f"}], "functions": [{"name": "f"}], ' + said()[1:], "both 'tools' and"),
    ('{"loss_mask": [0, 1], ' + said()[1:], "'loss_mask' of a row is not supported"),
    (
        '{"prompt": "p", "completion": "c", "context": "t"}',
        "'context' is not used: say --columns prompt=prompt,input=context,response=completion",
    ),
    ('{"instruction": "i", "input": "n", "context": "t", "output": "o"}', "'context' is not used"),
    ('{"rows": [{"question": "q"}]}', "it holds a list of objects under 'rows'"),
]  # fmt: skip


@pytest.mark.parametrize("line, reason", BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_is_named_with_its_line(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", f"{GOOD}\r\n\r\n{line}\r\n{GOOD}")
    with pytest.raises(ValueError) as error:
        load_rows(path)
    assert f"{path}: 1 unusable rows" in str(error.value) and "--skip-bad" in str(error.value)
    assert f"{path}:3 (row 2): " in str(error.value) and reason in str(error.value)

    rows = load_rows(path, skip_bad=True)
    assert [row.reference for row in rows] == ["two", "two"]
    assert [(bad.line, bad.row) for bad in rows.bad] == [(3, 2)] and reason in rows.bad[0].reason


def test_the_first_ten_bad_rows_are_listed_and_all_are_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", "{}\n[]\n" * 6 + "{}\n" + GOOD)
    with pytest.raises(ValueError) as error:
        load_rows(path)
    text = str(error.value)
    assert "13 unusable rows" in text and "and 3 more" in text
    for line in range(1, 14):
        is_listed = f"a.jsonl:{line} (row" in text
        assert is_listed == (line <= 10)
    assert "--skip-bad" in text
    rows = load_rows(path, skip_bad=True)
    assert len(rows) == 1 and [bad.line for bad in rows.bad] == list(range(1, 14))


def test_rows_after_a_dropped_one_keep_their_answers(tmp_path):
    """The published code zips answers with a list from which rows without prompt have vanished."""
    records = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]
    records[1]["question"] = ""
    rows = load_rows(jsonl(tmp_path / "a.jsonl", *records), skip_bad=True)
    assert [(r.messages[0]["content"], r.reference) for r in rows] == [
        ("q0", "a0"), ("q2", "a2"), ("q3", "a3"), ("q4", "a4"),
    ]  # fmt: skip


def test_array_elements_are_named_by_the_line_they_start_on(tmp_path):
    good = '{\n  "question": "q",\n  "answer": "a"\n }'
    text = f'\ufeff\n[{good},\n\n {{"question": "q",\n"answer": ""}}, 7,\n{good}\n, null ]\n'
    rows = load_rows(write(tmp_path / "a.json", text), skip_bad=True)
    assert [(bad.line, bad.row) for bad in rows.bad] == [(7, 2), (8, 3), (13, 5)]
    assert len(rows) == 2
    many = json.dumps(
        [{"question": "q", "answer": "a" if i % 7 else ""} for i in range(50)], indent=3
    )
    rows = load_rows(write(tmp_path / "b.json", many), skip_bad=True)
    assert [bad.line for bad in rows.bad] == [2 + 4 * i for i in range(0, 50, 7)]


@pytest.mark.parametrize(
    "text, line, reason",
    [
        ("[", 1, "Expecting value"),
        ("[\n" + GOOD, 2, "expected ',' or ']'"),
        ("[\n" + GOOD + "\n" + GOOD + "]", 3, "expected ',' or ']'"),
        ("[\n" + GOOD + ",\n]", 3, "Expecting value"),
        ("[" + GOOD + ",\n{'question': 'q'}]", 2, "double quotes"),
        ("[" + GOOD + "]\n\nmore", 3, "text after the closing"),
        ("[" + GOOD + ",\n\n" + "[" * 100_000, 3, ""),
    ],
)
def test_a_broken_array_stops_with_its_line_even_when_skipping(tmp_path, text, line, reason):
    path = write(tmp_path / "a.json", text)
    with pytest.raises(ValueError, match=f"a.json:{line}: bad JSON: .*{reason}"):
        load_rows(path, skip_bad=True)


def test_csv_rows_are_named_by_the_line_they_start_on(tmp_path):
    text = 'question,answer\n"a\nb",c\nonly one\n\nq,"\n"\n1,2,3\nq,a\n'
    rows = load_rows(write(tmp_path / "a.CSV", text), skip_bad=True)
    assert [(bad.line, bad.reason) for bad in rows.bad] == [
        (4, "1 cells, expected 2 as in the header"),
        (6, "'answer' is empty"),
        (8, "3 cells, expected 2 as in the header"),
    ]
    assert [row.messages[0]["content"] for row in rows] == ["a\nb", "q"]
    broken = write(tmp_path / "b.csv", 'question,answer\nq,a\nq,"never closed\nq,a\n')
    with pytest.raises(ValueError, match="b.csv:3: bad CSV: unexpected end of data"):
        load_rows(broken, skip_bad=True)
    with pytest.raises(ValueError, match="c.csv:1: two columns have one name"):
        load_rows(write(tmp_path / "c.csv", "answer,answer\na,b\n"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_a_file_without_rows_is_refused(tmp_path, name, text):
    with pytest.raises(ValueError, match="no usable row"):
        load_rows(write(tmp_path / name, text))


def test_unknown_formats_empty_arrays_and_absent_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="begins with 'q'; expected"):
        load_rows(write(tmp_path / "a.txt", "question"))
    with pytest.raises(ValueError, match="no usable row"):
        load_rows(write(tmp_path / "a.json", "[ ]"))
    with pytest.raises(ValueError, match="no usable row .1 unusable"):
        load_rows(write(tmp_path / "a.jsonl", "{}"), skip_bad=True)
    with pytest.raises(ValueError, match="limit=0"):
        load_rows(write(tmp_path / "a.jsonl", GOOD), limit=0)
    with pytest.raises(FileNotFoundError):
        load_rows(tmp_path / "absent.json")


# ---- encodings, hashes, limits, ids


def test_utf8_with_and_without_mark_is_one_text(tmp_path):
    text = json.dumps({"question": "größer \u2028 \U0001f600?", "answer": "ja"}, ensure_ascii=False)
    plain = load_rows(write(tmp_path / "a.jsonl", text))
    marked = load_rows(write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + text.encode()))
    assert list(plain) == list(marked)
    assert plain[0].messages[0]["content"] == "größer \u2028 \U0001f600?"
    assert plain.sha256 == hashlib.sha256(text.encode()).hexdigest() != marked.sha256


@pytest.mark.parametrize(
    "data, offset, line",
    [
        (b'{"question": "q", "answer": "a"}\n{"question": "\xe4"}', 47, 2),
        (GOOD.encode("utf-16"), 0, 1),
        (b"\xef\xbb\xbf\n\xff", 4, 2),
    ],
)
def test_another_encoding_is_refused_with_the_offset(tmp_path, data, offset, line):
    message = f"not UTF-8: byte 0x{data[offset]:02x} at offset {offset} .line {line}."
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path / "a.jsonl", data), skip_bad=True)


def test_a_line_of_ten_megabytes_is_whole(tmp_path):
    long = "größer " * 1_400_000
    path = jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": long}, json.loads(GOOD))
    assert path.stat().st_size > 10_000_000
    rows = load_rows(path)
    assert [len(row.reference) for row in rows] == [len(long), len(json.loads(GOOD)["answer"])]


def test_a_system_message_is_given_to_rows_that_have_none(tmp_path):
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "q"}]
    own += [{"role": "assistant", "content": "a"}]
    path = jsonl(tmp_path / "a.jsonl", json.loads(GOOD), {"messages": own})
    plain, given = load_rows(path), load_rows(path, system="Count.")
    assert given[0].messages == ({"role": "system", "content": "Count."}, *plain[0].messages)
    assert given[1] == plain[1] and [r.id for r in given] == [r.id for r in plain]
    other = load_rows(path, system="Add.")
    assert len({plain.sha256, given.sha256, other.sha256}) == 3, "a resumed run must notice"


def test_limit_counts_usable_rows_and_the_rest_is_not_parsed(tmp_path):
    path = write(tmp_path / "a.jsonl", f"oops\n{GOOD}\n{GOOD}\noops\n")
    assert [len(load_rows(path, limit=n, skip_bad=True)) for n in (1, 2, 3)] == [1, 2, 2]
    assert [len(load_rows(path, limit=n, skip_bad=True).bad) for n in (1, 2, 3)] == [1, 1, 2]
    assert len(load_rows(write(tmp_path / "b.jsonl", f"{GOOD}\noops"), limit=1)) == 1
    array = write(tmp_path / "c.json", f"[{GOOD}, {GOOD} oops")
    assert len(load_rows(array, limit=2)) == 2


def test_ids_come_from_the_id_field_or_the_content(tmp_path):
    a, b = {"question": "q", "answer": "a"}, {"question": "q", "answer": "b"}
    rows = load_rows(jsonl(tmp_path / "a.jsonl", a, b, a, {**a, "id": 7}, {**a, "id": "x/y"}, a))
    first = rows[0].id
    assert [row.id for row in rows][2:] == [f"{first}-2", "7", "x/y", f"{first}-3"]
    assert len({row.id for row in rows}) == 6
    # neither order, format, other rows nor fields without text move an id
    other = json.dumps([{**b, "topic": 1, "id": None}, a], indent=1)
    again = load_rows(write(tmp_path / "b.json", other))
    assert [row.id for row in again] == [rows[1].id, first]
    assert first == "2bb26115c2dc1924", "ids are written to disk: they must not change"

    path = jsonl(tmp_path / "c.jsonl", {**a, "id": 7}, b, {**b, "id": "7"})
    with pytest.raises(
        ValueError, match=r"c.jsonl:3 \(row 3\): id '7' is taken by line 1"
    ) as error:
        load_rows(path)
    assert "--columns id=" in str(error.value) and "--skip-bad" not in str(error.value)
    assert len(load_rows(path, skip_bad=True)) == 2


def test_ids_of_random_files_are_unique_and_independent_of_other_rows(tmp_path):
    rng = random.Random(0)
    for trial in range(20):
        records = [
            {"question": rng.choice("ab"), "answer": rng.choice("abc")}
            for _ in range(rng.randint(1, 30))
        ]
        ids = [row.id for row in load_rows(jsonl(tmp_path / f"{trial}.jsonl", *records))]
        assert len(set(ids)) == len(records)
        kept = sorted(rng.sample(range(len(records)), rng.randint(1, len(records))))
        distinct = [i for i in kept if records[i] not in records[:i]]  # no earlier copy
        if distinct:
            alone = load_rows(jsonl(tmp_path / "alone.jsonl", *(records[i] for i in distinct)))
            assert [row.id for row in alone] == [ids[i] for i in distinct]


# ---- keys of messages beside the text


@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "loss_mask", "loss"])
@pytest.mark.parametrize("no, yes", [(0, 1), (False, True), (0.0, 1.0), (False, None)])
def test_an_answer_that_is_not_to_be_trained_on_stays_as_context(tmp_path, capsys, key, no, yes):
    """OpenAI's `weight`, and the names of other programs for it."""
    turns = [user("What is 2 + 2?"), bot("Five, obviously.") | {key: no}, user("Think again.")]
    turns += [bot("It is four.") | {key: yes}]
    path = jsonl(tmp_path / "a.jsonl", {"messages": turns})
    (row,) = load_rows(path)
    plain = [user("What is 2 + 2?"), bot("Five, obviously."), user("Think again.")]
    assert list(row.messages) == [*plain, bot("It is four.")] and row.context_only == {0}
    (told,) = load_rows(path, system="Add.")
    assert told.context_only == {0} and told.id == row.id, "by turn, wherever a message stands"
    assert prompts_of(row) == [tuple(plain)]
    DataConfig(str(path)).load()
    assert "1 of the assistant's messages are context only" in capsys.readouterr().out


def test_unread_keys_of_messages_are_listed_as_unused(tmp_path, capsys):
    turns = [user("a") | {"name": "Ann"}, bot("b") | {"name": "", "tool_calls": [], "weight": 1}]
    path = jsonl(tmp_path / "a.jsonl", {"messages": turns, "topic": 1})
    rows = load_rows(path)
    assert rows.unused == ("messages[].name", "topic") and not rows[0].context_only
    DataConfig(str(path)).load()
    assert "fields not used: messages[].name, topic" in capsys.readouterr().out


def test_text_parts_developer_and_numbers_are_read(tmp_path):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    told = {"role": "developer", "content": "s"}
    turns = [told, {"role": "user", "content": parts}, bot([{"type": "output_text", "text": "c"}])]
    (row,) = load_rows(jsonl(tmp_path / "a.jsonl", {"messages": turns}))
    assert list(row.messages) == [system("s"), user("a b"), bot("c")]
    # as they are written: 0.50 is not 0.5
    text = '{"question": "q", "answer": 42}\n{"question": "q", "answer": 0.50}\n'
    text += '{"instruction": "Even?", "input": 0, "output": -1e3}\n'
    rows = load_rows(write(tmp_path / "b.jsonl", text))
    assert [row.reference for row in rows] == ["42", "0.50", "-1e3"]
    assert rows[2].messages[0]["content"] == "Even?\n0"
    array = "[" + ",".join(text.splitlines()) + "]"
    assert list(load_rows(write(tmp_path / "b.json", array))) == list(rows)


CONTEXTS = {
    "Dolly as published": {"instruction": "q", "context": "c", "response": "a", "category": "x"},
    "Alpaca's answer": {"instruction": "q", "input": " ", "context": "c", "output": "a"},
    "question": {"question": "q", "context": "c", "answer": "a"},
}


@pytest.mark.parametrize("record", CONTEXTS.values(), ids=CONTEXTS)
def test_a_context_is_read_as_the_input(tmp_path, capsys, record):
    path = jsonl(tmp_path / "a.jsonl", record, {**record, "context": ""})
    rows = load_rows(path)
    assert [row.messages[0]["content"] for row in rows] == ["q\nc", "q"]
    assert rows.inputs == ("context",) and set(rows.unused) <= {"category", "context"}
    assert load_rows(path, need_reference=False)[0].messages == (user("q\nc"),)
    DataConfig(str(path)).load()
    assert "'context' read as input" in capsys.readouterr().out
    with_columns = "prompt=instruction,response=response"
    if "response" in record:  # what is named is used, and the rest is told
        rows = load_rows(path, columns=parse_columns(with_columns))
        assert rows[0].messages[0]["content"] == "q" and "context" in rows.unused


def test_ids_that_name_sources_can_be_replaced_by_ids_of_the_texts(tmp_path):
    records = [{"id": "doc1", "question": f"q{i}", "answer": "a"} for i in range(5)]
    path = jsonl(tmp_path / "a.jsonl", *records)
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match="4 of 5 rows have an id that an earlier row has"):
            load_rows(path, skip_bad=skip_bad)
    bare = [{k: v for k, v in record.items() if k != "id"} for record in records]
    plain = load_rows(jsonl(tmp_path / "b.jsonl", *bare))
    for columns in ("id=", "prompt=question,response=answer,id="):
        rows = load_rows(path, columns=parse_columns(columns))
        assert list(rows) == list(plain) and rows.unused == ("id",)
    assert load_rows(path, columns={"id": "question"})[3].id == "q3"


def test_a_row_that_the_check_refuses_is_bad_like_any_other(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl", {}, *({"question": f"q{i}", "answer": "a"} for i in range(4))
    )

    def check(row):
        if row.messages[0]["content"] in ("q1", "q2"):
            raise ValueError("the template says no")

    with pytest.raises(ValueError, match="3 unusable rows") as error:
        load_rows(path, check=check)
    assert str(error.value).count("the template says no") == 2
    rows = load_rows(path, skip_bad=True, check=check)
    assert [bad.line for bad in rows.bad] == [1, 3, 4] and len(rows) == 2


# ---- files that are something else


@pytest.mark.parametrize(
    "beginning, said",
    [
        (b"PK\x03\x04", "a zip archive .an .xlsx workbook is one."),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd; expected JSON.*: zstd -d"),
        (b"BZh91AY", "compressed with bzip2"),
        (b"\xfd7zXZ\0", "compressed with xz"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet"])
def test_a_file_of_another_format_is_refused_by_its_name(tmp_path, beginning, said, name):
    path = write(tmp_path / name, beginning + bytes(range(256)))
    for load in (load_rows, is_distilled, load_distilled):
        with pytest.raises(ValueError, match=said):
            load(path)


def test_gzipped_files_are_read(tmp_path):
    text = "".join(json.dumps({"question": f"q{i} é", "answer": "a"}) + "\n" for i in range(999))
    plain = load_rows(write(tmp_path / "a.jsonl", text))
    packed = write(tmp_path / "b.jsonl.gz", gzip.compress(text.encode()))
    rows = load_rows(packed)
    assert list(rows) == list(plain) and rows.sha256 == plain.sha256
    cells = "question,answer\nq,a\n"
    assert len(load_rows(write(tmp_path / "c.csv.gz", gzip.compress(cells.encode())))) == 1
    torn = write(tmp_path / "d.jsonl.gz", packed.read_bytes()[:-40])
    with pytest.raises(ValueError, match="d.jsonl.gz is a damaged gzip file"):
        load_rows(torn)


def test_rows_under_a_key_are_refused_with_the_command_that_unwraps_them(tmp_path):
    rows = [{"question": f"q{i} é", "answer": "a"} for i in range(3)]
    for n, text in enumerate(
        [
            json.dumps({"version": 1, "data": rows}, indent=2),
            '{"data": [' + ",\n".join(map(json.dumps, rows)) + "]}",
            json.dumps({"data": rows}),
        ]
    ):
        path = write(tmp_path / f"it's {n}.json", text)
        for skip_bad in (False, True):
            with pytest.raises(ValueError, match="rows? .*under 'data'|under 'data'") as error:
                load_rows(path, skip_bad=skip_bad)
        command = re.search(r"python (-c .* > rows.jsonl)", str(error.value))[1]
        subprocess.run(f"{sys.executable} {command}", shell=True, check=True, cwd=tmp_path)
        assert [r.messages[0]["content"] for r in load_rows(tmp_path / "rows.jsonl")] == [
            "q0 é", "q1 é", "q2 é",
        ]  # fmt: skip


def test_objects_over_several_lines_are_read(tmp_path):
    records = [{"question": f"q{i}", "answer": "a" if i != 1 else ""} for i in range(4)]
    text = "\n".join(json.dumps(record, indent=2) for record in records)
    path = write(tmp_path / "a.jsonl", text)
    with pytest.raises(ValueError, match=r"a.jsonl:5 \(row 2\): 'answer' is empty"):
        load_rows(path)
    assert len(load_rows(path, skip_bad=True)) == 3
    with pytest.raises(ValueError, match=r"b.jsonl:4: bad JSON: expected the '\{' of the next row"):
        load_rows(write(tmp_path / "b.jsonl", text.replace("}\n{", "},\n{")), skip_bad=True)


def test_commas_after_every_line_are_refused_with_the_command_that_removes_them(tmp_path):
    path = write(tmp_path / "a.jsonl", f"{GOOD},\n{GOOD},\n{GOOD}\n")
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match="a comma after every line") as error:
            load_rows(path, skip_bad=skip_bad)
    command = str(error.value).split("and nothing else: ")[1]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert len(load_rows(tmp_path / "rows.jsonl")) == 3


def test_skip_bad_does_not_help_where_most_rows_cannot_be_parsed(tmp_path):
    path = write(tmp_path / "a.jsonl", f"oops\nnot json\n{GOOD}\n")
    with pytest.raises(ValueError, match="2 of 3 rows cannot be parsed; .*lose the good rows"):
        load_rows(path, skip_bad=True)
    assert len(load_rows(write(path, f"oops\n{GOOD}\n{GOOD}\nno\n"), skip_bad=True)) == 2
    with pytest.raises(ValueError, match="2 of 3 rows cannot be parsed"):
        load_rows(write(tmp_path / "a.csv", "question,answer\n1\n2\nq,a\n"), skip_bad=True)
    with pytest.raises(ValueError, match="the columns are separated by ';'"):
        load_rows(write(tmp_path / "b.csv", "question;answer\nq;a\n"))


def test_a_long_cell_is_whole(tmp_path):
    """The csv module stops at 131,072 characters."""
    long = "word " * 60_000
    path = write(tmp_path / "a.csv", f'question,answer\nq,"{long}"\nq,a\n')
    assert [len(row.reference) for row in load_rows(path)] == [300_000, 1]


MEMORY_OF_FIVE_ROWS = """
import resource, sys
from engine.data.rows import load_rows

def largest_kilobytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = largest_kilobytes()
rows = load_rows(sys.argv[1], limit=5)
print(len(rows), rows.sha256, largest_kilobytes() - before)
"""


@pytest.mark.parametrize("form", ["jsonl", "array", "objects", "csv", "gz"])
def test_a_large_file_takes_the_memory_of_the_rows_asked_for(tmp_path, form):
    """40 MB, one character of four bytes in a row: five rows, and the hash of all."""
    row = {"question": "What is it? \U0001f600 " + "word " * 40, "answer": "more " * 20}
    line = json.dumps(row, ensure_ascii=False) + "\n"
    count = 40_000_000 // len(line.encode())
    if form == "array":
        data = ("[" + ",".join([line] * count) + "]").encode()
    elif form == "csv":
        cells = ",".join(f'"{text}"' for text in row.values()) + "\n"
        data = ("question,answer\n" + cells * count).encode()
    elif form == "objects":
        data = ((json.dumps(row, ensure_ascii=False, indent=1) + "\n") * count).encode()
    else:
        data = (line * count).encode()
    names = {"csv": "a.csv", "gz": "a.json.gz"}
    path = tmp_path / names.get(form, "a.json")
    path.write_bytes(gzip.compress(data, 1) if form == "gz" else data)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", MEMORY_OF_FIVE_ROWS, path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    rows, sha256, kilobytes = done.stdout.split()
    assert rows == "5" and sha256 == hashlib.sha256(data).hexdigest()
    assert int(kilobytes) < 30_000, "the 40 MB are read in chunks of a megabyte"


@pytest.mark.parametrize(
    "text", [f"{GOOD}\n{GOOD}", f"[{GOOD}]", "question,answer\nq,aaaaaaaaaaaaa"]
)
def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch, text):
    """A damaged file, or a gzip bomb: the error names it."""
    monkeypatch.setattr("engine.data.data_file.MAX_CHARACTERS", 12)
    monkeypatch.setattr("engine.data.data_file.HEAD_CHARACTERS", 4)
    monkeypatch.setattr("engine.data.data_file.CHUNK_BYTES", 4)
    path = write(tmp_path / ("a.csv" if text[0] == "q" else "a.json"), text)
    with pytest.raises(ValueError, match=f"{path}: a line or a row has over 12 characters"):
        load_rows(path)


def test_any_chunk_size_gives_the_same_rows_and_faults(tmp_path, monkeypatch):
    """Lines, characters and values that go over the end of a chunk; faults by line and byte."""
    rng = random.Random(0)
    records = [
        {"question": "é\U0001f600\\" * rng.randint(1, 30) + f"{i}", "answer": i * 1.5, "n": [i]}
        for i in range(60)
    ]
    lines = [json.dumps(r, ensure_ascii=rng.random() < 0.3) for r in records]
    texts = {
        "a.jsonl": "\n".join(lines),
        "a.json": "[" + " ,\n".join(lines) + " ]\n",
        "b.json": "\n".join(json.dumps(r, indent=1, ensure_ascii=False) for r in records),
        "c.csv": "question,answer\r\n" + "".join(f'"{i}\nü",{i}\r\n' for i in range(60)),
        "c.json": "[" + " ,1234567,".join(lines) + "]",
    }
    skip = {"skip_bad": True}
    whole = {name: load_rows(write(tmp_path / name, text), **skip) for name, text in texts.items()}
    assert all(len(rows) == 60 for rows in whole.values())
    faulty = texts["a.jsonl"].encode()
    at = faulty.index(b"\n", len(faulty) // 2) + 1
    faulty = faulty[:at] + b"\xe2\x82\xff" + faulty[at:]  # a character that is not whole
    monkeypatch.setattr("engine.data.data_file.HEAD_CHARACTERS", 16)
    for chunk_bytes in (1, 2, 3, 7, 61, 1000):
        monkeypatch.setattr("engine.data.data_file.CHUNK_BYTES", chunk_bytes)
        for name, rows in whole.items():
            again = load_rows(tmp_path / name, **skip)
            assert list(again) == list(rows) and again.sha256 == rows.sha256
            assert again.bad == rows.bad
            assert len(rows.bad) == (59 if name == "c.json" else 0)
        line = faulty.count(b"\n", 0, at) + 1
        with pytest.raises(ValueError, match=f"byte 0xe2 at offset {at} .line {line}."):
            load_rows(write(tmp_path / "d.jsonl", faulty))
        broken = texts["a.json"].replace('"n": [40]', '"n": [40')
        line = broken.count("\n", 0, broken.index('"n": [40')) + 1
        with pytest.raises(ValueError, match=f"d.json:{line}: bad JSON"):
            load_rows(write(tmp_path / "d.json", broken))


def test_an_opened_file_is_read_from_its_beginning(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"question": "q" * 200_000, "answer": "a"})
    with DataFile(path) as file:
        assert not is_distilled(file)
        assert load_rows(file)[0].reference == "a"


# ---- the real files


@pytest.mark.parametrize(
    "name, count",
    [
        ("alpaca_eval.json", 805),
        ("alpaca_train.json", 2000),
        ("distilled_alpaca.json", 2000),
        ("dolly_train.json", 2000),
        ("gsm8k_test.json", 1319),
        ("gsm8k_train.json", 7473),
        ("openfunction_test.json", 112),
        ("openfunction_train.json", 2211),
        ("harmful_behaviors.csv", 520),
    ],
)
def test_published_files_load_whole(shared_data, name, count):
    columns = {"prompt": "goal", "response": "target"} if name.endswith("csv") else None
    path = shared_data / name
    rows = load_rows(path, columns=columns)
    assert len(rows) == count == len({row.id for row in rows})
    assert not rows.bad and not rows.unused and not is_distilled(path)
    first_rows = load_rows(path, columns=columns, limit=50)
    assert [row.id for row in first_rows] == [row.id for row in rows[:50]]
    if name.endswith("json"):
        raw = json.loads(path.read_text())
        for record, row in zip(raw, rows, strict=True):
            prompt = record.get("question") or record["instruction"]
            prompt += "\n" + record["input"] if record.get("input") else ""
            answer = record.get("answer") or record.get("output")
            assert list(row.messages) == [user(prompt), bot(answer)]
