"""Command-line flags derived from the fields of a frozen dataclass: a default exists once.

A field's trailing comment is its help text, so `--help` says what a reader of the code sees. It may
continue in comment lines below the field, and it may end in `[default: ...]`, the default in words:

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
    """A default of a script whose value does not say what holds."""

    value: Any
    words: str  # for the help


def make_parser(doc: str, script: str | None = None) -> FlagParser:
    """A parser whose help begins with the script's docstring as it is written.

    script: the one whose flags in COMMON `--help` shows; None: it shows all flags.
    """
    return FlagParser(doc, COMMON[script].split() if script else None)


def add_flags(
    parser: FlagParser, cls: type, leave_out: Collection[str] = (), **defaults: Any
) -> None:
    """One flag per field of `cls`.

    defaults: replace a field's own, each by a value or by one InWords.
    """
    types = typing.get_type_hints(cls)
    source = inspect.getsource(cls)
    for field in dataclasses.fields(cls):
        if field.name in leave_out:
            continue
        kinds = [t for t in typing.get_args(types[field.name]) if t is not type(None)]
        kind = kinds[0] if kinds else types[field.name]
        given: dict[str, Any] = {"dest": field.name}
        default = defaults.get(field.name, field.default)
        text = _comment(source, field.name)
        if field.name in defaults:
            text, _ = split_default(text)  # its words are of the field's own default
        if isinstance(default, InWords):
            text += f" [default: {default.words}]"
            default = default.value
        if default is dataclasses.MISSING:
            given["required"] = True
        else:
            given["default"] = default
        if kind is bool:
            # --truncate can be undone by --no-truncate, for a preset that sets it
            either = argparse.BooleanOptionalAction
            given["action"] = "store_true" if field.name.startswith("no_") else either
        else:
            word = field.name.rpartition("_")[2].upper()
            given |= {"type": kind, "metavar": METAVARS.get(kind, word)}
        if typing.get_origin(types[field.name]) is tuple:  # repeatable; None where not given
            given |= {"action": "append", "default": None}
        flags = ["--" + name.replace("_", "-") for name in _names(field.name)]
        parser.add_argument(*flags, **given).help = text  # set last: argparse 3.10 appends to it


def _names(field: str) -> list[str]:
    """The names of a field's flag, the one that the help shows first."""
    return [RENAMED[field], field] if field in RENAMED else [field]


def from_flags(cls: type[T], args: argparse.Namespace, **given: Any) -> T:
    """The dataclass from parsed flags, checked; `given` overrides them."""
    values = {}
    for field in dataclasses.fields(cls):
        value = given.get(field.name, getattr(args, field.name, dataclasses.MISSING))
        if isinstance(value, list):
            value = tuple(value)
        if value is not dataclasses.MISSING and not (
            value is None and isinstance(field.default, tuple)
        ):
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
    goes_on: str = "the same command goes on",
    kept: str = "what was finished is kept",
    lower: str = "",
) -> None:
    """Run a script: what a user caused ends as one message and exit code 2, not as a traceback.

    goes_on, kept    what a script says behind Ctrl-C or SIGTERM (exit codes 130 and 143): how to go
                     on, and what is there where the stage itself does not say
    lower            what takes less memory, where a stage itself does not say
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
        stopped = interrupt if isinstance(interrupt, Stopped) else Stopped()
        message = f"{NAMES[stopped.by]}: {stopped.kept or kept}; {goes_on}"
        sys.exit(_stop(message, stopped.code))
    except Exception as error:
        message = explain(error, lower)
        if message is None:
            raise
        sys.exit(_stop(f"error: {message}", 2))


class _Shown(io.TextIOBase):
    """A terminal to which file contents can send no commands: they are shown as escapes."""

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
    print(visible(message), file=sys.stderr)
    return code
