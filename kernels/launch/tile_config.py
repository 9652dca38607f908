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
H100_PROCESSORS = 132

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
    first = shape_classes[0] if shape_classes else ANY
    overrides = _overrides.get()
    if (kernel, first) in overrides:
        config = overrides[kernel, first]
    elif (kernel, "") in overrides:
        config = overrides[kernel, ""]
    else:
        config = _configured(kernel, device_class(device), shape_classes)
    for watcher in _watchers.get():
        watcher(Lookup(kernel, first, dict(config)))
    return dict(config)


@functools.cache
def _configured(kernel: str, device_class: str, shape_classes: tuple[str, ...]) -> Config:
    """The configuration in the files, without its `from`."""
    by_shape = configurations()[kernel][device_class]
    for shape_class in (*shape_classes, ANY):
        if shape_class in by_shape:
            config = dict(by_shape[shape_class])
            config.pop("from", None)
            return config
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
    pretended = _pretended.get()
    if pretended is not None:
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

    On sm_90 the number of multiprocessors (an H100's where no other is pretended), in the
    interpreter 3.
    """
    pretended = _pretended_processors.get()
    if pretended is not None:
        return pretended
    kind = device_class(device)
    if kind == "interpreter":
        return 3
    if kind != "sm_90":
        return 0
    if _pretended.get() is not None:
        return H100_PROCESSORS
    return _card_processors(_index(device))


@functools.cache
def _card_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


# ---- for ahead-of-time compilation and tuning (benchmarks/tuning)

_pretended: ContextVar[str | None] = ContextVar("pretended", default=None)
_pretended_processors: ContextVar[int | None] = ContextVar("pretended processors", default=None)
_overrides: ContextVar[Mapping[tuple[str, str], Config]] = ContextVar(
    "overrides", default=MappingProxyType({})
)
_watchers: ContextVar[tuple[Callable[[Lookup], None], ...]] = ContextVar("watchers", default=())


@contextlib.contextmanager
def pretending(device_class: str | None, processors: int | None = None) -> Iterator[None]:
    """Inside, every device is of this class; None: each is of its own.

    processors: what `device_processors` returns; None: that of the class.
    """
    token = _pretended.set(device_class)
    processors_token = _pretended_processors.set(processors)
    try:
        yield
    finally:
        _pretended_processors.reset(processors_token)
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
    """One operation's file, a configuration per line, so that a change is one line of a diff.

    by_kernel: as `configurations` gives it.
    """
    kernels = {}
    for kernel, by_device in by_kernel.items():
        devices = {}
        for device in CLASSES:
            if device in by_device:
                by_shape = by_device[device]
                configs = {shape: json.dumps(config) for shape, config in by_shape.items()}
                devices[device] = _json_object(configs, indent="    ")
        kernels[kernel] = _json_object(devices, indent="  ")
    beside = path.with_suffix(".tmp")
    beside.write_text(_json_object(kernels, indent="") + "\n")
    beside.replace(path)


def _json_object(members: Mapping[str, str], indent: str) -> str:
    """A JSON object with a member per line, name -> its value as JSON."""
    lines = [f"{indent}  {json.dumps(name)}: {value}" for name, value in members.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
