"""Constraints on the form of a text, which a program can check

Each public function but `words` makes a check: text -> None where the text meets the constraint,
else its fault in words. Words are runs of letters, digits, apostrophes and hyphens; a sentence ends
in . ! or ? before a space or the end; blank lines separate paragraphs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

Check = Callable[[str], str | None]  # text -> its fault, None where it meets the constraint

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)*]*(?=\s|$)")
_PARAGRAPH_END = re.compile(r"\S\s*?(?:\n\s*\n|\Z)")
_BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^\s*(\d+)[.)]\s+\S", re.MULTILINE)
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL)
# Words that are frequent in one language and rare in the others; enough for a few sentences.
_FREQUENT = {
    "english": "the of and to in is that it for are with this",
    "french": "le la les des une est dans que pour et du sur",
    "german": "der die das und ist ein eine nicht mit auf für zu",
    "spanish": "el los las una es en que para y del con por",
    "italian": "il lo gli una è di che per e della con sono",
}


# ---- amounts


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(text)


def _amount(count: Callable[[str], int], low: int, high: int | None, unit: str) -> Check:
    """The count of a text is from `low` to `high` (None: there is no upper limit)."""
    if high is None:
        limits = f"at least {low}"
    elif high == low:
        limits = str(low)
    else:
        limits = f"{low} to {high}"

    def check(text: str) -> str | None:
        n = count(text)
        if n < low or (high is not None and n > high):
            return f"{n} {unit}, expected {limits}"
        return None

    return check


def word_count(low: int, high: int | None = None) -> Check:
    """From `low` to `high` words."""
    return _amount(lambda text: len(words(text)), low, high, "words")


def sentence_count(low: int, high: int | None = None) -> Check:
    """From `low` to `high` sentences."""
    return _amount(lambda text: len(_SENTENCE_END.findall(text.strip())), low, high, "sentences")


def paragraph_count(n: int) -> Check:
    """Exactly n paragraphs."""
    return _amount(lambda text: len(_PARAGRAPH_END.findall(text)), n, n, "paragraphs")


def bullet_count(n: int) -> Check:
    """Exactly n lines that begin with -, * or •."""
    return _amount(lambda text: len(_BULLET.findall(text)), n, n, "bullets")


def line_count(n: int) -> Check:
    """Exactly n lines that are not blank."""

    def count(text: str) -> int:
        return len([line for line in text.split("\n") if line.strip()])

    return _amount(count, n, n, "lines")


def numbered(n: int) -> Check:
    """Exactly the lines 1. to n., in order."""
    expected = list(range(1, n + 1))

    def check(text: str) -> str | None:
        found = [int(number) for number in _NUMBERED.findall(text)]
        if found != expected:
            return f"numbered {found}, expected 1 to {n}"
        return None

    return check


def mentions(word: str, low: int, high: int | None = None) -> Check:
    """A word `low` to `high` times."""
    return _amount(lambda text: _occurrences(text, word), low, high, f"times {word!r}")


def _occurrences(text: str, phrase: str) -> int:
    """How often a phrase occurs as whole words, in any case."""
    whole_words = rf"(?<!\w){re.escape(phrase.lower())}(?!\w)"
    return len(re.findall(whole_words, text.lower()))


# ---- letters and words


def lowercase() -> Check:
    """No capital letter, but some letter."""

    def check(text: str) -> str | None:
        if text.islower():
            return None
        capitals = [char for char in text if char.isupper()]
        return f"capitals {''.join(capitals[:10])!r}"

    return check


def uppercase() -> Check:
    """No small letter, but some letter."""

    def check(text: str) -> str | None:
        if text.isupper():
            return None
        small = [char for char in text if char.islower()]
        return f"small letters {''.join(small[:10])!r}"

    return check


def includes(*phrases: str) -> Check:
    """Each of these words or phrases as whole words, in any case."""

    def check(text: str) -> str | None:
        missing = [phrase for phrase in phrases if not _occurrences(text, phrase)]
        return f"without {missing}" if missing else None

    return check


def excludes(*phrases: str) -> Check:
    """None of these words or phrases, in any case."""

    def check(text: str) -> str | None:
        present = [phrase for phrase in phrases if _occurrences(text, phrase)]
        return f"contains {present}" if present else None

    return check


def without_character(*characters: str) -> Check:
    """None of these characters, in any case."""

    def check(text: str) -> str | None:
        present = [char for char in characters if char in text.lower()]
        return f"contains {present}" if present else None

    return check


def language(name: str) -> Check:
    """Of the frequent words in the text, no other language has more than this one."""

    def check(text: str) -> str | None:
        found = [word.lower() for word in words(text)]
        counts = {of: _count_among(found, frequent) for of, frequent in _FREQUENT.items()}
        most = max(counts.values())
        if most == 0:
            return f"no frequent word of {', '.join(_FREQUENT)}"
        if counts[name] < most:
            likeliest = max(counts, key=lambda other: counts[other])
            return f"looks {likeliest}"
        return None

    return check


def _count_among(found: Sequence[str], frequent: str) -> int:
    """How many words are among the frequent ones, which are separated by spaces."""
    return len([word for word in found if word in frequent.split()])


# ---- the whole text


def begins(prefix: str) -> Check:
    """The text begins with `prefix`, in the same letter case."""

    def check(text: str) -> str | None:
        beginning = text.strip()
        return None if beginning.startswith(prefix) else f"begins {beginning[:30]!r}"

    return check


def ends(suffix: str) -> Check:
    """The text ends with `suffix`, in the same letter case."""

    def check(text: str) -> str | None:
        ending = text.strip()
        return None if ending.endswith(suffix) else f"ends {ending[-30:]!r}"

    return check


def matches(pattern: str, form: str) -> Check:
    """The whole text, without space around it, matches; `form` names the pattern in the fault."""
    compiled = re.compile(pattern, re.DOTALL)

    def check(text: str) -> str | None:
        return None if compiled.fullmatch(text.strip()) else f"is not {form}"

    return check


def one_of(*choices: str) -> Check:
    """The text is one of these and nothing else; letter case and a full stop do not count."""
    allowed = {choice.lower() for choice in choices}

    def check(text: str) -> str | None:
        given = text.strip().rstrip(".").lower()
        return None if given in allowed else f"is none of {', '.join(choices)}"

    return check


# ---- data formats


def _json(text: str) -> object:
    """The JSON value of a text, which is JSON alone or in one fenced block; else ValueError."""
    fenced = _FENCED.fullmatch(text.strip())
    try:
        return json.loads(fenced[1] if fenced else text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_object(**kinds: type) -> Check:
    """A JSON object of exactly these keys, with values of these types, and nothing around it."""

    def check(text: str) -> str | None:
        try:
            value = _json(text)
        except ValueError as error:
            return f"is not JSON: {error}"
        if not isinstance(value, dict) or set(value) != set(kinds):
            return f"expected an object with the keys {', '.join(kinds)}"
        wrong = [key for key, kind in kinds.items() if type(value[key]) is not kind]
        return f"wrong type of the values of {wrong}" if wrong else None

    return check


def json_list(n: int, kind: type) -> Check:
    """A JSON array of n values of a type, and nothing around it."""

    def check(text: str) -> str | None:
        try:
            value = _json(text)
        except ValueError as error:
            return f"is not JSON: {error}"
        fault = f"expected an array of {n} values of type {kind.__name__}"
        if not isinstance(value, list) or len(value) != n:
            return fault
        if any(type(entry) is not kind for entry in value):
            return fault
        return None

    return check


def csv_rows(rows: int, columns: int) -> Check:
    """`rows` lines of `columns` comma-separated cells, none of them empty."""

    def check(text: str) -> str | None:
        lines = text.strip().split("\n")
        fault = f"{len(lines)} lines, expected {rows} of {columns} cells"
        if len(lines) != rows:
            return fault
        for line in lines:
            cells = line.split(",")
            if len(cells) != columns or not all(cell.strip() for cell in cells):
                return fault
        return None

    return check
