"""Selection: is what the seed model wrote fit to be trained on in place of the reference?

`judge` gives a response its status. The rules, first match wins:

    prompt_too_long   the sampler could not start
    empty             no text
    identical         the reference itself (whitespace around it aside), whatever else it breaks
    garbled           see `garbled`: it is no text
    truncated         it hit the token limit, so its end is missing
    banned            it talks about the task of rewriting (the ban list of the paper, 2402.13669)
    echo              it repeats the template's headers or the chat format's marks
    repeats_prompt    it repeats the user's whole message (of PROMPT_WORDS words or more; a shorter
                      one only where nothing else is said)
    refusal           it refuses (engine/verify/refusals.py) and the reference does not
    not_refused       the reference refuses and it does not
    (the verifier's)  mismatch, no_number, no_call, reference_without_number, ...
    accepted

What the reference does too is no echo and no repetition. Only "accepted" and "identical" responses
become targets (`data.KEPT`); every other status falls back to the reference, so a rule that fires
once too often costs a rewrite, never a wrong target. Verifiers are in engine/verify/verifiers.py.
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
    """What is done with rewrites, beside the verifier; OURS, or PAPER with the published defects
    that change results (engine/presets.py lists all)."""

    guards: bool = True  # all rules above; False: the ban list and the verifier, nothing else
    cut_prompts: int = 0  # prompts that ask for a rewrite lose their end from there; 0: none does
    prefix_in_target: bool = True  # a forced beginning of the answer is part of the target
    every_turn: bool = True  # False: a conversation's last answer only; the others stay as given


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
    """The status of a response to `messages` (which end with the user's); see above for the rules.

    finish is the sampler's: "stop", "stop_string", "length" or "prompt_too_long". tests: the row's,
    for the verifier. Without `rules.guards` a response that hit the limit can be accepted.
    """
    if finish == "prompt_too_long":
        return "prompt_too_long"
    if not response.strip():
        return "empty"
    if response.strip() == reference.strip():
        return "identical"
    if rules.guards and (fault := _fault(messages, reference, response, finish)):
        return fault
    if banned(response):
        return "banned"
    if rules.guards and (fault := _misfit(messages, reference, response)):
        return fault
    # The verifier sees a row whose reference is this turn's, also in the middle of a conversation.
    row = Row("", (*messages, {"role": "assistant", "content": reference}), tests)
    ok, reason = verifier(row, response)
    return "accepted" if ok else reason


def _fault(messages: Sequence[dict[str, str]], reference: str, response: str, finish: str) -> str:
    """Why it is no whole text, or ""."""
    if garbled(response, "\n".join([*(said["content"] for said in messages), reference])):
        return "garbled"
    return "truncated" if finish == "length" else ""


def _misfit(messages: Sequence[dict[str, str]], reference: str, response: str) -> str:
    """Why a whole text is no answer such as the reference is, or ""."""
    if _ECHO.search(response) and not _ECHO.search(reference):
        return "echo"
    asked = messages[-1]["content"]
    if repeats(response, asked) and not repeats(reference, asked):
        return "repeats_prompt"
    if refuses(response) != refuses(reference):
        return "not_refused" if refuses(reference) else "refusal"
    return ""


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


def repeats(text: str, asked: str) -> bool:
    """Whether the text repeats all of what was asked, letter case and spaces aside."""
    said, words = " ".join(text.casefold().split()), asked.casefold().split()
    whole = " ".join(words)
    return said == whole or (len(words) >= PROMPT_WORDS and whole in said)


def garbled(text: str, context: str) -> str:
    """Why `text` is no text, or "" if it is. `context` is all the writer saw: what stands there
    already is no fault.

    - a replacement character (bytes that are no UTF-8) or a control character
    - up to 100 characters, a letter among them, ten times in a row: a loop
    - ten letters or more, over a tenth of all, from scripts that the context does not use: token
      soup. This also hits an honest answer in a script that nobody has used so far
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
