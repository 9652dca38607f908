"""How a job is asked to stop: Ctrl-C and SIGTERM mean the same in every stage

    first     the unit in flight is finished where that is worth it (rows being distilled, a step
              of training: `Stopping`), else dropped; what is finished is kept; `Stopped` is raised
    second    ends at once, whatever is in flight
    third     the system ends the process

What is on disk is whole at any moment (lines are appended, files renamed into place), so dropping
costs work and never a file. Nothing that runs under `catch_signals` goes on behind a signal.
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
# torchrun and `timeout` send theirs to the process and to its group: two that come together are one
TOGETHER = 0.3  # seconds


class Stopped(KeyboardInterrupt):
    """The job ended because it was asked to. `kept` says what is there; `code` is the shell's."""

    def __init__(self, kept: str = "", by: int = signal.SIGINT) -> None:
        super().__init__(kept)
        self.kept, self.by = kept, by

    @property
    def code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM, as a shell has it."""
        return 128 + self.by


class _Signals:
    """What came so far, for the whole process: signals belong to it, not to a stage."""

    by: int | None = None  # the first signal
    since = 0.0  # when it came
    depth = 0  # blocks that handle signals, one in another

    def take(self, by: int, first: Callable[[], None]) -> None:
        """Note a signal: call `first` for the first, raise for the second."""
        now = time.monotonic()
        if self.by is None:
            self.by, self.since = by, now
            first()
        elif now - self.since > TOGETHER:
            for number in NAMES:
                signal.signal(number, signal.SIG_DFL)
            raise Stopped(by=self.by)


_signals = _Signals()


@contextlib.contextmanager
def _handled_by(note: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside `with`, `note` handles both signals, but for one that the process was told to ignore
    (behind `nohup` or `&`). Outside of the main thread signals cannot be caught: nothing changes.
    """
    before = {}
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
    """Inside `with`, either signal raises `Stopped` where the process stands: around a script."""

    def stop(by: int) -> None:
        raise Stopped(by=by)

    with _handled_by(lambda by, _: _signals.take(by, lambda: stop(by))):
        yield


class Stopping:
    """Inside `with`, the first signal only sets `asked`: the unit in flight may come to an end.

    `meaning` says what that is. Whoever opened the block calls `end` then, which raises `Stopped`;
    the end of the block raises it too where a signal came too late for that, and says `kept`. The
    second signal raises at once.
    """

    by: int | None

    def __init__(self, meaning: str) -> None:
        self.meaning, self.by = meaning, None
        self.kept = ""  # what is there, at the end of the block
        self.finish: Callable[[], None] = lambda: None  # what the first signal calls too

    @property
    def asked(self) -> bool:
        return self.by is not None

    def _note(self, by: int, _: Any) -> None:
        def first() -> None:
            self.by = by
            if os.environ.get("RANK", "0") == "0":  # of a job of several, one speaks
                # not print: the signal may have come in the middle of one
                text = f"\n{NAMES[by]}: {self.meaning}; a second one stops at once\n"
                os.write(2, text.encode(errors="backslashreplace"))
            self.finish()

        _signals.take(by, first)

    def end(self, kept: str) -> None:
        """Raise `Stopped`: `kept` says what is there. In a job of several, all call it together."""
        raise Stopped(kept, self.by or signal.SIGTERM)  # asked through another process: SIGTERM

    def __enter__(self) -> Stopping:
        self._handling = _handled_by(self._note)
        self._handling.__enter__()
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self._handling.__exit__(kind, *error)
        if kind is None and self.asked:  # since anybody looked
            raise Stopped(self.kept, self.by)
