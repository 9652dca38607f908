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
    code = re.search(r"os error (\d+)", str(error))  # safetensors states errno in its text
    number = int(code[1]) if code else getattr(error, "errno", None)
    if number is None:
        return str(error)
    cause = os.strerror(number)
    if number in _ADVICE:
        return f"{cause}; {_ADVICE[number]}"
    return cause


@contextlib.contextmanager
def writing(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Inside `with`, a write that fails raises an OSError naming `path`, the cause and advice.

    `beside` is the hidden file or directory that becomes `path`. An OSError about another file is
    passed on unchanged.
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
    """Whether an error names `path`, a folder above it, something in `beside`, or no file."""
    if error.filename is None:
        return True
    named = Path(os.fsdecode(error.filename))
    if path.is_relative_to(named):
        return True
    return beside is not None and named.is_relative_to(beside)


def sync(path: Path) -> None:
    """Write a file's content, or the list of a directory's files, from memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems cannot sync a directory
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
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
    """The hidden name under which this process writes `path`.

    A killed process leaves it behind; engine/runtime/locking.py removes it.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextlib.contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """A hidden file name beside `path`; the file written there is renamed to `path` at the end.

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


def remove_directory(path: Path) -> None:
    """Delete a directory; a kill leaves it whole or gone, and what is left of it hidden."""
    beside = _beside(path)
    shutil.rmtree(beside, ignore_errors=True)
    os.replace(path, beside)
    shutil.rmtree(beside)


@contextlib.contextmanager
def directory_beside(out: Path) -> Iterator[Path]:
    """A hidden new directory, renamed to `out` at the end, once all its files are on the disk.

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
