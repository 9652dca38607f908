"""Selection: whether a response may be trained on in place of its reference

`judge` gives a response its status. The rules, first match wins:

    prompt_too_long   the sampler could not start
    empty             no text
    identical         the reference itself (whitespace around it aside), whatever else it breaks
    garbled           see `garbled`: it is no text
    truncated         it hit the token limit, so its end is missing
    banned            it talks about the task of rewriting (the ban list of the paper, 2402.13669)
    echo              it repeats the template's headers or the chat format's marks
    repeats_prompt    it repeats the user's whole message (of PROMPT_WORDS words or more; a shorter
                      one only where it says nothing else)
    refusal           it refuses (engine/verify/refusals.py) and the reference does not
    not_refused       the reference refuses and it does not
    (the verifier's)  mismatch, no_number, no_call, reference_without_number, ...
    accepted

Where the reference has the same echo or repetition, the response may have it. Only "accepted" and
"identical" responses become targets (`data.KEPT`); with every other status the target is the
reference, so a rule that is too strict costs a rewrite, never a wrong target. Verifiers are in
engine/verify/verifiers.py.
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

PROMPT_WORDS = 12


@dataclass(frozen=True)
class Rules:
    """Rules for rewrites, beside the verifier: OURS, or PAPER with the published defects that
    change results (engine/presets.py lists all)."""

    guards: bool = True  # all rules above; False: the ban list and the verifier only
    cut_prompts: int = 0  # tokens to which prompts that ask for a rewrite are cut; 0: not cut
    prefix_in_target: bool = True  # whether the answer's forced beginning is part of the target
    every_turn: bool = True  # False: rewrite a conversation's last answer only


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
    """The status of a response to `messages`, which end with the user's; the rules are above.

    finish: the sampler's, "stop", "stop_string", "length" or "prompt_too_long". tests: the row's,
    for the verifier. Without `rules.guards` a response that hit the limit can be accepted.
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
        fault = _why_unlike_reference(messages, reference, response)
        if fault is not None:
            return fault
    # The verifier sees a row whose reference is this turn's, also in the middle of a conversation.
    row = Row("", (*messages, {"role": "assistant", "content": reference}), tests)
    ok, reason = verifier(row, response)
    return "accepted" if ok else reason


def _why_incomplete(
    messages: Sequence[dict[str, str]], reference: str, response: str, finish: str
) -> str | None:
    """The status of a response that is no complete text, None for one that is."""
    context = "\n".join([*(message["content"] for message in messages), reference])
    if garbled(response, context):
        return "garbled"
    return "truncated" if finish == "length" else None


def _why_unlike_reference(
    messages: Sequence[dict[str, str]], reference: str, response: str
) -> str | None:
    """The status of a complete text that does not answer as the reference does, else None."""
    if _ECHO.search(response) and not _ECHO.search(reference):
        return "echo"
    question = messages[-1]["content"]
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
_RUN = re.compile(r"(.{1,100}?)\1{9,}", re.DOTALL)


def banned(text: str) -> bool:
    """Whether the text holds a phrase of BANNED, in any case, or begins with "Your turn"."""
    lower = text.lower().replace("’", "'")
    return any(phrase in lower for phrase in BANNED) or lower.lstrip().startswith("your turn")


def repeats(text: str, question: str) -> bool:
    """Whether the text repeats the whole question, letter case and spaces aside."""
    answer_words, question_words = text.casefold().split(), question.casefold().split()
    answer, whole = " ".join(answer_words), " ".join(question_words)
    return answer == whole or (len(question_words) >= PROMPT_WORDS and whole in answer)


def garbled(text: str, context: str) -> str:
    """Why `text` is no text, "" if it is one. context: all that the model saw; characters and
    repetitions that occur there are no fault.

    - a replacement character (bytes that are no UTF-8) or a control character
    - up to 100 characters, a letter among them, ten times in a row: a loop
    - ten letters or more, over a tenth of all, from scripts that the context does not use: random
      tokens. This also rejects an honest answer in a script that the context does not use
    """
    for char in sorted(set(text) - set(context)):
        if char == "\ufffd" or (unicodedata.category(char) == "Cc" and char not in "\n\r\t"):
            return f"holds U+{ord(char):04X}"
    for run in _RUN.finditer(text):
        if any(char.isalpha() for char in run[1]) and run[1] * 10 not in context:
            return f"repeats {run[1]!r}"
    scripts = {_script(char) for char in context if char.isalpha()}
    letters = [char for char in text if char.isalpha()]
    foreign = [char for char in letters if _script(char) not in scripts]
    if scripts and len(foreign) >= 10 and 10 * len(foreign) > len(letters):
        return f"{len(foreign)} of {len(letters)} letters are foreign: {''.join(foreign[:10])}"
    return ""


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    """The first word of a letter's Unicode name: LATIN, CYRILLIC, HANGUL, ..."""
    script = unicodedata.name(char, "?").split()[0]
    return "CJK" if script in ("HIRAGANA", "KATAKANA") else script  # Japanese mixes the three
