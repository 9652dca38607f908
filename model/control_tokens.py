"""Control tokens: those that a template writes around turns, and those that a message only spells

Only text that a template writes can become a control token. One that a message spells is replaced
by a private-use character (its stand-in) before rendering, so that the template trims and joins as
usual, and is afterwards encoded as plain text between the pieces around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from model.messages import Messages, texts_of, with_texts
from model.template import TemplateStopped
from model.tokenizer_base import any_of

# the texts of the conversation that probes a template
QUESTION = "A-QUESTION"
ANSWER = "AN-ANSWER"
PRIVATE_USE = range(0xF0000, 0xFFFFE)  # code points that stand for spelled control tokens

Render = Callable[[Sequence[dict[str, Any]], bool], str]  # (turns, add_generation_prompt) -> text


class Masked(NamedTuple):
    """Messages whose spelled control tokens are replaced by private-use characters."""

    turns: list[dict[str, Any]]
    stand_ins: dict[str, str]  # private-use character -> the spelling that it stands for


def mask(messages: Messages, pattern: re.Pattern[str], source: str) -> Masked:
    """The messages with each spelled control token, which `pattern` finds, as its stand-in.

    Characters that occur in the messages or in the template's `source` are not used.
    """
    texts = [text for message in messages for text in texts_of(message)]
    spelled: set[str] = set()
    for text in texts:
        spelled.update(pattern.findall(text))
    if not spelled:
        return Masked([dict(message) for message in messages], {})
    taken = set(source).union(*texts)
    free = [chr(code) for code in PRIVATE_USE if chr(code) not in taken]
    stand_in_of = dict(zip(sorted(spelled), free[: len(spelled)], strict=True))

    def masked(text: str) -> str:
        return pattern.sub(lambda match: stand_in_of[match.group()], text)

    turns = [with_texts(message, masked) for message in messages]
    return Masked(turns, {stand_in: spelling for spelling, stand_in in stand_in_of.items()})


def turn_tokens(render: Render, added: Iterable[str]) -> set[str]:
    """Added tokens that the template writes around finished turns, special or not.

    Those that are blank or a plain word are not taken for control tokens.
    """
    candidates = []
    for spelling in added:
        stripped = spelling.strip()
        if stripped and not stripped.isalnum():
            candidates.append(spelling)
    pattern = any_of(candidates)
    system = {"role": "system", "content": QUESTION}
    question = {"role": "user", "content": QUESTION}
    answer = {"role": "assistant", "content": ANSWER}
    probes = (
        [system, question, answer, question],
        [question, answer, question],
        [question, answer],
    )
    for turns in probes:
        try:
            text = render(turns, False)
            return set(pattern.findall(text))
        except TemplateStopped:
            raise
        except ValueError:  # it takes no system message, or one question only
            continue
    return set()
