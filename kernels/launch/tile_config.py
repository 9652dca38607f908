"""The table of tiles: block sizes, warps and stages by kernel, device class and shape class.

It lies in tiles/, a file per operation, a row per line, and is read once. A row is a starting point
that compiles without spilling (`python -m benchmarks.tuning.compile` holds every row to that) until
`python -m benchmarks.tuning.tune` has measured candidates on a card and written the fastest, with
the card's name as its `from`.

Device classes
    interpreter  triton's interpreter on a CPU: tiny tiles, so that small shapes have ragged edges
    sm_80        A100 and consumer cards; rows stay within the 99 KiB a consumer card has
    sm_90        H100, H200 and what came after
    gfx942       MI300
A kernel's file says what its shape classes mean. `any` serves every shape.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("tiles")
CLASSES = ("interpreter", "sm_80", "sm_90", "gfx942")

# benchmarks/tuning/compile.py and tune.py set these: the class to compile for; rows to measure, by
# kernel
# and first shape class of a look-up ("": of every one); who wants to know of look-ups.
pretended: str | None = None
overrides: dict[tuple[str, str], dict[str, int]] = {}
watcher: Callable[[str, str], None] | None = None


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict]]]:
    """kernel -> device class -> shape class -> row."""
    rows: dict = {}
    for path in sorted(FOLDER.glob("*.json")):
        rows.update(json.loads(path.read_text()))
    return rows


@functools.cache
def _card_class(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(index)[0]
    return "sm_90" if major in (9, 10) else "sm_80"  # 12 is a consumer card: 99 KiB, mma.sync


def device_class(device: torch.device) -> str:
    """Which rows of the table are for this device."""
    if pretended is not None:
        return pretended
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return _card_class(index)
    return "interpreter"


@functools.cache
def _card_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def device_processors(device: torch.device) -> int:
    """Programs that run at once where a kernel is to walk over its tiles: the multiprocessors of an
    sm_90 card (an H100's where one is pretended), three in the interpreter; else 0."""
    kind = device_class(device)
    if kind != "sm_90" or pretended is not None:
        return {"sm_90": 132, "interpreter": 3}.get(kind, 0)
    return _card_processors(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _row(kernel: str, device: str, shapes: tuple[str, ...]) -> dict[str, int]:
    rows = table()[kernel][device]
    found = next((rows[s] for s in (*shapes, "any") if s in rows), None)
    assert found is not None, f"kernels/tiles has no row {kernel} / {device} / {shapes or 'any'}"
    return {k: v for k, v in found.items() if k != "from"}


def forget() -> None:
    """Read the table anew at the next look: files, or rows in memory, have changed."""
    table.cache_clear()
    _row.cache_clear()


def tile(kernel: str, device: torch.device, *shapes: str) -> dict[str, int]:
    """The caller's own copy of a kernel's row: the first shape class that has one, else `any`."""
    first = (*shapes, "any")[0]
    if watcher is not None:
        watcher(kernel, first)
    if overrides and (row := overrides.get((kernel, first)) or overrides.get((kernel, ""))):
        return dict(row)
    return dict(_row(kernel, device_class(device), shapes))


def write(path: Path, rows: dict[str, dict[str, dict[str, dict]]]) -> None:
    """One operation's rows as JSON with a row per line, so that a change is a line of a diff."""
    kernels = []
    for kernel, by_device in rows.items():
        devices = []
        for device in (d for d in CLASSES if d in by_device):
            shapes = by_device[device].items()
            body = ",\n".join(f"      {json.dumps(s)}: {json.dumps(r)}" for s, r in shapes)
            devices.append(f"    {json.dumps(device)}: {{\n{body}\n    }}")
        kernels.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(devices) + "\n  }")
    beside = path.with_suffix(".tmp")
    beside.write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    beside.replace(path)
