"""Files to rows (engine/rows.py): every shape, every kind of bad row with its line, ids, encodings.

The real files of ../shared/data are loaded where they are present.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from engine.data import is_distilled, load_rows, parse_columns


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def jsonl(path: Path, *records) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


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
def test_shapes_are_found(tmp_path, record, messages):
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


def test_columns_name_fields_and_unused_ones_are_told(tmp_path):
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
def test_columns_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="wanted ROLE=FIELD"):
        parse_columns(text)


@pytest.mark.parametrize(
    "columns", [{"response": "a"}, {"prompt": "a"}, {"prompt": "a", "messages": "b"}, {"goal": "a"}]
)
def test_columns_that_make_no_row(tmp_path, columns):
    with pytest.raises(ValueError, match="columns"):
        load_rows(jsonl(tmp_path / "a.jsonl", {"a": "b"}), columns=columns)


# ---- bad rows

BAD = [  # (line of a JSONL file, part of the reason)
    ('{"question": "q", "answer": "  "}', "'answer' is empty"),
    ('{"question": "", "answer": "a"}', "'question' is empty"),
    ('{"question": "q", "answer": 3}', "'answer' is a number, wanted text"),
    ('{"question": "q", "answer": null}', "'answer' is null, wanted text"),
    ('{"question": "q", "answer": true}', "'answer' is a boolean, wanted text"),
    ('{"question": ["q"], "answer": "a"}', "'question' is a list, wanted text"),
    ('{"question": "q"}', "fields 'question' fit no known shape"),
    ("{}", "fields (none) fit no known shape"),
    ('{"question": "q", "answer": "a", "prompt": "p", "response": "r"}', "fits question/answer"),
    ('{"prompt": "p", "response": "r", "completion": "c"}', "fits prompt/response and"),
    ('["q", "a"]', "the row is a list, wanted an object"),
    ('{"question": "q", "answer": "a"', "bad JSON: Expecting ',' delimiter (column 33)"),
    ("nonsense", "bad JSON: Expecting value (column 1)"),
    ('{"question": "q", "answer": ' + "[" * 100_000 + "}", "bad JSON"),
    ('{"question": "q", "answer": ' + "9" * 9_999 + "}", "bad JSON"),
    ('{"question": "\\ud83d", "answer": "a"}', "half of a surrogate pair"),
    ('{"question": "q", "answer": "a", "id": 1.5}', "'id' is a number, wanted text or an integer"),
    ('{"question": "q", "answer": "a", "id": ""}', "'id' is empty"),
    ('{"question": "q", "answer": "a", "id": false}', "'id' is a boolean"),
    ('{"instruction": "i", "input": 7, "output": "o"}', "'input' is a number"),
    ('{"instruction": "i", "output": "o", "history": "h"}', "not a list of [user, assistant]"),
    ('{"instruction": "i", "output": "o", "history": [["a"]]}', "not a list of [user, assistant]"),
    ('{"instruction": "i", "output": "o", "history": [["a", " "]]}', "'history 1, assistant' is"),
    ('{"instruction": "i", "output": "o", "system": 5}', "'system' is a number"),
    ('{"messages": []}', "'messages' is empty, wanted a list of messages"),
    ('{"messages": "hi"}', "'messages' is text, wanted a list of messages"),
    ('{"messages": ["hi"]}', "message 1 is text, wanted an object"),
    ('{"messages": [{"role": "tool", "content": "x"}]}', "message 1: unknown role 'tool'"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', "message 1: unknown role ['user']"),
    ('{"messages": [{"content": "x"}]}', "message 1: unknown role None"),
    ('{"messages": [{"role": "user", "content": [{"text": "x"}]}]}', "'message 1' is a list"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "does not end with the assistant"),
    ('{"messages": [{"role": "system", "content": "x"}]}', "does not end with the assistant"),
    (
        '{"messages": [{"role": "assistant", "content": "x"}]}',
        "message 1 is the assistant's, wanted the user's",
    ),
    (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}',
        "message 2 is the user's, wanted the assistant's",
    ),
    (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}',
        "message 2 is the system's, wanted the assistant's",
    ),
    (
        '{"system": "s", "messages": [{"role": "system", "content": "x"},'
        '{"role": "user", "content": "y"}, {"role": "assistant", "content": "z"}]}',
        "both a system message and a 'system' field",
    ),
]  # fmt: skip
GOOD = '{"question": "how many?", "answer": "two"}'


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
    path = write(tmp_path / "a.jsonl", "oops\n" * 13 + GOOD)
    with pytest.raises(ValueError) as error:
        load_rows(path)
    text = str(error.value)
    assert "13 unusable rows" in text and "and 3 more" in text
    assert all((f"a.jsonl:{n} (row" in text) == (n <= 10) for n in range(1, 14))
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
        ("[\n" + GOOD, 2, "wanted ',' or ']'"),
        ("[\n" + GOOD + "\n" + GOOD + "]", 3, "wanted ',' or ']'"),
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
        (4, "1 cells, wanted 2 as in the header"),
        (6, "'answer' is empty"),
        (8, "3 cells, wanted 2 as in the header"),
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


def test_other_refusals(tmp_path):
    with pytest.raises(ValueError, match="begins with 'q'; wanted"):
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


def test_limit_counts_usable_rows_and_looks_no_further(tmp_path):
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
    with pytest.raises(ValueError, match=r"c.jsonl:3 \(row 3\): id '7' is taken by line 1"):
        load_rows(path)
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
    assert [row.id for row in load_rows(path, columns=columns, limit=50)] == [
        r.id for r in rows[:50]
    ]
    if name.endswith("json"):
        raw = json.loads(path.read_text())
        for record, row in zip(raw, rows, strict=True):
            prompt = record.get("question") or record["instruction"]
            prompt += "\n" + record["input"] if record.get("input") else ""
            answer = record.get("answer") or record.get("output")
            assert list(row.messages) == [user(prompt), bot(answer)]
