"""Work that goes on where memory is short: what is cached is given back, then it is tried again

    attempt        the result of a piece of work, or why memory did not suffice for it
    tried_twice    the result, at the second attempt where the first ran out of memory

A job that can take on less at once (rows, tokens) halves that between attempts and says so; each
does it in its own place, around `attempt`. Work that can be attempted again changes nothing before
it has all memory that it needs, or begins by undoing what an earlier attempt has changed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from engine.runtime.process_memory import first_line, give_back_freed_memory, is_out_of_memory

T = TypeVar("T")


class Attempt(NamedTuple, Generic[T]):
    """How an attempt ended."""

    result: T | None  # None where memory was short
    failure: str | None  # the first line of the error, where memory was short


def attempt(device: str | torch.device, work: Callable[..., T], *args: Any) -> Attempt[T]:
    """Do `work(*args)`. Where memory is short, everything that it held is freed, and what torch and
    glibc have cached is given back; no other error is caught."""
    failure = None
    try:
        return Attempt(work(*args), None)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure = first_line(error)
    # Outside of `except`: the error's traceback, which holds the tensors of all frames, is gone.
    gc.collect()
    give_back_freed_memory(device)
    return Attempt(None, failure)


def tried_twice(
    doing: str,
    device: str | torch.device,
    work: Callable[..., T],
    *args: Any,
    make_room: Callable[[], None] | None = None,
) -> T:
    """The result of `work(*args)`; of a second attempt, which is announced, where memory is short.

    For work that cannot be made smaller: one row, one sequence. torch.OutOfMemoryError where it
    does not fit alone either (`memory_for` turns that into a ValueError).

    make_room: frees more than what is cached, before the second attempt
    """
    result, failure = attempt(device, work, *args)
    if failure is None:
        return result
    print(f"\n{doing}: out of memory ({failure}); cached memory is given back, trying again")
    if make_room is not None:
        make_room()
    result, failure = attempt(device, work, *args)
    if failure is not None:
        raise torch.OutOfMemoryError(failure)
    return result
