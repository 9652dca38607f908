"""The sandbox, in which alone programs that a model wrote are run

    run_program(source, seconds=5, memory_mb=256) -> Outcome(ok, reason, output)

The program runs in a process of its own, with an empty environment and an empty temporary
directory, in which it may keep files and directories. Before its first line the process gives up
its rights (sandbox_child.py), and this process watches it:

    Landlock        reads Python's libraries and its own directory, writes in that directory
    seccomp         no new process, no other program, no sockets but pairs, no signal to others
    limits          address space, CPU time, size of a file, open files, no core file
    capabilities    none, also for root; no new privileges; dies with its parent
    from outside    every CHECK_SECONDS: wall clock, amount of output, threads, files and their
                    bytes (those removed and still open too); past a limit it gets SIGKILL

None of this needs root, a container or a namespace. All of it is requested in every run. Where the
system lacks one part (Linux before 5.13, a container that forbids it, not x86-64), nothing is run,
and `Unprotected` is raised. Nothing that a program does raises an exception here; an ending that is
not understood is "exit".

Known limits. A program may read the system's libraries and use its seconds. Between two checks it
may write as much as the disk takes in CHECK_SECONDS, and as much as its memory limit by mapping
files that it has removed and closed. Its tests run in its own process: a program written against
these two files can claim to have passed, and a value with an `__eq__` of its own
(`unittest.mock.ANY`) equals any expected value. So a pass says that the tests ran to their end,
unless the program was made to deceive.
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
from typing import BinaryIO

MAX_OUTPUT_BYTES = 1 << 20  # of stdout and stderr together; past it the program is killed
KEPT_BYTES = 1 << 14  # the part of the output that Outcome.output keeps
MAX_FILE_BYTES = 16 << 20  # of one file in the working directory
MAX_ALL_FILES_BYTES = 64 << 20
MAX_FILES = 256  # files and directories
MAX_THREADS = 32
CHECK_SECONDS = 0.02  # between two checks of files and threads
# Reasons that the process may report about its program; any other report is "exit".
REPORTED_REASONS = (
    "ok", "error", "syntax", "exit", "memory", "files", "process", "network", "signal",
)  # fmt: skip


class Unprotected(OSError):
    """This system lacks a protection, so the program was not run."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    The reasons:
        ok                     it ran to its end
        error                  an exception; a failed assert is one
        syntax                 it does not compile
        exit                   it left before its end, or no valid report came
        timeout, memory        a limit
        output, files          a limit, or a file that it may not open
        process                it tried to start a process, or too many threads
        network, signal        it tried to open a socket, to send a signal
        killed by SIGSEGV      or by another signal
    """

    ok: bool  # the reason is "ok"
    reason: str
    output: str  # the first KEPT_BYTES of stdout and stderr, with the traceback if it fits


def run_program(source: str, *, seconds: float = 5.0, memory_mb: int = 256) -> Outcome:
    """Run Python source as a program in the sandbox; returns how it ended.

    seconds      wall clock, including the start of the interpreter (50 ms)
    memory_mb    address space, including the interpreter's own 40 MB or so

    Unprotected where the program cannot be contained; OSError where its process or its directory
    cannot be made; ValueError for limits that are too small.
    """
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        raise Unprotected(
            f"model-written programs need the sandbox of Linux on x86-64, this is "
            f"{platform.system()} on {platform.machine()}; leave such tasks out"
        )
    if seconds <= 0 or memory_mb < 64:
        raise ValueError(f"seconds {seconds} and memory_mb {memory_mb}: expected > 0 and >= 64")
    token = secrets.token_hex(16).encode()
    with _working_directory() as directory, tempfile.TemporaryFile() as program:
        program.write(source.encode("utf-8", "replace"))
        program.seek(0)
        child, report_fd = _start_child(program, directory, token, seconds, memory_mb << 20)
        try:
            limit, output, report = _watch(child, report_fd, directory, seconds)
        finally:
            child.kill()  # and its threads; it has no children, which seccomp forbids
            child.wait()
            child.stdout.close()
            os.close(report_fd)
    return _outcome(child.returncode, limit, output, report, token)


def check_sandbox() -> None:
    """Unprotected where programs cannot be contained, or an empty one does not run to its end."""
    outcome = run_program("pass", seconds=60)
    if not outcome.ok:
        raise Unprotected(
            f"the sandbox for model-written programs does not work here: an empty program ended by "
            f"{outcome.reason!r}: {outcome.output.strip()[-300:]!r}; leave such tasks out"
        )


def _start_child(
    program: BinaryIO, directory: str, token: bytes, seconds: float, memory_bytes: int
) -> tuple[subprocess.Popen, int]:
    """Start sandbox_child.py in `directory` with `program` as its standard input.

    Returns the process, whose stdout has its stderr too, and the descriptor of its report.
    """
    token_fd, token_write_fd = os.pipe()
    report_fd, report_write_fd = os.pipe()
    os.write(token_write_fd, token)
    os.close(token_write_fd)
    launcher = Path(__file__).with_name("sandbox_child.py")
    arguments = (token_fd, report_write_fd, seconds, memory_bytes, MAX_FILE_BYTES)
    command = [sys.executable, "-s", "-S", "-B", str(launcher)]
    command += [str(argument) for argument in arguments]
    child = subprocess.Popen(
        command,
        stdin=program,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=directory,
        env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONCOERCECLOCALE": "0"},
        pass_fds=(token_fd, report_write_fd),
        start_new_session=True,
    )
    os.close(token_fd)
    os.close(report_write_fd)
    return child, report_fd


def _watch(
    child: subprocess.Popen, report_fd: int, directory: str, seconds: float
) -> tuple[str | None, bytes, bytes]:
    """Read until both pipes end or a limit is passed: (reason, output, report).

    The reason names the limit that was passed; None where the process ended by itself.
    """
    output = bytearray()
    report = bytearray()
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as pipes:
        pipes.register(child.stdout, selectors.EVENT_READ, output)
        pipes.register(report_fd, selectors.EVENT_READ, report)
        next_check = time.monotonic() + CHECK_SECONDS
        while pipes.get_map():
            for key, _ in pipes.select(CHECK_SECONDS):
                part = os.read(key.fd, 1 << 16)
                key.data.extend(part)  # `output` or `report`
                if not part:
                    pipes.unregister(key.fileobj)
            now = time.monotonic()
            reason = None
            if len(output) + len(report) > MAX_OUTPUT_BYTES:
                reason = "output"
            elif now >= next_check:
                next_check = now + CHECK_SECONDS
                reason = _limit_passed(child.pid, directory)
            if reason is None and now > deadline:
                reason = "timeout"
            if reason is not None:
                return reason, bytes(output), bytes(report)
    return None, bytes(output), bytes(report)


def _limit_passed(pid: int, directory: str) -> str | None:
    """The limit that the process has passed: "process" (threads), "files", or None for no limit."""
    try:
        threads = len(os.listdir(f"/proc/{pid}/task"))
        if threads > MAX_THREADS + 1:  # and the main thread
            return "process"
        size = _bytes_of_removed_files(pid)
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        size = 0
    count = 0
    try:
        for file in _files_below(directory):
            count += 1
            size += file.st_size
            if count > MAX_FILES:
                return "files"
    except OSError:  # a path that is too long, a directory without the right to list it
        return "files"
    if size > MAX_ALL_FILES_BYTES:
        return "files"
    return None


def _bytes_of_removed_files(pid: int) -> int:
    """Bytes of the files that the process has open and has removed; 0 where /proc hides them."""
    size = 0
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except PermissionError:
        return 0
    for descriptor in descriptors:
        try:
            file = os.stat(f"/proc/{pid}/fd/{descriptor}")
        except OSError:  # closed between the two calls
            continue
        if stat.S_ISREG(file.st_mode) and file.st_nlink == 0:
            size += file.st_size
    return size


def _files_below(directory: str) -> Iterator[os.stat_result]:
    """The stat of every file and directory below this one; some may vanish meanwhile."""
    folders = [directory]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    file = entry.stat(follow_symlinks=False)
                    yield file
                    if stat.S_ISDIR(file.st_mode):
                        folders.append(entry.path)
        except FileNotFoundError:
            continue


@contextmanager
def _working_directory() -> Iterator[str]:
    """Inside `with`, an empty directory; it is removed with all that the program left in it."""
    directory = tempfile.mkdtemp(prefix="sandbox-")
    try:
        yield directory
    finally:
        _remove(directory)


def _remove(directory: str) -> None:
    """Remove a directory and all below it, however deep it goes and whatever its modes.

    `shutil.rmtree` cannot: a program may nest directories beyond Python's recursion and beyond the
    longest path. So before a directory is removed, the directories in it are moved up into this
    one, until none is left.
    """
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        names = os.listdir(root)
        while names:
            for name in names:
                if _is_directory(name, root):
                    os.chmod(name, 0o700, dir_fd=root)
                    _empty_into(root, name)
                    os.rmdir(name, dir_fd=root)
                else:
                    os.unlink(name, dir_fd=root)
            names = os.listdir(root)
    finally:
        os.close(root)
    os.rmdir(directory)


def _empty_into(root: int, name: str) -> None:
    """Remove the files of the directory `name` of `root`; move its directories up into `root`."""
    folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
    try:
        for inner in os.listdir(folder):
            if _is_directory(inner, folder):
                os.chmod(inner, 0o700, dir_fd=folder)
                os.rename(inner, secrets.token_hex(16), src_dir_fd=folder, dst_dir_fd=root)
            else:
                os.unlink(inner, dir_fd=folder)
    finally:
        os.close(folder)


def _is_directory(name: str, folder: int) -> bool:
    """Whether `name` in the open directory `folder` is a directory, and no link to one."""
    file = os.stat(name, dir_fd=folder, follow_symlinks=False)
    return stat.S_ISDIR(file.st_mode)


def _outcome(code: int, limit: str | None, output: bytes, report: bytes, token: bytes) -> Outcome:
    """The outcome of a process; Unprotected if it ended before it was protected.

    code      its exit status, -SIGNAL where a signal ended it
    limit     the limit that it passed, None if none
    report    "PROTECTED", a newline, then `token` and the reason that the process reports
    """
    text = output[:KEPT_BYTES].decode("utf-8", "replace")
    first, _, last = report.partition(b"\n")
    if first != b"PROTECTED" and limit is None and code >= 0:
        why = first.decode("utf-8", "replace")
        if not why:
            why = f"it did not start: {text.strip()[-300:]!r}"
        raise Unprotected(
            f"the sandbox for model-written programs is not available here: {why}; nothing was "
            "run. It needs Linux 5.13 with Landlock and seccomp (a container may forbid them); "
            "leave such tasks out"
        )
    reported = ""
    if last.startswith(token):
        reported = last[len(token) :].decode("ascii", "replace")
    if limit is not None:
        reason = limit
    elif reported in REPORTED_REASONS:
        reason = reported
    elif code < 0:
        reason = f"killed by {_signal_name(-code)}"
    else:
        reason = "exit"
    return Outcome(reason == "ok", reason, text)


def _signal_name(number: int) -> str:
    """The name of a signal, such as SIGSEGV; "signal 40" for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
