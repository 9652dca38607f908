"""Checks of a file before a parser reads it: broken downloads are named, links stay inside.

Every reader of weights, tokenizers, adapters, GGUF and data calls `check_file` first, so that the
message names the kind of file instead of a parser's error. `check_links` keeps a checkpoint inside
its directory: the target of a link that leads out is neither read nor copied.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"
HTML_BEGINNINGS = (b"<!doctype html", b"<html", b"<head")
BYTES_READ = 512  # a Git LFS pointer has about 130
READ_SUFFIXES = (".json", ".safetensors", ".model", ".jinja")  # of the files of a checkpoint


def why_not_the_file(path: Path) -> str | None:
    """Why `path` is not the file that its name says: what is there instead. None where it may be.

    It may be a directory, a pipe or a device, a Git LFS pointer, or a web page saved in the file's
    place. An absent file gives None.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        return "is a directory, expected a file"
    if not stat.S_ISREG(mode):
        return (
            "is a pipe or a device, which can be read only once; expected a file: write its "
            "content to one first"
        )
    with path.open("rb") as file:
        beginning = file.read(BYTES_READ)
    if beginning.startswith(LFS_POINTER):
        return (
            "is a Git LFS pointer, not the file itself: it was cloned without Git LFS; run "
            "`git lfs install` and `git lfs pull` in its repository, or download the file again"
        )
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(HTML_BEGINNINGS):
        return (
            "is an HTML page, not the file itself: the download was answered with a web page (a "
            "login or an error); download the file again"
        )
    return None


def check_file(path: Path) -> None:
    """ValueError naming `path` and the reason where `why_not_the_file` has one."""
    reason = why_not_the_file(path)
    if reason is not None:
        raise ValueError(f"{path} {reason}")


def leads_out(path: Path) -> Path | None:
    """The target of `path` if that is a link out of its directory, else None.

    Links into the Hugging Face cache count as inside: its snapshots consist of them, and so did
    the large files of its downloads elsewhere. They lead to .../models--OWNER--NAME/blobs/HASH.
    """
    home = Path(os.path.realpath(path.parent))
    target = Path(os.path.realpath(path))
    if target.is_relative_to(home):
        return None
    folder = target.parent
    is_cached = folder.name == "blobs" and folder.parent.name.startswith("models--")
    return None if is_cached else target


def check_links(directory: Path) -> None:
    """ValueError naming the first file of a checkpoint that is a link out of its directory."""
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        if path.suffix not in READ_SUFFIXES or not path.is_symlink():
            continue
        target = leads_out(path)
        if target is not None:
            raise ValueError(
                f"{path} is a link out of its directory, to {target}; a checkpoint must lie in one "
                "place (links into the Hugging Face cache apart): put a copy or a hard link there"
            )
