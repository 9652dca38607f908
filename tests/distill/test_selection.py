"""The rules of selection (engine/distill/selection.py).

Every mistake of the published selection code has a case here or in tests/verify. The rules also run
over the rows of ../shared/data where present.
"""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from engine.data.rows import Row, load_rows
from engine.distill.selection import PAPER, banned, judge, repeats, why_garbled
from engine.verify.verifiers import VERIFIERS

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
def test_banned_phrases_are_found_in_any_case(text, verdict):
    assert banned(text) is verdict


SOUP = "Hinweis \u043a\u0432\u0456\u0442\u043d\u044f \ub4f1\ub85d trag \u7684\u662f\u4e86 und"
HELLO = "\u043f\u0440\u0438\u0432\u0435\u0442"  # in Russian
KANA, KANJI = "\u3053\u3093\u306b\u3061\u306f", "\u6f22\u5b57"
GARBLED = [
    ("a \ufffd b", "", "U+FFFD"),
    ("a \ufffd b", "see \ufffd", None),
    ("bell \x07", "", "U+0007"),
    ("c1 \x85", "", "U+0085"),
    ("tab\tand\r\nlines", "", None),
    ("no " * 10, "say no", "repeats 'no '"),
    ("no " * 9, "say no", None),
    ("Sure. " + "I love apples and pears.\n" * 12, "", "repeats"),
    ("\n".join(f"{i}. Buy milk" for i in range(1, 40)), "", None),
    ("-" * 300 + "\n" + "| --- " * 30 + "_" * 50 + " 1000000000000", "", None),
    ("hello " * 12, "Write hello 12 times: " + "hello " * 12, None),
    (SOUP, "Write a poem", "letters are foreign"),
    (f"{HELLO}, {HELLO}!", f"say {HELLO}", None),
    (f"{HELLO}, {HELLO}!", "say hello", "letters are foreign"),
    (f"{HELLO}, {HELLO}!" + " and more" * 9 + " plain words" * 5, "say hello", None),
    ("A = \u03c0r\u00b2", "area of a circle", None),
    (f"{KANA} means hello", "Hello in Japanese?", None),
    (f"{KANA}, {KANA}, {KANA}", KANJI, None),
    ("x" * 10, "12345 ?", "repeats"),
    ("all letters", "12345 ?", None),
    ("\U0001f600 " * 20, "cheer", None),
]  # fmt: skip


@pytest.mark.parametrize("text, context, reason", GARBLED)
def test_a_garbled_text_is_named_with_its_fault(text, context, reason):
    why = why_garbled(text, context)
    if reason is None:
        assert why is None
    else:
        assert reason in why


def test_long_texts_are_checked_quickly():
    letters = random.Random(0).choices("abcdefgh \n", k=20_000)
    noise = "".join(letters)
    texts = (noise, "_" * 20_000, "ab" * 4 + "-" * 20_000, " x y" * 4999 + "z")
    start = time.perf_counter()
    for text in texts:
        why_garbled(text, "abcdefgh")
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
def test_every_response_gets_its_status(response, finish, status):
    assert judge(PROMPT, "There are 4.", response, finish, VERIFIERS["number"]) == status


def test_text_of_the_prompt_or_reference_is_no_fault():
    def status(reference, response):
        return judge(PROMPT, reference, response, "stop", VERIFIERS["none"])

    assert status(LOOP, LOOP + "end") == "accepted"
    assert status("### Response: 4", "Sure. \n### Response: 4") == "accepted"
    assert status("See your response.", "See your response.") == "identical"
    assert status("See your response.", "Look at your response.") == "banned"


def test_the_verifier_gets_the_judged_turn():
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
def test_a_repeated_prompt_and_a_refusal_are_rejected_unless_the_reference_has_them(
    asked, reference, response, status
):
    prompt = [{"role": "user", "content": asked}]
    assert judge(prompt, reference, response, "stop", VERIFIERS["none"]) == status


def test_repeats_needs_the_whole_of_a_long_message():
    assert repeats(f"So: {LONG}", LONG)
    assert not repeats(f"So: {LONG[:-2]}", LONG)


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
def test_the_papers_only_rule_is_the_ban_list(response, finish, ours, paper):
    def status(**rules):
        return judge(PROMPT, "There are 4.", response, finish, VERIFIERS["none"], **rules)

    assert (status(), status(rules=PAPER)) == (ours, paper)


# ---- the real files


def test_published_rewrites_pass_the_guards(shared_data):
    """All 2,000 targets that the authors trained on, judged as if their sampling had ended."""
    rows = load_rows(shared_data / "alpaca_train.json")
    rewrites = load_rows(shared_data / "distilled_alpaca.json")
    statuses = Counter()
    for row, rewrite in zip(rows, rewrites, strict=True):
        prompt = row.messages[:-1]
        status = judge(prompt, row.reference, rewrite.reference, "stop", VERIFIERS["none"])
        statuses[status] += 1
    # two refuse what the reference does, two begin with the whole instruction
    assert statuses == {"accepted": 1644, "identical": 352, "refusal": 2, "repeats_prompt": 2}


def test_no_reference_is_garbled(shared_data):
    for name in ("alpaca_eval", "dolly_train", "gsm8k_train", "openfunction_train"):
        for row in load_rows(shared_data / f"{name}.json", limit=500):
            question = row.messages[0]["content"]
            assert why_garbled(row.reference, question) is None
