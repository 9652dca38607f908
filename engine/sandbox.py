"""Programs that a model wrote run here and nowhere else

    run_program(source, seconds=5, memory_mb=256) -> Outcome(ok, reason, output)

A process of its own with an empty environment and an empty temporary directory, in which it may
keep plain files; see sandboxed.py for what it gives up before the first line of the program runs:

    Landlock        reads Python's libraries and its own directory, writes in that directory
    seccomp         no process or thread, no program started, no socket, no signal to others
    limits          address space, CPU time, size of a file, open files, no core file
    capabilities    none, also for root; no new privileges; dies with its parent
    from outside    wall clock, amount of output, number of files and their bytes: SIGKILL

None needs root, a container or a namespace; each is asked for in every run, and where the system
does not give one (Linux before 5.13, a container that forbids it, not x86-64) nothing is run:
`Unprotected`. What is left: a program may read the system's libraries and spend its seconds, and
one written against these two files can claim to have passed (it is judged in its own process): a
pass says that the tests ran to their end unless the program was made to deceive this very file.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

OUTPUT_BYTES = 1 << 20  # of stdout and stderr together; beyond it the program is killed
KEPT_BYTES = 1 << 14  # of that, in Outcome.output
FILE_BYTES, ALL_FILES_BYTES, FILES = 16 << 20, 64 << 20, 256  # the working directory's limits
TICK = 0.05  # seconds between looks at the working directory


class Unprotected(OSError):
    """A protection cannot be had on this system, so the program was not run."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    reason: "ok" (it ran to its end) or "error" (an exception, a failed assert among them),
    "syntax", "exit" (it left before its end), "timeout", "memory", "output", "files", "process",
    "network", "signal" (it tried to send one) or "killed by SIGSEGV" and the like.
    """

    ok: bool
    reason: str
    output: str  # the beginning of stdout and stderr, with the traceback if it fits


def run_program(source: str, *, seconds: float = 5.0, memory_mb: int = 256) -> Outcome:
    """Run Python source as a program of its own and say how it ended.

    seconds: wall clock, the start of the interpreter (50 ms) included. memory_mb: address space,
    the interpreter's own 40 MB or so included. Raises Unprotected where it cannot be contained.
    """
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        raise Unprotected(
            f"model-written programs need the sandbox of Linux on x86-64, this is "
            f"{platform.system()} on {platform.machine()}; leave such tasks out"
        )
    if seconds <= 0 or memory_mb < 64:
        raise ValueError(f"seconds {seconds} and memory_mb {memory_mb}: wanted > 0 and >= 64")
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-") as directory,
        tempfile.TemporaryFile() as program,
    ):
        program.write(source.encode("utf-8", "replace"))
        program.seek(0)
        token = secrets.token_hex(16).encode()
        token_fd, token_in = os.pipe()
        report_fd, report_out = os.pipe()
        os.write(token_in, token)
        os.close(token_in)
        limits = (seconds, memory_mb << 20, FILE_BYTES)
        child = subprocess.Popen(
            [
                *(sys.executable, "-s", "-S", "-B", str(Path(__file__).with_name("sandboxed.py"))),
                *map(str, (token_fd, report_out, *limits)),
            ],
            stdin=program,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONCOERCECLOCALE": "0"},
            pass_fds=(token_fd, report_out),
            start_new_session=True,
        )
        os.close(token_fd)
        os.close(report_out)
        try:
            reason, output, report = _watch(child, report_fd, directory, seconds)
        finally:
            child.kill()  # it has no children: seccomp lets it make none
            child.wait()
            child.stdout.close()
            os.close(report_fd)
    return _outcome(child.returncode, reason, output, report, token)


def _watch(
    child: subprocess.Popen, report_fd: int, directory: str, seconds: float
) -> tuple[str, bytes, bytes]:
    """Read until both pipes end or a limit is passed: (its reason or "", output, report)."""
    output, report = bytearray(), bytearray()
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as pipes:
        pipes.register(child.stdout, selectors.EVENT_READ, output)
        pipes.register(report_fd, selectors.EVENT_READ, report)
        look = time.monotonic() + TICK
        while pipes.get_map():
            for key, _ in pipes.select(TICK):
                part = os.read(key.fd, 1 << 16)
                key.data.extend(part)
                if not part:
                    pipes.unregister(key.fileobj)
            now = time.monotonic()
            if len(output) + len(report) > OUTPUT_BYTES:
                return "output", bytes(output), b""
            if now >= look:
                look = now + TICK
                if _overfull(directory):
                    return "files", bytes(output), b""
            if now > deadline:
                return "timeout", bytes(output), b""
    return "", bytes(output), bytes(report)


def _overfull(directory: str) -> bool:
    """Whether the working directory, which is flat, holds too much."""
    with os.scandir(directory) as entries:
        sizes = []
        for entry in entries:
            try:
                sizes.append(entry.stat(follow_symlinks=False).st_size)
            except FileNotFoundError:
                continue  # removed between the two calls
            if len(sizes) > FILES:
                return True
    return sum(sizes) > ALL_FILES_BYTES


def _outcome(code: int, reason: str, output: bytes, report: bytes, token: bytes) -> Outcome:
    """What the pipes and the exit status say."""
    text = output[:KEPT_BYTES].decode("utf-8", "replace")
    said = json.loads(report[len(token) :]) if report.startswith(token) else {}
    if "unprotected" in said:
        raise Unprotected(
            "the sandbox for model-written programs cannot be had here: "
            f"{said['unprotected']}; nothing was run. It needs Linux 5.13 with Landlock and "
            "seccomp (a container may forbid them); leave such tasks out"
        )
    if not reason and said:
        reason = said["reason"]
    elif not reason and code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
    elif not reason:
        reason = "exit"
    return Outcome(reason == "ok", reason, text)
