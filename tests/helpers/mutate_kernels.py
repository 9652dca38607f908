"""Flips one sign or bound of a kernel at a time, in a copy, and shows that the suite goes red.

    python -m tests.helpers.mutate_kernels           # all kernels, a table, exit 1 for a survivor
    python -m tests.helpers.mutate_kernels --kernel 'lora_*' --per-kernel 12

A mutant is tested as tests/kernels/test_operations.py tests a kernel (ratio rule, guards, poison,
addresses), over its operation's shapes in fp32 and bf16, up to the first failure. A survivor is a
hole in the suite unless EQUIVALENT says why the mutant computes the same.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
}
# Seconds of processor time; a mutant that takes more does not end: red. A sound suite takes 95 at
# most. Time by the clock would call every mutant red on a machine that is busy.
SECONDS = 150
# In these two tables a file is named by its place under kernels/, without the suffix.
# The tests that are run beside those over the registry's operations:
MORE_TESTS = {
    "cached_attention/triton_forward": ["tests/kernels/test_cached_attention_triton.py"],
    "lora_linear/triton_forward": ["tests/kernels/test_batch_invariant.py", "-k", "product"],
    "philox": ["tests/kernels/test_operations.py", "-k", "draw_the_same"],
    "sampling/triton_forward": ["tests/sampling/test_sampling_options.py"],
}
# The operations that test a file outside their own folder:
USED_BY = {
    "philox": ("lora_linear", "sample"),
}

# (kernel, line of code, the line from the operator on) -> why the mutant computes the same; this
# is Mutant.key. Reviewed.
EMPTY_TILE = "at equality the program has nothing in its tile: it computes and stores nothing"
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("attention_dkv_kernel", "if j >= n:", ">= n:"): EMPTY_TILE,
    ("cached_decode_kernel", "if part * SPLIT >= end:", ">= end:"): EMPTY_TILE,
    ("cached_extend_kernel", "if first >= new * N:", ">= new * N:"): EMPTY_TILE,
    (
        "load_queries",
        "inside = is_query[:, None] & (cols < D)[None, :]",
        "< D)[None, :]",
    ): "q's extra column meets a column of k that is zero",
    (
        "id_of_key",
        "return tl.minimum(LARGEST - lower, V - 1)",
        "- 1)",
    ): "the clamp guards memory against a key of no row; no input tried, NaN included, has one",
    ("lora_up_backward_kernel", "tl.assume(size > 0)", "> 0)"): "a hint to the compiler",
    (
        "search_keys",
        "between = (keys >= low) & (keys < end)",
        "< end)",
    ): "the interval shrinks by its marks alone where `end` is a key: only slower",
    (
        "sample_draw_kernel",
        "if TOP_P < 1:",
        "< 1:",
    ): "a cut at all of the mass leaves out what does not change the sum and is never drawn",
}


@dataclass(frozen=True)
class Mutant:
    """One operator of one kernel replaced."""

    path: Path  # relative to the clone
    kernel: str
    line: int  # from 1
    column: int
    old: str
    new: str

    @property
    def file(self) -> str:
        """Its place under kernels/, without the suffix, as in "attention/triton_forward"."""
        return self.path.relative_to("kernels").with_suffix("").as_posix()

    @property
    def key(self) -> tuple[str, str, str]:
        """Its key in EQUIVALENT: kernel, line of code, the line from the operator on."""
        line = (ROOT / self.path).read_text().split("\n")[self.line - 1]
        return self.kernel, line.strip(), line[self.column :]

    def apply(self, source: str) -> str:
        """The text of the file with the operator replaced."""
        lines = source.split("\n")
        text = lines[self.line - 1]
        before = text[: self.column]
        rest = text[self.column :]
        assert rest.startswith(self.old), f"{self}: {text!r}"
        lines[self.line - 1] = before + self.new + rest.removeprefix(self.old)
        return "\n".join(lines)


class Site(NamedTuple):
    """An operator in the source that can be flipped."""

    line: int  # from 1
    column: int
    old: str
    new: str

    @property
    def is_sign(self) -> bool:
        """Whether it is + or -, and not a bound."""
        return self.old in "+-"


def _operands(node: ast.AST) -> tuple[ast.expr, ast.expr, type] | None:
    """(left, right, kind of operator) of a node with one operator between two operands."""
    if isinstance(node, ast.BinOp):
        return node.left, node.right, type(node.op)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return node.left, node.comparators[0], type(node.ops[0])
    if isinstance(node, ast.AugAssign):
        return node.target, node.value, type(node.op)
    return None


def _sites(function: ast.FunctionDef, lines: list[str]) -> Iterator[Site]:
    """Every operator in a function's body that can be flipped."""
    for statement in function.body:
        for node in ast.walk(statement):
            operands = _operands(node)
            if operands is None:
                continue
            left, right, kind = operands
            if kind not in OPERATORS or left.end_lineno != right.lineno:
                continue
            if isinstance(left, ast.Name) and left.id.endswith("_ptr"):
                continue  # an address below the tensor: the bounds check sees every one of them
            old, new = OPERATORS[kind]
            between = lines[right.lineno - 1][left.end_col_offset : right.col_offset]
            column = left.end_col_offset + between.index(old)
            yield Site(right.lineno, column, old, new)


def _is_kernel(node: ast.AST, pattern: str) -> bool:
    """Whether a node is a `@jit` function with a name that matches."""
    if not isinstance(node, ast.FunctionDef) or not fnmatch(node.name, pattern):
        return False
    decorators = [ast.unparse(d).split("(")[0] for d in node.decorator_list]
    return "jit" in decorators


def _chosen(sites: list[Site], name: str, count: int) -> list[Site]:
    """Up to `count` sites of the kernel `name`, half of them bounds if there are enough of both."""
    shuffled = sorted(set(sites))
    random.Random(name).shuffle(shuffled)
    signs = [site for site in shuffled if site.is_sign]
    bounds = [site for site in shuffled if not site.is_sign]
    bounds = bounds[: max(count // 2, count - len(signs))]
    signs = signs[: count - len(bounds)]
    return sorted(bounds + signs)


def mutants(pattern: str, per_kernel: int) -> list[Mutant]:
    """Up to `per_kernel` of each kernel, the same ones every time, signs and bounds both."""
    found = []
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        source = path.read_text()
        lines = source.split("\n")
        for node in ast.parse(source).body:
            if not _is_kernel(node, pattern):
                continue
            for site in _chosen(list(_sites(node, lines)), node.name, per_kernel):
                found.append(Mutant(path.relative_to(ROOT), node.name, *site))
    return found


def judge(mutant: Mutant) -> tuple[str, float]:
    """("red: why" or "survived", seconds): the mutant alone, in a copy of the clone."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("kernels", "model", "engine", "tests"):  # conftest knows them all
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        target = copy / mutant.path
        target.write_text(mutant.apply(target.read_text()))
        env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": folder}
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.mutate_kernels", "--judge", mutant.file],
            cwd=copy, env=env, capture_output=True, text=True,
        )  # fmt: skip
        seconds = time.monotonic() - start
    if done.returncode == 0:
        return "survived", seconds
    if done.returncode == -signal.SIGXCPU:
        return "red: does not end", seconds
    complaints = done.stderr.strip().splitlines()
    last = complaints[-1] if complaints else f"exit code {done.returncode}"
    return f"red: {last}", seconds


def specs_testing(file: str) -> list[Any]:
    """The SPECs that test a file of kernels/: its folder's (or its own), and those in USED_BY."""
    from kernels.registry import SPECS

    owner = f"kernels.{file.split('/')[0]}"
    names = USED_BY.get(file, ())
    specs = []
    for spec in SPECS.values():
        is_owner = spec.make_inputs.__module__ == owner
        if is_owner or spec.name in names:
            specs.append(spec)
    return specs


def run_suite(file: str) -> None:
    """Test the operations of `file` as test_operations.py does; raises at the first failure."""
    import pytest
    import torch

    from tests.helpers import interpreter
    from tests.helpers.operation_cases import kernel_shapes, random_shapes, triton_tables

    interpreter.install()
    specs = specs_testing(file)
    assert specs, f"no operation tests kernels/{file}.py"
    for spec in specs:
        tables = [ops for _, ops in triton_tables(spec.name)]
        distinct = {*kernel_shapes(spec), *random_shapes(spec)}
        shapes = sorted(distinct, key=lambda shape: sum(map(int, shape)))  # quick ones first
        for shape in shapes:
            for ops in tables:
                for dtype in (torch.float32, torch.bfloat16):
                    _check_guarded(spec, ops, shape, dtype)
        for shape in shapes[:3]:
            for ops in tables:
                _check_order_of_programs(spec, ops, shape)
    if file in MORE_TESTS:
        quiet = ["-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib"]
        assert pytest.main([*quiet, *MORE_TESTS[file]]) == 0, f"{MORE_TESTS[file]}"


def _check_guarded(spec: Any, ops: Any, shape: tuple, dtype: Any) -> None:
    """The ratio rule, with the inputs between guards and every fresh tensor poisoned."""
    from kernels.registry import REFERENCE
    from kernels.spec import check
    from tests.helpers import interpreter

    buffers: list = []

    def prepare(inputs: dict) -> dict:
        return interpreter.guarded(inputs, buffers)

    with interpreter.poisoned():
        check(spec, ops, REFERENCE, shape, dtype, prepare=prepare)
    assert interpreter.guards_intact(buffers), "wrote outside its tensors"


def _check_order_of_programs(spec: Any, ops: Any, shape: tuple) -> None:
    """The same bits whichever program of a launch runs first."""
    import torch

    from kernels.spec import cast
    from tests.helpers import interpreter

    inputs = spec.make_inputs(shape, torch.Generator().manual_seed(1))
    first = spec.run(ops, cast(inputs, torch.float32))
    with interpreter.last_programs_first():
        second = spec.run(ops, cast(inputs, torch.float32))
    assert all(torch.equal(first[key], second[key]) for key in first), "programs collide"


def main() -> int:
    """Judge the mutants and print the table; exit code 1 where a survivor is not explained."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", default="*", help="pattern of names")
    parser.add_argument("--per-kernel", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--judge", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.judge:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 10))
        run_suite(args.judge)
        return 0
    todo = mutants(args.kernel, args.per_kernel)
    survived = 0
    unexplained = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, (verdict, seconds) in zip(todo, pool.map(judge, todo), strict=True):
            if verdict == "survived":
                survived += 1
                reason = EQUIVALENT.get(mutant.key)
                if reason is None:
                    unexplained += 1
                    verdict = "SURVIVED"
                else:
                    verdict = f"equivalent: {reason}"
            place = f"{mutant.path.name}:{mutant.line}:{mutant.column}"
            flip = f"{mutant.old} -> {mutant.new}"
            _, code, _ = mutant.key
            print(
                f"{mutant.kernel:32} {place} {flip}  {seconds:5.1f} s  {verdict[:110]}   | {code}",
                flush=True,
            )
    print(f"{len(todo)} mutants, {len(todo) - survived} red, {unexplained} unexplained survivors")
    return min(unexplained, 1)


if __name__ == "__main__":
    sys.exit(main())
