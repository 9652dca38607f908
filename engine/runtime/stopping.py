"""How a job stops on Ctrl-C and SIGTERM, which mean the same in every stage

A unit of work is one training step, or the sequences that are being sampled together.

    first signal     the current unit is finished where that is worth it (`Stopping`), else dropped;
                     all that is finished is kept; `Stopped` is raised
    second signal    `Stopped` is raised at once, in the middle of a unit
    third signal     the system ends the process

Files are whole at any moment (lines are appended, files are renamed into place), so a dropped unit
costs work and never a file. No stage that runs under `catch_signals` continues after a signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
# torchrun and `timeout` signal the process and its group: signals within this time count as one
TOGETHER_SECONDS = 0.3


class Stopped(KeyboardInterrupt):
    """The job ends because of a signal.

    kept    what is finished and where it is, for the last message
    by      the number of the signal
    """

    def __init__(self, kept: str = "", by: int = signal.SIGINT) -> None:
        super().__init__(kept)
        self.kept = kept
        self.by = by

    @property
    def code(self) -> int:
        """The exit code, as shells count: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.by


class _Signals:
    """The signals that this process has received inside of nested blocks that handle them."""

    by: int | None = None  # the first signal
    since = 0.0  # time.monotonic() of the first signal
    depth = 0  # nested blocks that handle signals

    def receive(self, by: int, first: Callable[[], None]) -> None:
        """Handle a signal: call `first` for the first one, raise `Stopped` for the second."""
        now = time.monotonic()
        if self.by is None:
            self.by = by
            self.since = now
            first()
        elif now - self.since > TOGETHER_SECONDS:
            for number in NAMES:
                signal.signal(number, signal.SIG_DFL)
            raise Stopped(by=self.by)


# State of this process: signals are sent to it, not to one of its stages.
_signals = _Signals()


@contextlib.contextmanager
def _handled_by(note: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside `with`, `note` handles both signals.

    Without effect on a signal that the process was started to ignore (by `nohup` or `&`), and
    outside of the main thread, where Python handles no signals.
    """
    before = {}  # the handlers of both signals outside of the block
    if threading.current_thread() is threading.main_thread():
        for number in NAMES:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    _signals.depth += 1
    try:
        yield
    finally:
        _signals.depth -= 1
        for number, previous in before.items():
            if not _signals.depth or signal.getsignal(number) != signal.SIG_DFL:
                signal.signal(number, previous)
        if not _signals.depth:
            _signals.by = None


@contextlib.contextmanager
def catch_signals() -> Iterator[None]:
    """Inside `with`, either signal raises `Stopped` at once; for the whole of a script."""

    def note(by: int, _: Any) -> None:
        def stop() -> None:
            raise Stopped(by=by)

        _signals.receive(by, stop)

    with _handled_by(note):
        yield


class Stopping:
    """Inside `with`, the first signal only sets `asked`, so that the current unit can be finished.

    The block then calls `end`, which raises `Stopped`. If a signal comes after the block last read
    `asked`, the end of the block raises `Stopped`, with `kept`. The second signal raises at once.

    meaning    for the message of the first signal: the work that is still finished
    """

    def __init__(self, meaning: str) -> None:
        self.meaning = meaning
        self.by: int | None = None  # the number of the first signal
        self.kept = ""  # names the results that are kept, for the end of the block
        self.finish: Callable[[], None] = lambda: None  # called by the first signal
        self._handlers = contextlib.ExitStack()  # of the signals, inside the block

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.by is not None

    def _note(self, by: int, _: Any) -> None:
        def first() -> None:
            self.by = by
            if os.environ.get("RANK", "0") == "0":  # rank 0 prints for all
                # not `print`: the signal may have interrupted one
                text = f"\n{NAMES[by]}: {self.meaning}; a second one stops at once\n"
                os.write(2, text.encode(errors="backslashreplace"))
            self.finish()

        _signals.receive(by, first)

    def end(self, kept: str) -> None:
        """Raise `Stopped`; `kept` names the results that are kept. All ranks call it together."""
        # another rank may have got the signal
        raise Stopped(kept, self.by or signal.SIGTERM)

    def __enter__(self) -> Stopping:
        self._handlers.enter_context(_handled_by(self._note))
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self._handlers.close()
        if kind is None and self.asked:  # a signal that the block has not seen
            raise Stopped(self.kept, self.by)
