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
from typing import Any

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
# Files are named by their place under kernels/, without the suffix.
# The tests that are run beside those over the registry's operations.
MORE_TESTS = {
    "cached_attention/triton_forward": ["tests/kernels/test_cached_attention_triton.py"],
    "lora_linear/triton_forward": ["tests/kernels/test_batch_invariant.py", "-k", "product"],
    "philox": ["tests/kernels/test_operations.py", "-k", "draw_the_same"],
    "sampling/triton_forward": ["tests/sampling/test_sampling_options.py"],
}
# The operations that test a file outside their own folder.
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
        lines = source.split("\n")
        text = lines[self.line - 1]
        assert text[self.column :].startswith(self.old), f"{self}: {text!r}"
        lines[self.line - 1] = text[: self.column] + self.new + text[self.column + len(self.old) :]
        return "\n".join(lines)


def _operators(function: ast.FunctionDef, lines: list[str]) -> Iterator[tuple[int, int, str, str]]:
    """(line, column, old, new) of every operator in a function's body that can be flipped."""
    for statement in function.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.BinOp):
                left, right, kind = node.left, node.right, type(node.op)
            elif isinstance(node, ast.Compare) and len(node.ops) == 1:
                left, right, kind = node.left, node.comparators[0], type(node.ops[0])
            elif isinstance(node, ast.AugAssign):
                left, right, kind = node.target, node.value, type(node.op)
            else:
                continue
            if kind not in OPERATORS or left.end_lineno != right.lineno:
                continue
            if isinstance(left, ast.Name) and left.id.endswith("_ptr"):
                continue  # an address below the tensor: the bounds check sees every one of them
            old, new = OPERATORS[kind]
            between = lines[right.lineno - 1][left.end_col_offset : right.col_offset]
            yield right.lineno, left.end_col_offset + between.index(old), old, new


def mutants(pattern: str, per_kernel: int) -> list[Mutant]:
    """Up to `per_kernel` of each kernel, the same ones every time, signs and bounds both."""
    found = []
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        source = path.read_text()
        lines = source.split("\n")
        for node in ast.parse(source).body:
            if not isinstance(node, ast.FunctionDef) or not fnmatch(node.name, pattern):
                continue
            if not any(ast.unparse(d).split("(")[0] == "jit" for d in node.decorator_list):
                continue
            sites = sorted(set(_operators(node, lines)))
            rng = random.Random(node.name)
            rng.shuffle(sites)
            signs = [s for s in sites if s[2] in "+-"]
            bounds = [s for s in sites if s[2] not in "+-"]
            half = max(per_kernel // 2, per_kernel - len(signs))
            chosen = bounds[:half] + signs[: per_kernel - len(bounds[:half])]
            where = path.relative_to(ROOT)
            found += [Mutant(where, node.name, *site) for site in sorted(chosen)]
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
    complaint = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"red: {complaint}", seconds


def specs_testing(file: str) -> list[Any]:
    """The SPECs that test a file of kernels/: its folder's (or its own), and those in USED_BY."""
    from kernels.registry import SPECS

    owner = f"kernels.{file.split('/')[0]}"
    names = USED_BY.get(file, ())
    return [s for s in SPECS.values() if s.name in names or s.make_inputs.__module__ == owner]


def run_suite(file: str) -> None:
    """Test the operations of `file` as test_operations.py does; raises at the first failure."""
    import pytest
    import torch

    from kernels.registry import REFERENCE
    from kernels.spec import cast, check
    from tests.helpers import interpreter
    from tests.helpers.operation_cases import kernel_shapes, random_shapes, triton_tables

    interpreter.install()
    specs = specs_testing(file)
    assert specs, f"no operation tests kernels/{file}.py"
    for spec in specs:
        tables = list(triton_tables(spec.name))
        shapes = {*kernel_shapes(spec), *random_shapes(spec)}
        shapes = sorted(shapes, key=lambda s: sum(map(int, s)))  # quick ones first
        for shape in shapes:
            for _, ops in tables:
                for dtype in (torch.float32, torch.bfloat16):
                    buffers: list = []
                    with interpreter.poisoned():
                        check(
                            spec, ops, REFERENCE, shape, dtype,
                            prepare=lambda i, b=buffers: interpreter.guarded(i, b),
                        )  # fmt: skip
                    assert interpreter.guards_intact(buffers), "wrote outside its tensors"
        for shape in shapes[:3]:
            inputs = spec.make_inputs(shape, torch.Generator().manual_seed(1))
            for _, ops in tables:
                first = spec.run(ops, cast(inputs, torch.float32))
                with interpreter.last_programs_first():
                    second = spec.run(ops, cast(inputs, torch.float32))
                assert all(torch.equal(first[k], second[k]) for k in first), "programs collide"
    if file in MORE_TESTS:
        quiet = ["-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib"]
        assert pytest.main([*quiet, *MORE_TESTS[file]]) == 0, f"{MORE_TESTS[file]}"


def main() -> int:
    """Judge the mutants, print the table, return the number of unexplained survivors."""
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
    unexplained = survived = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, (verdict, seconds) in zip(todo, pool.map(judge, todo), strict=True):
            if verdict == "survived":
                survived += 1
                reason = EQUIVALENT.get(mutant.key)
                unexplained += reason is None
                verdict = f"equivalent: {reason}" if reason else "SURVIVED"
            print(
                f"{mutant.kernel:32} {mutant.path.name}:{mutant.line}:{mutant.column} "
                f"{mutant.old} -> {mutant.new}  {seconds:5.1f} s  {verdict[:110]}"
                f"   | {mutant.key[1]}",
                flush=True,
            )
    print(f"{len(todo)} mutants, {len(todo) - survived} red, {unexplained} unexplained survivors")
    return min(unexplained, 1)


if __name__ == "__main__":
    sys.exit(main())
