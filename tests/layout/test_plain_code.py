"""Constructs that a reader must stop at, found in the syntax tree: none stands in our sources.

Each of them says in one expression what two or three plain statements say.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "model", "engine", "scripts", "benchmarks", "tests")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def is_boolean(node: ast.expr) -> bool:
    """Whether the expression is a comparison, an `and`/`or`, a `not` or a call of bool()."""
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "bool"
    return isinstance(node, (ast.Compare, ast.BoolOp))


def unpacks_a_generator(node: ast.AST) -> bool:
    """`a, b = (f(x) for x in (1, 2))`, also with a list or with map().

    `(a,) = (x for x in found if ...)` is allowed: it says that there is exactly one.
    """
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], (ast.Tuple, ast.List)):
        return False
    if len(node.targets[0].elts) < 2:
        return False
    value = node.value
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "map"
    return isinstance(value, COMPREHENSIONS)


def nests_conditions(node: ast.AST) -> bool:
    """`a if p else b if q else c`."""
    if not isinstance(node, ast.IfExp):
        return False
    return any(isinstance(part, ast.IfExp) for part in (node.test, node.body, node.orelse))


def multiplies_by_a_boolean(node: ast.AST) -> bool:
    """`text * (n > 1)`."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return False
    return is_boolean(node.left) or is_boolean(node.right)


def indexes_by_a_boolean(node: ast.AST) -> bool:
    """`("a", "b")[n > 1]`."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, (ast.Tuple, ast.List)):
        return False
    return is_boolean(node.slice)


def unpacks_a_display(node: ast.AST) -> bool:
    """`[*("a", "b"), *("c", "d")]`: a display inside a display."""
    return isinstance(node, ast.Starred) and isinstance(node.value, (ast.Tuple, ast.List))


RULES = {
    "a generator unpacked into names": unpacks_a_generator,
    "a conditional expression inside another": nests_conditions,
    "a boolean as a factor": multiplies_by_a_boolean,
    "a boolean as an index": indexes_by_a_boolean,
    "a tuple or list unpacked where it stands": unpacks_a_display,
}


def found(source: str) -> Iterator[str]:
    """ "line: rule" for each place of the source that a rule names."""
    for node in ast.walk(ast.parse(source)):
        for name, rule in RULES.items():
            if rule(node):
                yield f"{node.lineno}: {name}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_expression_is_a_puzzle(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    places = []
    for path in files:
        for place in found(path.read_text()):
            places.append(f"{path.relative_to(ROOT)}:{place}")
    assert not places, "\n".join(places)


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("a, b = (f(x) for x in (1, 2))", "a generator unpacked into names"),
        ("a, b = [f(x) for x in (1, 2)]", "a generator unpacked into names"),
        ("a, b = map(int, words)", "a generator unpacked into names"),
        ("a = 1 if p else 2 if q else 3", "a conditional expression inside another"),
        ("a = 's' * (n > 1)", "a boolean as a factor"),
        ("a = bool(n) * 2", "a boolean as a factor"),
        ("a = (1, 2)[not p]", "a boolean as an index"),
        ("a = [*(1, 2), 3]", "a tuple or list unpacked where it stands"),
        ("a, b = f(x), f(y)", None),
        ("(a,) = (x for x in found if x)", None),
        ("a = [*first, *second]", None),
        ("a = 1 if p and q else 2", None),
        ("a = table[x > 0]", None),
    ],
)
def test_rules_of_plain_code(source, rule):
    assert list(found(source)) == ([f"1: {rule}"] if rule else [])
