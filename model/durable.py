"""Files that are whole or absent, also after a power cut: written beside, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_ADVICE = {
    errno.ENOSPC: "make room and start again",
    errno.EDQUOT: "make room within the quota and start again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) and start again",
}


def why(error: Exception) -> str:
    """The cause in the system's words, and what helps: "No space left on device; make room ..."."""
    found = re.search(r"os error (\d+)", str(error))  # safetensors has its own kind of error
    number = int(found[1]) if found else getattr(error, "errno", None)
    if number is None:
        return str(error)
    advice = _ADVICE.get(number)
    return os.strerror(number) + (f"; {advice}" if advice else "")


@contextlib.contextmanager
def writing(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Inside `with`, a write that fails is an OSError that names `path`, the cause and what helps.

    beside    where it is written first. An OSError about another file is passed on as it is
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


@contextlib.contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """A new name beside `path`, which becomes `path` when the file under it is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path, beside):
            yield beside
            put_in_place(beside, path)
    finally:
        beside.unlink(missing_ok=True)
