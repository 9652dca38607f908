"""The Python program in an answer: one reader for HumanEval and for `--verify code`

    program_in(text, names) -> source

A model writes a program in many ways, with prose around it. These are read, in this order:

    fenced blocks    three or more ` or ~, in any indentation, list item or quotation, with any info
                     string, closed by the same sign (as many or more) or by the end of the text;
                     a fence inside a docstring closes nothing, since the code before it does not
                     compile
    [PYTHON] tags    as Code Llama writes them
    plain text       the longest run of lines that compiles, with prose before, between and after it

Of several candidates the reader takes the one that binds most of `names` (those that the tests
use), and the last of equals. So an example of use behind a function is not taken for the function.
Imports and helpers that it needs and another block defines are put before it.

Nothing is run here: sources are only compiled, and warnings are not shown.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

# Limits on what is tried, so that a hostile text takes bounded time.
MAX_FENCES = 12  # fences tried as the end of one block
MAX_GROWTH = 40  # statements of plain text joined to make one that compiles
MAX_SHRINKAGE = 20  # lines cut off the end of a statement of plain text
MAX_COMPILED = 2000  # sources compiled for the plain text of one answer
# Its groups: indentation with list and quotation signs, fence, info string.
_OPENING_FENCE = re.compile(r"((?:[ \t]|>|[-*+][ \t]|[0-9]{1,3}[.)][ \t])*)(`{3,}|~{3,})([^`\n]*)")
_QUOTATION_SIGN = re.compile(r"[ \t]*(?:>[ \t]?)+")
_TAGGED = re.compile(r"\[PYTHON\](.*?)(?:\[/PYTHON\]|\Z)", re.DOTALL)
_PYTHON = re.compile(r"\W*(?:python|py)[0-9.]*\b", re.IGNORECASE)
_CONTINUES = ("else", "elif", "except", "finally", ")", "]", "}")  # such a line begins no statement
_BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__"}
_PARSE_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)


def program_in(text: str, names: Collection[str] = ()) -> str:
    """The source of the program that a text holds; the text itself where nothing in it compiles.

    names    the names that the program should bind: a task's function, or those that the tests use
    """
    names = set(names)
    blocks = fenced_blocks(text)
    for tag in _TAGGED.finditer(text):
        code = "\n".join(lines_of(tag[1]))
        blocks.append(Block("python", code))
    ranks = [_rank(block, index, names) for index, block in enumerate(blocks)]
    best = max(ranks, default=None)
    if best is None or best.bound == 0:  # no block binds any of the names
        run = _best_run(lines_of(text), names)
        if run is not None and (best is None or bound_names(run) & names):
            return run
    if best is None:
        return "\n".join(lines_of(text))
    others = [block.code for index, block in enumerate(blocks) if index != best.index]
    return _with_helpers(blocks[best.index].code, others)


class _Rank(NamedTuple):
    """How well a block serves as the program; a greater one is better, by the first field first."""

    bound: int  # the wanted names that it binds
    compiles: bool
    python_likelihood: int
    index: int  # of the block: the last of equals is taken


def _rank(block: Block, index: int, names: set[str]) -> _Rank:
    bound = bound_names(block.code) & names
    return _Rank(len(bound), compiles(block.code), _python_likelihood(block.info), index)


def _python_likelihood(info: str) -> int:
    """2 where the info string names Python, 1 where there is none, 0 where it names another."""
    if _PYTHON.match(info):
        return 2
    return 0 if info else 1


def _with_helpers(code: str, others: list[str]) -> str:
    """The code, and before it those definitions and imports of the other blocks that it needs."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    helpers: list[str] = []
    for other in reversed(others):
        needed = free_names("\n".join([*helpers, code]))
        tree = parsed(other)
        if not needed or tree is None:
            continue
        nodes = [node for node in tree.body if isinstance(node, definitions)]
        bound: set[str] = set()
        for node in nodes:
            bound.update(_binds(node))
        if needed & bound:
            helpers.insert(0, "\n".join(ast.unparse(node) for node in nodes))
    return future_first("\n\n".join([*helpers, code]))


def future_first(source: str) -> str:
    """The source with its `from __future__` imports at the top, the only place Python allows.

    The lines that they stood on are left blank, so that the other lines keep their order.
    """
    try:
        nodes = ast.parse(source).body
    except _PARSE_ERRORS:
        return source
    lines = source.split("\n")
    moved = []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            moved.append(ast.unparse(node))
            first, end = node.lineno - 1, node.end_lineno  # of its lines, from 0
            lines[first:end] = [""] * (end - first)
    return "\n".join([*moved, *lines])


# ---- sources


def parsed(source: str) -> ast.Module | None:
    """The syntax tree of a program that compiles; None where it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string literal warns
            tree = ast.parse(source)
            # also refuses what parses and does not compile: a return outside a function
            compile(source, "program", "exec", dont_inherit=True)
    except _PARSE_ERRORS:
        return None
    return tree


def compiles(source: str) -> bool:
    """Whether the source is a program."""
    return parsed(source) is not None


def lines_of(text: str) -> list[str]:
    """The lines of a text, which end with LF, CRLF or CR."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


# ---- fenced blocks


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    info: str  # its info string: "python", "" where it has none
    code: str  # its content


def fenced_blocks(text: str, is_complete: Callable[[str], bool] = compiles) -> list[Block]:
    """Every fenced block, dedented.

    is_complete    whether a text is complete in the block's language

    A block ends at the first closing fence with which it is complete. Where there is none, it ends
    at a fence within a line ("return x```") or at the end of the text, if it is complete then; else
    at the first closing fence, complete or not.
    """
    lines = lines_of(text)
    blocks = []
    number = 0
    while number < len(lines):
        opening = _OPENING_FENCE.fullmatch(lines[number])
        if opening is None:
            number += 1
            continue
        prefix, fence, info = opening.groups()
        code, number = _block_content(lines, number + 1, prefix, fence, is_complete)
        blocks.append(Block(info.strip(), code))
    return blocks


def _block_content(
    lines: list[str], start: int, prefix: str, fence: str, is_complete: Callable[[str], bool]
) -> tuple[str, int]:
    """(content of the block whose first line is `start`, index of the line after the block).

    prefix    the signs before the opening fence
    """
    body = lines[start:]
    if ">" in prefix:  # a quotation: each line carries its sign
        body = [_QUOTATION_SIGN.sub("", line, count=1) for line in body]
    closing_fence = re.compile(rf"[ \t]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*")
    all_closing = (n for n, line in enumerate(body) if closing_fence.fullmatch(line))
    closing = list(islice(all_closing, MAX_FENCES))  # lines of the body
    all_with_fence = (n for n, line in enumerate(body) if fence in line)
    with_fence = islice(all_with_fence, MAX_FENCES)

    candidates = [(n, body[:n]) for n in closing]  # (last line of the block, its content)
    for n in with_fence:
        if n not in closing:
            column = body[n].index(fence)
            candidates.append((n, [*body[:n], body[n][:column]]))
    candidates.append((len(body), body))  # the end of the text

    for n, content in candidates:
        for code in _dedented(content, prefix):
            if is_complete(code):
                return code, start + n + 1
    n, content = candidates[0] if closing else candidates[-1]
    code = _dedented(content, prefix)[0]
    return code, start + n + 1


def _dedented(lines: list[str], prefix: str) -> list[str]:
    """The text of the lines without the fence's indentation, and also without their common one.

    One text where both are the same.
    """
    width = len(prefix.replace(">", ""))
    indent = re.compile(rf"[ \t]{{0,{width}}}")
    without_fence_indent = "\n".join(indent.sub("", line, count=1) for line in lines)
    without_any = textwrap.dedent(without_fence_indent)
    if without_any == without_fence_indent:
        return [without_any + "\n"]
    return [without_fence_indent + "\n", without_any + "\n"]


# ---- a program without a fence


def _best_run(lines: list[str], names: set[str]) -> str | None:
    """The run of statements that binds most of the names; None where there is no run.

    Of equals the longest, and of these the last.
    """
    runs = list(_runs(lines))
    for block in _indented_blocks(lines):
        runs += _runs(block)
    best: str | None = None
    best_rank = (0, 0)  # (names that it binds, lines after the first)
    for run in runs:
        rank = (len(bound_names(run) & names), run.count("\n"))
        if best is None or rank >= best_rank:
            best = run
            best_rank = rank
    return best


def _indented_blocks(lines: list[str]) -> Iterator[list[str]]:
    """Stretches of indented lines, dedented: code blocks as old Markdown writes them."""
    block: list[str] = []
    for line in [*lines, "end"]:  # a line that ends the last block
        if not line.strip() or line[0] in " \t":
            block.append(line)
        elif any(inner.strip() for inner in block):
            yield textwrap.dedent("\n".join(block)).split("\n")
            block = []


def _runs(lines: list[str]) -> Iterator[str]:
    """The runs of statements in a text: a run ends at a line that belongs to no statement.

    A statement begins at a line without indentation. Its end is the next beginning at which it
    compiles (within MAX_GROWTH), or up to MAX_SHRINKAGE lines before the first one.
    """
    starts = [n for n, line in enumerate(lines) if _may_begin_statement(line)]
    ends = [*starts[1:], len(lines)]  # by start: the line of the next start
    compiled = 0
    run: list[str] = []
    index = 0  # in `starts`
    while index < len(starts) and compiled < MAX_COMPILED:
        start = starts[index]
        next_start = ends[index]
        longer = ends[index : index + MAX_GROWTH]
        shorter = range(next_start - 1, max(start, next_start - MAX_SHRINKAGE), -1)
        tree = None
        for end in (*longer, *shorter):
            compiled += 1
            tree = parsed("\n".join(lines[start:end]))
            if tree is not None:
                break
        if tree is None:  # nothing that begins here compiles
            if run:
                yield "\n".join(run)
            run = []
            index += 1
            continue
        if any(map(_does_something, tree.body)):
            run += lines[start:end]
        while index < len(starts) and starts[index] < end:
            index += 1
        has_prose_behind = end < ends[index - 1]  # lines up to the next start are left
        if has_prose_behind:
            if run:
                yield "\n".join(run)
            run = []
    if run:
        yield "\n".join(run)


def _may_begin_statement(line: str) -> bool:
    """Whether the line is neither blank nor indented, nor continues a statement."""
    return bool(line.strip()) and line[0] not in " \t" and not line.startswith(_CONTINUES)


def _does_something(node: ast.stmt) -> bool:
    """Whether a statement is more than a word of prose that happens to compile ("Done", "- so")."""
    match node:
        case ast.Expr(value=ast.Call(func=ast.Name() | ast.Attribute())):
            return True
        case ast.Expr() | ast.AnnAssign(value=None):
            return False
    return True


# ---- names


def bound_names(source: str) -> set[str]:
    """The names that a program binds at its top level; empty where it does not compile."""
    tree = parsed(source)
    if tree is None:
        return set()
    names: set[str] = set()
    for node in tree.body:
        names.update(_binds(node))
    return names


def _binds(node: ast.stmt) -> Iterator[str]:
    """The names that a statement binds in its own scope."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield node.name
        case ast.Import() | ast.ImportFrom():
            for alias in node.names:
                yield (alias.asname or alias.name).split(".")[0]
        case _:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    yield from _binds(child)
                elif isinstance(child, ast.ExceptHandler | ast.match_case):
                    for inner in child.body:
                        yield from _binds(inner)
                else:
                    for inner in ast.walk(child):
                        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                            yield inner.id


def free_names(source: str) -> set[str]:
    """The names that a program uses and binds nowhere, except builtins.

    Empty where the source does not compile.
    """
    tree = parsed(source)
    if tree is None:
        return set()
    used: set[str] = set()
    bound = set(_BUILTINS)
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.ExceptHandler(name=str() as name):
                bound.add(name)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bound.add(node.name)
            case ast.Import() | ast.ImportFrom():
                bound.update(_binds(node))
    return used - bound
