"""Checks in a process of their own (program.py), so that no kernel can harm this one

A kernel that reads outside of its tensors leaves the GPU unusable for its process, or ends it. Then
its operation has failed, and another process checks those that are left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from kernels.self_check.cases import REASON
from kernels.self_check.request import Request
from kernels.self_check.sources import ROOT

SECONDS = 600  # without a line: longer than any compilation or check takes
CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP")


class Result(NamedTuple):
    """The result of an operation's check."""

    operation: str
    reason: str  # why it fails; "" if it passed
    lasting: bool = True  # False: something else may have been the reason; do not remember it


class NoProcess(Exception):
    """No process could check; the message says why."""


# What this module needs of a process: what it writes, how it ended, and its end.
Start = Callable[[Request], "Running"]


@dataclasses.dataclass
class Running:
    """A process that checks."""

    lines: IO[bytes]  # what it writes
    ended: Callable[[], str]  # waits for its end; how it ended: "SIGSEGV", "exit code 1", ...
    kill: Callable[[], None]  # with all its processes


def start(request: Request) -> Running:
    """Start program.py, in a session of its own: Ctrl-C on a terminal is for this process."""
    # not -m: that would look for modules in the current directory first
    command = (
        f"import sys; sys.path[0] = {str(ROOT)!r}; import kernels.self_check.program as p; p.main()"
    )
    errors = tempfile.TemporaryFile()
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
    )
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(dataclasses.asdict(request)).encode())
        process.stdin.close()

    def ended() -> str:
        code = process.wait()
        if code < 0:
            return signal.Signals(-code).name
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
        last = said[-1] if said else ""
        return f"exit code {code}: {last}"[:REASON]

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        errors.close()

    return Running(process.stdout, ended, kill)


def check_in_process(
    request: Request, progress: Callable[[str], None], start: Start = start
) -> Iterator[Result]:
    """The result of each operation of the request; NoProcess where no process can check them.

    progress: called with a text that says how far it is.
    """
    left = list(request.operations)
    while left:
        found = 0
        for result in _by_one_process(
            dataclasses.replace(request, operations=left), progress, start
        ):
            found += 1
            left.remove(result.operation)
            yield result
        assert found, "a process that checks nothing raises NoProcess"


def _by_one_process(
    request: Request, progress: Callable[[str], None], start: Start
) -> Iterator[Result]:
    """The results that one process finds, its end included: the check that it died in failed."""
    of, results, checking, kernels = len(request.operations), 0, None, 0
    running = start(request)
    try:
        for line in _lines(running.lines):
            if line is None:
                if checking is None:
                    raise NoProcess(f"it did nothing for {SECONDS} s")
                yield Result(checking, f"its check did not end within {SECONDS} s")
                return
            if "unusable" in line:
                raise NoProcess(line["unusable"])
            kernels = line.get("kernels", kernels)
            checking = line.get("checking", checking)
            if "operation" in line:
                results, checking = results + 1, None
                yield Result(line["operation"], line["fails"], is_lasting(line["fails"]))
            if "compiled" in line:
                progress(f"compiled {line['compiled']} of {kernels} kernels")
            elif checking is not None:
                progress(f"checking {checking}, {results} of {of} operations are checked")
            if "lost" in line:
                return
        if results == of:
            return
        how = running.ended()
        if checking is None:
            raise NoProcess(how)
        yield Result(checking, f"its check ended with {how}", how in CRASHES)
    finally:
        running.kill()


def is_lasting(reason: str) -> bool:
    """Whether the check would fail again; memory may be short because of others."""
    return not reason.startswith(("OutOfMemoryError", "MemoryError"))


def _lines(pipe: IO[bytes]) -> Iterator[dict[str, Any] | None]:
    """The JSON objects that a process writes, a line each; None once if none came in time."""
    text = b""
    latest = time.monotonic()
    while True:
        ready, _, _ = select.select([pipe], [], [], 1.0)
        if ready:
            more = os.read(pipe.fileno(), 65536)
            if not more:
                return
            text += more
            latest = time.monotonic()
        *whole, text = text.split(b"\n")
        for line in whole:
            yield json.loads(line)
        if time.monotonic() - latest > SECONDS:
            yield None
            return
