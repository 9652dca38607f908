"""Thoughts: the text between <think> and </think> with which an answer begins

`--thinking` says what becomes of them:

    keep           a thought is text like any other
    strip          thoughts are removed from the answers of the data, in prompts and references
    answer-only    they stay in prompts and references and carry no loss; a verdict looks at what
                   follows them

An answer may begin with several thoughts. An empty one, with which a chat template opens answers
that are not to think, is a thought for `answer-only` and none for `strip`. Where the chat
template's prompt opens the thought, an answer begins inside it: then all up to its first </think>
is the thought.
"""

from __future__ import annotations

import re

from model.messages import THOUGHT_TAGS

MODES = ("keep", "strip", "answer-only")
OPENS, CLOSES = THOUGHT_TAGS
_WHOLE = re.compile(r"\s*(?:<think>.*?</think>\s*)+", re.DOTALL)


def with_thought(thought: str, text: str) -> str:
    """An answer that begins with a thought, in the form that models are taught."""
    inner = thought.strip("\n")
    answer = text.lstrip("\n")
    block = f"{OPENS}\n{inner}\n{CLOSES}"
    return f"{block}\n\n{answer}" if answer else block


def end_of_thoughts(text: str) -> int:
    """The place in an answer at which its thoughts and the space after them end; 0 without.

    The end of the text where a thought is not closed.
    """
    whole = _WHOLE.match(text)
    if whole:
        return whole.end()
    if text.lstrip().startswith(OPENS):
        return len(text)
    before, closes, rest = text.partition(CLOSES)
    if not closes or OPENS in before:
        return 0
    return len(text) - len(rest.lstrip())


def without_thoughts(text: str) -> str:
    """What follows the thoughts of an answer: all of it where it begins with none."""
    return text[end_of_thoughts(text) :]


def thinks(text: str) -> bool:
    """Whether an answer begins with a thought that is not empty."""
    thoughts = text[: end_of_thoughts(text)]
    for tag in THOUGHT_TAGS:
        thoughts = thoughts.replace(tag, "")
    return bool(thoughts.strip())


def check_thoughts(text: str, where: str) -> None:
    """ValueError where it cannot be told what of an answer is thought."""
    rest = without_thoughts(text)
    begins_with_one = rest != text
    if begins_with_one and CLOSES not in text:
        raise ValueError(f"{where} has a {OPENS} that is not closed")
    if OPENS in rest or CLOSES in rest:
        raise ValueError(
            f"{where} has a {OPENS} or {CLOSES} behind the beginning of its text; expected "
            "thoughts first (--thinking keep takes all as text)"
        )
