"""Command-line flags derived from the fields of a frozen dataclass: a default exists once.

A field's trailing comment is its help text, so `--help` shows the comment that a reader of the code
sees. It may continue in comment lines below the field, and it may end in `[default: ...]`, the
default in words:

    rows: int = 0  # sequences decoded together
    #   [default: auto (64; 32 on a CPU)]

flag_parser.py shows the texts; flag_groups.py says under which headings.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import re
import sys
import typing
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TextIO, TypeVar

from engine.runtime.failures import explain
from engine.runtime.flag_groups import COMMON, RENAMED
from engine.runtime.flag_parser import FlagParser, split_default
from engine.runtime.stopping import NAMES, Stopped, catch_signals
from model.terminal import visible

T = TypeVar("T")
METAVARS = {int: "N", float: "X"}  # what a help text shows for a value; else the flag's last word


class InWords(NamedTuple):
    """A script's own default for a flag, and the words for it in the help."""

    value: Any
    words: str


def make_parser(doc: str, script: str | None = None) -> FlagParser:
    """A parser whose help begins with the script's docstring as it is written.

    script: the key in COMMON of the flags that `--help` shows; None: it shows all flags.
    """
    common = None if script is None else COMMON[script].split()
    return FlagParser(doc, common)


def add_flags(
    parser: FlagParser, cls: type, leave_out: Collection[str] = (), **defaults: Any
) -> None:
    """One flag per field of `cls`, except those in `leave_out`.

    defaults: field -> a value or InWords, in place of the field's own default.
    """
    types = typing.get_type_hints(cls)
    source = inspect.getsource(cls)
    for field in dataclasses.fields(cls):
        if field.name in leave_out:
            continue
        default = field.default
        text = _comment(source, field.name)
        if field.name in defaults:
            default = defaults[field.name]
            text, _ = split_default(text)  # its words are of the field's own default
        if isinstance(default, InWords):
            text += f" [default: {default.words}]"
            default = default.value
        given = _argument(field.name, types[field.name], default)
        action = parser.add_argument(*_flags(field.name), **given)
        action.help = text  # here, because argparse of Python 3.10 would append to it above


def _argument(name: str, hint: Any, default: Any) -> dict[str, Any]:
    """The keyword arguments of `add_argument` for a field with that type hint."""
    given: dict[str, Any] = {"dest": name}
    if default is dataclasses.MISSING:
        given["required"] = True
    else:
        given["default"] = default
    kind = _value_type(hint)
    if kind is not bool:
        _, _, last_word = name.rpartition("_")
        given["type"] = kind
        given["metavar"] = METAVARS.get(kind, last_word.upper())
    elif name.startswith("no_"):
        given["action"] = "store_true"
    else:
        # --truncate can be undone by --no-truncate, for a preset that sets it
        given["action"] = argparse.BooleanOptionalAction
    if typing.get_origin(hint) is tuple:  # the flag may be repeated
        given["action"] = "append"
        given["default"] = None
    return given


def _value_type(hint: Any) -> Any:
    """The type of one typed value: int for `int`, `int | None` and `tuple[int, ...]`."""
    for member in typing.get_args(hint):
        if member is not type(None):
            return member
    return hint


def _flags(field: str) -> list[str]:
    """The spellings of a field's flag, the one that the help shows first."""
    names = [field]
    if field in RENAMED:
        names = [RENAMED[field], field]
    return ["--" + name.replace("_", "-") for name in names]


def from_flags(cls: type[T], args: argparse.Namespace, **given: Any) -> T:
    """The dataclass from parsed flags, checked; `given` overrides them by field.

    A field that has neither keeps its own default.
    """
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in given:
            value = given[field.name]
        elif hasattr(args, field.name):
            value = getattr(args, field.name)
        else:
            continue
        if value is None and isinstance(field.default, tuple):  # a repeatable flag, not typed
            continue
        if isinstance(value, list):
            value = tuple(value)
        values[field.name] = value
    config = cls(**values)
    if hasattr(config, "check"):
        config.check()
    return config


def _comment(source: str, name: str) -> str:
    """The trailing comment of a field's line in its class, with the comment lines below it."""
    comment = re.search(rf"^    {name}:[^#\n]*#(.+(?:\n    #.+)*)$", source, re.MULTILINE)
    assert comment, f"field {name} has no trailing comment: it is the flag's help text"
    return " ".join(line.strip(" #") for line in comment[1].split("\n"))


def run_main(
    main: Callable[[], None],
    next_step: str = "run the same command again to continue",
    kept: str = "all finished results are kept",
    lower: str = "",
) -> None:
    """Run a script: an error that a user can cause ends it with one message and exit code 2.

    Ctrl-C and SIGTERM end it with exit codes 130 and 143; a bug of ours keeps its traceback.

    next_step    end of the message after Ctrl-C or SIGTERM: how to continue
    kept         the results that are kept, for that message, where the stage names none itself
    lower        advice where memory is short, where the stage gives none itself
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no character ends a run
    if sys.stdout.isatty():
        sys.stdout = _Shown(sys.stdout)
    try:
        with catch_signals():
            main()
    except KeyboardInterrupt as interrupt:
        stopped = interrupt if isinstance(interrupt, Stopped) else Stopped()  # else Python's own
        message = f"{NAMES[stopped.by]}: {stopped.kept or kept}; {next_step}"
        sys.exit(_stop(message, stopped.code))
    except Exception as error:
        message = explain(error, lower)
        if message is None:
            raise
        sys.exit(_stop(f"error: {message}", 2))


class _Shown(io.TextIOBase):
    """A terminal that shows control characters as escapes, so that printed text commands nothing.

    A model, or a file of data, may hold such characters.
    """

    def __init__(self, terminal: TextIO) -> None:
        self.terminal = terminal

    @property
    def encoding(self) -> str:
        return self.terminal.encoding

    def write(self, text: str) -> int:
        return self.terminal.write(visible(text))

    def flush(self) -> None:
        self.terminal.flush()

    def fileno(self) -> int:
        return self.terminal.fileno()

    def isatty(self) -> bool:
        return True


def _stop(message: str, code: int) -> int:
    """Print the last message of a script; returns its exit code."""
    print(visible(message), file=sys.stderr)
    return code
