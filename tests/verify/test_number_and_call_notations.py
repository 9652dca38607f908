"""The verifiers `number` and `call` on the notations that people and models use

Units, powers and LaTeX (engine/verify/answer_numbers.py); chains of calls and calls in JSON
(engine/verify/calls.py). Hostile texts are read in linear time.
"""

from __future__ import annotations

import time

import pytest

from engine.data.rows import Row, load_rows
from engine.verify.answer_numbers import last_number
from engine.verify.verifiers import VERIFIERS


def row(reference: str) -> Row:
    return Row("r", ({"role": "user", "content": "q"}, {"role": "assistant", "content": reference}))


# reference, text, whether they are the same number; each pair is also tested the other way round
NUMBERS = [
    ("20 cm^2", "30 cm^2", False),
    ("20 cm^2", "20 cm^{2}", True),
    ("20", "20 cm^2", True),
    ("20 m2", "30 m2", False),
    ("20 m2", "20 m²", True),
    ("20 m^3", "20m3", True),
    ("20", "20 cm$^2$", True),
    ("20", r"$20 \text{ cm}^2$", True),
    ("20", r"20~\mathrm{cm}^2", True),
    ("9.8 m/s^2", "9.8", True),
    ("9.8 m/s^2", "9.7 m/s^2", False),
    ("90", r"90^\circ", True),
    (r"90^{\circ}", r"80^\circ", False),
    (r"\frac{1}{2}", r"\frac{3}{2}", False),
    (r"\boxed{\frac{1}{2}}", "1/2", True),
    (r"$\dfrac{1}{2}$", "0.5", True),
    (r"\frac12", "1/2", True),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", True),
    (r"3\frac{1}{2}", "3 1/2", True),
    ("3 1/2", "3.5", True),
    ("3 1/2", "4 1/2", False),
    (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt{5}}{2}", False),
    (r"\frac{\sqrt{3}}{2}", r"It is $\dfrac{\sqrt{3}}{2}$.", True),
    ("2^{10}", "3^{10}", False),
    ("2^{10}", "1024", True),
    ("2**10", "2^10", True),
    ("10²", "10³", False),
    ("10²", "100", True),
    ("1e3", "1000", True),
    ("1e3", "1e4", False),
    ("1e-3", "0.001", True),
    (r"1.5 \times 10^{3}", "1500", True),
    ("1.5 x 10^3", "2.5 x 10^3", False),
    (r"\sqrt{2}", r"3\sqrt{2}", False),
    (r"\sqrt{2}", "the answer is √2.", True),
    (r"3 \cdot \sqrt{2}", r"3\cdot\sqrt{2}", True),
    (r"2\pi", "2π", True),
    (r"2\pi", r"3\pi", False),
    ("20x^2", "20x^3", False),
    ("x^2 + 3", "x^3 + 3", False),
    ("x^2 + 3", "x^2 + 3.", True),
    ("3:30", "4:30", False),
    ("3:30", "at 3:30 pm", True),
    ("2:3", "3", False),
    ("1234", "1{,}234", True),
    ("1234", r"1\,234", True),
    ("７", "7", True),
    ("１，２３４．５", "1234.5", True),
    ("–5", "-5", True),
    ("5", "–5", False),
    (r"\boxed{18}", "The answer is 18.", True),
    ("18", r"So \boxed{18}, since 3 ducks are left.", True),
    (r"\boxed{19}. 18", "18", False),
    (r"\boxed{\text{18 eggs}}", "18", True),
    (r"\boxed{x = \frac{1}{2}}", "1/2", True),
]


@pytest.mark.parametrize("reference, text, same", NUMBERS)
def test_the_last_expression_is_read_whole(reference, text, same):
    verify = VERIFIERS["number"]
    verdict = (True, "ok") if same else (False, "mismatch")
    assert verify(row(reference), text) == verdict
    assert verify(row(text), reference) == verdict


# Forms of the number 18, separated by |.
USUAL_FORMS = """18|18.|18!|18,|(18)|"18"|**18**|__18__|*18*|`18`|#### 18|= 18|x = 18|Answer:18|$18
$18.00|18%|\\$18|18\\%|$18$|\\(18\\)|\\[18\\]|$$18$$|18 eggs|18 km/h|18 square meters
18 per m2|USD 18|€18|Rs.18|018|2 x 9 = 18|2^3 + 10 = 18|20-2=18|36/2 = 18
The answer is 18.0|18 (eighteen)|she has 18, not more
3 + 15 = **18** eggs.|So 10 + 8 = 18|about ~18|18 dollars and no cents|[18]|{18}|<b>18</b>|18 :)"""


@pytest.mark.parametrize("text", USUAL_FORMS.replace("\n", "|").split("|"))
def test_usual_forms_of_a_number_have_its_value(text):
    assert last_number(text) == 18


def test_every_published_answer_has_the_value_it_states(shared_data):
    """All 8,792 answers of GSM8K are read as the integer N of their end, `The answer is N.`."""
    for name in ("gsm8k_train.json", "gsm8k_test.json"):
        for given in load_rows(shared_data / name):
            stated = given.reference.rsplit("The answer is ", 1)[1]
            digits = stated.rstrip(".").replace(",", "")
            assert last_number(given.reference) == int(digits)
            assert last_number(digits) == int(digits)


def test_hostile_numbers_are_read_quickly():
    texts = (
        "1" * 50_000, "1 " * 50_000, "\\frac{" * 20_000, "\\frac{1}{" * 20_000, "^" * 50_000,
        "1^" * 30_000, "√(" * 30_000, "\\boxed{" * 20_000, "1,111" * 20_000, "\\text{" * 20_000,
        "- " * 50_000, "a + " * 30_000 + "1", "1/" * 50_000, "1e" * 50_000, "x10^" * 30_000,
        " " * 99_000 + "1", "1 x 10" * 20_000, "⁵" * 50_000, "1:" * 50_000, "9^999", "0^-1",
        "99999999999999999999^300", "1e999",
    )  # fmt: skip
    for text in texts:
        started = time.process_time()
        last_number(text)
        assert time.process_time() - started < 2, text[:20]


# ---- calls

JSON = '{"name": "f", "arguments": {"a": 1, "b": ["x", null]}}'
CALLS = [
    ("pd.read_csv('a.csv').head(5)", "pd.read_csv('a.csv').tail(99)", "mismatch"),
    ("pd.read_csv('a.csv').head(5)", 'Use pd.read_csv("a.csv").head( 5 ).', "ok"),
    ("pd.read_csv('a.csv').head(5)", "pd.read_csv('a.csv')", "mismatch"),
    ("torch.hub.load(a=1).eval()", "torch.hub.load(a=1).train()", "mismatch"),
    ("torch.hub.load(a=1)", "torch.hub.load(a=1). Then go on.", "ok"),
    ("torch.hub.load(a=1)", "torch.hub.load(a=1)(see below)", "ok"),
    ("pipeline('x')('a')", "pipeline('x')('b')", "mismatch"),
    ("pipeline('x')('a')", 'pipeline("x")("a")', "ok"),
    ("f(x)[0]", "f(x)[1]", "mismatch"),
    ("f(x)[0]", "f(x)[0] is it", "ok"),
    ("f(x).shape", "f(x).dtype", "mismatch"),
    ("f(a=1).g(b=2, c=3)", "f(a=1).g(c=3, b=2)", "ok"),
    ("df.groupby('a').sum()", "df.groupby('a')\n  .sum()", "ok"),
    ("f(a=<t>).run(b=1)", "f(a=<t>).run(b=2)", "mismatch"),
    ("f(a=1, b=2)", "f(\n a=1,  # don't change (it\n b=2)", "ok"),
    ('f(a="it\'s")', "f(a='''it's''')", "ok"),
    ("f(a={1, 2})", "f(a={2, 1})", "ok"),
    ("f(a={1, 2})", "f(a={1, 3})", "mismatch"),
    ("f(color=#fff)", "f(color=#fff)", "ok"),
    ("f(color=#fff)", "f(color=#000)", "mismatch"),
    # JSON
    (JSON, f"<tool_call>\n{JSON}\n</tool_call>", "ok"),
    (JSON, '```json\n{"arguments": {"b": ["x", null], "a": 1.0}, "name": "f"}\n```', "ok"),
    (JSON, '{"function": {"name": "f", "arguments": "{\\"b\\": [\\"x\\", null], \\"a\\": 1}"}}',
     "ok"),
    (JSON, f'{{"tool_calls": [{{"type": "function", "function": {JSON}}}]}}', "ok"),
    (JSON, f"[{JSON.replace('arguments', 'parameters')}]", "ok"),
    (JSON, JSON.replace("1", "2"), "mismatch"),
    (JSON, JSON.replace("1", "true"), "mismatch"),
    (JSON, JSON.replace("1", '"1"'), "mismatch"),
    (JSON, JSON.replace("f", "g"), "mismatch"),
    (JSON, f'{JSON} and {{"name": "g", "arguments": {{}}}}', "mismatch"),
    (JSON, "f(a=1, b=['x', None])", "no_call"),
    (JSON, JSON[:-1], "no_call"),
    ("f(a=1, b=['x', None])", JSON, "no_call"),
    ('{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', "reference_without_call"),
    ('{"name": "run", "arguments": {"code": "f({1: 2})"}}',
     '{"name": "run", "arguments": {"code": "f({1: 3})"}}', "mismatch"),
    (f"f(a={JSON})", f"f( a={JSON})", "ok"),
    (f"f(a={JSON})", JSON, "no_call"),
]  # fmt: skip


@pytest.mark.parametrize("reference, text, reason", CALLS)
def test_chains_and_json_are_compared_as_whole_calls(reference, text, reason):
    verify = VERIFIERS["call"]
    assert verify(row(reference), text) == (reason == "ok", reason)
    if reason != "reference_without_call":
        assert verify(row(reference), f"So: {reference}") == (True, "ok")


def test_every_published_call_passes_for_itself(shared_data):
    verify = VERIFIERS["call"]
    for name, count in (("openfunction_train.json", 2211), ("openfunction_test.json", 112)):
        rows = load_rows(shared_data / name)
        assert len(rows) == count
        for given in rows:
            assert verify(given, f"So: {given.reference}") == (True, "ok")


def test_hostile_calls_are_read_quickly():
    texts = (
        "f(" * 10_000, "f(a" * 5000, "[" * 50_000, '{"a":' * 900 + "1", "f('" * 5000, "{" * 9000,
        '["a",' * 900, "f(x)" * 3000, "f(x)(x)" * 1500, "f" + "(x)" * 4000, "f" + ".f(" * 5000,
        '{"name": "f", "arguments": ' + "[" * 900 + "]" * 900 + "}", "f(" + "1" * 9000 + ")",
    )  # fmt: skip
    for text in texts:
        for reference in ("f(a=1)", JSON):
            started = time.process_time()
            accepted, _ = VERIFIERS["call"](row(reference), text)
            assert not accepted
            assert time.process_time() - started < 5, text[:20]
