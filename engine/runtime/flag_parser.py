"""The parser behind every script: help by topic, and the nearest flag where a name is wrong.

    --help        the flags that most people need, under headings that name a topic
    --help-all    every flag, under the same headings

A help text may end in `[default: ...]`: the default in words, where the value alone says little
(None, or a 0 that means "choose for me"). Otherwise the help shows the value itself.

As in argparse, the beginning of a flag's name stands for the flag if no other flag begins with it.
A wrong name ends the program with one line and exit code 2:

    error: unknown flag --learning-rate; did you mean --lr?
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from engine.runtime.flag_groups import GROUPS, SYNONYMS

FLAG = re.compile(r"--?[A-Za-z][\w-]*$")  # a name as it is typed; -1e-3 and "-a b" are values
DEFAULT = re.compile(r"\s*\[default: (.*)\]$")  # the end of a help text
HELP_COLUMN = 26  # column at which the texts begin, counted from 0
WIDEST = 100  # most columns of the help
SHORT = 24  # most characters of a default that is kept on one line
UNBROKEN = "\u00a0"  # a space at which textwrap breaks no line


class FlagParser(argparse.ArgumentParser):
    """argparse with two lengths of help, and with errors that name the nearest flag.

    doc      the script's docstring: the help begins with it
    common   names of the flags that `--help` shows, without dashes; None: all
    """

    def __init__(self, doc: str, common: Sequence[str] | None = None) -> None:
        super().__init__(description=doc, add_help=False)
        self.common = common
        self.arguments: list[argparse.Action] = []
        self.replaced: set[str] = set()  # names whose default a preset has replaced
        self.add_argument("-h", "--help", action=_PrintHelp, help="show the usual flags and exit")
        self.add_argument("--help-all", action=_PrintHelp, help="show every flag and exit")

    def add_argument(self, *names: str, **given: Any) -> argparse.Action:
        """As argparse's, and listed in `arguments`."""
        action = super().add_argument(*names, **given)
        self.arguments.append(action)
        return action

    def set_defaults(self, **values: Any) -> None:
        """As argparse's; the help shows these values in place of a default in words."""
        super().set_defaults(**values)
        self.replaced |= set(values)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's, once every flag has its full name."""
        typed = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(self._full_names(typed), namespace)

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        self.exit(2, f"error: {message}\n")

    # ---- names

    def _full_names(self, typed: Sequence[str]) -> list[str]:
        """The arguments with flags by their full names; a wrong name ends the program."""
        full = []
        for place, text in enumerate(typed):
            if text == "--":  # positional arguments follow
                return full + list(typed[place:])
            name, equals, value = text.partition("=")
            if FLAG.match(name):
                full.append(self._full_name(name) + equals + value)
            else:
                full.append(text)
        return full

    def _full_name(self, typed: str) -> str:
        """The flag that was typed; a name of none or of several ends the program."""
        known: list[str] = []
        for action in self.arguments:
            known += action.option_strings
        if typed in known:
            return typed

        candidates = []  # flags whose name begins with it
        if self.allow_abbrev and typed.startswith("--"):
            candidates = [name for name in known if name.startswith(typed)]
        meant = None  # the flag here for a name that other programs use
        synonym = SYNONYMS.get(_plain(typed))
        if synonym is not None and f"--{synonym}" in known:
            meant = f"--{synonym}"
        if meant is not None and meant not in candidates:
            candidates = []  # `--tasks` begins `--tasks-dir`, but whoever types it means `--task`
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            hint = "" if meant is None else f"; did you mean {meant}?"
            self.error(f"flag {typed} is ambiguous: {' or '.join(candidates)}{hint}")
        near = _nearest(typed, known) if meant is None else [meant]
        if near:
            self.error(f"unknown flag {typed}; did you mean {' or '.join(near)}?")
        self.error(f"unknown flag {typed}; --help-all lists every flag")

    # ---- help

    def format_help(self) -> str:
        """The short help; argparse's name for it."""
        return self.help_text(everything=False)

    def help_text(self, everything: bool) -> str:
        """The docstring, then the flags under their headings: the common ones, or all."""
        width = min(WIDEST, shutil.get_terminal_size().columns)
        lines = [(self.description or "").strip()]
        shown = 0
        for heading, actions in self._by_heading():
            if not everything:
                actions = [action for action in actions if self._is_common(action)]
            if actions:
                lines += ["", f"{heading}:"]
            for action in actions:
                lines += self._entry(action, width)
            shown += len(actions)
        if self.epilog:
            lines += ["", *textwrap.wrap(self.epilog, width)]
        if shown < len(self.arguments):
            lines += ["", f"These are the usual flags; --help-all shows all {self._count()}."]
        return "\n".join(lines) + "\n"

    def _count(self) -> int:
        """Number of flags, without --help and --help-all."""
        return len([action for action in self.arguments if not isinstance(action, _PrintHelp)])

    def _is_common(self, action: argparse.Action) -> bool:
        """Whether `--help` shows the flag."""
        if self.common is None or action.required or isinstance(action, _PrintHelp):
            return True
        return name_of(action) in self.common

    def _by_heading(self) -> Iterator[tuple[str, list[argparse.Action]]]:
        """Every argument once; one that has no heading comes last."""
        left = {name_of(action): action for action in self.arguments}
        for heading, names in GROUPS.items():
            yield heading, [left.pop(name) for name in names.split() if name in left]
        yield "Other", list(left.values())

    def _entry(self, action: argparse.Action, width: int) -> list[str]:
        """The lines of one flag: its spelling, and its text from HELP_COLUMN on."""
        text, words = split_default(action.help or "")
        default = self._default(action, words)
        if default and len(default) <= SHORT:
            default = default.replace(" ", UNBROKEN)
        if default:
            text = f"{text} [{default}]"
        spelling = "  " + _spelling(action)
        indent = " " * HELP_COLUMN
        lines = textwrap.wrap(
            text,
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
        lines = [line.replace(UNBROKEN, " ") for line in lines]
        if len(spelling) + 2 > HELP_COLUMN:
            return [spelling, *lines]
        return [spelling.ljust(HELP_COLUMN) + lines[0].strip(), *lines[1:]]

    def _default(self, action: argparse.Action, words: str | None) -> str:
        """The text in brackets at the end of a help text; "" for none."""
        if action.required:
            return "required"
        if words is not None and action.dest not in self.replaced:
            return f"default: {words}"
        value = action.default
        if isinstance(action, argparse.BooleanOptionalAction):
            return "default: on" if value else "default: off"
        if action.nargs == 0 or value is None or value == []:
            return ""
        if action.type is float:
            return f"default: {float(value):g}"
        return f"default: {value}"


class _PrintHelp(argparse.Action):
    """--help and --help-all."""

    def __init__(self, option_strings: Sequence[str], dest: str, **given: Any) -> None:
        nothing = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS, "nargs": 0}
        super().__init__(option_strings, **nothing, **given)

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        print(parser.help_text(everything=option == "--help-all"), end="")
        parser.exit()


def name_of(action: argparse.Action) -> str:
    """A flag's first long name without dashes; a positional argument's own name."""
    for name in action.option_strings:
        if name.startswith("--"):
            return name.removeprefix("--")
    return action.dest


def split_default(text: str) -> tuple[str, str | None]:
    """A help text without the default that it gives in words, and those words or None."""
    match = DEFAULT.search(text)
    if match is None:
        return text, None
    return text[: match.start()], match[1]


def _spelling(action: argparse.Action) -> str:
    """`--out OUT`, `--[no-]truncate`, `RUN ...`"""
    shown = action.metavar or action.dest.upper()
    if not action.option_strings:
        return f"{shown} ..." if action.nargs == "+" else str(shown)
    name = name_of(action)
    if isinstance(action, argparse.BooleanOptionalAction):
        return f"--[no-]{name}"
    if action.nargs == 0:
        return ", ".join(action.option_strings)
    return f"--{name} {shown}"


def _plain(name: str) -> str:
    """A typed name in the spelling of the tables: `--Max_Length` is max-length."""
    return name.strip("-").lower().replace("_", "-")


def _nearest(typed: str, known: Sequence[str]) -> list[str]:
    """The most similar flag, else up to three that share a word with it."""
    plain = _plain(typed)
    most_similar = difflib.get_close_matches(f"--{plain}", known, n=1, cutoff=0.7)
    if most_similar:
        return most_similar
    words = {word for word in plain.split("-") if len(word) > 2}
    sharing = [name for name in known if words & set(name.split("-"))]
    return sharing[:3]
