"""Constraints on a text that a program can check

Each function here returns a check: text -> None where the text meets the constraint, else the
fault. Words are runs of letters, digits, apostrophes and hyphens; a sentence ends in . ! or ?
before a space or the end; blank lines separate paragraphs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

Check = Callable[[str], str | None]  # text -> fault, or None

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_SENTENCE = re.compile(r"[.!?]+[\"'”’)*]*(?=\s|$)")
_BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^\s*(\d+)[.)]\s+\S", re.MULTILINE)
# Words that are frequent in one language and rare in the others; enough for a few sentences.
_COMMON = {
    "english": "the of and to in is that it for are with this",
    "french": "le la les des une est dans que pour et du sur",
    "german": "der die das und ist ein eine nicht mit auf für zu",
    "spanish": "el los las una es en que para y del con por",
    "italian": "il lo gli una è di che per e della con sono",
}


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(text)


def _between(count: int, low: int, high: int | None, unit: str) -> str | None:
    """The fault of a count that is not from `low` to `high` (None: without an upper limit)."""
    if count >= low and (high is None or count <= high):
        return None
    limits = str(low) if high == low else f"{low} to {high}"
    return f"{count} {unit}, wanted {limits}"


def word_count(low: int, high: int | None = None) -> Check:
    """From `low` to `high` words."""
    return lambda text: _between(len(words(text)), low, high, "words")


def sentence_count(low: int, high: int | None = None) -> Check:
    """From `low` to `high` sentences."""
    return lambda text: _between(len(_SENTENCE.findall(text.strip())), low, high, "sentences")


def paragraph_count(n: int) -> Check:
    """Exactly n paragraphs."""
    return lambda text: _between(len(re.findall(r"\S\s*?(?:\n\s*\n|\Z)", text)), n, n, "paragraphs")


def bullet_count(n: int) -> Check:
    """Exactly n lines that begin with -, * or •."""
    return lambda text: _between(len(_BULLET.findall(text)), n, n, "bullets")


def numbered(n: int) -> Check:
    """Exactly the lines 1. to n., in order."""

    def check(text: str) -> str | None:
        found = [int(number) for number in _NUMBERED.findall(text)]
        return None if found == list(range(1, n + 1)) else f"numbered {found}, wanted 1 to {n}"

    return check


def line_count(n: int) -> Check:
    """Exactly n lines that are not blank."""
    return lambda text: _between(sum(bool(x.strip()) for x in text.split("\n")), n, n, "lines")


def lowercase() -> Check:
    """No capital letter, but some letter."""

    def check(text: str) -> str | None:
        upper = [c for c in text if c.isupper()]
        return None if text.islower() else f"capitals {''.join(upper[:10])!r}"

    return check


def uppercase() -> Check:
    """No small letter, but some letter."""

    def check(text: str) -> str | None:
        lower = [c for c in text if c.islower()]
        return None if text.isupper() else f"small letters {''.join(lower[:10])!r}"

    return check


def includes(*phrases: str) -> Check:
    """Each of these words or phrases as whole words, in any case."""

    def check(text: str) -> str | None:
        missing = [w for w in phrases if not _occurrences(text, w)]
        return f"without {missing}" if missing else None

    return check


def excludes(*phrases: str) -> Check:
    """None of these words or phrases, in any case."""

    def check(text: str) -> str | None:
        there = [w for w in phrases if _occurrences(text, w)]
        return f"holds {there}" if there else None

    return check


def mentions(word: str, low: int, high: int | None = None) -> Check:
    """A word `low` to `high` times."""
    return lambda text: _between(_occurrences(text, word), low, high, f"times {word!r}")


def _occurrences(text: str, phrase: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(phrase.lower())}(?!\w)", text.lower()))


def without_character(*characters: str) -> Check:
    """None of these characters, in any case."""

    def check(text: str) -> str | None:
        there = [c for c in characters if c in text.lower()]
        return f"holds {there}" if there else None

    return check


def begins(prefix: str) -> Check:
    """The text begins so, letter case as it is."""
    return lambda text: None if text.strip().startswith(prefix) else f"begins {text.strip()[:30]!r}"


def ends(suffix: str) -> Check:
    """The text ends so, letter case as it is."""
    return lambda text: None if text.strip().endswith(suffix) else f"ends {text.strip()[-30:]!r}"


def matches(pattern: str, form: str) -> Check:
    """The whole text, without space around it, matches; `form` names the pattern in the fault."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda text: None if compiled.fullmatch(text.strip()) else f"is not {form}"


def one_of(*choices: str) -> Check:
    """The text is one of these and nothing else; case and a full stop aside."""
    allowed = {choice.lower() for choice in choices}
    return lambda text: None if text.strip().rstrip(".").lower() in allowed else "is another text"


def _json(text: str) -> object:
    """The JSON value that a text is, alone or in one fenced block; ValueError if it is none."""
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?\s*```", text.strip(), re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def json_object(**kinds: type) -> Check:
    """A JSON object of exactly these keys, with values of these types, and nothing around it."""

    def check(text: str) -> str | None:
        try:
            value = _json(text)
        except ValueError as error:
            return f"no JSON: {error}"
        if not isinstance(value, dict) or set(value) != set(kinds):
            return f"wanted an object with the keys {', '.join(kinds)}"
        wrong = [key for key, kind in kinds.items() if type(value[key]) is not kind]
        return f"another type of value: {wrong}" if wrong else None

    return check


def json_list(n: int, kind: type) -> Check:
    """A JSON array of n values of a type, and nothing around it."""

    def check(text: str) -> str | None:
        try:
            value = _json(text)
        except ValueError as error:
            return f"no JSON: {error}"
        fits = isinstance(value, list) and len(value) == n and all(type(v) is kind for v in value)
        return None if fits else f"wanted an array of {n}"

    return check


def csv_rows(rows: int, columns: int) -> Check:
    """So many lines of so many comma-separated cells, none empty."""

    def check(text: str) -> str | None:
        table = [line.split(",") for line in text.strip().split("\n")]
        good = len(table) == rows and all(
            len(line) == columns and all(cell.strip() for cell in line) for line in table
        )
        return None if good else f"{len(table)} lines, wanted {rows} of {columns} cells"

    return check


def language(name: str) -> Check:
    """Most of the frequent words in the text are this language's."""

    def check(text: str) -> str | None:
        found = [word.lower() for word in words(text)]
        counts = {n: sum(w in common.split() for w in found) for n, common in _COMMON.items()}
        best = max(counts, key=lambda n: (counts[n], n == name))
        return None if counts[name] and best == name else f"looks {best}"

    return check
