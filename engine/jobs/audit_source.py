"""The sources that an audit shows: files of ours, their functions, code lines and statements

A function here stands at the top of a module or in a class; functions, lambdas and comprehensions
inside it belong to it. Code lines are lines that are not blank, comments or docstrings.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("engine", "model", "kernels")
TOP_LEVEL = "top-level"  # the name of the code of a module outside its functions
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Function:
    """A function or method: its name, and its lines in its file."""

    name: str  # module.function or module.Class.function: its anchor on the page
    path: str  # from the root of the clone: engine/train/step.py
    first: int  # number of its first line, decorators included
    last: int

    @property
    def room(self) -> str:
        """The folder whose README describes it: engine/train, model, kernels/cpu, kernels."""
        floor, *folders = self.path.split("/")[:-1]
        if floor == "engine" and folders:
            return f"engine/{folders[0]}"
        if folders and folders[0] in ("cpu", "launch"):
            return f"{floor}/{folders[0]}"
        return floor


@dataclass(frozen=True)
class SourceFile:
    """A file of the clone. Lines are numbered from 1."""

    path: str
    lines: tuple[str, ...]
    code: frozenset[int]  # numbers of the code lines
    functions: tuple[Function, ...]
    statements: dict[int, int]  # line -> first line of the innermost statement that it belongs to
    executable: frozenset[int]  # first lines of the statements that compile to instructions

    def function_at(self, line: int) -> Function:
        """The function around that line; the module's top level where there is none."""
        for function in self.functions:
            if function.first <= line <= function.last:
                return function
        name = f"{module_of(self.path)}.{TOP_LEVEL}"
        return Function(name, self.path, 1, len(self.lines))

    def lines_of(self, function: Function) -> list[int]:
        """Numbers of its lines; of a top level those outside all functions."""
        numbers = list(range(function.first, function.last + 1))
        if function.name.endswith(f".{TOP_LEVEL}"):
            numbers = [number for number in numbers if self.function_at(number) == function]
        return numbers

    def code_of(self, function: Function) -> list[int]:
        """Numbers of its code lines."""
        return [number for number in self.lines_of(function) if number in self.code]

    def whole_statements(self, function: Function, traced: set[int]) -> set[int]:
        """The code lines of the function that ran: a statement ran if one of its lines was traced.

        A statement that compiles to no instruction (an annotation, `global`) counts as the line
        above it does.
        """
        # first lines of the statements that ran
        started = {self.statements[line] for line in traced if line in self.statements}
        ran: set[int] = set()
        statement_ran = False
        for line in self.code_of(function):
            start = self.statements.get(line)
            if start in self.executable:
                statement_ran = start in started
            if statement_ran:
                ran.add(line)
        return ran


def module_of(path: str) -> str:
    """engine/train/step.py -> engine.train.step; a package's __init__.py is the package."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def path_of(filename: str) -> str | None:
    """The path inside the clone of a file of FLOORS; None for other files and the audit's own.

    filename: co_filename of a code object.
    """
    file = Path(filename)
    if not file.is_absolute() or not file.is_relative_to(ROOT):
        return None
    path = file.relative_to(ROOT).as_posix()
    if path.split("/")[0] not in FLOORS or path.startswith("engine/jobs/audit"):
        return None
    return path


@functools.cache
def read_source(path: str) -> SourceFile:
    """A Python file of the clone."""
    text = (ROOT / path).read_text(encoding="utf-8")
    tree = ast.parse(text)
    statements: dict[int, int] = {}
    for node in ast.walk(tree):  # outer statements come first, inner ones replace them
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            start = _first_line(node)
            for line in _span(start, node.end_lineno):
                statements[line] = start
    compiled = _compiled_lines(compile(text, path, "exec"))
    executable = {statements[line] for line in compiled if line in statements}
    return SourceFile(
        path=path,
        lines=tuple(text.splitlines()),
        code=frozenset(_code_lines(text, tree)),
        functions=tuple(_functions(tree, module_of(path), path)),
        statements=statements,
        executable=frozenset(executable),
    )


def _span(first: int, last: int) -> range:
    """The numbers of the lines from `first` to `last`, both included."""
    return range(first, last + 1)


def _first_line(node: ast.stmt | ast.ExceptHandler) -> int:
    """The line on which a statement begins, its decorators included."""
    first = node.lineno
    for decorator in getattr(node, "decorator_list", []):
        first = min(first, decorator.lineno)
    return first


def _functions(
    tree: ast.Module | ast.ClassDef | ast.If | ast.Try, prefix: str, path: str
) -> Iterator[Function]:
    """Functions at the top of a module or a class, also those under an `if` or a `try`."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(f"{prefix}.{node.name}", path, _first_line(node), node.end_lineno)
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}.{node.name}", path)
        elif isinstance(node, ast.If | ast.Try):
            yield from _functions(node, prefix, path)


def _compiled_lines(code: CodeType) -> set[int]:
    """Lines that have instructions, those of nested functions included."""
    lines = {line for _, _, line in code.co_lines() if line is not None}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            lines |= _compiled_lines(constant)
    return lines


def _code_lines(text: str, tree: ast.Module) -> set[int]:
    """Numbers of the lines that are not blank, comments or docstrings."""
    documentation: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, DOCUMENTED):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            documentation.update(_span(docstring.lineno, docstring.end_lineno))

    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            first, _ = token.start
            last, _ = token.end
            lines.update(_span(first, last))
    return lines - documentation


# ---- C


@functools.cache
def c_function(name: str) -> Function:
    """The C function of that name in kernels/cpu/native/.

    Its definition begins a line, and ends with the next line that is a single brace.
    """
    definition = re.compile(rf"^[a-z][\w \*]*\b{name}\(")
    for file in sorted((ROOT / "kernels" / "cpu" / "native").glob("*.c")):
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            is_declaration = line.rstrip().endswith(";")
            if definition.match(line) and not is_declaration:
                last = lines.index("}", number) + 1
                path = file.relative_to(ROOT).as_posix()
                return Function(f"kernels.cpu.native.{file.name}.{name}", path, number, last)
    raise AssertionError(f"no C function {name} in kernels/cpu/native/*.c")


@functools.cache
def read_c(path: str) -> SourceFile:
    """A C file of the clone; its lines are not traced, so it has no statements."""
    text = (ROOT / path).read_text(encoding="utf-8")
    without_comments = re.sub(r"/\*.*?\*/", _only_line_ends, text, flags=re.DOTALL)
    code = set()
    for number, line in enumerate(without_comments.splitlines(), 1):
        before_comment, _, _ = line.partition("//")
        if before_comment.strip():
            code.add(number)
    return SourceFile(
        path=path,
        lines=tuple(text.splitlines()),
        code=frozenset(code),
        functions=(),
        statements={},
        executable=frozenset(),
    )


def _only_line_ends(comment: re.Match[str]) -> str:
    """The line ends of a comment, so that the lines below it keep their numbers."""
    return "\n" * comment[0].count("\n")


def source_of(function: Function) -> SourceFile:
    """The file in which the function is defined."""
    if function.path.endswith(".c"):
        return read_c(function.path)
    return read_source(function.path)
