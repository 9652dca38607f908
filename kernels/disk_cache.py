"""Where results and compiled code are kept between runs, and whether what lies there is ours

The folder is $XDG_CACHE_HOME (~/.cache)/sdft-engine. What is loaded from it runs with the user's
rights, so nothing is taken that another user owns or may write: neither the file, nor its folder,
nor the folder around that (one with the sticky bit, as /tmp has, lets nobody take what is not
theirs). root may do anything anyway and is trusted.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

NAME = "sdft-engine"


class NotOurs(OSError):
    """A place in the cache that another user owns or may write."""


def folder() -> Path | None:
    """Where this user's cache lies, there or not; None where no home directory is known."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no HOME, and a user id that is not in /etc/passwd
        return None
    return Path(base, NAME)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _shared_group(owner: int, group: int) -> bool:
    """Whether a group may have other members than the owner, whose own one has his name."""
    try:
        found, name = grp.getgrgid(group), pwd.getpwuid(owner).pw_name
    except KeyError:
        return True
    return found.gr_name != name or bool(set(found.gr_mem) - {name})


def distrusted(path: Path) -> str:
    """Why nothing is to be taken from this file of the cache, "" if all of it is this user's.

    What is not there yet is nobody's. OSError where a folder may not be looked into.
    """
    for place in (path.parent.parent, path.parent, path):
        try:
            about = place.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if about.st_uid not in (os.geteuid(), 0):
            return f"{place} belongs to {_user(about.st_uid)}"
        if place == path.parent.parent and about.st_mode & stat.S_ISVTX:
            continue
        by_group = about.st_mode & stat.S_IWGRP and _shared_group(about.st_uid, about.st_gid)
        if by_group or about.st_mode & stat.S_IWOTH:
            return f"{place} may be written by other users"
    return ""
