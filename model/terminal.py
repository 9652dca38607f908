"""Untrusted text (a checkpoint's, a data file's) on a terminal: shown, never obeyed."""

from __future__ import annotations

import unicodedata

# controls, marks that turn the writing direction, halves of characters, line and paragraph ends
COMMANDS = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: str) -> str:
    """`text` with control characters as escapes (\\x1b); line ends and tabs stay."""
    shown = []
    for character in text:
        commands = unicodedata.category(character) in COMMANDS and character not in "\n\t"
        shown.append(character.encode("unicode_escape").decode() if commands else character)
    return "".join(shown)
