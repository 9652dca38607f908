"""The rules of selection (engine/distill/selection.py), and the verifiers `number` and `call`.

Every mistake of the published selection code (see engine/distill/selection.py and the paper's
repository)
has its case here or in test_verifiers.py, which has the other verifiers. The rules and verifiers
also run over all rows of ../shared/data where present.
"""

from __future__ import annotations

import ast
import random
import time
from collections import Counter
from fractions import Fraction

import pytest

from engine.data.rows import Row, load_rows
from engine.distill.selection import PAPER, banned, garbled, judge, repeats
from engine.verify.answer_numbers import last_number
from engine.verify.verifiers import VERIFIERS


def row(reference: str) -> Row:
    return Row("r", ({"role": "user", "content": "q"}, {"role": "assistant", "content": reference}))


# ---- number

NUMBERS = [
    ("The answer is 18.", 18),
    ("$1,234.50", Fraction("1234.5")),
    ("109,200,000.", 109_200_000),
    ("1\u202f234\u00a0567", 1_234_567),
    ("between 1, 2", 2),  # the published regular expression reads 12
    ("day 1 200 people", 200),  # and 1200 here
    ("1,2345", 2345),
    ("0,500,1", 1),
    ("5-3", 3),  # and -3 here
    ("(2+1)-3", 3),
    ("10%-20%", 20),
    ("x = -5", -5),
    ("it is \u22125 degrees", -5),
    ("a loss of -$1,000", -1000),
    ("a loss of $-7", -7),
    ("pages 3\u20135", 5),
    (".5", Fraction(1, 2)),
    ("-.5", Fraction(-1, 2)),
    ("1.50%", Fraction(3, 2)),
    ("0.1", Fraction(1, 10)),
    ("3/4", Fraction(3, 4)),
    ("48/2 = 24 clips", 24),
    ("12/5/2024", Fraction(5, 2024)),
    ("1/0", None),
    ("-", None),
    ("no digits, \u00bd and \u0663", None),
    ("1" * 5000, None),
    ("", None),
]


@pytest.mark.parametrize("text, number", NUMBERS, ids=[text[:20] for text, _ in NUMBERS])
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    "reference, text, expected",
    [
        ("The answer is 3.", "So 3.0 in all", "ok"),
        ("The answer is 1,234.", "It is 1234!", "ok"),
        ("The answer is 0.3.", "0.30000000000000001", "mismatch"),
        ("9007199254740993", "9007199254740992", "mismatch"),  # equal as floats
        ("The answer is 12.", "Either 1, 2", "mismatch"),
        ("The answer is 3/4.", "The answer is 1/4.", "mismatch"),
        ("The answer is 18.", "The answer is 18. I hope this helps in 2024", "mismatch"),
        ("The answer is 18.", "no idea", "no_number"),
        # two answers without number: the published sentinel makes them equal
        ("unknown", "no idea", "reference_without_number"),
        ("unknown", "unknown", "reference_without_number"),
        ("-999999999", "no idea", "no_number"),
        ("unknown", "-999999999", "reference_without_number"),
    ],
)
def test_number(reference, text, expected):
    assert VERIFIERS["number"](row(reference), text) == (expected == "ok", expected)


def test_numbers_survive_being_written_in_many_ways():
    rng = random.Random(0)
    for _ in range(500):
        value = rng.choice([rng.randint(-20, 20), rng.randint(-(10**9), 10**9)])
        decimals = rng.choice(["", ".0", ".00", f".{rng.randint(1, 99):02}"])
        exact = Fraction(f"{value}{decimals}")
        sign, digits = ("-" if value < 0 else ""), f"{abs(value)}"
        grouped = f"{abs(value):,}"
        for body in (digits, grouped, grouped.replace(",", "\u00a0"), "0" + digits):
            for text in (
                f"{sign}{body}{decimals}",
                f"7 {sign}${body}{decimals}.",
                f"({sign}{body}{decimals})%",
            ):
                assert last_number(text) == exact, text


# ---- call

REFERENCE = 'shop.find(location="San Jose, CA", amenities=["Wi-Fi", \'tea\'], open=true, radius=5)'


@pytest.mark.parametrize(
    "reference, text, expected",
    [
        (REFERENCE, REFERENCE, "ok"),
        (
            REFERENCE,
            "Sure! Call\n```python\nshop.find(radius = 5.0, open=True,\n  location='San Jose, CA', "
            "amenities=['Wi-Fi','tea'])\n```\nI hope it is accurate (please review it).",
            "ok",
        ),
        (REFERENCE, REFERENCE.replace("San Jose", "san jose"), "mismatch"),
        (REFERENCE, REFERENCE.replace("San Jose, CA", "SanJose,CA"), "mismatch"),
        (REFERENCE, REFERENCE.replace("=5", '="5"'), "mismatch"),
        (REFERENCE, REFERENCE.replace(", radius=5", ""), "mismatch"),
        (REFERENCE, REFERENCE.replace("shop.", "my.shop."), "no_call"),
        (REFERENCE, REFERENCE.replace("shop.", ""), "no_call"),
        (REFERENCE, REFERENCE[:-1], "no_call"),
        (REFERENCE, "use shop.find with a location", "no_call"),
        (REFERENCE, f"not shop.find(radius=1) but {REFERENCE}", "mismatch"),
        (REFERENCE, f"{REFERENCE} - that is: {REFERENCE}", "ok"),
        (REFERENCE, f"print({REFERENCE})", "ok"),
        ("f(1, 2)", "f(1,2)", "ok"),
        ("f(1, 2)", "f(2, 1)", "mismatch"),
        ("f(1, b=2)", "f(a=1, b=2)", "mismatch"),
        ("f(a=1)", "f(a=True)", "mismatch"),
        ("f(a=-1)", "f(a = -1.0)", "ok"),
        ("f(a=None)", "f(a=null)", "ok"),
        ("f(a='true')", "f(a=true)", "mismatch"),
        ("f(a={'x': 1, 'y': 2})", 'f(a={"y": 2, "x": 1})', "ok"),
        ("f(a={'x': 1, 'y': 2})", 'f(a={"y": 1, "x": 2})', "mismatch"),
        ("f(a=[1, 2])", "f(a=[2, 1])", "mismatch"),
        ("f(a=g(x=1, y='2'))", 'f(a=g(y="2", x=1))', "ok"),
        ("f(a=g(x=1, y='2'))", "f(a=g(x=1, y='3'))", "mismatch"),
        ("f(a=g(x=1))", "g(x=1)", "no_call"),
        ("f(a='(')", "f(a='(') :)", "ok"),
        (r"f(a='it\'s)')", 'f(a="it\'s)")', "ok"),
        ("f()", "f()", "ok"),
        ("f()", "f(a=1)", "mismatch"),
        ("f(a=me@example.com, b=i-1)", "f(b=i - 1, a=me@example.com)", "ok"),
        ("f(a=<token>, b='x')", 'f(a=<token>, b="x")', "ok"),  # not Python: compared as text
        ("f(a=<token>, b='x')", "f(a=<tok>, b='x')", "mismatch"),
        ("f(a=<token>)", "f(a='token')", "mismatch"),
        ("f(a=1); g(b=2)", "g(b=2) and then f(a=1)", "ok"),
        ("f(a=1); g(b=2)", "f(a=1)", "mismatch"),
        ("[f(a=1), f(a=2)]", "f(a=2)\nf(a=1)", "ok"),
        ("[f(a=1), f(a=2)]", "f(a=1)\nf(a=1)", "mismatch"),
        ("f(a=1)", "x[0].f(a=1)", "no_call"),
        (r"f(a='\d', b=1)", r"f(b=1, a='\d')", "ok"),  # Python's parser warns of \d
        ("no call", "no call", "reference_without_call"),
        ("f(a=1)", "f(" * 5000 + ")" * 5000, "mismatch"),
        ("f(a=1)", "f(" * 500, "no_call"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_call(reference, text, expected):
    assert VERIFIERS["call"](row(reference), text) == (expected == "ok", expected)


# ---- the rules on text


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("As the Reference Answer says, 5.", True),
        ("Here is MY RESPONSE: 5", True),
        ("your own response", True),
        ("Now it\u2019s your turn to try", True),
        ("  Your turn: 5", True),
        ("It is your turn", False),
        ("The reference and the answer", False),
    ],
)
def test_ban_list(text, verdict):
    assert banned(text) is verdict


SOUP = "Hinweis \u043a\u0432\u0456\u0442\u043d\u044f \ub4f1\ub85d trag \u7684\u662f\u4e86 und"
HELLO = "\u043f\u0440\u0438\u0432\u0435\u0442"  # in Russian
KANA, KANJI = "\u3053\u3093\u306b\u3061\u306f", "\u6f22\u5b57"
GARBLED = [
    ("a \ufffd b", "", "U+FFFD"),
    ("a \ufffd b", "see \ufffd", ""),
    ("bell \x07", "", "U+0007"),
    ("c1 \x85", "", "U+0085"),
    ("tab\tand\r\nlines", "", ""),
    ("no " * 10, "say no", "repeats 'no '"),
    ("no " * 9, "say no", ""),
    ("Sure. " + "I love apples and pears.\n" * 12, "", "repeats"),
    ("\n".join(f"{i}. Buy milk" for i in range(1, 40)), "", ""),
    ("-" * 300 + "\n" + "| --- " * 30 + "_" * 50 + " 1000000000000", "", ""),
    ("hello " * 12, "Write hello 12 times: " + "hello " * 12, ""),
    (SOUP, "Write a poem", "letters are foreign"),
    (f"{HELLO}, {HELLO}!", f"say {HELLO}", ""),
    (f"{HELLO}, {HELLO}!", "say hello", "letters are foreign"),
    (f"{HELLO}, {HELLO}!" + " and more" * 9 + " plain words" * 5, "say hello", ""),
    ("A = \u03c0r\u00b2", "area of a circle", ""),
    (f"{KANA} means hello", "Hello in Japanese?", ""),
    (f"{KANA}, {KANA}, {KANA}", KANJI, ""),
    ("x" * 10, "12345 ?", "repeats"),
    ("all letters", "12345 ?", ""),
    ("\U0001f600 " * 20, "cheer", ""),
]  # fmt: skip


@pytest.mark.parametrize("text, context, reason", GARBLED)
def test_garbled(text, context, reason):
    why = garbled(text, context)
    assert reason in why if reason else not why


def test_garbled_is_quick_on_long_texts():
    letters = random.Random(0).choices("abcdefgh \n", k=20_000)
    start = time.perf_counter()
    for text in ("".join(letters), "_" * 20_000, "ab" * 4 + "-" * 20_000, " x y" * 4999 + "z"):
        garbled(text, "abcdefgh")
    assert time.perf_counter() - start < 5


# ---- judge

PROMPT = [{"role": "user", "content": "How many?"}]
LOOP = "the " * 20


@pytest.mark.parametrize(
    "response, finish, status",
    [
        ("It is 4.", "stop", "accepted"),
        ("It is 4.", "stop_string", "accepted"),
        ("  There are 4.\n", "stop", "identical"),
        ("There are 4.", "length", "identical"),
        ("", "stop", "empty"),
        (" \n", "length", "empty"),
        ("", "prompt_too_long", "prompt_too_long"),
        ("It is 4.", "length", "truncated"),  # the published code trains it with an end token
        ("It is 5.", "length", "truncated"),
        ("It is 5.", "stop", "mismatch"),
        ("Four.", "stop", "no_number"),
        ("The reference answer is 4.", "stop", "banned"),
        ("The reference answer is 4.", "length", "truncated"),
        ("### Reference Answer:\nIt is 4.", "stop", "banned"),
        ("### Instruction:\nIt is 4.", "stop", "echo"),
        ("It is 4.\n  ##response: 4", "stop", "echo"),
        ("It is 4. [/INST]", "stop", "echo"),
        ("### Explanation:\nIt is 4.", "stop", "accepted"),
        (LOOP, "length", "garbled"),
        ("It is \ufffd 4.", "stop", "garbled"),
    ],
)
def test_judge(response, finish, status):
    assert judge(PROMPT, "There are 4.", response, finish, VERIFIERS["number"]) == status


def test_judge_measures_against_what_the_writer_saw():
    def none(reference, response):
        return judge(PROMPT, reference, response, "stop", VERIFIERS["none"])

    assert none(LOOP, LOOP + "end") == "accepted"
    assert none("### Response: 4", "Sure. \n### Response: 4") == "accepted"
    assert none("See your response.", "See your response.") == "identical"
    assert none("See your response.", "Look at your response.") == "banned"


def test_the_verifier_sees_the_turn_it_judges():
    seen = []

    def spy(given: Row, text: str) -> tuple[bool, str]:
        seen.append((given.messages[:-1], given.reference, text))
        return False, "because"

    talk = [*PROMPT, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And now?"}]
    assert judge(talk, "5", "6", "stop", spy) == "because"
    assert seen == [(tuple(talk), "5", "6")]


LONG = "Write a short note to the team that says when we meet next week."
NO = "I'm sorry, but I can't help with that."


@pytest.mark.parametrize(
    "asked, reference, response, status",
    [
        (LONG, "We meet on Monday.", f"{LONG} Sure: Monday.", "repeats_prompt"),
        (LONG, "We meet on Monday.", f"> {LONG.upper()}\nMonday.", "repeats_prompt"),
        (LONG, f"{LONG} Monday.", f"{LONG} On Monday.", "accepted"),
        ("How many cats?", "Four.", "How many cats? There are four.", "accepted"),  # short
        ("How many cats?", "Four.", "how many  cats?", "repeats_prompt"),
        ("Make a bomb", NO, "Sorry, I cannot assist with this.", "accepted"),
        ("Make a bomb", NO, "Take some nails and ...", "not_refused"),
        ("Bake a cake", "Take flour.", "As an AI language model, I cannot bake.", "refusal"),
        ("Bake a cake", "Take flour.", "Sorry about the mess: take flour.", "accepted"),
    ],
)
def test_repetition_of_the_prompt_and_refusals(asked, reference, response, status):
    prompt = [{"role": "user", "content": asked}]
    assert judge(prompt, reference, response, "stop", VERIFIERS["none"]) == status


def test_repeats_wants_all_of_a_long_message():
    assert repeats(f"So: {LONG}", LONG) and not repeats(f"So: {LONG[:-2]}", LONG)


@pytest.mark.parametrize(
    "response, finish, ours, paper",
    [
        ("It is 4, and", "length", "truncated", "accepted"),
        ("", "stop", "empty", "empty"),
        (LOOP, "length", "garbled", "accepted"),
        ("### Instruction:\nIt is 4.", "stop", "echo", "accepted"),
        (NO, "stop", "refusal", "accepted"),
        ("How many?", "stop", "repeats_prompt", "accepted"),
        ("The reference answer is 4.", "stop", "banned", "banned"),
        ("There are 4.", "length", "identical", "identical"),
        ("", "prompt_too_long", "prompt_too_long", "prompt_too_long"),
    ],
)
def test_the_papers_rules_are_the_ban_list(response, finish, ours, paper):
    def status(**rules):
        return judge(PROMPT, "There are 4.", response, finish, VERIFIERS["none"], **rules)

    assert (status(), status(rules=PAPER)) == (ours, paper)


# ---- the real files


@pytest.mark.parametrize("name, count", [("gsm8k_train", 7473), ("gsm8k_test", 1319)])
def test_every_gsm8k_reference_verifies_and_none_passes_for_another(shared_data, name, count):
    rows = load_rows(shared_data / f"{name}.json")
    verify = VERIFIERS["number"]
    assert [verify(r, r.reference)[1] for r in rows] == ["ok"] * count
    for r, other in zip(rows, rows[1:], strict=False):
        stated = [
            Fraction(x.reference.rsplit("The answer is ")[-1].rstrip(".").replace(",", ""))
            for x in (r, other)
        ]
        assert verify(r, other.reference)[0] == (stated[0] == stated[1])


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("name, count", [("openfunction_train", 2211), ("openfunction_test", 112)])
def test_every_openfunctions_reference_verifies_however_it_is_written(shared_data, name, count):
    rows = load_rows(shared_data / f"{name}.json")
    verify = VERIFIERS["call"]
    assert [verify(r, r.reference)[1] for r in rows] == ["ok"] * count
    changed = 0
    for r in rows:
        try:
            call = ast.parse(r.reference.strip(), mode="eval").body
        except SyntaxError:  # three rows hold a <placeholder>
            continue
        call.keywords.reverse()
        arguments = ",\n  ".join(map(ast.unparse, [*call.args, *call.keywords]))
        rewritten = f"{ast.unparse(call.func)}({arguments} )"
        assert verify(r, f"Sure: `{rewritten}`.") == (True, "ok")
        if call.keywords:
            call.keywords[0].value = ast.Constant("another value")
            assert verify(r, ast.unparse(call)) == (False, "mismatch")
            changed += 1
    assert changed > 0.9 * count


def test_published_rewrites_are_not_rejected_for_their_looks(shared_data):
    """All 2,000 targets that the authors trained on, as if they had ended by themselves."""
    given = load_rows(shared_data / "alpaca_train.json")
    written = load_rows(shared_data / "distilled_alpaca.json")
    statuses = Counter(
        judge(r.messages[:-1], r.reference, w.reference, "stop", VERIFIERS["none"])
        for r, w in zip(given, written, strict=True)
    )
    # two refuse what the reference does, two begin with the whole instruction
    assert statuses == {"accepted": 1644, "identical": 352, "refusal": 2, "repeats_prompt": 2}


def test_no_reference_is_garbled(shared_data):
    for name in ("alpaca_eval", "dolly_train", "gsm8k_train", "openfunction_train"):
        for r in load_rows(shared_data / f"{name}.json", limit=500):
            assert not garbled(r.reference, r.messages[0]["content"])
