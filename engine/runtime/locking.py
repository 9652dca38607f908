"""One job at a time on an `--out`, and what killed jobs left there removed

A lock is flock on a file that lies in a directory of results, or beside a file of them. The system
gives it back when the process ends, however it ends. It keeps out whoever writes; who only reads
takes none. Of the processes of a job under torchrun the first one holds it for all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not Unix
    fcntl = None

LOCK = ".lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_ADVICE = "wait for it to end, stop it, or choose another --out"
_PARTIAL = re.compile(r"\.(.+)\.(\d+)\.partial")
_held: dict[Path, int] = {}  # how often this process has taken what it holds


@contextlib.contextmanager
def lock_directory(out: Path | None) -> Iterator[None]:
    """Inside `with`, no other job writes into the directory `out`, which is made if need be.

    ValueError where another process is at work there. Removes leftovers of killed ones. An empty
    directory that was made for the lock goes with it. None: nothing to lock.
    """
    if out is None or not _leads():
        yield
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, where a directory is wanted; choose another --out")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(out / LOCK, out) as held:
            if held:
                _remove_leftovers(out.rglob(".*.partial"), out)
            yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


@contextlib.contextmanager
def lock_file(out: Path | None) -> Iterator[None]:
    """Inside `with`, no other job writes the file `out`, or what lies beside it under its name.

    Also for a directory that appears as a whole (a merged model). Else as `lock_directory`.
    """
    if out is None or not _leads():
        yield
        return
    made = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(out.with_name(f".{out.name}{LOCK}"), out) as held:
            mine = (p for p in out.parent.glob(".*.partial") if p.name[1:].startswith(out.name))
            if held:
                _remove_leftovers(mine, out)
            yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _leads() -> bool:
    """Whether this process speaks and writes for its job (torchrun's first one, or alone)."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _locked(file: Path, out: Path) -> Iterator[bool]:
    """Inside `with`, the lock is held: whether it could be."""
    file = file.parent.resolve() / file.name
    if file in _held:  # a stage of a job that holds it already
        _held[file] += 1
        try:
            yield True
        finally:
            _held[file] -= 1
        return
    descriptor = _take(file, out)
    if descriptor is None:
        yield False
        return
    _held[file] = 1
    try:
        yield True
    finally:
        del _held[file]
        file.unlink(missing_ok=True)  # before it is given back: who waits for it looks again
        os.close(descriptor)


def _take(file: Path, out: Path) -> int | None:
    """The open lock file, held; None where there is none to be had."""
    if fcntl is None:
        print("note: this system has no flock, so nothing keeps a second job off the same --out")
        return None
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            if not file.exists():  # nothing can be written there; whoever tries says so
                return None
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)  # another user's: it holds too
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(file.stat(), os.fstat(descriptor)):
                break
        except FileNotFoundError:
            pass  # its holder has removed it in the meantime: make another
        except OSError as error:
            os.close(descriptor)
            if error.errno in _TAKEN:
                raise ValueError(f"{out} is in use by {_holder(file)}; {_ADVICE}") from None
            if error.errno not in _NO_LOCKS:
                raise
            file.unlink(missing_ok=True)
            print(
                f"note: {file} cannot be locked ({error.strerror}), so nothing keeps a second job "
                "off the same --out"
            )
            return None
        os.close(descriptor)
    begun = time.strftime("%Y-%m-%d %H:%M:%S")
    command = Path(sys.argv[0]).name
    said = f"process {os.getpid()} on {socket.gethostname()} ({command}, since {begun})\n"
    with contextlib.suppress(OSError):  # a full disk: the lock holds without words
        os.ftruncate(descriptor, 0)
        os.write(descriptor, said.encode(errors="backslashreplace"))
    return descriptor


def _holder(file: Path) -> str:
    """What the holder wrote into its lock file."""
    with contextlib.suppress(OSError):
        if said := file.read_text(encoding="utf-8", errors="replace").strip():
            return said
    return "another process"


def _remove_leftovers(paths: Iterator[Path], out: Path) -> None:
    """Remove what dead processes were writing when they were killed; what was removed is said."""
    count = size = 0
    for path in list(paths):
        match = _PARTIAL.fullmatch(path.name)
        if match is None or _alive(int(match[2])):
            continue
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        size += sum(p.stat().st_size for p in files)
        count += 1
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if count:
        print(f"{out}: {count} leftovers of killed jobs removed ({size / 1e6:.1f} MB)")


def _alive(pid: int) -> bool:
    """Whether a process of that number is there, not counting this one: it has begun nothing."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True
