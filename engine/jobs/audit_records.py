"""The records of a trace: functions that ran, launches of kernels, and the tensors in a value."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

from engine.jobs.audit_source import Function, source_of

MOST_FIELDS = 12  # members of a list or tuple that are described


@dataclass
class Launch:
    """The first launch of a Triton kernel."""

    grid: tuple[int, ...]
    constants: dict[str, Any]  # constexpr arguments and options of the launch, by name
    arguments: list[tuple[str, str]]  # name, and dtype and shape or value


@dataclass
class Record:
    """A function of ours that ran."""

    function: Function
    called_from: str | None  # name of the function of ours that called it first
    calls: int = 0
    traced: set[int] = field(default_factory=set)  # numbers of the lines that sys.settrace saw
    arguments: list[tuple[str, str]] = field(default_factory=list)  # name, dtype and shape
    results: list[str] = field(default_factory=list)  # of the first call; empty without tensors
    torch: Counter[str] = field(default_factory=Counter)  # calls of functions of torch, by name
    launches: int = 0  # of a kernel
    launch: Launch | None = None
    untraced: bool = False  # compiled: its lines cannot be traced, all count as run
    first_frame: FrameType | None = None  # of the first call, until it returns

    @property
    def ran(self) -> set[int]:
        """Numbers of its code lines that ran."""
        source = source_of(self.function)
        if self.untraced:
            return set(source.code_of(self.function))
        return source.whole_statements(self.function, self.traced)


@dataclass
class Trace:
    """Everything that was recorded of a traced piece of work."""

    records: dict[str, Record] = field(default_factory=dict)  # by name, in the order of the calls
    seen: set[CodeType] = field(default_factory=set)  # all code that sys.setprofile saw
    c_functions: set[str] = field(default_factory=set)  # names of the C functions called
    kernels: set[str] = field(default_factory=set)  # names of the kernels launched
    packages: dict[str, str] = field(default_factory=dict)  # top-level package -> who called it
    autograd: dict[str, None] = field(default_factory=dict)  # sentences, each once, in order
    pickling: dict[str, None] = field(default_factory=dict)  # likewise


def describe(value: Any, depth: int = 2) -> str:
    """Dtype and shape of a tensor, or of the tensors in a value; "" where there is none.

    depth: levels of dataclasses, tuples and lists to look into.
    """
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        device = "" if value.device.type == "cpu" else f" on {value.device.type}"
        return f"{dtype} {tuple(value.shape)}{device}"
    kind = type(value)
    if kind.__module__ == "triton.language.core" and kind.__name__ == "tensor":
        return str(value.type)
    if depth == 0:
        return ""

    texts = {}  # by name of the member
    for name, member in _members(value):
        text = describe(member, depth - 1)
        if text:
            texts[name] = text
    if not texts:
        return ""
    if isinstance(value, list | tuple) and not _is_named_tuple(value):
        return f"({'; '.join(texts.values())})"
    fields = "; ".join(f"{name}: {text}" for name, text in texts.items())
    return f"{kind.__name__}({fields})"


def _members(value: Any) -> list[tuple[str, Any]]:
    """Names and values of the fields of a dataclass or named tuple, or of the first items."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return [(member.name, getattr(value, member.name, None)) for member in fields]
    if _is_named_tuple(value):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple):
        return [(str(index), item) for index, item in enumerate(value[:MOST_FIELDS])]
    return []


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")
