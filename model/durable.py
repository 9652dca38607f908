"""Files that are whole or absent, also after a power cut: written beside, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_ADVICE = {
    errno.ENOSPC: "make room and start again",
    errno.EDQUOT: "make room within the quota and start again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) and start again",
}


def why(error: Exception) -> str:
    """The cause in the system's words, and advice: "No space left on device; make room ..."."""
    code = re.search(r"os error (\d+)", str(error))  # safetensors has its own kind of error
    number = int(code[1]) if code else getattr(error, "errno", None)
    if number is None:
        return str(error)
    advice = _ADVICE.get(number)
    return os.strerror(number) + (f"; {advice}" if advice else "")


@contextlib.contextmanager
def writing(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Inside `with`, a write that fails is an OSError that names `path`, the cause and advice.

    `beside` is the place where `path` is written first. An OSError about another file is passed on
    unchanged.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {why(error)}") from None
    except OSError as error:
        if error.errno is None or not _is_about(error, path, beside):
            raise
        raise OSError(f"{path} cannot be written: {why(error)}") from None


def _is_about(error: OSError, path: Path, beside: Path | None) -> bool:
    """Whether an error is about one of these, a folder on the way, or about no file by name."""
    if error.filename is None:
        return True
    named = Path(os.fsdecode(error.filename))
    return path.is_relative_to(named) or (beside is not None and named.is_relative_to(beside))


def sync(path: Path) -> None:
    """Have the system put a file's content, or a directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some have no sync of directories
            raise
    finally:
        os.close(descriptor)


def put_in_place(beside: Path, path: Path) -> None:
    """Rename a finished file or directory to `path` once all of it is on the disk."""
    if beside.is_dir():
        for folder, _, names in os.walk(beside):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
    else:
        sync(beside)
    os.replace(beside, path)
    sync(path.parent)


def _beside(path: Path) -> Path:
    """The hidden name under which this process writes `path`. A killed process leaves it behind;
    engine/runtime/locking.py removes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextlib.contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """A new name beside `path`, which becomes `path` when the file under it is written.

    OSError names `path`, the cause and advice where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        with writing(path, beside):
            yield beside
            put_in_place(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def directory_beside(out: Path) -> Iterator[Path]:
    """A new directory that becomes `out` only when everything in it is written, on the disk.

    ValueError where `out` exists; OSError names `out`, the cause and advice where it cannot be
    written.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; choose another name or delete it")
    beside = _beside(out)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with writing(out, beside):
            beside.mkdir(parents=True)
            yield beside
            # safetensors makes files that only their owner may read: give them the usual mode
            mode = beside.stat().st_mode & 0o666
            for file in beside.iterdir():
                if file.is_file():
                    file.chmod(mode)
            put_in_place(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
