"""The parser behind every script: help by topic, and the nearest flag where a name is wrong.

    --help        the flags that most people need, under headings that name a topic
    --help-all    every flag, under the same headings

A help text may end in `[default: ...]`: the default in words, where the value alone says little
(None, or a 0 that means "choose for me"). Otherwise the help shows the value itself.

The beginning of a flag's name stands for the flag where no other flag begins so, as in argparse.
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
HELP_COLUMN = 26  # where the texts begin, counted from 0
WIDEST = 100  # columns of the help
SHORT = 24  # characters of a default that stays on one line
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
            full.append(self._full_name(name) + equals + value if FLAG.match(name) else text)
        return full

    def _full_name(self, typed: str) -> str:
        known = [name for action in self.arguments for name in action.option_strings]
        if typed in known:
            return typed
        begun = []  # the flags that begin as it does
        if self.allow_abbrev and typed.startswith("--"):
            begun = [name for name in known if name.startswith(typed)]
        synonym = SYNONYMS.get(_plain(typed))
        meant = f"--{synonym}" if f"--{synonym}" in known else None
        if begun and meant is not None and meant not in begun:
            begun = []  # `--tasks` begins `--tasks-dir`, but whoever types it means `--task`
        if len(begun) == 1:
            return begun[0]
        if begun:
            likely = f"; did you mean {meant}?" if meant else ""
            self.error(f"flag {typed} is ambiguous: {' or '.join(begun)}{likely}")
        near = [meant] if meant else _nearest(typed, known)
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
            actions = [a for a in actions if everything or self._is_common(a)]
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
        return sum(not isinstance(action, _PrintHelp) for action in self.arguments)

    def _is_common(self, action: argparse.Action) -> bool:
        is_help = isinstance(action, _PrintHelp)
        return self.common is None or is_help or action.required or name_of(action) in self.common

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
        spelling = "  " + _spelling(action)
        indent = " " * HELP_COLUMN
        lines = textwrap.wrap(
            f"{text} [{default}]" if default else text,
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
        """What stands in the brackets behind a text; "" for nothing."""
        if action.required:
            return "required"
        if words is not None and action.dest not in self.replaced:
            return f"default: {words}"
        value = action.default
        if isinstance(action, argparse.BooleanOptionalAction):
            return "default: on" if value else "default: off"
        if action.nargs == 0 or value in (None, []):
            return ""
        return f"default: {float(value):g}" if action.type is float else f"default: {value}"


class _PrintHelp(argparse.Action):
    """--help and --help-all."""

    def __init__(self, option_strings: Sequence[str], dest: str, **given: Any) -> None:
        nothing = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS, "nargs": 0}
        super().__init__(option_strings, **nothing, **given)

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        print(parser.help_text(everything=option == "--help-all"), end="")
        parser.exit()


def name_of(action: argparse.Action) -> str:
    """A flag's first long name without dashes; a positional argument's own."""
    long = [name for name in action.option_strings if name.startswith("--")]
    return long[0].removeprefix("--") if long else action.dest


def split_default(text: str) -> tuple[str, str | None]:
    """A help text and the default that it tells in words, if it does."""
    words = DEFAULT.search(text)
    return (text[: words.start()], words[1]) if words else (text, None)


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
    """A typed name as the tables spell it: `--Max_Length` is max-length."""
    return name.strip("-").lower().replace("_", "-")


def _nearest(typed: str, known: Sequence[str]) -> list[str]:
    """The most similar flag, else up to three that share a word with it."""
    near = difflib.get_close_matches(f"--{_plain(typed)}", known, n=1, cutoff=0.7)
    words = {word for word in _plain(typed).split("-") if len(word) > 2}
    return near or [name for name in known if words & set(name.split("-"))][:3]
