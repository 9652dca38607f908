"""The process that checks kernels on a GPU: compiles them in parallel, then runs the checks

It reads a request (one JSON object) from stdin and writes JSON lines to stdout:
    {"kernels": 151}                                number of kernels to compile
    {"compiled": 57}                                so many are compiled
    {"checking": "rope"}                            the check of this operation begins
    {"operation": "rope", "fails": ""}              its result: "" if it passed, else why not
    {"unusable": "..."}                             the device does not work, and no check ran
    {"lost": "rope"}                                the check left the device unusable; the end

Compilers are forked before this process uses the GPU. They take no memory of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

import torch

from kernels.dtypes import sum_products_in_fp32
from kernels.launch import compile_ahead
from kernels.launch.compile_ahead import Compilers, Launch, Target
from kernels.registry import REFERENCE, SPECS, Ops
from kernels.self_check.cases import why_failing, why_unusable
from kernels.self_check.request import Request


def serve(request: Request, out: TextIO) -> None:
    """Compile, check, and write the results to `out`, each as soon as it is known."""

    def tell(**line: Any) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    ops, at, device = request.table(), request.cases(), torch.device(request.device)
    compilers, wanted = None, {}
    if request.target is not None:
        launches, wanted = launches_of(ops, at, Target(*request.target))
        tell(kernels=len(launches))
        compilers = Compilers(launches, Target(*request.target), request.processes)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            sum_products_in_fp32()
        reason = why_unusable(device)
        if reason is not None:
            tell(unusable=reason)
            return
        for name in request.operations:
            if compilers is not None:
                compilers.wait_for(wanted[name], lambda count: tell(compiled=count))
            tell(checking=name)
            reason = why_failing(SPECS[name], ops, REFERENCE, device, at[name])
            tell(operation=name, fails=reason or "")
            if reason is not None and why_unusable(device) is not None:
                tell(lost=name)
                return
    finally:
        if compilers is not None:
            compilers.close()


def launches_of(
    ops: Ops, at: dict[str, list], target: Target
) -> tuple[list[Launch], dict[str, set[int]]]:
    """The launches to compile, and for each operation the indices of those that it needs.

    An operation that cannot be recorded has none: its kernels are compiled when they are launched.
    """
    launches: list[Launch] = []
    wanted: dict[str, set[int]] = {}
    for name, of_operation in at.items():
        first = len(launches)
        try:
            launches += compile_ahead.distinct(recorded(ops, name, of_operation, target), target)
        except Exception:  # whatever it raises, its check will raise too
            del launches[first:]
        wanted[name] = set(range(first, len(launches)))
    return launches, wanted


def recorded(ops: Ops, name: str, at: Iterable, target: Target) -> list[Launch]:
    """All launches of the check of an operation."""
    launches: list[Launch] = []
    for shape, dtype in at:
        launches += compile_ahead.record(SPECS[name], ops, shape, dtype, target)
    return launches


def main() -> None:
    request = Request(**json.load(sys.stdin))
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is not taken for a result
    serve(request, lines)


if __name__ == "__main__":
    main()
