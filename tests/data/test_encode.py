"""Rows to token ids, ids to micro-batches (engine/data/encode.py).

The chat here is a stub with one id per character, so every expected id can be read off.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import time
from dataclasses import asdict, replace

import pytest

from engine.data.distilled import CONTEXT, KEPT, Distilled, is_distilled, load_distilled
from engine.data.encode import EncodeRules, Example, encode
from engine.data.fit import cut_in_proportion
from engine.data.pack import pack
from engine.data.rows import Row
from engine.data.show import show
from engine.measure.general_prompts import PROMPTS
from model.chat import Target
from tests.helpers.data_files import bot, jsonl, system, user, write
from tests.helpers.published_code import published_lengths

END = 1


class StubChat:
    """One id per character; "user>" and the like mark the roles."""

    end_id = END

    def prompt_ids(self, messages, prefix=""):
        turns = [f"{message['role']}>{message['content']}|" for message in messages]
        return self.response_ids("".join(turns) + prefix)

    def response_ids(self, text, prefix=""):
        return [ord(char) for char in text]

    def target(self, messages, text):
        prompt = self.prompt_ids(messages)
        answer = self.response_ids(text)
        return Target(prompt, answer, as_rendered="<t>" not in text)

    def check_ids(self, ids):
        if any(token > 9999 for token in ids):
            raise ValueError("beyond the embeddings")

    def spells_special(self, messages):
        return any("<s>" in message["content"] for message in messages)


def encode_with(rows, chat=None, **rules):
    """`encode` with StubChat, unless another chat is given."""
    if chat is None:
        chat = StubChat()
    return encode(rows, chat, EncodeRules(**rules))


class StubTokenizer:
    def piece(self, token):
        return {END: "</s>"}.get(token, chr(token))


# ---- distilled lines


def line(**changes) -> dict:
    """One good line as written to disk; `accepted` unless changed."""
    made = Distilled(
        id="r/0", messages=[user("q")], reference="ref", response="resp", response_ids=[900, 901],
        target="resp", status="accepted", stage="guided", finish="stop", prompt_tokens=9,
        response_tokens=2,
    )  # fmt: skip
    return asdict(replace(made, **changes))


REJECTED = {"status": "mismatch", "target": "ref"}
SECOND = {"id": "r/1", "messages": [user("q"), bot("resp"), user("q2")], "reference": "ref2"}


def test_distilled_lines_are_loaded_as_written(tmp_path):
    records = [
        line(),
        line(**SECOND, **{**REJECTED, "target": "ref2"}),
        line(id="a/b/0", status="identical", response="ref ", target="ref ", finish="length"),
        line(id="s/0", **REJECTED, response="", response_ids=[], response_tokens=0),
    ]
    path = jsonl(tmp_path / "d.jsonl", *records)
    assert is_distilled(path) and not is_distilled(jsonl(tmp_path / "a.jsonl", user("q")))
    rows = load_distilled(path)
    assert [asdict(row) for row in rows] == records
    assert rows.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


WRONG = [
    ({"tries": ["accepted"]}, "'tries' is a list, expected dict"),
    ({"tries": {"guided": "accepted"}}, "'tries' of 'guided': expected a list of statuses"),
    ({"tries": {"guided": [1]}}, "'tries' of 'guided': expected a list of statuses"),
    ({"id": 5}, "'id' is a number, expected str"),
    ({"id": "r"}, "expected 'row/0'"),
    ({"id": "/0"}, "expected 'row/0'"),
    ({"id": "r/1"}, "expected 'row/0', as many turns come before it"),
    ({"messages": "q"}, "'messages' is text, expected list"),
    ({"messages": []}, "does not end with the user"),
    ({"messages": [user("q"), bot("a")]}, "does not end with the user"),
    ({"messages": [{"role": "user"}]}, "message 1: expected an object of role and content"),
    ({"messages": [{"role": "human", "content": "q"}]}, "message 1: unknown role 'human'"),
    ({"messages": [user("")]}, "'message 1' is empty"),
    ({"reference": " ", "status": "banned", "target": " "}, "'reference' is empty"),
    ({"response": None}, "'response' is null, expected str"),
    ({"response_ids": [1, 2.0]}, "something else than token ids"),
    ({"response_ids": [1, True]}, "something else than token ids"),
    ({"response_ids": [1, -1]}, "something else than token ids"),
    ({"response_ids": [], "response_tokens": 0}, "'response_ids' is empty"),
    ({"response_tokens": 3}, "do not fit 2 response_ids"),
    ({"prompt_tokens": True}, "'prompt_tokens' is a boolean, expected int"),
    ({"prompt_tokens": -1}, "do not fit"),
    ({"target": "ref"}, "status 'accepted', but 'target' is not the response"),
    ({"status": "mismatch"}, "status 'mismatch', but 'target' is not the reference"),
    ({"status": ""}, "expected a status"),
    ({"finish": "eos"}, "finish='eos'"),
    ({"extra": 1}, "expected the fields"),
]


@pytest.mark.parametrize("changes, reason", WRONG, ids=[reason for _, reason in WRONG])
def test_a_distilled_line_that_breaks_the_rules_is_named(tmp_path, changes, reason):
    path = jsonl(tmp_path / "d.jsonl", line(id="x/0"), {**line(), **changes})
    with pytest.raises(ValueError, match="d.jsonl:2: ") as error:
        load_distilled(path)
    assert reason in str(error.value)


def test_distilled_data_with_absent_fields_torn_lines_or_repeated_ids_is_refused(tmp_path):
    for name in line():
        record = line()
        del record[name]
        if name in ("tries", "answer"):  # of older lines, and of those without tool calls
            assert getattr(load_distilled(jsonl(tmp_path / "old.jsonl", record))[0], name) == {}
            continue
        with pytest.raises(ValueError, match="d.jsonl:1: expected the fields"):
            load_distilled(jsonl(tmp_path / "d.jsonl", record))
    whole = json.dumps(line()) + "\n" + json.dumps(line(id="s/0"))
    load_distilled(write(tmp_path / "d.jsonl", whole))
    for cut in (1, 2, 40, 200):
        with pytest.raises(ValueError, match=r"(?s)--resume.*d.jsonl:2: bad JSON"):
            load_distilled(write(tmp_path / "d.jsonl", whole[:-cut]))
    with pytest.raises(ValueError, match="d.jsonl:2: id 'r/0' is taken by line 1"):
        load_distilled(jsonl(tmp_path / "d.jsonl", line(), line()))
    with pytest.raises(ValueError, match="holds no line"):
        load_distilled(write(tmp_path / "d.jsonl", "\n"))


# ---- encoding


def ids(text: str) -> list[int]:
    return [ord(char) for char in text]


def made(examples: list[Example]) -> list[tuple]:
    """(id, prompt ids, answer ids) of each example."""
    return [(e.id, e.ids[: e.n_prompt], e.ids[e.n_prompt :]) for e in examples]


def test_every_assistant_turn_of_a_row_is_an_example():
    rows = [
        Row("r", (system("s"), user("a"), bot("b"), user("c"), bot("<s>"))),
        Row("t", (user("q"), bot("x"))),
    ]
    for target in ("target", "reference"):
        examples, counts = encode_with(rows, target=target, max_length=99)
        assert made(examples) == [
            ("r/0", ids("system>s|user>a|"), [*ids("b"), END]),
            ("r/1", ids("system>s|user>a|assistant>b|user>c|"), [*ids("<s>"), END]),
            ("t/0", ids("user>q|"), [*ids("x"), END]),
        ]
        assert (counts.examples, counts.from_response, counts.special) == (3, 0, 1)
        assert counts.tokens == sum(len(e.ids) for e in examples)
        assert counts.response_tokens == 2 + 4 + 2
    with pytest.raises(ValueError, match="row r has no response.*distill.py"):
        encode_with(rows, target="response", max_length=99)
    with pytest.raises(ValueError, match="target='best'; expected one of"):
        encode_with(rows, target="best", max_length=99)
    with pytest.raises(ValueError, match="row p has no reference"):
        encode_with([Row("p", (user("q"),))], max_length=99)


def distilled(*records) -> list[Distilled]:
    return [Distilled(**record) for record in records]


LINES = distilled(
    line(finish="stop"),
    line(**{**SECOND, "response": "mid", "response_ids": [902], "response_tokens": 1},
         status="truncated", target="ref2", finish="length"),
    line(id="r/2", messages=[*SECOND["messages"], bot("ref2"), user("q3")], reference="ref3",
         response="ref3", response_ids=[903, 904], target="ref3", status="identical",
         finish="length"),
)  # fmt: skip


def test_a_kept_rewrite_is_trained_on_its_sampled_ids():
    examples, counts = encode_with(LINES, max_length=99)
    context = "user>q|assistant>resp|user>q2|"
    assert made(examples) == [
        ("r/0", ids("user>q|"), [900, 901, END]),
        ("r/1", ids(context), [*ids("ref2"), END]),
        ("r/2", ids(context + "assistant>ref2|user>q3|"), [903, 904, END]),
    ]
    assert (counts.from_response, counts.unfinished) == (2, 0)


def test_every_response_can_be_trained_on_and_a_cut_one_gets_no_end_token():
    examples, counts = encode_with(LINES, target="response", max_length=99)
    assert [e.ids[e.n_prompt :] for e in examples] == [[900, 901, END], [902], [903, 904, END]]
    assert (counts.from_response, counts.unfinished) == (3, 1)
    empty = distilled(line(**REJECTED, response="", response_ids=[], response_tokens=0))
    assert made(encode_with(empty, max_length=99)[0])[0][2] == [
        *ids("ref"),
        END,
    ]
    with pytest.raises(ValueError, match="r/0 .'q'.: no token to train on"):
        encode_with(empty, target="response", max_length=99, truncate=True)


def test_the_reference_target_has_references_in_its_context():
    examples, counts = encode_with(LINES, target="reference", max_length=99)
    assert made(examples) == [
        ("r/0", ids("user>q|"), [*ids("ref"), END]),
        ("r/1", ids("user>q|assistant>ref|user>q2|"), [*ids("ref2"), END]),
        ("r/2", ids("user>q|assistant>ref|user>q2|assistant>ref2|user>q3|"), [*ids("ref3"), END]),
    ]
    assert counts.from_response == 0
    row = Row("r", (user("q"), bot("ref"), user("q2"), bot("ref2"), user("q3"), bot("ref3")))
    assert examples == encode_with([row], max_length=99)[0], "as from the data file itself"
    with pytest.raises(ValueError, match="r/2: the line of its earlier turn r/1 is absent"):
        encode_with([LINES[0], LINES[2]], target="reference", max_length=99)


def test_a_turn_that_is_too_long_is_named_or_truncated():
    rows = [Row(name, (user("q" * n), bot("abcdef"))) for name, n in [("short", 1), ("long", 3)]]
    encode_with(rows, max_length=9 + 7)
    for room in range(1, 7):
        with pytest.raises(ValueError, match="longer than max_length") as error:
            encode_with(rows, max_length=9 + room)
        assert "long/0 ('qqq'): 9 + 7 tokens" in str(error.value)
        assert ("short/0" in str(error.value)) == (room < 5)
        examples, counts = encode_with(rows, max_length=9 + room, truncate=True)
        assert examples[1].ids == [*ids("user>qqq|"), *ids("abcdef"[:room])]
        assert len(examples[0].ids) == min(14, 9 + room)
        assert counts.truncated == 1 + (room < 5)
        assert counts.response_tokens == room + min(7, 2 + room)
    for truncate in (False, True):
        with pytest.raises(ValueError, match="long/0 .*: 9 prompt tokens leave no room"):
            encode_with(rows, max_length=9, truncate=truncate)


def test_drop_long_leaves_out_the_long_turn_only():
    talk = Row("talk", (user("a"), bot("b"), user("c" * 30), bot("d"), user("e"), bot("f")))
    short = Row("short", (user("q"), bot("x")))
    with pytest.raises(ValueError, match="--drop-long") as error:
        encode_with([talk, short], max_length=40)
    assert "talk/1" in str(error.value) and "talk/0" not in str(error.value)
    examples, counts = encode_with([talk, short], max_length=40, drop_long=True)
    assert [e.id for e in examples] == ["talk/0", "short/0"] and counts.dropped == 2
    # an answer that is too long goes with its turn, or only loses its end under truncate
    long = Row("long", (user("q"), bot("y" * 40)))
    with pytest.raises(ValueError, match="--drop-long"):
        encode_with([short, long], max_length=20)
    examples, counts = encode_with([short, long], max_length=20, drop_long=True)
    assert [e.id for e in examples] == ["short/0"] and (counts.dropped, counts.truncated) == (1, 0)
    both = {"drop_long": True, "truncate": True}
    examples, counts = encode_with([talk, short, long], max_length=20, **both)
    assert [e.id for e in examples] == ["talk/0", "short/0", "long/0"]
    assert (counts.dropped, counts.truncated, len(examples[-1].ids)) == (2, 1, 20)


def test_every_target_drops_the_same_turns():
    """A rewrite that is too long takes its reference along, and the other way round."""
    long = {"response": "r" * 20, "response_ids": [900] * 20, "target": "r" * 20}
    lines = distilled(
        line(id="a/0"),
        line(id="b/0", **long, response_tokens=20),
        line(id="c/0", reference="c" * 20),
        line(id="d/0", **REJECTED, response="r" * 20, response_ids=[900] * 20, response_tokens=20),
    )
    for settings in ({"target": "reference"}, {"target": "target"}, {"mix": 0.5}, {"mix": 1.0}):
        examples, counts = encode_with(lines, max_length=20, drop_long=True, **settings)
        assert [e.id for e in examples] == ["a/0", "d/0"] and counts.dropped == 2


def test_cutting_in_proportion_matches_the_published_code():
    rng = random.Random(0)
    lengths = [(1000, 24), (1000, 25), (5000, 1), (1, 5000), (1023, 1), (1024, 1), (3, 1021)]
    lengths += [(rng.randint(1, 3000), rng.randint(1, 1500)) for _ in range(400)]
    for source, target in lengths:
        prompt, answer = list(range(source)), list(range(10_000, 10_000 + target))
        ids, before = cut_in_proportion([(prompt, answer)], 1024)
        assert (len(ids), len(ids) - before) == published_lengths([(source, target)]), "one turn"
        assert ids == prompt[:before] + answer[: len(ids) - before]
    # by hand: 3,000 before 1,000 keep 768 and 256; of a prompt without end one token is trained on
    assert cut_in_proportion([([1] * 3000, [2] * 1000)], 1024) == ([1] * 768 + [2] * 256, 768)
    assert cut_in_proportion([([1] * 5000, [2])], 1024) == ([1] * 1023 + [2], 1023)
    # 100 * 0.29 is a little less than 29 in floating point: they lose an end token that fits
    assert cut_in_proportion([([1] * 71, [2] * 29)], 100) == ([1] * 71 + [2] * 28, 71)


class Closing(StubChat):
    """An earlier answer is closed as it is trained on: by one token."""

    def prompt_ids(self, messages, prefix=""):
        text = ""
        for message in messages:
            text += message["content"]
            if message["role"] == "assistant":
                text += "|"
        return self.response_ids(text)


def test_a_conversation_is_cut_turn_by_turn_and_then_at_its_end():
    rng = random.Random(1)
    for _ in range(200):
        sizes = [(rng.randint(1, 60), rng.randint(1, 40)) for _ in range(rng.randint(2, 4))]
        messages = []
        for asked, answered in sizes:
            messages += [user("u" * asked), bot("b" * answered)]

        row, limit = Row("r", tuple(messages)), 64
        examples, counts = encode_with([row], chat=Closing(), max_length=limit, in_proportion=True)
        tokens = [(asked, answered + 1) for asked, answered in sizes]
        with_loss = sum(len(e.ids) - e.n_prompt for e in examples)
        want_tokens, want_with_loss = published_lengths(tokens, limit)
        assert with_loss == want_with_loss
        assert max(len(e.ids) for e in examples) <= want_tokens
        assert counts.dropped == len(sizes) - len(examples)
        whole = [sum(map(sum, tokens[: k + 1])) for k in range(len(sizes))]
        if max(whole) < limit:
            assert counts.cut == 0 and [len(e.ids) for e in examples] == whole


class Refusing(StubChat):
    """Its template knows no system message."""

    def prompt_ids(self, messages, prefix=""):
        if messages[0]["role"] == "system":
            raise ValueError("the chat template refuses this conversation: no system")
        return super().prompt_ids(messages, prefix)


def test_turns_that_the_template_refuses_are_named_as_such():
    """The error does not mention --max-length, which would not help."""
    told = {"id": "s/0", "messages": [system("s"), user("q")]}
    lines = distilled(line(), line(**told))
    with pytest.raises(ValueError, match="1 turns are refused by the chat template; ") as error:
        encode_with(lines, chat=Refusing(), max_length=99)
    text = str(error.value)
    assert "s/0: the chat template" in text and "--skip-bad" in text and "max" not in text
    examples, counts = encode_with(lines, chat=Refusing(), max_length=99, skip_refused=True)
    assert [e.id for e in examples] == ["r/0"] and counts.refused == 1


def test_context_only_turns_carry_no_loss():
    row = Row("r", (user("a"), bot("b"), user("c"), bot("d")), context_only=frozenset({0}))
    examples, counts = encode_with([row], max_length=99)
    assert made(examples) == [("r/1", ids("user>a|assistant>b|user>c|"), [*ids("d"), END])]
    assert counts.context == 1
    silent = {"status": CONTEXT, "response": "", "response_ids": [], "response_tokens": 0}
    first = line(reference="b", target="b", **silent)
    second = line(id="r/1", messages=[user("q"), bot("b"), user("c")])
    for target in ("target", "reference", "response"):
        examples, counts = encode_with(distilled(first, second), target=target, max_length=99)
        assert [e.id for e in examples] == ["r/1"] and counts.context == 1
        assert examples[0].ids[: examples[0].n_prompt] == ids("user>q|assistant>b|user>c|")


def test_answers_that_the_template_does_not_render_whole_are_counted():
    rows = [Row("r", (user("a"), bot("<t>b"))), Row("s", (user("a"), bot("b")))]
    _, counts = encode_with(rows, max_length=99)
    assert (counts.examples, counts.unrendered) == (2, 1)


def test_sampled_ids_beyond_the_embeddings_are_refused_before_training():
    far = distilled(line(response_ids=[900, 10000]))
    with pytest.raises(ValueError, match="r/0: beyond the embeddings"):
        encode_with(far, max_length=99)
    encode_with(far, target="reference", max_length=99)


def test_errors_propose_only_flags_that_can_help():
    """--max-length helps below the model's own limit alone."""
    rows = [Row("long", (user("qqq"), bot("abcdef")))]

    def said(room, **limits):
        with pytest.raises(ValueError) as error:
            encode_with(rows, max_length=9 + room, **limits)
        return str(error.value)

    assert "raise --max-length, or --truncate answers" in said(3, model_limit=20)
    assert "raise --max-length, or leave them out" in said(0, model_limit=20)
    for room, otherwise in ((3, "--truncate answers"), (0, "leave them out")):
        words = said(room, model_limit=9 + room)
        assert f"the model itself was made for {9 + room} tokens: {otherwise}" in words
        assert "--max-length" not in words


# ---- packing


def test_packing_is_first_fit_longest_first():
    assert pack([3, 5, 2, 5, 1, 9, 4], 8) == [[5], [0, 1], [2, 3, 4], [6]]
    assert pack([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert pack([], 8) == []
    assert pack([3, 5, 2], 5) == [[1], [0, 2]]
    with pytest.raises(ValueError, match="micro_tokens=0"):
        pack([1], 0)


def test_random_lengths_are_packed_once_each_within_the_limit_and_without_waste():
    rng = random.Random(1)
    for _ in range(200):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 40))]
        micro_tokens = rng.randint(1, 80)
        batches = pack(lengths, micro_tokens)
        packed = [index for batch in batches for index in batch]
        assert sorted(packed) == list(range(len(lengths)))
        tokens = [sum(lengths[index] for index in batch) for batch in batches]
        for batch, batch_tokens in zip(batches, tokens, strict=True):
            assert batch_tokens <= micro_tokens or len(batch) == 1
            assert batch == sorted(batch)
        assert max(lengths) in [lengths[index] for index in batches[0]]
        assert batches == pack(lengths, micro_tokens)
        for one, other in itertools.combinations(tokens, 2):
            assert one + other > micro_tokens, "two batches could have been one"


def test_packing_is_the_plain_first_fit_and_not_quadratic():
    """The first batch with room, searched one by one; also zeros and examples over the limit. A
    batch more costs a step of the search only where the number of batches doubles."""
    rng = random.Random(2)
    for _ in range(100):
        lengths = [rng.randint(0, 30) for _ in range(rng.randint(1, 60))]
        micro_tokens = rng.randint(1, 25)
        expected: list[list[int]] = []
        free: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            fitting = [number for number, room in enumerate(free) if lengths[index] <= room]
            if not fitting:
                fitting = [len(free)]
                expected.append([])
                free.append(micro_tokens)
            expected[fitting[0]].append(index)
            free[fitting[0]] -= lengths[index]
        assert pack(lengths, micro_tokens) == [sorted(batch) for batch in expected]

    def seconds(count: int) -> float:
        started = time.process_time()
        assert len(pack([60] * count, 100)) == count
        return time.process_time() - started

    ratios = [seconds(8000) / seconds(1000) for _ in range(3)]
    assert sorted(ratios)[1] < 24, "8 times as many: 64 where every batch is looked at"


# ---- show


def test_show_marks_every_token_that_carries_loss():
    chat = StubChat()
    rows = [Row("r", (user("a b\n" * 30), bot("yes no")))] * 3
    examples, _ = encode_with(rows, chat=chat, max_length=200)
    text = show(examples, StubTokenizer(), 2)
    assert text.count("r/0: 133 tokens, 7 with loss (*)") == 2
    assert all(len(row) <= 96 for row in text.splitlines())
    first = text.split("r/0: ")[1].splitlines()[1:]
    unmarked = " ".join(row[4:] for row in first if row.startswith("    "))
    marked = " ".join(row[4:] for row in first if row.startswith("  * "))
    assert marked == "121'y' 101'e' 115's' 32'␣' 110'n' 111'o' 1'</s>'"
    assert len(unmarked.split(" ")) == 126 and r"10'\n'" in unmarked


# ---- retention prompts


def test_retention_prompts_are_64_distinct_ones_in_8_categories():
    categories = [category for category, _ in PROMPTS]
    prompts = [prompt for _, prompt in PROMPTS]
    assert len(set(prompts)) == 64
    assert all(categories.count(category) == 8 for category in categories)
    assert all(prompt == prompt.strip() and len(prompt) < 260 for prompt in prompts)
    assert set(KEPT) == {"accepted", "identical"}


def test_show_writes_each_loss_after_its_token():
    examples = [Example("r/0", [1, 2, 3, 4], 2)]
    text = show(examples, StubTokenizer(), 1, [[0.5, 1.25]])
    assert "2 with loss (*), 0.875 nats each" in text
    assert text.count(":0.50") == 1 and text.endswith(":1.25") and ":0.50" in text.split("*")[-1]


def test_mix_replaces_that_share_of_rewrites_by_references():
    many = distilled(*(line(id=f"r{i}/0") for i in range(300)), line(id="x/0", **REJECTED))
    settings = {"max_length": 99, "mix": 0.3, "seed": 1}
    examples, counts = encode_with(many, **settings)
    assert 60 <= counts.mixed <= 120 and counts.from_response == 300 - counts.mixed
    given, _ = encode_with(many, target="reference", max_length=99)
    kept, _ = encode_with(many, max_length=99)
    taken = [i for i in range(300) if examples[i].ids != kept[i].ids]
    assert len(taken) == counts.mixed and all(examples[i].ids == given[i].ids for i in taken)
    assert encode_with(many[::-1], **settings)[0] == examples[::-1], "by row, not by place"
    assert encode_with(many, **{**settings, "seed": 2})[0] != examples
    assert encode_with(many, max_length=99, mix=1.0)[0] == given
    assert encode_with([], max_length=99, mix=0.3)[0] == [], "none is refused for a mix of nothing"
    for wrong in ({"mix": 1.5}, {"mix": 0.3, "target": "reference"}):
        with pytest.raises(ValueError, match="a share from 0 to 1 of the rewrites"):
            encode_with(many, max_length=99, **wrong)
