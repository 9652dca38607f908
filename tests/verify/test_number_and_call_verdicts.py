"""The verifiers `number` and `call` (engine/verify/answer_numbers.py, engine/verify/calls.py).

Every mistake of the published verifiers has a case here. Both verifiers also run over all rows of
../shared/data where present.
"""

from __future__ import annotations

import ast
import random
from fractions import Fraction

import pytest

from engine.data.rows import Row, load_rows
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
    ("between 1, 2", 2),
    ("day 1 200 people", 200),  # the published regular expression reads 1200
    ("1,2345", 2345),
    ("0,500,1", 1),
    ("5-3", 3),  # the published one reads -3
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
def test_the_last_number_is_read_exactly(text, number):
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
def test_the_verifier_number_compares_values(reference, text, expected):
    assert VERIFIERS["number"](row(reference), text) == (expected == "ok", expected)


def test_numbers_are_read_in_many_notations():
    rng = random.Random(0)
    for _ in range(500):
        value = rng.choice([rng.randint(-20, 20), rng.randint(-(10**9), 10**9)])
        decimals = rng.choice(["", ".0", ".00", f".{rng.randint(1, 99):02}"])
        exact = Fraction(f"{value}{decimals}")
        sign = "-" if value < 0 else ""
        digits = f"{abs(value)}"
        grouped = f"{abs(value):,}"
        for body in (digits, grouped, grouped.replace(",", "\u00a0"), "0" + digits):
            number = f"{body}{decimals}"
            for text in (f"{sign}{number}", f"7 {sign}${number}.", f"({sign}{number})%"):
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
def test_the_verifier_call_compares_calls_as_python_reads_them(reference, text, expected):
    assert VERIFIERS["call"](row(reference), text) == (expected == "ok", expected)


# ---- the real files


@pytest.mark.parametrize("name, count", [("gsm8k_train", 7473), ("gsm8k_test", 1319)])
def test_every_gsm8k_reference_passes_as_itself_only(shared_data, name, count):
    rows = load_rows(shared_data / f"{name}.json")
    verify = VERIFIERS["number"]
    assert [verify(row, row.reference)[1] for row in rows] == ["ok"] * count

    def stated(row):
        """The N of "The answer is N."."""
        answer = row.reference.rsplit("The answer is ")[-1]
        return Fraction(answer.rstrip(".").replace(",", ""))

    for row, other in zip(rows, rows[1:], strict=False):
        accepted, _ = verify(row, other.reference)
        assert accepted == (stated(row) == stated(other))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("name, count", [("openfunction_train", 2211), ("openfunction_test", 112)])
def test_every_openfunctions_reference_passes_in_other_notations(shared_data, name, count):
    rows = load_rows(shared_data / f"{name}.json")
    verify = VERIFIERS["call"]
    assert [verify(row, row.reference)[1] for row in rows] == ["ok"] * count
    changed = 0
    for row in rows:
        try:
            call = ast.parse(row.reference.strip(), mode="eval").body
        except SyntaxError:  # three rows hold a <placeholder>
            continue
        # the same call with other spaces, quotes and order of keyword arguments
        call.keywords.reverse()
        arguments = ",\n  ".join(map(ast.unparse, [*call.args, *call.keywords]))
        rewritten = f"{ast.unparse(call.func)}({arguments} )"
        assert verify(row, f"Sure: `{rewritten}`.") == (True, "ok")
        # another call
        if call.keywords:
            call.keywords[0].value = ast.Constant("another value")
            assert verify(row, ast.unparse(call)) == (False, "mismatch")
            changed += 1
    assert changed > 0.9 * count
