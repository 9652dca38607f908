"""Template files: a user's own wording of the prompt that shows the model a reference

    [system]
    You are a patient teacher. {system}
    [user]
    {instruction}

    ### Model solution:
    {reference}

    Explain the solution in your own words.
    [prefix]
    Let's see.

`[user]` is the message that asks for the rewrite; a file without a heading is this part alone.
`[system]` is its system message, `[prefix]` a forced beginning of the answer, which becomes part of
the target. Placeholders:

    {instruction}   the row's last user message
    {reference}     the reference answer
    {system}        the row's system message, "" where it has none. In a file without this
                    placeholder the row's system message stands before the part [system]

`{{name}}` is the text `{name}`; other braces are themselves. Space around a part is cut off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from engine.runtime.files import sha256

PLACEHOLDERS = ("instruction", "reference", "system")
PARTS = ("system", "user", "prefix")
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")  # escaped, or to be filled in
_HEADING = re.compile(r"\[(\w+)\]\s*")  # a whole line


class TemplateFile(NamedTuple):
    """The parts of a template file, with their placeholders."""

    system: str
    user: str
    prefix: str
    marks: tuple[str, ...]  # its own headings: an answer that repeats one repeats the prompt
    digest: str  # sha256 of the file


def read_template(path: Path) -> TemplateFile:
    """The parts of a file; ValueError, with the line, for a fault in it."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template {path}: cannot be read as UTF-8 text ({error})") from None
    parts: dict[str, list[str]] = {}
    name = "user"
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        heading = _HEADING.fullmatch(line)
        if heading is not None and heading[1] in PARTS:
            name = heading[1]
            _check_heading(path, number, name, parts)
            parts[name] = []
            continue
        _check_line(path, number, name, line)
        parts.setdefault(name, []).append(line)
    texts = {part: "\n".join(parts.get(part, [])).strip() for part in PARTS}
    _check_placeholders(path, texts)
    marks = tuple(line for line in texts["user"].splitlines() if _is_mark(line))
    prefix = fill(texts["prefix"], {})
    return TemplateFile(texts["system"], texts["user"], prefix, marks, sha256(data))


def fill(text: str, values: Mapping[str, str]) -> str:
    """A part with its placeholders replaced; what is put in is never searched for others."""

    def replacement(found: re.Match[str]) -> str:
        escaped, name = found.groups()
        return f"{{{escaped}}}" if name is None else values[name]

    return _PLACEHOLDER.sub(replacement, text)


def names_in(text: str) -> set[str]:
    """The names of the placeholders of a part."""
    return {name for _, name in _PLACEHOLDER.findall(text) if name}


def _check_heading(path: Path, number: int, name: str, parts: dict[str, list[str]]) -> None:
    """ValueError for a part that occurs twice; text before the first heading is [user] too."""
    has_text = any(line.strip() for line in parts.get(name, []))
    if name in parts and (name != "user" or has_text):
        raise ValueError(f"template {path}:{number}: a second part [{name}]; expected one")


def _check_line(path: Path, number: int, name: str, line: str) -> None:
    """ValueError for a placeholder that there is not, or any in the forced beginning."""
    unknown = sorted(names_in(line) - set(PLACEHOLDERS))
    if unknown:
        raise ValueError(
            f"template {path}:{number}: no placeholder {{{unknown[0]}}}; expected "
            f"{{instruction}}, {{reference}} or {{system}}, or {{{{{unknown[0]}}}}} for the text"
        )
    if name == "prefix" and names_in(line):
        raise ValueError(
            f"template {path}:{number}: the part [prefix] has a placeholder; expected plain text, "
            "the same beginning for every answer"
        )


def _check_placeholders(path: Path, texts: Mapping[str, str]) -> None:
    """ValueError where the user's message lacks the instruction, or no part shows the reference."""
    if "instruction" not in names_in(texts["user"]):
        raise ValueError(
            f"template {path}: {{instruction}} is missing; expected it in the part [user] (a file "
            "without headings is that part)"
        )
    if "reference" not in names_in(texts["user"] + texts["system"]):
        raise ValueError(
            f"template {path}: {{reference}} is missing; expected the reference to be shown. For "
            "answers without it give --cascade unguided, which needs no template"
        )


def _is_mark(line: str) -> bool:
    """Whether a line of the template is a heading of its own: `### Solution`, `Model answer:`."""
    text = line.strip()
    is_heading = text.startswith("#") or text.endswith(":")
    return is_heading and len(text) > 3 and not _PLACEHOLDER.search(text)
