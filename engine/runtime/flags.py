"""Command-line flags derived from the fields of a frozen dataclass: a default exists once.

A field's trailing comment is its help text: `--help` says what a reader of the code sees.
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
from typing import Any, TextIO, TypeVar

from engine.runtime.failures import explain
from engine.runtime.stopping import NAMES, Stopped, catch_signals
from model.terminal import visible

T = TypeVar("T")


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help begins with the script's docstring as it is written."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_flags(
    parser: argparse.ArgumentParser, cls: type, leave_out: Collection[str] = (), **defaults: Any
) -> None:
    """One flag per field of `cls`; `defaults` replaces a field's own default."""
    group = parser.add_argument_group(cls.__name__)
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in leave_out:
            continue
        flag = "--" + field.name.replace("_", "-")
        default = defaults.get(field.name, field.default)
        required = default is dataclasses.MISSING
        help_text = _comment(cls, field.name).replace("%", "%%")
        help_text += "" if required else " (default: %(default)s)"
        kinds = [t for t in typing.get_args(types[field.name]) if t is not type(None)]
        kind = kinds[0] if kinds else types[field.name]
        if kind is bool:
            # --truncate can be undone by --no-truncate, for a preset that sets it
            either = argparse.BooleanOptionalAction
            action = "store_true" if field.name.startswith("no_") else either
            group.add_argument(flag, action=action, default=default, help=help_text)
        elif typing.get_origin(types[field.name]) is tuple:
            group.add_argument(flag, action="append", type=kind, metavar="TEXT", help=help_text)
        else:
            given = {"required": True} if required else {"default": default}
            group.add_argument(flag, type=kind, help=help_text, **given)


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


def _comment(cls: type, name: str) -> str:
    """The trailing comment of a field's line."""
    match = re.search(rf"^    {name}:[^#\n]*#\s*(.+)$", inspect.getsource(cls), re.MULTILINE)
    assert match, f"{cls.__name__}.{name} has no trailing comment: it is the flag's help text"
    return match[1]


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
