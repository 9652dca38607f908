"""What a process that checks is asked to do, as plain values of JSON."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from kernels.registry import SPECS, TORCH, Ops
from kernels.self_check.cases import Case, cases
from kernels.spec import Widths

MOST_COMPILERS = 16  # processes; each takes about 300 MB


@dataclasses.dataclass(frozen=True)
class Request:
    """What to check, and with which functions."""

    functions: dict[str, str]  # field of a table -> "module:function"; TORCH has the others
    operations: list[str]  # names of SPECS
    device: str
    dtype: str  # as "bfloat16"
    widths: dict[str, int] | None  # of the model
    target: list[Any] | None  # compile_ahead.Target; None: nothing is compiled ahead
    processes: int  # that compile

    def table(self) -> Ops:
        """The table with these functions."""
        found = {}
        for field, place in self.functions.items():
            module, _, name = place.partition(":")
            found[field] = getattr(importlib.import_module(module), name)
        return dataclasses.replace(TORCH, name="candidate", **found)

    def cases(self) -> dict[str, list[Case]]:
        """What each operation is checked at."""
        widths = None if self.widths is None else Widths(**self.widths)
        dtype = getattr(torch, self.dtype)
        return {name: cases(SPECS[name], dtype, widths) for name in self.operations}


def request_for(
    candidate: Ops,
    operations: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    widths: Widths | None,
) -> Request:
    """The request to check these operations; ValueError if another process cannot
    import one of their functions."""
    places = {}
    for operation in operations:
        for field in SPECS[operation].fields:
            function = getattr(candidate, field)
            module = sys.modules.get(function.__module__)
            found = getattr(module, function.__name__, None)
            if found is not function or function.__module__ == "__main__":
                raise ValueError(f"{function.__qualname__} cannot be imported")
            places[field] = f"{function.__module__}:{function.__name__}"
    target, name = None, str(device)
    if device.type == "cuda":
        from kernels.launch.compile_ahead import Target

        index = torch.cuda.current_device() if device.index is None else device.index
        name = f"cuda:{index}"
        target = list(Target.of(device))
    return Request(
        functions=places,
        operations=list(operations),
        device=name,
        dtype=str(dtype).removeprefix("torch."),
        widths=None if widths is None else dataclasses.asdict(widths),
        target=target,
        processes=min(MOST_COMPILERS, len(os.sched_getaffinity(0))),
    )
