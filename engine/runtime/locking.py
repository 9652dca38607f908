"""One job at a time on an `--out`; leftovers of killed jobs are removed

A lock is flock on a file that lies in a directory of results, or beside a file of them. The system
releases it when the process ends, however it ends. Jobs that write take it; programs that only read
do not. Under torchrun, rank 0 holds it for all ranks.
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
from collections.abc import Iterable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not Unix
    fcntl = None

LOCK = ".lock"
# errors of flock where another process holds the lock, and where the file system has no locks
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
# errors of open in a directory where this user may not write
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_ADVICE = "wait for it to end, stop it, or choose another --out"
_PARTIAL = re.compile(r"\.(.+)\.(\d+)\.partial")  # .NAME.PID.partial (model/durable.py)
# State of this process: lock file -> how often it is taken. A stage takes the lock that its job
# holds already; flock would refuse that, because it counts two descriptors as two owners.
_held: dict[Path, int] = {}


@contextlib.contextmanager
def lock_directory(out: Path | None) -> Iterator[None]:
    """Inside `with`, no other job writes into the directory `out`; None locks nothing.

    Makes the directory, and removes it at the end if it is still empty. Removes leftovers of killed
    jobs. ValueError where another process works there.
    """
    if out is None or not _is_rank0():
        yield
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, expected a directory; choose another --out")
    with _directory_while_used(out), _locked(out / LOCK, out) as held:
        if held:
            _remove_leftovers(out.rglob(".*.partial"), out)
        yield


@contextlib.contextmanager
def lock_file(out: Path | None) -> Iterator[None]:
    """Inside `with`, no other job writes the file `out`, or files beside it named `out`.*

    Also for a directory that appears as a whole (a merged model). Otherwise as `lock_directory`.
    """
    if out is None or not _is_rank0():
        yield
        return
    file = out.with_name(f".{out.name}{LOCK}")
    with _directory_while_used(out.parent), _locked(file, out) as held:
        if held:
            partial = out.parent.glob(".*.partial")
            of_out = [path for path in partial if path.name.startswith(f".{out.name}")]
            _remove_leftovers(of_out, out)
        yield


def _is_rank0() -> bool:
    """Whether this process writes for its job: torchrun's rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _directory_while_used(directory: Path) -> Iterator[None]:
    """Inside `with`, the directory exists; folders made for that are removed if they stay empty."""
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


@contextlib.contextmanager
def _locked(file: Path, out: Path) -> Iterator[bool]:
    """Inside `with`, this process holds the lock; False where locks are not available."""
    file = file.parent.resolve() / file.name
    if file in _held:
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
        # before the release: a process that waits with this file open finds it gone and makes its
        # own (`_take`)
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _take(file: Path, out: Path) -> int | None:
    """The descriptor of the lock file, locked; None where this system or directory has no locks.

    ValueError where another process holds it.
    """
    if fcntl is None:
        print("note: this system has no flock, so nothing keeps a second job off the same --out")
        return None
    while True:
        descriptor = _open_lock_file(file)
        if descriptor is None:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        if _is_at_its_path(descriptor, file):
            _write_holder(descriptor)
            return descriptor
        os.close(descriptor)  # its holder has removed the file meanwhile: make another


def _is_at_its_path(descriptor: int, file: Path) -> bool:
    """Whether the open file is still the one at that path."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _open_lock_file(file: Path) -> int | None:
    """The lock file, opened and made if need be; None where the directory cannot be written."""
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
    if not file.exists():  # the job fails, with a message, as soon as it writes there
        return None
    return os.open(file, os.O_RDONLY | os.O_CLOEXEC)  # another user's lock file locks too


def _write_holder(descriptor: int) -> None:
    """Write into the lock file which process holds it, for the message of a second job."""
    begun = time.strftime("%Y-%m-%d %H:%M:%S")
    command = Path(sys.argv[0]).name
    holder = f"process {os.getpid()} on {socket.gethostname()} ({command}, since {begun})\n"
    with contextlib.suppress(OSError):  # a full disk: the lock holds without this text
        os.ftruncate(descriptor, 0)
        os.write(descriptor, holder.encode(errors="backslashreplace"))


def _holder(file: Path) -> str:
    """The text that the holder wrote into its lock file."""
    text = ""
    with contextlib.suppress(OSError):
        text = file.read_text(encoding="utf-8", errors="replace").strip()
    return text or "another process"


def _remove_leftovers(paths: Iterable[Path], out: Path) -> None:
    """Remove and count the partial files and directories of processes that are dead."""
    count = 0
    size = 0  # bytes
    for path in list(paths):  # all are found before the first is removed
        match = _PARTIAL.fullmatch(path.name)
        if match is None or _alive(int(match[2])):
            continue
        if not os.path.lexists(path):  # it lay in a directory that was removed
            continue
        size += _size(path)
        count += 1
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if count:
        print(f"{out}: {count} leftovers of killed jobs removed ({size / 1e6:.1f} MB)")


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _alive(pid: int) -> bool:
    """Whether another process has this id.

    This process has begun no partial file yet: one with its id is of an older process.
    """
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user; or no id that a process can have
        return True
    return True
