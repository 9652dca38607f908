"""Tile configurations: block sizes, warps and stages by kernel, device class and shape class.

They are kept in tiles/*.json, a file per operation, a configuration per line, and read once. A
configuration is a starting point that compiles without spilling (`python -m
benchmarks.tuning.compile` checks every one) until `python -m benchmarks.tuning.tune` has measured
candidates on a card and written the fastest, with the card's name as its `from`.

Device classes
    interpreter  triton's interpreter on a CPU: tiny tiles, so that small shapes have ragged edges
    sm_80        A100 and consumer cards; within the 99 KiB of shared memory of a consumer card
    sm_90        H100, H200 and later
    gfx942       MI300
A kernel's file says what its shape classes mean. `any` serves every shape.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).with_name("tiles")
CLASSES = ("interpreter", "sm_80", "sm_90", "gfx942")
ANY = "any"  # the shape class that serves every shape

# A tile configuration: block sizes, num_warps, num_stages; for a few operations the name of a form.
Config = dict[str, Any]


class Lookup(NamedTuple):
    """One look-up of a tile configuration."""

    kernel: str
    shape_class: str  # the first that was asked for
    config: Config  # the configuration that was given


# ---- look-ups


def tile_config(kernel: str, device: torch.device, *shape_classes: str) -> Config:
    """A copy of a kernel's configuration: of the first shape class that has one, else of `any`."""
    first = (*shape_classes, ANY)[0]
    overrides = _overrides.get()
    config = overrides.get((kernel, first)) or overrides.get((kernel, ""))
    if config is None:
        config = _configured(kernel, device_class(device), shape_classes)
    for watcher in _watchers.get():
        watcher(Lookup(kernel, first, dict(config)))
    return dict(config)


@functools.cache
def _configured(kernel: str, device_class: str, shape_classes: tuple[str, ...]) -> Config:
    by_shape = configurations()[kernel][device_class]
    for shape_class in (*shape_classes, ANY):
        if shape_class in by_shape:
            return {k: v for k, v in by_shape[shape_class].items() if k != "from"}
    raise AssertionError(
        f"kernels/launch/tiles has no configuration {kernel} / {device_class} / "
        f"{shape_classes or ANY}"
    )


@functools.cache
def configurations() -> dict[str, dict[str, dict[str, Config]]]:
    """kernel -> device class -> shape class -> configuration, with its `from`."""
    by_kernel: dict = {}
    for path in sorted(FOLDER.glob("*.json")):
        by_kernel.update(json.loads(path.read_text()))
    return by_kernel


def forget() -> None:
    """Read the files again at the next look-up: they have changed."""
    configurations.cache_clear()
    _configured.cache_clear()


# ---- devices


def device_class(device: torch.device) -> str:
    """Which of CLASSES this device belongs to."""
    if (pretended := _pretended.get()) is not None:
        return pretended
    if device.type == "cuda":
        return _card_class(_index(device))
    return "interpreter"


@functools.cache
def _card_class(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(index)[0]
    return "sm_90" if major in (9, 10) else "sm_80"  # 12 is a consumer card: 99 KiB, mma.sync


def device_processors(device: torch.device) -> int:
    """How many programs a persistent kernel is launched with; 0 where it has one per tile.

    On sm_90 the number of multiprocessors (an H100's where one is pretended), in the interpreter 3.
    """
    kind = device_class(device)
    if kind == "interpreter":
        return 3
    if kind != "sm_90":
        return 0
    return 132 if _pretended.get() is not None else _card_processors(_index(device))


@functools.cache
def _card_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


# ---- for ahead-of-time compilation and tuning (benchmarks/tuning)

_pretended: ContextVar[str | None] = ContextVar("pretended", default=None)
_overrides: ContextVar[Mapping[tuple[str, str], Config]] = ContextVar(
    "overrides", default=MappingProxyType({})
)
_watchers: ContextVar[tuple[Callable[[Lookup], None], ...]] = ContextVar("watchers", default=())


@contextlib.contextmanager
def pretending(device_class: str | None) -> Iterator[None]:
    """Inside, every device is of this class; None: each is of its own."""
    token = _pretended.set(device_class)
    try:
        yield
    finally:
        _pretended.reset(token)


@contextlib.contextmanager
def overriding(configs: Mapping[tuple[str, str], Config]) -> Iterator[None]:
    """Inside, look-ups find these configurations, by (kernel, first shape class of the look-up).

    The shape class "" stands for every one. An inner block adds to the outer ones.
    """
    token = _overrides.set({**_overrides.get(), **configs})
    try:
        yield
    finally:
        _overrides.reset(token)


@contextlib.contextmanager
def watching(watcher: Callable[[Lookup], None]) -> Iterator[None]:
    """Inside, `watcher` is called with every look-up."""
    token = _watchers.set((*_watchers.get(), watcher))
    try:
        yield
    finally:
        _watchers.reset(token)


def write(path: Path, by_kernel: dict[str, dict[str, dict[str, Config]]]) -> None:
    """One operation's file, a configuration per line, so that a change is one line of a diff."""
    kernels = []
    for kernel, by_device in by_kernel.items():
        devices = []
        for device in (d for d in CLASSES if d in by_device):
            shapes = by_device[device].items()
            body = ",\n".join(f"      {json.dumps(s)}: {json.dumps(c)}" for s, c in shapes)
            devices.append(f"    {json.dumps(device)}: {{\n{body}\n    }}")
        kernels.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(devices) + "\n  }")
    beside = path.with_suffix(".tmp")
    beside.write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    beside.replace(path)
