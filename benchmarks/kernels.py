"""Every operation, timed: the definition, torch.compile of it, torch's products, our kernels.

    python -m benchmarks.kernels                         forward, on the GPU if there is one
    python -m benchmarks.kernels --backward --kernel lora_linear --rows 8192
    python -m benchmarks.kernels --shape 8192,4096,4096,16      M,K,N,r of a linear of your own

Green first: a form is timed only if `kernels.spec.check` passes for it here, at the test shapes
and, on a GPU, at the shape that is timed (where that check is cheap); else it says RED.
The forms of an operation take turns in one process. On a GPU: CUDA events, the L2 cache flushed
before every call; the host's work for a launch is hidden only as far as the flush is long.
On a CPU 64 MiB are written before every call, which leaves a larger cache warm.

    eager       the REFERENCE form; backwards by autograd, whose forward is not timed
    compiled    torch.compile of it (on a GPU; elsewhere with --compile yes)
    peft, sdpa  what one would write by hand: an adapter per module; torch's fused attention
    torch       our TORCH table        triton and others: our kernels and their variants

On a GPU --jobs processes compile our kernels, those of the next shape while one is timed.

The floor of a call is the longer of its operations over the rate of a large product and its bytes
over the rate of a large copy, both measured on this machine first; `x floor` is time over floor.
The last line is JSON, appended to kernels.jsonl in $OUT, else in benchmarks/results/ (not --dry).
"""

from __future__ import annotations

import argparse
import dataclasses
import operator
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import groupby, zip_longest
from typing import Any

import torch

from benchmarks import _common
from benchmarks.clock import DTYPES, Clock, ceilings, first_line, header, machine, record
from benchmarks.operations import (
    BY_HAND,
    CALLS,
    DIFFERENTIABLE,
    NO_EAGER,
    WORK,
    make_inputs,
    on_device,
    rows_of,
)
from benchmarks.tuning.ahead import Target, Task, Workers, in_parts
from engine.runtime.terminal import table
from kernels import registry
from kernels.launch import triton_launch
from kernels.registry import REFERENCE, SPECS, TORCH, Ops, functions
from kernels.spec import check

PARTS = 3  # that a table's launches at a shape are compiled in
CHEAP_CHECK = 2e12  # operations of a call whose check in fp64 is made at the timed shape too
CPU_WORK = (4e9, 4e8)  # operations and bytes of the shapes that a CPU times without --all
Shape = tuple[int, ...]

# ---- forms


def compiled(operation: str) -> Ops:
    """The REFERENCE table with this operation's forwards through torch.compile."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # a backward is called again and again on one forward
    if hasattr(dynamo, "fail_on_recompile_limit_hit"):
        dynamo.fail_on_recompile_limit_hit = True  # else it would go on uncompiled
    names = [f for f in SPECS[operation].fields if "backward" not in f]
    forwards = {f: torch.compile(getattr(REFERENCE, f), fullgraph=True) for f in names}
    return dataclasses.replace(REFERENCE, name="compiled", **forwards)


def our_tables(operation: str) -> list[Ops]:
    """TRITON and its variants, as far as they have their own form of this operation."""
    spec = SPECS[operation]
    found = {functions(ops, spec): ops for ops in (TORCH, registry.TRITON)}
    for name, ops in registry.VARIANTS.items():
        name = f"triton {name.removeprefix(operation).strip()}"
        found.setdefault(functions(ops, spec), dataclasses.replace(ops, name=name))
    return list(found.values())[1:]


def why_failing(
    operation: str, ops: Ops, shape: Shape, dtype: torch.dtype, device: str
) -> str | None:
    """Why this table's form must not be timed; None when it passes its check at the shape."""
    try:
        check(on_device(SPECS[operation], device), ops, REFERENCE, shape, dtype, device)
    except Exception as error:  # whatever compiling, launching or checking may raise
        return first_line(error)
    return None


class Run:
    """One run of the benchmark: what was asked for, and what is known by now."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.dtype = args, args.device, DTYPES[args.dtype]
        self.gpu = args.device.startswith("cuda")
        if self.gpu:
            torch.cuda.set_device(torch.empty(0, device=self.device).device)
        self.compile = args.compile == "yes" or (args.compile == "auto" and self.gpu)
        self.compiled: dict[str, Ops] = {}
        self.verdicts: dict[tuple[str, str, Shape], str | None] = {}
        self.clock = Clock(self.device, args.slot, 2 if args.dry else 50)
        self.ceilings = ceilings(self.device, self.dtype)
        self.without_ours = triton_launch.why_unavailable(self.device)
        self.workers: Workers | None = None
        if self.gpu and args.jobs and not self.without_ours:
            self.workers = Workers(args.jobs, Target.of(torch.empty(0, device=self.device).device))

    def cases(self) -> Iterator[tuple[str, list[Shape]]]:
        """(operation, shapes), the largest and the smallest in turn."""
        args = self.args
        if args.shape:
            m, k, n, r = map(int, args.shape.split(","))
            yield "lora_linear", [(m, k, r, n)]
            return
        wanted = {int(n) for n in args.rows.split(",") if n}
        for operation in [args.kernel] if args.kernel else SPECS:
            spec = SPECS[operation]
            work = {s: self.work(operation, s) for s in spec.bench_shapes}
            if args.dry:
                work = {s: (0, 0) for s in (spec.interpreter_shapes or spec.test_shapes)[1:2]}
            if wanted:
                work = {s: w for s, w in work.items() if rows_of(operation, s) in wanted}
            order = sorted(work, key=work.__getitem__)
            if not (self.gpu or wanted or args.all):
                small = [s for s in order if all(map(operator.le, work[s], CPU_WORK))]
                order = small[:1] + small[1:][-1:]
            half = len(order) // 2
            pairs = zip_longest(reversed(order[half:]), order[:half])
            yield operation, [shape for pair in pairs for shape in pair if shape]

    def ahead(self, operation: str, shape: Shape) -> list[Task]:
        """What our forms compile at this shape: timed, with fp32 gradients, and in the check."""
        spec, dtype = SPECS[operation], str(self.dtype).removeprefix("torch.")
        names = [ops.name for ops in _common.tables(spec)]
        kinds = [(name, masters) for masters in (True, False) for name in names]
        made = [in_parts(PARTS, operation, n, shape, dtype, masters=m) for n, m in kinds]
        return [task for tasks in made for task in tasks]

    def compile_ahead(self, operation: str, now: Shape, following: list[Shape]) -> None:
        """Until the workers are through with this shape; then they begin with the next."""
        if not self.workers:
            return
        tasks = self.ahead(operation, now)
        self.workers.want(tasks, 0)
        for shape in following[:1]:
            self.workers.want(self.ahead(operation, shape), 1)
        while self.workers.missing(tasks):
            self.workers.poll(1.0)

    def work(self, operation: str, shape: Shape) -> tuple[float, float]:
        """Operations and bytes of its dearest call."""
        size = self.dtype.itemsize
        return max(fn(*shape, e=size) for (name, _), fn in WORK.items() if name == operation)

    def why_red(self, operation: str, ops: Ops, shape: Shape) -> str | None:
        """Why this table's form must not be timed at this shape; None if it may be."""
        spec = SPECS[operation]
        shapes = spec.test_shapes if self.gpu else spec.interpreter_shapes or spec.test_shapes
        cheap = self.work(operation, shape)[0] <= CHEAP_CHECK and operation not in NO_EAGER
        if self.args.dry:
            shapes = (shape,)
        elif self.gpu and cheap:
            shapes = (*shapes, shape)
        for at in shapes:
            key = (operation, ops.name, at)
            if key not in self.verdicts:
                self.verdicts[key] = why_failing(operation, ops, at, self.dtype, self.device)
            if self.verdicts[key] is not None:
                return self.verdicts[key]
        return None

    def tables(self, operation: str, shape: Shape) -> tuple[list[Ops], dict[str, dict]]:
        """The tables whose forms are timed, and why others are not."""
        found, without = [], {}
        if operation in NO_EAGER:
            without["eager"] = {"skipped": NO_EAGER[operation]}
        else:
            found.append(dataclasses.replace(REFERENCE, name="eager"))
            if self.compile and operation not in self.compiled:
                self.compiled[operation] = compiled(operation)
            found += [self.compiled[operation]] if self.compile else []
        found += [BY_HAND[operation]] if operation in BY_HAND else []
        for ops in [TORCH] if self.without_ours else [TORCH, *our_tables(operation)]:
            if red := self.why_red(operation, ops, shape):
                without[ops.name] = {"skipped": f"RED, not timed: {red}"}
            else:
                found.append(ops)
        return found, without

    def forms(self, operation: str, call: str, inputs: dict, tables: list[Ops]) -> dict:
        """Table name -> the call with everything ready; of a differentiable one its backward."""
        how = CALLS[operation, call]

        def ready(ops: Ops) -> Callable[[], Any]:
            if how.graph is not None and ops.name in DIFFERENTIABLE:
                outs, leaves, douts = how.graph(ops, inputs)
                return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)
            saved = how.saved(ops, inputs)
            return lambda: how.run(ops, inputs, saved)

        def lazily(ops: Ops) -> Callable[[], Any]:
            made: list[Callable[[], Any]] = []  # the first call makes it, and may fail: `measure`

            def once() -> Any:
                if not made:
                    made.append(ready(ops))
                return made[0]()

            return once

        return {ops.name: lazily(ops) for ops in tables}

    def time(self, operation: str, call: str, shape: Shape, inputs: dict) -> list[dict]:
        """Every form of one call: its times, rates and distance from the floor."""
        tables, without = self.tables(operation, shape)
        flops, size = WORK[operation, call](*shape, e=self.dtype.itemsize)
        floors = {"product": flops / self.ceilings["flops"], "copy": size / self.ceilings["bytes"]}
        bound = max(floors, key=floors.__getitem__)
        floor = 1e3 * floors[bound]
        about = {"operation": operation, "call": call, "shape": shape, "dtype": self.args.dtype}
        about |= {"floor_ms": floor, "bound": bound}
        times = self.clock.measure(self.forms(operation, call, inputs, tables))
        results = []
        for name, form in (times | without).items():
            result = about | {"form": name}
            if "skipped" in form:
                results.append(result | form)
                continue
            ms = form["ms"]
            low, high = ms[len(ms) // 5], ms[-1 - len(ms) // 5]
            median = statistics.median(ms)
            rate, unit = (flops / 1e9, "TFLOP/s") if bound == "product" else (size / 1e6, "GB/s")
            result |= {"ms": [low, median, high], "calls": len(ms), "peak_mib": form["peak_mib"]}
            result |= {
                "rate": rate / median,
                "unit": unit,
                "x_floor": median / floor if floor else 0.0,
            }
            results.append(result)
        return results


def shape_text(shape: Shape) -> str:
    """Sizes joined by x, equal rows counted: 32x8x128x2048*4."""
    runs = [(size, len(list(same))) for size, same in groupby(shape)]
    return "x".join(f"{size}*{n}" if n > 3 else "x".join([str(size)] * n) for size, n in runs)


def shown(results: list[dict]) -> str:
    """One call's forms as a table."""
    first = results[0]
    title = (
        f"\n{first['operation']} {first['call']}, shape {shape_text(first['shape'])}, "
        f"{first['dtype']}: floor {first['floor_ms']:.4f} ms, by the {first['bound']}"
    )
    lines = [["form", "median ms", "p20", "p80", "rate", "", "of ceiling", "x floor", "peak MiB"]]
    skipped = []
    for r in results:
        if "skipped" in r:
            skipped.append(f"{r['form']}: {r['skipped']}")
            continue
        low, median, high = (f"{t:.4f}" for t in r["ms"])
        peak = "-" if r["peak_mib"] is None else f"{r['peak_mib']:.1f}"
        share = f"{100 / r['x_floor']:.0f} %" if r["x_floor"] else "-"
        rate = [f"{r['rate']:.3g}", r["unit"], share, f"{r['x_floor']:.2f}"]
        lines.append([r["form"], median, low, high, *rate, peak])
    return "\n".join([title, table(lines), *skipped])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--kernel", choices=SPECS, help="one operation; default all")
    parser.add_argument("--backward", action="store_true", help="the backwards, not the forwards")
    parser.add_argument("--shape", help="M,K,N,r: lora_linear of this shape")
    parser.add_argument("--rows", default="", help="only shapes of so many tokens, as 1,8192")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if gpu else "fp32")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--all", action="store_true", help="every shape also on a CPU")
    parser.add_argument("--compile", choices=("auto", "yes", "no"), default="auto")
    parser.add_argument("--slot", type=float, default=0.2, help="seconds of a call at a shape")
    parser.add_argument("--seconds", type=float, default=0, help="in all; 0: as long as it takes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--dry", action="store_true", help="a tiny shape of each, two calls")
    args = parser.parse_args(argv)
    if args.shape and args.kernel not in (None, "lora_linear"):
        parser.error(f"--shape is of lora_linear, not of {args.kernel}")
    if args.shape and not re.fullmatch(r"\d+(,\d+){3}", args.shape):
        parser.error(f"--shape {args.shape}: four numbers are wanted, M,K,N,r as 8192,4096,4096,16")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    about, run = machine(args.device), Run(args)
    print(header(about, run.ceilings, args.dtype))
    if run.without_ours:
        print(f"our kernels are not timed: {run.without_ours}")
    document = {"benchmark": "kernels", "environment": about, "ceilings": run.ceilings}
    document |= {"left_out": 0, "stopped": None, "results": []}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is known by then is recorded
    try:
        time_cases(run, args, document)
    finally:
        if run.workers:
            run.workers.close()
        if document["left_out"]:
            print(
                f"\n{document['left_out']} shapes left out: --seconds {args.seconds:.0f} are over"
            )
        record(document, not (args.dry or os.environ.get("OUT")))
    red = {r["form"] for r in document["results"] if "RED" in r.get("skipped", "")}
    if red or document["stopped"]:
        sys.exit(1)


def time_cases(run: Run, args: argparse.Namespace, document: dict) -> None:
    """Time every case into the document, each operation at one shape at least."""
    started, cases = time.perf_counter(), list(run.cases())
    for n, (operation, shapes) in enumerate(cases, start=1):
        calls = [c for name, c in CALLS if name == operation and ("backward" in c) == args.backward]
        for k, shape in enumerate(shapes if calls else []):
            late = time.perf_counter() - started > args.seconds * n / len(cases)
            if args.seconds and k and late:
                document["left_out"] += len(shapes) - k
                break
            try:
                run.compile_ahead(operation, shape, shapes[k + 1 :])
                inputs = make_inputs(operation, shape, run.dtype, run.device)
                for call in calls:
                    found = run.time(operation, call, shape, inputs)
                    document["results"] += found
                    print(shown(found), flush=True)
            except torch.OutOfMemoryError as error:
                print(f"\n{operation} {shape_text(shape)}: {first_line(error)}")
            except RuntimeError as error:  # a launch that failed takes the device with it
                document["stopped"] = f"{operation} {shape_text(shape)}: {first_line(error)}"
                print(f"\nSTOPPED at {document['stopped']}")
                return


if __name__ == "__main__":
    main()
