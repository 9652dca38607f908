"""What an operation is checked at, and the check itself

At its SPEC's two largest test shapes in the run's dtype, at the largest in fp32, and for a few
tokens at the model's own widths: those are the kernels that will run.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.spec import Spec, Widths, check

REASON = 200  # characters of a reason that are kept

Case = tuple[tuple[int, ...], torch.dtype]  # shape and dtype


def cases(spec: Spec, dtype: torch.dtype, widths: Widths | None) -> list[Case]:
    """What the operation is checked at for a run in this dtype, of a model of these widths."""
    by_size = largest_first(spec)
    shapes = by_size[:2]
    if widths is not None:
        shapes += spec.model_shapes(widths)
    found = [(shape, dtype) for shape in shapes]
    found.append((by_size[0], torch.float32))
    return list(dict.fromkeys(found))  # each once


def largest_first(spec: Spec) -> list[tuple[int, ...]]:
    """The test shapes by the size of their inputs. (Each costs a compilation of every kernel.)"""

    def num_elements(shape: tuple[int, ...]) -> int:
        inputs = spec.make_inputs(shape, torch.Generator().manual_seed(0))
        tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() for tensor in tensors)

    return sorted(spec.test_shapes, key=num_elements, reverse=True)


def why_failing(
    spec: Spec, ops: Any, reference: Any, device: torch.device, at: list[Case]
) -> str | None:
    """Why this operation of the table `ops` must not be used here; None when it passes."""
    try:
        for shape, dtype in at:
            check(spec, ops, reference, shape, dtype, str(device))
    except Exception as error:  # anything that a compiler, a launch or the check may raise
        return first_line(error) or "failed"
    return None


def first_line(error: Exception) -> str:
    """The beginning of an error's message, with its type unless the check itself raised it."""
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else ""
    if not isinstance(error, AssertionError):
        message = f"{type(error).__name__}: {message}"
    return message[:REASON]


def why_unusable(device: torch.device) -> str | None:
    """Why nothing can run on the device (any more); None if it can."""
    try:
        torch.zeros(1, device=device).sum().item()
    except RuntimeError as error:
        return first_line(error)
    return None
