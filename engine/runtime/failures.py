"""Errors that a user can cause end a script with one line; a bug of ours keeps its traceback."""

from __future__ import annotations

import errno

from safetensors import SafetensorError

from model.durable import why


def explain(error: BaseException, lower: str = "") -> str | None:
    """The message for an error that a user can cause; None for a bug of ours.

    lower    advice for this script where memory is short: the flags that need less
    """
    # imported here because it imports torch, which nothing else of this module needs
    from engine.runtime.process_memory import first_line, is_out_of_memory

    if is_out_of_memory(error):
        advice = f": {lower}" if lower else ""
        return f"out of memory ({first_line(error)}){advice}"
    if isinstance(error, OSError) and error.errno not in (None, errno.EPIPE):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{why(error)}"
    if isinstance(error, (ValueError, OSError, SafetensorError)):
        return str(error)
    if isinstance(error, ImportError) and error.name is None:
        return str(error)  # our message about a missing package; Python's own has a name
    return None
