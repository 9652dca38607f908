"""The cache on disk of check results and compiled code, and whether its files can be trusted.

The folder is $XDG_CACHE_HOME (~/.cache)/sdft-engine. Code that is loaded from it runs with the
user's rights, so nothing is taken that another user owns or may write: neither the file, nor its
folder, nor the folder around that. (In one with the sticky bit, as /tmp has, users cannot replace
each other's files.) root may do anything anyway and is trusted.
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
    """This user's cache folder, which need not exist; None where no home directory is known."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if base:
        return Path(base, NAME)
    try:
        return Path.home() / ".cache" / NAME
    except RuntimeError:  # no HOME, and a user id that is not in /etc/passwd
        return None


def why_distrusted(path: Path) -> str | None:
    """Why nothing may be taken from this file of the cache; None if it is this user's alone.

    A place that does not exist yet is trusted. OSError where a folder may not be looked into.
    """
    around = path.parent.parent
    for place in (around, path.parent, path):
        try:
            status = place.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if status.st_uid not in (os.geteuid(), 0):
            return f"{place} belongs to {_user_name(status.st_uid)}"
        is_sticky = bool(status.st_mode & stat.S_ISVTX)
        if place == around and is_sticky:
            continue
        others_may_write = bool(status.st_mode & stat.S_IWOTH)
        group_may_write = bool(status.st_mode & stat.S_IWGRP)
        if group_may_write and not _is_private_group(status.st_uid, status.st_gid):
            others_may_write = True
        if others_may_write:
            return f"{place} may be written by other users"
    return None


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _is_private_group(owner: int, gid: int) -> bool:
    """Whether the group is the owner's own: it has the owner's name and no other members."""
    try:
        group = grp.getgrgid(gid)
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        return False
    other_members = set(group.gr_mem) - {name}
    return group.gr_name == name and not other_members
