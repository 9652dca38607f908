"""The Python program in an answer: one reader for HumanEval and for `--verify code`

    program_in(text, wanted) -> source

A model writes a program in many ways, and prose around it. Read are, in this order:

    fenced blocks    three or more ` or ~, in any indentation, list item or quotation, with any info
                     string, closed by the same sign (as many or more) or by the end of the text;
                     a fence inside a docstring closes nothing, since the rest does not compile then
    [PYTHON] tags    as Code Llama writes them
    plain text       the longest run of lines that compiles, prose before, between and behind it

Of several candidates that one is taken which binds most of the wanted names (those that the tests
use), the last of equals, so that an example of use behind a function is not taken for it. What it
needs and another block defines (imports, a helper) is put before it.

Nothing is run here: sources are only compiled, under warnings that are not shown.
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

CLOSERS = 12  # fences that are tried as the end of one block
GROWTH, SHRINKAGE, COMPILED = 40, 20, 2000  # tries in plain text: a statement's end, all in all
_OPENS = re.compile(r"((?:[ \t]|>|[-*+][ \t]|[0-9]{1,3}[.)][ \t])*)(`{3,}|~{3,})([^`\n]*)")
_QUOTED = re.compile(r"[ \t]*(?:>[ \t]?)+")
_TAGGED = re.compile(r"\[PYTHON\](.*?)(?:\[/PYTHON\]|\Z)", re.DOTALL)
_PYTHON = re.compile(r"\W*(?:python|py)[0-9.]*\b", re.IGNORECASE)
_GOES_ON = ("else", "elif", "except", "finally", ")", "]", "}")  # lines that begin no statement
_BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__"}
_NEVER_PARSED = (SyntaxError, ValueError, RecursionError, MemoryError)


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string ("python", "" where it has none) and what it holds."""

    info: str
    code: str


def parsed(source: str) -> ast.Module | None:
    """The syntax tree of a program that compiles; None where it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string literal warns
            tree = ast.parse(source)
            compile(source, "program", "exec", dont_inherit=True)  # a return outside a function
    except _NEVER_PARSED:
        return None
    return tree


def compiles(source: str) -> bool:
    """Whether the source is a program."""
    return parsed(source) is not None


def lines_of(text: str) -> list[str]:
    """Its lines, whatever ends them: LF, CRLF or CR."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


# ---- fenced blocks


def fenced_blocks(text: str, whole: Callable[[str], bool] = compiles) -> list[Block]:
    """Every fenced block, dedented.

    whole: says whether a text is complete in the block's language. A block ends at the first
    closing fence with which it is complete, else at the first closing fence; a fence within a line
    ("return x```") and the end of the text close it too where nothing else does.
    """
    lines = lines_of(text)
    found, at = [], 0
    while at < len(lines):
        opens = _OPENS.fullmatch(lines[at])
        if opens is None:
            at += 1
            continue
        prefix, fence, info = opens.groups()
        code, at = _closed(lines, at + 1, prefix, fence, whole)
        found.append(Block(info.strip(), code))
    return found


def _closed(
    lines: list[str], start: int, prefix: str, fence: str, whole: Callable[[str], bool]
) -> tuple[str, int]:
    """(what the block that begins at this line holds, the line behind it)."""
    body = lines[start:]
    if ">" in prefix:  # a quotation: each line carries its sign
        body = [_QUOTED.sub("", line, count=1) for line in body]
    closes = re.compile(rf"[ \t]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*")
    ends = list(islice((n for n, line in enumerate(body) if closes.fullmatch(line)), CLOSERS))
    within = ((n, line.index(fence)) for n, line in enumerate(body) if fence in line)
    inside = list(islice(within, CLOSERS))
    choices = [(n, body[:n]) for n in ends]
    choices += [(n, [*body[:n], body[n][:column]]) for n, column in inside if n not in ends]
    choices.append((len(body), body))
    for n, kept in choices:
        for code in _dedented(kept, prefix):
            if whole(code):
                return code, start + n + 1
    n, kept = choices[0] if ends else choices[-1]
    return _dedented(kept, prefix)[0], start + n + 1


def _dedented(lines: list[str], prefix: str) -> tuple[str, ...]:
    """The lines without the fence's own indentation, and without all that they have in common."""
    indent = re.compile(rf"[ \t]{{0,{len(prefix.replace('>', ''))}}}")
    own = "\n".join(indent.sub("", line, count=1) for line in lines)
    plain = textwrap.dedent(own)
    return (own + "\n",) if plain == own else (own + "\n", plain + "\n")


# ---- names


def bound_names(source: str) -> set[str]:
    """The names that a program binds at its top level; empty where it does not compile."""
    tree = parsed(source)
    return set() if tree is None else {name for node in tree.body for name in _binds(node)}


def _binds(node: ast.stmt) -> Iterator[str]:
    """The names that a statement binds in its own scope."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield node.name
        case ast.Import() | ast.ImportFrom():
            yield from ((name.asname or name.name).split(".")[0] for name in node.names)
        case _:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    yield from _binds(child)
                elif isinstance(child, ast.ExceptHandler | ast.match_case):
                    for inner in child.body:
                        yield from _binds(inner)
                else:
                    names = (n for n in ast.walk(child) if isinstance(n, ast.Name))
                    yield from (n.id for n in names if isinstance(n.ctx, ast.Store))


def free_names(source: str) -> set[str]:
    """The names that a program uses and binds nowhere, Python's own aside."""
    tree = parsed(source)
    used, bound = set(), set(_BUILTINS)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound.update(_binds(node))
    return used - bound


# ---- the program


def program_in(text: str, wanted: Collection[str] = ()) -> str:
    """The program that a text holds; the text itself where nothing in it compiles.

    wanted: the names that it should bind (a task's function, or what the tests use).
    """
    blocks = fenced_blocks(text)
    blocks += [Block("python", "\n".join(lines_of(tag[1]))) for tag in _TAGGED.finditer(text)]
    ranked = [
        (len(bound_names(b.code) & set(wanted)), compiles(b.code), _language(b.info), n)
        for n, b in enumerate(blocks)
    ]
    best = max(ranked, default=None)
    if best is None or not best[0]:
        run = _longest_run(lines_of(text), set(wanted))
        if run and (best is None or bound_names(run) & set(wanted)):
            return run
    if best is None:
        return "\n".join(lines_of(text))
    chosen = best[-1]
    others = [block.code for n, block in enumerate(blocks) if n != chosen]
    return _with_helpers(blocks[chosen].code, others)


def _language(info: str) -> int:
    """How likely a block of this info string is Python."""
    return 2 if _PYTHON.match(info) else 0 if info else 1


def _with_helpers(code: str, others: list[str]) -> str:
    """The code behind those definitions and imports of the other blocks that it needs."""
    helpers: list[str] = []
    for other in reversed(others):
        needed = free_names("\n".join([*helpers, code]))
        tree = parsed(other)
        if not needed or tree is None:
            continue
        defines = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
        nodes = [node for node in tree.body if isinstance(node, defines)]
        if needed & {name for node in nodes for name in _binds(node)}:
            helpers.insert(0, "\n".join(ast.unparse(node) for node in nodes))
    return future_first("\n\n".join([*helpers, code]))


def future_first(source: str) -> str:
    """The source with its `from __future__` imports at the top, where alone Python allows them."""
    try:
        nodes = ast.parse(source).body
    except _NEVER_PARSED:
        return source
    lines, moved = source.split("\n"), []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            moved.append(ast.unparse(node))
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join([*moved, *lines])


# ---- a program without a fence


def _longest_run(lines: list[str], wanted: set[str]) -> str:
    """The statements that stand together in a text: most wanted names, then most lines; or ""."""
    runs = list(_runs(lines))
    for block in _indented(lines):
        runs += _runs(block)
    ranked = [
        (len(bound_names(run) & wanted), run.count("\n"), n) for n, run in enumerate(runs) if run
    ]
    return runs[max(ranked)[-1]] if ranked else ""


def _indented(lines: list[str]) -> Iterator[list[str]]:
    """Stretches of indented lines, dedented: a code block as old Markdown writes it."""
    block: list[str] = []
    for line in [*lines, "end"]:
        if not line.strip() or line[0] in " \t":
            block.append(line)
        elif any(x.strip() for x in block):
            yield textwrap.dedent("\n".join(block)).split("\n")
            block = []


def _runs(lines: list[str]) -> Iterator[str]:
    """The runs of statements in a text, each as long as no line breaks it."""
    starts = [
        n
        for n, line in enumerate(lines)
        if line.strip() and line[0] not in " \t" and not line.startswith(_GOES_ON)
    ]
    ends = [*starts[1:], len(lines)]
    tries, run, place = COMPILED, [], 0
    while place < len(starts) and tries > 0:
        start, found = starts[place], None
        upper = [*ends[place : place + GROWTH]]
        lower = range(ends[place] - 1, max(start, ends[place] - SHRINKAGE), -1)
        for end in (*upper, *lower):
            tries -= 1
            tree = parsed("\n".join(lines[start:end]))
            if tree is not None:
                found = end
                break
        if found is None:
            yield "\n".join(run)
            run, place = [], place + 1
            continue
        if any(map(_does_something, tree.body)):
            run += lines[start:found]
        while place < len(starts) and starts[place] < found:
            place += 1
        if found < ends[place - 1]:  # prose within the statement's own lines
            yield "\n".join(run)
            run = []
    yield "\n".join(run)


def _does_something(node: ast.stmt) -> bool:
    """Whether a statement is more than a word of prose that happens to compile ("Done", "- so")."""
    match node:
        case ast.Expr(value=ast.Call(func=ast.Name() | ast.Attribute())):
            return True
        case ast.Expr() | ast.AnnAssign(value=None):
            return False
    return True
