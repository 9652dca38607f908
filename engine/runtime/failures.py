"""What ends a script in one line: what a user can cause. A fault of ours keeps its traceback."""

from __future__ import annotations

import errno

from safetensors import SafetensorError

from model.durable import why


def explain(error: BaseException, lower: str = "") -> str | None:
    """The message for a user; None for a fault of ours.

    lower    what takes less memory in this script
    """
    from engine.runtime.process_memory import first_line, is_out_of_memory  # torch is there by now

    if is_out_of_memory(error):
        return f"out of memory ({first_line(error)})" + (f": {lower}" if lower else "")
    if isinstance(error, OSError) and error.errno not in (None, errno.EPIPE):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{why(error)}"
    if isinstance(error, (ValueError, OSError, SafetensorError)):
        return str(error)
    if isinstance(error, ImportError) and error.name is None:  # a package that we ask for by name
        return str(error)
    return None
