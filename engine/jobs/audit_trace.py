"""The tracer of an audit: records which functions of ours run, their tensors, and their calls

    with Tracer() as tracer:
        work()
    tracer.trace

sys.settrace     sees calls, lines, arguments and results of every function of ours
dispatch mode    sees the functions of torch that they call, and tensors that require a gradient
launch_now       is the function that launches every Triton kernel: its arguments give the kernel,
                 the grid and the constants. Triton's interpreter runs the lines of a kernel as
                 Python, so they are traced; those of a compiled kernel are not
C library        is replaced by one that records the name of each function called
sys.setprofile   sees independently which code ran (the check of the page), and calls of C
                 functions that unpickle

"Ours" are the files of engine/, model/ and kernels/, except those of the audit.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
import textwrap
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.jobs.audit_records import Launch, Record, Trace, describe
from engine.jobs.audit_source import Function, c_function, path_of, read_source
from kernels.cpu import native

LAUNCH = "kernels.launch.triton_launch.launch_now"
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"load", "loads", "dump", "dumps"}  # names of their C functions
UNPICKLING = {"torch.serialization": ("load", "save"), "torch.jit._serialization": ("load",)}
# modules of torch that differentiate, and those among them that only switch it off or profile
AUTOGRAD = ("torch.autograd", "torch._functorch", "torch.func")
NO_AUTOGRAD = ("torch.autograd.grad_mode", "torch.autograd.profiler")
TENSOR_METHODS = {"backward", "requires_grad_"}


class Tracer:
    """Records everything inside its `with` block into `trace`.

    uses_c: the work calls the C library, which is loaded before the trace begins.
    """

    def __init__(self, uses_c: bool = False) -> None:
        self.trace = Trace()
        self.uses_c = uses_c
        self._records: dict[CodeType, Record | None] = {}  # None for code that is not ours
        self._is_function: dict[CodeType, bool] = {}  # False: nested in the record's function
        self._started_at: dict[CodeType, int] = {}  # first instruction of a generator
        self._line_tracers: dict[CodeType, Callable] = {}
        self._checked: set[CodeType] = set()  # code that `_check` has seen
        self._contexts = contextlib.ExitStack()  # open inside the `with` block

    def __enter__(self) -> Tracer:
        loader = _RecordingLoader(self)
        if self.uses_c:
            loader.loaded()
        self._contexts.enter_context(native.loading_by(loader))
        self._contexts.enter_context(_TorchCalls(self))
        # torch imports many modules at its first call under a dispatch mode: not to be traced
        with torch.no_grad():
            torch.zeros(2).add_(1)
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
        self._contexts.close()
        for record in self.trace.records.values():
            record.first_frame = None

    # ---- Python

    def _call(self, frame: FrameType, event: str, _: object) -> Any:
        """The trace function of every new frame; returns the one for its lines (sys.settrace)."""
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
        _, _, name = function.name.rpartition(".")
        self._is_function[code] = code.co_name == name
        return self._record(function, frame.f_back)

    def _record(self, function: Function, caller: FrameType | None) -> Record:
        """The record of that function, made at its first call. caller: frame of the call."""
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

    def _owner_name(self, frame: FrameType | None) -> str:
        """The name of that function, for the sentences about violations."""
        owner = self._owner(frame)
        return "nothing of ours" if owner is None else owner.function.name

    def _enter(self, frame: FrameType, record: Record) -> None:
        """Count the call, and describe the arguments of the first one."""
        code = frame.f_code
        record.traced.add(frame.f_lineno)
        if not self._is_function[code]:
            return
        if code.co_flags & inspect.CO_GENERATOR:
            start = self._started_at.setdefault(code, frame.f_lasti)
            if frame.f_lasti != start:  # it continues after a yield: no new call
                return
        record.calls += 1
        if record.calls == 1:
            record.arguments = _described_arguments(frame)
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
        """Record the kernel that `launch_now`, whose frame this is, is about to run."""
        kernel = frame.f_locals["kernel"]
        grid = frame.f_locals["grid"]
        if 0 in grid:  # no program runs
            return
        function = function_of(kernel.fn.__code__)
        assert function is not None, f"kernel {kernel.fn.__name__} is not in a file of ours"
        record = self._record(function, frame)
        record.launches += 1
        self.trace.kernels.add(function.name)
        if record.launch is not None:
            return
        arguments = []
        for name, value in zip(kernel.arg_names, frame.f_locals["args"], strict=False):
            arguments.append((name, describe(value) or repr(value)))
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
        """Record a call of a C function of kernels/cpu/native/."""
        record = self._record(c_function(name), frame)
        record.calls += 1
        record.untraced = True
        self.trace.c_functions.add(record.function.name)

    def called_torch(self, name: str, values: Any, frame: FrameType) -> None:
        """Record a call of a function of torch, and whether autograd would differentiate it.

        values: its arguments. frame: of the call.
        """
        owner = self._owner(frame)
        if owner is None:
            return
        owner.torch[name] += 1
        for value in torch.utils._pytree.tree_leaves(values):
            if isinstance(value, Tensor) and value.requires_grad:
                sentence = f"{owner.function.name} gives torch a tensor that requires a gradient"
                self.trace.autograd.setdefault(sentence)

    # ---- violations

    def _check(self, frame: FrameType) -> None:
        """Record the package of code that runs for the first time, and autograd and unpickling."""
        code = frame.f_code
        module = str(frame.f_globals.get("__name__", ""))
        is_ours = path_of(code.co_filename) is not None
        is_generated = module.startswith("namedtuple_")  # by the standard library
        if is_ours or is_generated or code.co_name == "<module>":
            return
        caller = self._owner_name(frame.f_back)
        sentence = f"{caller} calls {module}.{code.co_name}"
        package, _, _ = module.partition(".")
        self.trace.packages.setdefault(package, caller)
        if package in PICKLERS or code.co_name in UNPICKLING.get(module, ()):
            self.trace.pickling.setdefault(sentence)
        differentiates = _is_in(module, AUTOGRAD) and not _is_in(module, NO_AUTOGRAD)
        is_method = module == "torch._tensor" and code.co_name in TENSOR_METHODS
        if differentiates or is_method:
            self.trace.autograd.setdefault(sentence)

    def _profile(self, frame: FrameType, event: str, value: Any) -> None:
        """The profile function (sys.setprofile): code that runs, and C functions that unpickle."""
        if event == "call":
            self.trace.seen.add(frame.f_code)
            return
        if event != "c_call" or value.__name__ not in PICKLING_CALLS:
            return
        # a method has no module: its object's class has
        module = value.__module__ or type(value.__self__).__module__
        if module in PICKLERS and not _is_import_machinery(frame.f_code):
            sentence = f"{self._owner_name(frame)} calls {module}.{value.__name__}"
            self.trace.pickling.setdefault(sentence)


class _TorchCalls(TorchDispatchMode):
    """Calls every function of torch as usual, and tells the tracer its name and arguments."""

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
    """Loads the C library as usual, and wraps it into a _RecordingLibrary."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def loaded(self) -> native.Loaded:
        loaded = super().loaded()
        if loaded.library is None:
            return loaded
        return native.Loaded(_RecordingLibrary(loaded.library, self.tracer))


class _RecordingLibrary:
    """The C library; the tracer is told the name of each function before it is called."""

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


# ---- code


def function_of(code: CodeType, frame: FrameType | None = None) -> Function | None:
    """The function of ours that this code belongs to, None where it is not ours.

    frame: where it runs. Code at the top of a module counts only while the module is imported:
    triton's interpreter runs such code too, around each function that it rewrites.
    """
    path = path_of(code.co_filename)
    if path is None:
        return None
    source = read_source(path)
    if code.co_name != "<module>":
        return source.function_at(code.co_firstlineno)
    caller = None if frame is None else frame.f_back
    if caller is None or not _is_import_machinery(caller.f_code):
        return None
    return source.function_at(0)  # the top level


def _is_import_machinery(code: CodeType) -> bool:
    """Whether it is code of the standard library that imports a module."""
    return code.co_filename.startswith("<frozen importlib")


def _while_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported between this frame and the function of ours around it."""
    while frame is not None and path_of(frame.f_code.co_filename) is None:
        if _is_import_machinery(frame.f_code):
            return True
        frame = frame.f_back
    return False


def _described_arguments(frame: FrameType) -> list[tuple[str, str]]:
    """Names and descriptions of the arguments that hold tensors, in a frame that begins."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    if code.co_flags & inspect.CO_VARARGS:
        count += 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        count += 1
    values = frame.f_locals
    arguments = []
    for name in code.co_varnames[:count]:
        text = describe(values.get(name))
        if text:
            arguments.append((name, text))
    return arguments


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    """Whether the module is one of the packages, or inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def is_interpreted(kernel: Any) -> bool:
    """Whether triton's interpreter runs this kernel."""
    return type(kernel).__name__ == "InterpretedFunction"


def jit_functions_named_in(kernel: Any) -> list[Any]:
    """The `@jit` functions that the source of a kernel names."""
    source = textwrap.dedent(inspect.getsource(kernel.fn))
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    values = [kernel.fn.__globals__.get(name) for name in sorted(names)]
    return [value for value in values if type(value) is type(kernel)]
