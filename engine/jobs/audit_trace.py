"""The tracer of an audit: which functions of ours run, with what, and what they call

    with Tracer() as tracer:
        work()
    tracer.trace

sys.settrace     notes calls, lines, arguments and results of every function of ours
dispatch mode    notes the functions of torch that it calls, and tensors that require a gradient
launch_now       names each Triton kernel with its grid and constants. In triton's interpreter the
                 kernel's lines are traced like other lines; a compiled kernel's are not
C library        is replaced by one that notes the name of each function called
sys.setprofile   notes independently which code ran (the check of the page), and calls of C
                 functions that unpickle
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.jobs.audit_source import Function, c_function, path_of, read_source, source_of
from kernels.cpu import native

LAUNCH = "kernels.launch.triton_launch.launch_now"
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"load", "loads", "dump", "dumps"}  # names of their C functions
UNPICKLING = {"torch.serialization": ("load", "save"), "torch.jit._serialization": ("load",)}
# modules of torch that do automatic differentiation, but for those that switch it off or profile
AUTOGRAD = ("torch.autograd", "torch._functorch", "torch.func")
NO_AUTOGRAD = ("torch.autograd.grad_mode", "torch.autograd.profiler")
TENSOR_METHODS = {"backward", "requires_grad_"}
MOST_FIELDS = 12  # tensors that are shown of one value


@dataclass
class Launch:
    """The first launch of a Triton kernel."""

    grid: tuple[int, ...]
    constants: dict[str, Any]
    arguments: list[tuple[str, str]]


@dataclass
class Record:
    """A function of ours that ran."""

    function: Function
    called_from: str | None  # name of the function of ours that called it first
    calls: int = 0
    traced: set[int] = field(default_factory=set)  # lines
    arguments: list[tuple[str, str]] = field(default_factory=list)  # name, dtype and shape
    results: list[str] = field(default_factory=list)
    torch: Counter[str] = field(default_factory=Counter)
    launches: int = 0  # of a kernel
    launch: Launch | None = None
    untraced: bool = False  # compiled: its lines cannot be marked, all count as run
    first_frame: FrameType | None = None  # until its first result

    @property
    def ran(self) -> set[int]:
        """Numbers of its code lines that ran."""
        source = source_of(self.function)
        if self.untraced:
            return set(source.code_of(self.function))
        return source.whole_statements(self.function, self.traced)


@dataclass
class Trace:
    """The account of a traced piece of work."""

    records: dict[str, Record] = field(default_factory=dict)  # by name, in the order of the calls
    seen: set[CodeType] = field(default_factory=set)  # all that ran, as sys.setprofile saw it
    c_functions: set[str] = field(default_factory=set)
    kernels: set[str] = field(default_factory=set)  # names of the kernels launched
    packages: dict[str, str] = field(default_factory=dict)  # top-level package -> who called it
    autograd: dict[str, None] = field(default_factory=dict)  # sentences, in order
    pickling: dict[str, None] = field(default_factory=dict)


class Tracer:
    """Records everything inside its `with` block into `trace`.

    uses_c: the work calls the C library, which is loaded before the trace begins.
    """

    def __init__(self, uses_c: bool = False) -> None:
        self.trace = Trace()
        self.uses_c = uses_c
        self._records: dict[CodeType, Record | None] = {}
        self._own: dict[CodeType, bool] = {}  # is it the function itself, not one nested in it?
        self._started_at: dict[CodeType, int] = {}  # first instruction of a generator
        self._line_tracers: dict[CodeType, Callable] = {}
        self._checked: set[CodeType] = set()
        self._inside = contextlib.ExitStack()

    def __enter__(self) -> Tracer:
        loader = _RecordingLoader(self)
        if self.uses_c:
            loader.loaded()
        self._inside.enter_context(native.loading_by(loader))
        self._inside.enter_context(_TorchCalls(self))
        with torch.no_grad():
            torch.zeros(2).add_(1)  # torch imports much at its first call under a dispatch mode
        threading.settrace(self._call)
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        sys.setprofile(None)
        threading.settrace(None)
        threading.setprofile(None)
        self._inside.close()
        for record in self.trace.records.values():
            record.first_frame = None

    # ---- Python

    def _call(self, frame: FrameType, event: str, _: object) -> Any:
        """The trace function of every new frame; returns the one for its lines."""
        code = frame.f_code
        if code not in self._checked and not _while_importing(frame):
            self._checked.add(code)
            self._check(frame)
        if code not in self._records:
            self._records[code] = self._find(frame)
        record = self._records[code]
        if record is None:
            return None
        self._enter(frame, record)
        if code not in self._line_tracers:
            self._line_tracers[code] = self._line_tracer(record)
        return self._line_tracers[code]

    def _find(self, frame: FrameType) -> Record | None:
        """The record of the function that this code belongs to, new or not; None if not ours."""
        code = frame.f_code
        function = function_of(code, frame)
        if function is None:
            return None
        self._own[code] = code.co_name == function.name.rpartition(".")[2]
        return self._record(function, frame.f_back)

    def _record(self, function: Function, caller: FrameType | None) -> Record:
        if function.name not in self.trace.records:
            owner = self._owner(caller)
            called_from = None if owner is None else owner.function.name
            self.trace.records[function.name] = Record(function, called_from)
        return self.trace.records[function.name]

    def _owner(self, frame: FrameType | None) -> Record | None:
        """The record of the innermost function of ours around this frame."""
        while frame is not None:
            record = self._records.get(frame.f_code)
            if record is not None:
                return record
            frame = frame.f_back
        return None

    def _caller(self, frame: FrameType | None) -> str:
        owner = self._owner(frame)
        return "nothing of ours" if owner is None else owner.function.name

    def _enter(self, frame: FrameType, record: Record) -> None:
        code = frame.f_code
        record.traced.add(frame.f_lineno)
        if not self._own[code]:
            return
        if code.co_flags & inspect.CO_GENERATOR:
            start = self._started_at.setdefault(code, frame.f_lasti)
            if frame.f_lasti != start:  # it goes on behind a yield
                return
        record.calls += 1
        if record.calls == 1:
            names = code.co_varnames[: _argument_count(code)]
            values = frame.f_locals
            described = [(name, describe(values[name])) for name in names if name in values]
            record.arguments = [(name, text) for name, text in described if text]
            record.first_frame = frame
        if record.function.name == LAUNCH:
            self._launch(frame)

    def _line_tracer(self, record: Record) -> Callable:
        """The trace function inside a frame of this function."""

        def trace_line(frame: FrameType, event: str, value: Any) -> Callable:
            if event == "line":
                record.traced.add(frame.f_lineno)
            elif event == "return" and record.first_frame is frame:
                record.first_frame = None
                text = describe(value)
                record.results = [text] if text else []
            return trace_line

        return trace_line

    # ---- Triton

    def _launch(self, frame: FrameType) -> None:
        """Note the kernel that `launch_now` is about to run."""
        kernel, grid = frame.f_locals["kernel"], frame.f_locals["grid"]
        if 0 in grid:
            return
        function = function_of(kernel.fn.__code__)
        assert function is not None, f"kernel {kernel.fn.__name__} is not in a file of ours"
        record = self._record(function, frame)
        record.launches += 1
        self.trace.kernels.add(function.name)
        if record.launch is None:
            given = zip(kernel.arg_names, frame.f_locals["args"], strict=False)
            arguments = [(name, describe(value) or repr(value)) for name, value in given]
            record.launch = Launch(tuple(grid), dict(frame.f_locals["options"]), arguments)
            if not is_interpreted(kernel):
                record.untraced = True
                self._add_helpers(kernel, frame)

    def _add_helpers(self, kernel: Any, frame: FrameType) -> None:
        """Record the `@jit` functions that a compiled kernel's source names."""
        for helper in jit_functions_named_in(kernel):
            function = function_of(helper.fn.__code__)
            if function is not None and function.name not in self.trace.records:
                record = self._record(function, frame)
                record.untraced = True
                self.trace.kernels.add(function.name)
                self._add_helpers(helper, frame)

    # ---- C and torch

    def called_c(self, name: str, frame: FrameType) -> None:
        """Note a call of a C function of kernels/cpu/native/."""
        record = self._record(c_function(name), frame)
        record.calls += 1
        record.untraced = True
        self.trace.c_functions.add(record.function.name)

    def called_torch(self, name: str, values: Any, frame: FrameType) -> None:
        """Note a call of a function of torch, and whether autograd would differentiate it."""
        owner = self._owner(frame)
        if owner is None:
            return
        owner.torch[name] += 1
        tensors = [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)]
        if any(tensor.requires_grad for tensor in tensors):
            said = f"{owner.function.name} gives torch a tensor that requires a gradient"
            self.trace.autograd.setdefault(said)

    # ---- what must not run

    def _check(self, frame: FrameType) -> None:
        """Look at code that runs for the first time: its package, autograd, unpickling."""
        code = frame.f_code
        module = str(frame.f_globals.get("__name__", ""))
        generated = module.startswith("namedtuple_")  # the standard library's
        if path_of(code.co_filename) is not None or code.co_name == "<module>" or generated:
            return
        caller = self._caller(frame.f_back)
        self.trace.packages.setdefault(module.split(".")[0], caller)
        if module.split(".")[0] in PICKLERS or code.co_name in UNPICKLING.get(module, ()):
            self.trace.pickling.setdefault(f"{caller} calls {module}.{code.co_name}")
        in_autograd = _is_in(module, AUTOGRAD) and not _is_in(module, NO_AUTOGRAD)
        is_method = module == "torch._tensor" and code.co_name in TENSOR_METHODS
        if in_autograd or is_method:
            self.trace.autograd.setdefault(f"{caller} calls {module}.{code.co_name}")

    def _profile(self, frame: FrameType, event: str, value: Any) -> None:
        """The profile function: code that runs, and C functions that unpickle."""
        if event == "call":
            self.trace.seen.add(frame.f_code)
        elif event == "c_call" and value.__name__ in PICKLING_CALLS:
            # a function has a module; a method's is that of its object's class
            module = value.__module__ or type(value.__self__).__module__
            importing = frame.f_code.co_filename.startswith("<frozen importlib")
            if module in PICKLERS and not importing:
                said = f"{self._caller(frame)} calls {module}.{value.__name__}"
                self.trace.pickling.setdefault(said)


class _TorchCalls(TorchDispatchMode):
    """Passes every function of torch on, and its name to the tracer."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.tracer.called_torch(str(func.overloadpacket), (args, kwargs), sys._getframe(1))
        return func(*args, **kwargs)


class _RecordingLoader(native.Loader):
    """Finds the C library as usual; its functions tell the tracer that they were called."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def loaded(self) -> native.Loaded:
        found = super().loaded()
        if found.library is None:
            return found
        return native.Loaded(_RecordingLibrary(found.library, self.tracer))


class _RecordingLibrary:
    """The C library, each function of which names itself to the tracer first."""

    def __init__(self, library: Any, tracer: Tracer) -> None:
        self._library, self._tracer = library, tracer

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if name not in native.SIGNATURES:
            return function

        def call(*args: Any) -> Any:
            self._tracer.called_c(name, sys._getframe(1))
            return function(*args)

        return call


# ---- looking at code and values


def function_of(code: CodeType, frame: FrameType | None = None) -> Function | None:
    """The function of ours that this code belongs to; None for other people's.

    frame: where it runs. Code at the top of a module counts when the module is being imported.
    (Triton's interpreter also runs such code, around each function that it rewrites.)
    """
    path = path_of(code.co_filename)
    if path is None:
        return None
    if code.co_name == "<module>":
        caller = frame and frame.f_back and frame.f_back.f_code.co_filename
        if not str(caller).startswith("<frozen importlib"):
            return None
        source = read_source(path)
        return Function(f"{source.function_at(0).name}", path, 1, len(source.lines))
    return read_source(path).function_at(code.co_firstlineno)


def _while_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported, seen from the innermost function of ours around."""
    while frame is not None and path_of(frame.f_code.co_filename) is None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _argument_count(code: CodeType) -> int:
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS)
    return count + bool(code.co_flags & inspect.CO_VARKEYWORDS)


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def is_interpreted(kernel: Any) -> bool:
    """Whether triton's interpreter runs this kernel."""
    return type(kernel).__name__ == "InterpretedFunction"


def jit_functions_named_in(kernel: Any) -> list[Any]:
    """The `@jit` functions that the source of a kernel names."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    values = [kernel.fn.__globals__.get(name) for name in sorted(names)]
    return [value for value in values if type(value) is type(kernel)]


def describe(value: Any, depth: int = 2) -> str:
    """Dtype and shape of a tensor, or of the tensors in a value; "" where there is none."""
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device.type}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{where}"
    kind = type(value)
    if kind.__module__ == "triton.language.core" and kind.__name__ == "tensor":
        return str(value.type)
    if depth == 0:
        return ""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        members = [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        members = list(zip(value._fields, value, strict=True))
    elif isinstance(value, list | tuple):
        members = [(str(index), member) for index, member in enumerate(value[:MOST_FIELDS])]
    else:
        return ""
    described = [(name, describe(member, depth - 1)) for name, member in members]
    shown = [(name, text) for name, text in described if text]
    if not shown:
        return ""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return f"({'; '.join(text for _, text in shown)})"
    return f"{kind.__name__}({'; '.join(f'{name}: {text}' for name, text in shown)})"
