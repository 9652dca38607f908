"""Selection: is what the seed model wrote fit to be trained on in place of the reference?

`judge` gives a response its status. The rules, first match wins:

    prompt_too_long   the sampler could not start
    empty             no text
    identical         the reference itself (whitespace around it aside), whatever else it breaks
    garbled           see `garbled`: it is no text
    truncated         it hit the token limit, so its end is missing
    banned            it talks about the task of rewriting (the ban list of the paper, 2402.13669)
    echo              it repeats the template's headers or the chat format's marks
    (the verifier's)  mismatch, no_number, no_call, reference_without_number, ...
    accepted

A verifier compares a text with the row's reference: `(row, text) -> (ok, reason)`. Only "accepted"
and "identical" responses become targets (`data.KEPT`); every other status falls back to the
reference, so a rule that fires once too often costs a rewrite, never a wrong target.
"""

from __future__ import annotations

import ast
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache

from engine.rows import Row

Verifier = Callable[[Row, str], tuple[bool, str]]


def judge(
    messages: Sequence[dict[str, str]],
    reference: str,
    response: str,
    finish: str,
    verifier: Verifier,
) -> str:
    """The status of a response to `messages` (which end with the user's); see above for the rules.

    finish is the sampler's: "stop", "stop_string", "length" or "prompt_too_long".
    """
    if finish == "prompt_too_long":
        return "prompt_too_long"
    if not response.strip():
        return "empty"
    if response.strip() == reference.strip():
        return "identical"
    if garbled(response, "\n".join([*(said["content"] for said in messages), reference])):
        return "garbled"
    if finish == "length":
        return "truncated"
    if banned(response):
        return "banned"
    if _ECHO.search(response) and not _ECHO.search(reference):
        return "echo"
    # The verifier sees a row whose reference is this turn's, also in the middle of a conversation.
    row = Row("", (*messages, {"role": "assistant", "content": reference}))
    ok, reason = verifier(row, response)
    return "accepted" if ok else reason


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


# ---- verifiers


def verify_none(row: Row, text: str) -> tuple[bool, str]:
    """Accepts every text."""
    return True, "ok"


# A minus is a sign where no operand stands before it ("5-3" holds 5 and 3), also before a currency
# sign ("-$5"). Commas and no-break spaces group digits by three and only so: "1, 2" are two
# numbers, as are "1 200". a/b is one number, so that 1/4 does not pass for 3/4.
_DIGITS = r"(?:[0-9]{1,3}(?:[,\u00a0\u202f\u2009][0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_NUMBER = re.compile(
    rf"((?<![\w.)\]%])[-\u2212](?=[$€£¥]?[.0-9]))?[$€£¥]?({_DIGITS}|(?<![\w.])\.[0-9]+)"
    rf"(?:/({_DIGITS})(?![0-9/]|\.[0-9]))?"
)
_GROUPING = re.compile(r"[,\u00a0\u202f\u2009]")


def last_number(text: str) -> Fraction | None:
    """The last number in the text, in English notation, exactly; None if there is none.

    Currency and percent signs and a full stop around it do not count; exponents, mixed numbers
    ("1 1/2") and number words are not understood.
    """
    numbers = list(_NUMBER.finditer(text))
    if not numbers or len(numbers[-1][0]) > 400:  # so long is no number, and int() may refuse it
        return None
    sign, top, bottom = numbers[-1].groups()
    divisor = Fraction(_GROUPING.sub("", bottom or "1"))
    if not divisor:
        return None
    return (-1 if sign else 1) * Fraction(_GROUPING.sub("", top)) / divisor


def verify_number(row: Row, text: str) -> tuple[bool, str]:
    """Accepts a text whose last number equals the reference's last: 3 = 3.0, 1,234 = 1234."""
    wanted, got = last_number(row.reference), last_number(text)
    if wanted is None:
        return False, "reference_without_number"
    if got is None:
        return False, "no_number"
    return (True, "ok") if got == wanted else (False, "mismatch")


_CALL = re.compile(r"(?<![\w.])([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)[ \t]*\(")
_JSON_NAMES = {"true": True, "false": False, "null": None}


def verify_call(row: Row, text: str) -> tuple[bool, str]:
    """Accepts a text that makes the reference's calls, in any order, and calls those functions in
    no other way; whatever stands around the calls does not matter.

    Calls are compared as Python's parser reads them: spaces, kind of quotes and the order of
    keyword arguments and dictionary keys do not count, the order of positional arguments does;
    numbers compare by value; true/false/null are True/False/None. A call that does not parse
    (a `<placeholder>`) is compared as text without spaces and quotes.
    """
    wanted = list(_calls(row.reference))
    if not wanted:
        return False, "reference_without_call"
    made = list(_calls(text, names={name for name, _ in wanted}))
    if not made:
        return False, "no_call"
    same = {_meaning(source) for _, source in made} == {_meaning(source) for _, source in wanted}
    return (True, "ok") if same else (False, "mismatch")


def _calls(text: str, names: set[str] | None = None) -> Iterator[tuple[str, str]]:
    """(name, source) of every outermost `name(...)`, of these names only where they are given."""
    at = 0
    while found := _CALL.search(text, at):
        at = found.end()
        if names is None or found[1] in names:
            end = _closing(text, at - 1)
            if end is not None:
                yield found[1], text[found.start() : end]
                at = end


def _closing(text: str, start: int) -> int | None:
    """Past the parenthesis that closes the one at `start`; those inside quotes do not count."""
    depth, quote, at = 0, "", start
    while at < len(text):
        char = text[at]
        if quote:
            if char == "\\":
                at += 1
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    return None


def _meaning(source: str) -> object:
    """A call in a form in which equal calls are equal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string literal warns
            return _canonical(ast.parse(source, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.sub(r"[\s'\"]", "", source)


def _canonical(node: ast.expr) -> object:
    match node:
        case ast.Call(func=func, args=args, keywords=keywords):
            named = frozenset((keyword.arg, _canonical(keyword.value)) for keyword in keywords)
            return ("call", ast.unparse(func), tuple(map(_canonical, args)), named)
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return (type(node).__name__, tuple(map(_canonical, parts)))
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return ("dict", frozenset((k and _canonical(k), _canonical(v)) for k, v in pairs))
        case ast.Name(id=name) if name in _JSON_NAMES:
            return ("constant", str(_JSON_NAMES[name]))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return ("number", -value)
        case ast.Constant(value=bool() | None as value):
            return ("constant", str(value))
        case ast.Constant(value=int() | float() as value):
            return ("number", value)
    return ast.dump(node)  # strings and names end here, and expressions, compared as written


VERIFIERS: dict[str, Verifier] = {
    "none": verify_none,
    "number": verify_number,
    "call": verify_call,
}


def get_verifier(name: str) -> Verifier:
    """The verifier of that name."""
    if name not in VERIFIERS:
        raise ValueError(f"no verifier {name!r}; wanted one of {', '.join(VERIFIERS)}")
    return VERIFIERS[name]
