"""Programs that a model wrote run here and nowhere else

    run_program(source, seconds=5, memory_mb=256) -> Outcome(ok, reason, output)

A process of its own with an empty environment and an empty temporary directory, in which it may
keep files and directories; see sandbox_child.py for what it gives up before the first line of the
program runs:

    Landlock        reads Python's libraries and its own directory, writes in that directory
    seccomp         no process, no program started, no socket but a pair, no signal to others
    limits          address space, CPU time, size of a file, open files, no core file
    capabilities    none, also for root; no new privileges; dies with its parent
    from outside    wall clock, amount of output, threads, files and their bytes (those that are
                    removed and still open too), every TICK: SIGKILL

None needs root, a container or a namespace; each is asked for in every run, and where the system
does not give one (Linux before 5.13, a container that forbids it, not x86-64) nothing is run:
`Unprotected`. Nothing that a program does raises here: what cannot be understood is "exit".

What is left. A program may read the system's libraries and spend its seconds; between two looks it
may write what the disk takes in a TICK, and as much as its memory limit by mapping files that it
has removed and closed. It is judged in its own process: one written against these two files can
claim to have passed, and a value with an `__eq__` of its own (`unittest.mock.ANY`) equals whatever
a test expects. A pass says that the tests ran to their end, unless the program was made to deceive.
"""

from __future__ import annotations

import os
import platform
import secrets
import selectors
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

OUTPUT_BYTES = 1 << 20  # of stdout and stderr together; beyond it the program is killed
KEPT_BYTES = 1 << 14  # of that, in Outcome.output
FILE_BYTES, ALL_FILES_BYTES, FILES = 16 << 20, 64 << 20, 256  # the working directory's limits
THREADS = 32
TICK = 0.02  # seconds between looks at the working directory, open files and threads
# What the process may say of its program; anything else is not understood.
SAID = ("ok", "error", "syntax", "exit", "memory", "files", "process", "network", "signal")


class Unprotected(OSError):
    """A protection cannot be had on this system, so the program was not run."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    reason: "ok" (it ran to its end) or "error" (an exception, a failed assert among them),
    "syntax", "exit" (it left before its end, or nothing understandable was said of it), "timeout",
    "memory", "output", "files", "process" (it tried to start one, or too many threads), "network",
    "signal" (it tried to send one) or "killed by SIGSEGV" and the like.
    """

    ok: bool
    reason: str
    output: str  # the beginning of stdout and stderr, with the traceback if it fits


def run_program(source: str, *, seconds: float = 5.0, memory_mb: int = 256) -> Outcome:
    """Run Python source as a program of its own and say how it ended.

    seconds: wall clock, the start of the interpreter (50 ms) included. memory_mb: address space,
    the interpreter's own 40 MB or so included. Raises Unprotected where it cannot be contained,
    and OSError where a process or its directory cannot be made.
    """
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        raise Unprotected(
            f"model-written programs need the sandbox of Linux on x86-64, this is "
            f"{platform.system()} on {platform.machine()}; leave such tasks out"
        )
    if seconds <= 0 or memory_mb < 64:
        raise ValueError(f"seconds {seconds} and memory_mb {memory_mb}: wanted > 0 and >= 64")
    with _working_directory() as directory, tempfile.TemporaryFile() as program:
        program.write(source.encode("utf-8", "replace"))
        program.seek(0)
        token = secrets.token_hex(16).encode()
        token_fd, token_in = os.pipe()
        report_fd, report_out = os.pipe()
        os.write(token_in, token)
        os.close(token_in)
        limits = (seconds, memory_mb << 20, FILE_BYTES)
        launcher = str(Path(__file__).with_name("sandbox_child.py"))
        interpreter = [sys.executable, "-s", "-S", "-B", launcher]
        child = subprocess.Popen(
            [*interpreter, *map(str, (token_fd, report_out, *limits))],
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
            child.kill()  # with its threads; it has no children: seccomp lets it make none
            child.wait()
            child.stdout.close()
            os.close(report_fd)
    return _outcome(child.returncode, reason, output, report, token)


def check_sandbox() -> None:
    """Unprotected where programs cannot be contained, or an empty one does not come to its end."""
    outcome = run_program("pass", seconds=60)
    if not outcome.ok:
        raise Unprotected(
            f"the sandbox for model-written programs does not work here: an empty program ended by "
            f"{outcome.reason!r}: {outcome.output.strip()[-300:]!r}; leave such tasks out"
        )


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
                return "output", bytes(output), bytes(report)
            if now >= look:
                look = now + TICK
                if passed := _passed(child.pid, directory):
                    return passed, bytes(output), bytes(report)
            if now > deadline:
                return "timeout", bytes(output), bytes(report)
    return "", bytes(output), bytes(report)


def _passed(pid: int, directory: str) -> str:
    """The limit that is passed, of files or threads; "" where none is."""
    try:
        if len(os.listdir(f"/proc/{pid}/task")) > THREADS + 1:
            return "process"
        size = _removed_bytes(pid)
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        size = 0
    number = 0
    try:
        for found in _files_below(directory):
            number, size = number + 1, size + found.st_size
            if number > FILES:
                return "files"
    except OSError:  # a path that is too long, a directory that hides what it holds
        return "files"
    return "files" if size > ALL_FILES_BYTES else ""


def _removed_bytes(pid: int) -> int:
    """The bytes of files that the process has open and has removed; 0 where /proc hides them."""
    size = 0
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except PermissionError:
        return 0
    for descriptor in descriptors:
        try:
            found = os.stat(f"/proc/{pid}/fd/{descriptor}")
        except OSError:  # closed between the two calls
            continue
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 0:
            size += found.st_size
    return size


def _files_below(directory: str) -> Iterator[os.stat_result]:
    """What is known of every file and directory below this one; some may vanish meanwhile."""
    folders = [directory]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    yield found
                    if stat.S_ISDIR(found.st_mode):
                        folders.append(entry.path)
        except FileNotFoundError:
            continue


@contextmanager
def _working_directory() -> Iterator[str]:
    """An empty directory, removed behind the program whatever that has put there."""
    directory = tempfile.mkdtemp(prefix="sandbox-")
    try:
        yield directory
    finally:
        _remove(directory)


def _remove(directory: str) -> None:
    """Remove a directory and all below it, however deep it goes and whatever its modes.

    `shutil.rmtree` cannot: a program may nest directories beyond Python's recursion and beyond the
    longest path. So directories are moved up here, one by one, until there is none below another.
    """
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while names := os.listdir(root):
            for name in names:
                if not stat.S_ISDIR(os.stat(name, dir_fd=root, follow_symlinks=False).st_mode):
                    os.unlink(name, dir_fd=root)
                    continue
                os.chmod(name, 0o700, dir_fd=root)
                folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
                try:
                    for inner in os.listdir(folder):
                        found = os.stat(inner, dir_fd=folder, follow_symlinks=False)
                        if not stat.S_ISDIR(found.st_mode):
                            os.unlink(inner, dir_fd=folder)
                            continue
                        os.chmod(inner, 0o700, dir_fd=folder)
                        up = secrets.token_hex(16)
                        os.rename(inner, up, src_dir_fd=folder, dst_dir_fd=root)
                finally:
                    os.close(folder)
                os.rmdir(name, dir_fd=root)
    finally:
        os.close(root)
    os.rmdir(directory)


def _outcome(code: int, reason: str, output: bytes, report: bytes, token: bytes) -> Outcome:
    """What the pipes and the exit status say."""
    text = output[:KEPT_BYTES].decode("utf-8", "replace")
    first, _, last = report.partition(b"\n")
    if first != b"PROTECTED" and not reason and code >= 0:
        why = first.decode("utf-8", "replace") or f"it did not start: {text.strip()[-300:]!r}"
        raise Unprotected(
            f"the sandbox for model-written programs cannot be had here: {why}; nothing was run. "
            "It needs Linux 5.13 with Landlock and seccomp (a container may forbid them); leave "
            "such tasks out"
        )
    said = last[len(token) :].decode("ascii", "replace") if last.startswith(token) else ""
    if not reason and said in SAID:
        reason = said
    elif not reason and code < 0:
        reason = f"killed by {_signal_name(-code)}"
    elif not reason:
        reason = "exit"
    return Outcome(reason == "ok", reason, text)


def _signal_name(number: int) -> str:
    """SIGSEGV and the like; the number of a signal that has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
