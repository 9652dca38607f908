"""Selection: whether a response may be trained on in place of its reference

`judge` gives a response its status. The rules, first match wins:

    prompt_too_long   the sampler could not start
    empty             no text
    identical         the reference itself (whitespace around it aside), whatever else it breaks
    garbled           it is not natural text: see `why_garbled`
    truncated         it hit the token limit, so its end is missing
    banned            it talks about the task of rewriting (the ban list of the paper, 2402.13669)
    echo              it repeats the template's headers (those of a template file too) or the chat
                      format's marks
    repeats_prompt    it repeats the user's whole message (a message of fewer than PROMPT_WORDS
                      words counts only where the response says nothing else)
    refusal           it refuses (engine/verify/refusals.py) and the reference does not
    not_refused       the reference refuses and it does not
    (the verifier's)  mismatch, no_number, no_call, reference_without_number, ...
    accepted

A response may have an echo or a repetition that the reference has too. Only "accepted" and
"identical" responses become targets (`data.KEPT`); with every other status the target is the
reference. So a rule that is too strict costs a rewrite and never makes a wrong target. Verifiers
are in engine/verify/verifiers.py.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from engine.data.rows import Row
from engine.verify.refusals import refuses
from engine.verify.verifiers import Verifier
from model.messages import last_of_user, texts_of

PROMPT_WORDS = 12


@dataclass(frozen=True)
class Rules:
    """Rules for rewrites, beside the verifier.

    OURS, or PAPER with the published defects that change results (engine/presets.py lists all).
    """

    guards: bool = True  # all rules above; False: the ban list and the verifier only
    cut_prompts: int = 0  # tokens to which prompts that ask for a rewrite are cut; 0: not cut
    prefix_in_target: bool = True  # whether the answer's forced beginning is part of the target
    every_turn: bool = True  # False: rewrite a conversation's last answer only
    marks: tuple[str, ...] = ()  # headings of a template file: a response with one is an echo


OURS = Rules()
PAPER = Rules(guards=False, cut_prompts=1024, prefix_in_target=False, every_turn=False)


def judge(
    messages: Sequence[dict[str, str]],
    reference: str,
    response: str,
    finish: str,
    verifier: Verifier,
    *,
    rules: Rules = OURS,
    tests: str = "",
) -> str:
    """The status of a response; the rules are listed at the top of this file.

    messages    the context; it ends with the user's message or a tool's
    finish      how sampling ended: "stop", "stop_string", "length" or "prompt_too_long"
    rules       without `rules.guards` a response that hit the token limit can be accepted
    tests       the row's tests, for the verifier
    """
    if finish == "prompt_too_long":
        return "prompt_too_long"
    if not response.strip():
        return "empty"
    if response.strip() == reference.strip():
        return "identical"
    if rules.guards:
        fault = _why_incomplete(messages, reference, response, finish)
        if fault is not None:
            return fault
    if banned(response):
        return "banned"
    if rules.guards:
        fault = _why_unlike_reference(messages, reference, response, rules.marks)
        if fault is not None:
            return fault
    # The verifier sees a row whose reference is this turn's, also in the middle of a conversation.
    row = Row("", (*messages, {"role": "assistant", "content": reference}), tests)
    ok, reason = verifier(row, response)
    return "accepted" if ok else reason


def _why_incomplete(
    messages: Sequence[dict[str, str]], reference: str, response: str, finish: str
) -> str | None:
    """The status of a response that is not a complete text; None for one that is."""
    seen = [text for message in messages for text in texts_of(message)]
    context = "\n".join([*seen, reference])
    if why_garbled(response, context) is not None:
        return "garbled"
    if finish == "length":
        return "truncated"
    return None


def _why_unlike_reference(
    messages: Sequence[dict[str, str]], reference: str, response: str, marks: Sequence[str]
) -> str | None:
    """The status of a complete text that does not answer as the reference does; None if it does."""
    if _ECHO.search(response) and not _ECHO.search(reference):
        return "echo"
    if _has_line(response, marks) and not _has_line(reference, marks):
        return "echo"
    question = messages[last_of_user(messages)]["content"]
    if repeats(response, question) and not repeats(reference, question):
        return "repeats_prompt"
    if refuses(response) and not refuses(reference):
        return "refusal"
    if refuses(reference) and not refuses(response):
        return "not_refused"
    return None


# ---- rules on the text alone

BANNED = (
    "reference answer",
    "your response",
    "my response",
    "your own response",
    "now it's your turn",
)
# "[INST]" and "<<SYS>>" are ordinary text to Llama 2's tokenizer: no decoder removes them.
_ECHO = re.compile(
    r"^\s*#{2,}\s*(?:instruction|reference answer|response)\b|\[/?INST\]|<</?SYS>>",
    re.IGNORECASE | re.MULTILINE,
)
_LOOP = re.compile(r"(.{1,100}?)\1{9,}", re.DOTALL)  # the same characters ten times in a row


def _has_line(text: str, marks: Sequence[str]) -> bool:
    """Whether one of the marks is a line of the text; letter case and outer space do not count."""
    lines = {line.strip().casefold() for line in text.splitlines()}
    return any(mark.strip().casefold() in lines for mark in marks)


def banned(text: str) -> bool:
    """Whether the text holds a phrase of BANNED, in any case, or begins with "Your turn"."""
    lower = text.lower().replace("’", "'")
    return any(phrase in lower for phrase in BANNED) or lower.lstrip().startswith("your turn")


def repeats(text: str, question: str) -> bool:
    """Whether the text repeats the whole question; letter case and spaces do not count.

    A question of fewer than PROMPT_WORDS words must be the whole text.
    """
    question_words = question.casefold().split()
    whole_question = " ".join(question_words)
    answer = " ".join(text.casefold().split())
    if len(question_words) < PROMPT_WORDS:
        return answer == whole_question
    return whole_question in answer


def why_garbled(text: str, context: str) -> str | None:
    """Why `text` is not natural text; None where it is.

    context    all that the model saw; characters and repetitions that occur there are allowed

    Each of these is a fault:
    - a replacement character (bytes that are not UTF-8) or a control character
    - a loop: up to 100 characters, a letter among them, ten times in a row
    - random tokens: ten letters or more, over a tenth of all letters, from scripts that the context
      does not use. This also rejects an honest answer in a script that the context does not use
    """
    for char in sorted(set(text) - set(context)):
        is_control = unicodedata.category(char) == "Cc" and char not in "\n\r\t"
        if char == "\ufffd" or is_control:
            return f"holds U+{ord(char):04X}"
    for loop in _LOOP.finditer(text):
        unit = loop[1]
        has_letter = any(char.isalpha() for char in unit)
        if has_letter and unit * 10 not in context:
            return f"repeats {unit!r}"
    context_scripts = {_script(char) for char in context if char.isalpha()}
    letters = [char for char in text if char.isalpha()]
    foreign = [char for char in letters if _script(char) not in context_scripts]
    if context_scripts and len(foreign) >= 10 and 10 * len(foreign) > len(letters):
        first = "".join(foreign[:10])
        return f"{len(foreign)} of {len(letters)} letters are foreign: {first}"
    return None


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    """The first word of a letter's Unicode name: LATIN, CYRILLIC, HANGUL, ..."""
    script = unicodedata.name(char, "?").split()[0]
    if script in ("HIRAGANA", "KATAKANA"):
        return "CJK"  # Japanese mixes the three
    return script
