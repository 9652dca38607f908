"""Untrusted text (of a checkpoint, of a data file) on a terminal, without its control sequences."""

from __future__ import annotations

import unicodedata

# Unicode categories that a terminal may act on: control characters, marks of the writing direction,
# surrogates, line and paragraph separators
CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: str) -> str:
    """`text` with control characters as escapes (\\x1b); line ends and tabs stay."""
    shown = []
    for character in text:
        is_control = unicodedata.category(character) in CONTROLS
        if is_control and character not in "\n\t":
            character = character.encode("unicode_escape").decode()
        shown.append(character)
    return "".join(shown)
