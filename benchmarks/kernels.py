"""Every operation, timed: the definition, torch.compile of it, torch's products, our kernels.

    python -m benchmarks.kernels                         forward, on the GPU if there is one
    python -m benchmarks.kernels --backward --kernel lora_linear --rows 8192
    python -m benchmarks.kernels --shape 8192,4096,4096,16      M,K,N,r of a linear of your own
    python -m benchmarks.kernels --worth --graph --seconds 80   those worth most first (worth.py)

Green first: a form is timed only if `kernels.spec.check` passes for it here, at the test shapes
and, on a GPU, at the shape that is timed (where that check is cheap); else it says RED.
The forms of an operation take turns in one process. On a GPU: CUDA events, the L2 cache flushed
before every call; the host's work for a launch is hidden only as far as the flush is long.
On a CPU 64 MiB are written before every call, which leaves a larger cache warm.
With --graph the card's time and the host's stand apart beside that (graph_clock.py): what autograd
runs is not captured.

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
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import groupby

import torch

from benchmarks import _common
from benchmarks.clock import DTYPES, Clock, ceilings, figure, first_line, header, machine, record
from benchmarks.graph_clock import GraphClock, inputs_needed
from benchmarks.kernel_forms import (
    TimedForm,
    compiled,
    is_capturable,
    our_tables,
    why_failing,
)
from benchmarks.operations import (
    BY_HAND,
    CALLS,
    DIFFERENTIABLE,
    HAND_WRITTEN_ONLY,
    NO_EAGER,
    make_inputs,
)
from benchmarks.tuning.ahead import Target, Task, Workers, in_parts
from benchmarks.work import WORK, rows_of
from benchmarks.worth import by_worth
from engine.runtime.terminal import table
from kernels.launch import triton_launch
from kernels.registry import REFERENCE, SPECS, TORCH, Ops

PARTS = 3  # that a table's launches at a shape are compiled in
CHEAP_CHECK = 2e12  # operations of a call whose check in fp64 is made at the timed shape too
CPU_WORK = (4e9, 4e8)  # operations and bytes of the shapes that a CPU times without --all
Shape = tuple[int, ...]


class Run:
    """One run of the benchmark: its settings, and the checks made so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = args.device
        self.dtype = DTYPES[args.dtype]
        self.gpu = args.device.startswith("cuda")
        if self.gpu:
            torch.cuda.set_device(torch.empty(0, device=self.device).device)
        self.compile = args.compile == "yes" or (args.compile == "auto" and self.gpu)
        self.compiled: dict[str, Ops] = {}
        self.verdicts: dict[tuple[str, str, Shape], str | None] = {}
        self.clock = Clock(self.device, args.slot, 2 if args.dry else 50)
        self.graph_clock = GraphClock(self.device) if args.graph else None
        self.ceilings = ceilings(self.device, self.dtype)
        self.without_ours = triton_launch.why_unavailable(self.device)
        self.workers: Workers | None = None
        if self.gpu and args.jobs and not self.without_ours:
            self.workers = Workers(args.jobs, Target.of(torch.empty(0, device=self.device).device))

    def cases(self) -> Iterator[tuple[str, list[Shape]]]:
        """(operation, shapes), the largest and the smallest in turn."""
        args = self.args
        if args.shape:
            sizes = [int(size) for size in args.shape.split(",")]
            m, k, n, r = sizes
            yield "lora_linear", [(m, k, r, n)]
            return
        for operation in [args.kernel] if args.kernel else SPECS:
            yield operation, alternating(self.shapes(operation))

    def shapes(self, operation: str) -> list[Shape]:
        """The shapes at which an operation is timed, least work first."""
        args = self.args
        spec = SPECS[operation]
        if args.dry:
            tiny = spec.interpreter_shapes or spec.test_shapes
            shapes = list(tiny[1:2])
        else:
            shapes = list(spec.bench_shapes)
        selected = {int(n) for n in args.rows.split(",") if n}
        if selected:
            shapes = [s for s in shapes if rows_of(operation, s) in selected]
        shapes.sort(key=lambda shape: self.work(operation, shape))
        if self.gpu or selected or args.all or args.dry:
            return shapes
        small = [s for s in shapes if self.fits_a_cpu(operation, s)]
        return small if len(small) <= 2 else [small[0], small[-1]]

    def smallest_shape(self, operation: str) -> Shape:
        """The test shape with the least work, but some: for the interpreter.

        Of those that look like benchmark shapes: without a prefix (a negative number) and further
        settings.
        """
        spec = SPECS[operation]
        fewest, most = len(spec.bench_shapes[0]), max(map(len, spec.bench_shapes))
        work = {}
        for shape in spec.interpreter_shapes or spec.test_shapes:
            if fewest <= len(shape) <= most and min(shape) >= 0 and shape[0] > 0:
                work[shape] = self.work(operation, shape)
        return min(work, key=work.get)

    def fits_a_cpu(self, operation: str, shape: Shape) -> bool:
        """Whether a CPU times this shape without --all."""
        operations, size = self.work(operation, shape)
        return operations <= CPU_WORK[0] and size <= CPU_WORK[1]

    def ahead(self, operation: str, shape: Shape) -> list[Task]:
        """The compilations of our forms at this shape.

        With fp32 gradients, as they are timed, and without, as `check` calls them.
        """
        dtype = str(self.dtype).removeprefix("torch.")
        tasks = []
        for masters in (True, False):
            for ops in _common.tables(SPECS[operation]):
                tasks += in_parts(PARTS, operation, ops.name, shape, dtype, masters=masters)
        return tasks

    def compile_ahead(self, operation: str, now: Shape, following: list[Shape]) -> None:
        """Wait until this shape is compiled; the workers then compile the following one."""
        if not self.workers:
            return
        tasks = self.ahead(operation, now)
        self.workers.want(tasks, 0)
        for shape in following[:1]:
            self.workers.want(self.ahead(operation, shape), 1)
        while self.workers.missing(tasks):
            self.workers.poll(1.0)

    def work(self, operation: str, shape: Shape) -> tuple[float, float]:
        """Operations and bytes of the operation's most expensive call."""
        size = self.dtype.itemsize
        return max(work(*shape, e=size) for (name, _), work in WORK.items() if name == operation)

    def why_red(self, operation: str, ops: Ops, shape: Shape) -> str | None:
        """Why this table's form must not be timed at this shape; None if it may be."""
        spec = SPECS[operation]
        operations, _ = self.work(operation, shape)
        is_cheap = operations <= CHEAP_CHECK and operation not in NO_EAGER
        if self.args.dry:
            shapes = [shape]
        elif self.gpu:
            shapes = list(spec.test_shapes)
            if is_cheap:
                shapes.append(shape)
        else:
            shapes = list(spec.interpreter_shapes or spec.test_shapes)
        for checked in shapes:
            key = (operation, ops.name, checked)
            if key not in self.verdicts:
                self.verdicts[key] = why_failing(operation, ops, checked, self.dtype, self.device)
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
            if self.compile:
                if operation not in self.compiled:
                    self.compiled[operation] = compiled(operation)
                found.append(self.compiled[operation])
        if operation in BY_HAND:
            found.append(BY_HAND[operation])
        checked = [TORCH]
        if not self.without_ours:
            ours = our_tables(operation)
            is_rehearsal = self.args.worth and self.args.dry
            checked += ours[:1] if is_rehearsal else ours  # the interpreter takes seconds a call
        for ops in checked:
            why_red = self.why_red(operation, ops, shape)
            if why_red is None:
                found.append(ops)
            else:
                without[ops.name] = {"skipped": f"RED, not timed: {why_red}"}
        return found, without

    def forms(self, operation: str, call: str, inputs: dict, tables: list[Ops]) -> dict:
        """Table name -> the call of this table, without arguments."""
        how = CALLS[operation, call]
        if (operation, call) in HAND_WRITTEN_ONLY:
            tables = [ops for ops in tables if ops.name not in DIFFERENTIABLE]
        return {ops.name: TimedForm(how, ops, inputs) for ops in tables}

    def captured(self, operation: str, call: str, shape: Shape, tables: list[Ops]) -> dict:
        """Table name -> the milliseconds of the device and of the host, each on its own.

        {} without --graph. Forms that cannot be captured are left out (`is_capturable`).
        """
        if self.graph_clock is None:
            return {}
        one = make_inputs(operation, shape, self.dtype, self.device)
        size = sum(t.nbytes for t in one.values() if isinstance(t, torch.Tensor))
        sets = [one]
        for _ in range(inputs_needed(size, self.graph_clock.cache_bytes) - 1):
            sets.append(make_inputs(operation, shape, self.dtype, self.device))
        how = CALLS[operation, call]
        found = {}
        for ops in tables:
            if is_capturable(operation, ops):
                calls = [TimedForm(how, ops, inputs) for inputs in sets]
                found[ops.name] = self.graph_clock.measure(calls)
        return found

    def time(self, operation: str, call: str, shape: Shape, inputs: dict) -> list[dict]:
        """Every form of one call: its times, rates and distance from the floor."""
        tables, without = self.tables(operation, shape)
        flops, size = WORK[operation, call](*shape, e=self.dtype.itemsize)
        product_ms = 1e3 * flops / self.ceilings["flops"]
        copy_ms = 1e3 * size / self.ceilings["bytes"]
        if product_ms >= copy_ms:
            bound, floor, unit = "product", product_ms, "TFLOP/s"
            work_per_ms = flops / 1e9
        else:
            bound, floor, unit = "copy", copy_ms, "GB/s"
            work_per_ms = size / 1e6
        about = {
            "operation": operation,
            "call": call,
            "shape": shape,
            "dtype": self.args.dtype,
            "floor_ms": floor,
            "bound": bound,
        }
        times = self.clock.measure(self.forms(operation, call, inputs, tables))
        apart = self.captured(operation, call, shape, tables)
        results = []
        for name, form in (times | without).items():
            result = about | {"form": name}
            if "skipped" in form:
                results.append(result | form)
                continue
            ms = form["ms"]  # sorted
            fifth = len(ms) // 5
            median = statistics.median(ms)
            result |= {
                "ms": [ms[fifth], median, ms[-1 - fifth]],
                "calls": len(ms),
                "peak_mib": form["peak_mib"],
                "rate": work_per_ms / median,
                "unit": unit,
                "x_floor": median / floor if floor else 0.0,
            }
            results.append(result | apart.get(name, {}))
        return results


def alternating(shapes: list[Shape]) -> list[Shape]:
    """The largest, the smallest, the second largest, ...: of shapes sorted by work.

    A run that is stopped early has then measured both ends.
    """
    remaining = list(shapes)
    order = []
    while remaining:
        order.append(remaining.pop())
        if remaining:
            order.append(remaining.pop(0))
    return order


def shape_text(shape: Shape) -> str:
    """Sizes joined by x, more than three equal ones counted: 32x8x128x2048*4."""
    texts = []
    for size, run in groupby(shape):
        count = len(list(run))
        if count > 3:
            texts.append(f"{size}*{count}")
        else:
            texts += [str(size)] * count
    return "x".join(texts)


def results_text(results: list[dict]) -> str:
    """The forms of one call as a table for the terminal."""
    first = results[0]
    title = (
        f"\n{first['operation']} {first['call']}, shape {shape_text(first['shape'])}, "
        f"{first['dtype']}: floor {first['floor_ms']:.4f} ms, by the {first['bound']}"
    )
    names = "form,median ms,p20,p80,card ms,host ms,rate,,of ceiling,x floor,peak MiB"
    lines = [names.split(",")]
    skipped = []
    for r in results:
        if "skipped" in r:
            skipped.append(f"{r['form']}: {r['skipped']}")
            continue
        low, median, high = r["ms"]
        lines.append(
            [
                r["form"],
                f"{median:.4f}",
                f"{low:.4f}",
                f"{high:.4f}",
                f"{r['device_ms']:.4f}" if "device_ms" in r else "-",
                f"{r['host_ms']:.4f}" if "host_ms" in r else "-",
                f"{r['rate']:.3g}",
                r["unit"],
                f"{100 / r['x_floor']:.0f} %" if r["x_floor"] else "-",
                f"{r['x_floor']:.2f}",
                "-" if r["peak_mib"] is None else f"{r['peak_mib']:.1f}",
            ]
        )
    return "\n".join([title, table(lines), *skipped])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--kernel", choices=SPECS, help="one operation; default all")
    parser.add_argument("--backward", action="store_true", help="the backwards, not the forwards")
    parser.add_argument("--worth", action="store_true", help="the calls and order of worth.py")
    parser.add_argument("--graph", action="store_true", help="the card's time and the host's too")
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
    if args.worth and (args.shape or args.rows or args.backward):
        parser.error("--worth has its own shapes and calls: leave --shape, --rows, --backward out")
    if args.shape and args.kernel not in (None, "lora_linear"):
        parser.error(f"--shape is of lora_linear, not of {args.kernel}")
    if args.shape and not re.fullmatch(r"\d+(,\d+){3}", args.shape):
        parser.error(f"--shape {args.shape}: expected four numbers M,K,N,r as 8192,4096,4096,16")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    about = machine(args.device)
    run = Run(args)
    print(header(about, run.ceilings, args.dtype))
    if run.without_ours:
        print(f"our kernels are not timed: {run.without_ours}")
    document = {
        "benchmark": "kernels",
        "environment": about,
        "ceilings": run.ceilings,
        "left_out": 0,
        "stopped": None,
        "results": [],
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `finally` records the results so far
    try:
        time_cases(run, args, document)
    finally:
        if run.workers:
            run.workers.close()
        if document["left_out"]:
            left_out = document["left_out"]
            print(f"\n{left_out} shapes left out: --seconds {args.seconds:.0f} are over")
        record(document, not (args.dry or os.environ.get("OUT")))
    red = {r["form"] for r in document["results"] if "RED" in r.get("skipped", "")}
    if red or document["stopped"]:
        sys.exit(1)


def time_cases(run: Run, args: argparse.Namespace, document: dict) -> None:
    """Time every case into the document."""
    if args.worth:
        time_by_worth(run, args, document)
    else:
        time_by_operation(run, args, document)


def time_by_worth(run: Run, args: argparse.Namespace, document: dict) -> None:
    """Time the calls of worth.py in their order, until --seconds are over."""
    started = time.perf_counter()
    timed = [t for t in by_worth() if args.kernel in (None, t[0])]
    if args.dry:  # the first call of every operation, at its smallest shape with work in it
        first = {}
        for operation, call, _ in timed:
            first.setdefault(operation, (operation, call, run.smallest_shape(operation)))
        timed = list(first.values())
    for n, (operation, call, shape) in enumerate(timed):
        if args.seconds and n and time.perf_counter() - started > args.seconds:
            document["left_out"] += len(timed) - n
            return
        following = [other for name, _, other in timed[n + 1 :] if name == operation]
        if not time_shape(run, operation, [call], shape, following, document):
            return


def time_by_operation(run: Run, args: argparse.Namespace, document: dict) -> None:
    """Time every operation, at one shape at least."""
    started = time.perf_counter()
    cases = list(run.cases())
    for n, (operation, shapes) in enumerate(cases, start=1):
        calls = []
        for name, call in CALLS:
            if name == operation and ("backward" in call) == args.backward:
                calls.append(call)
        if not calls:
            continue
        for k, shape in enumerate(shapes):
            is_late = time.perf_counter() - started > args.seconds * n / len(cases)
            if args.seconds and k and is_late:
                document["left_out"] += len(shapes) - k
                break
            if not time_shape(run, operation, calls, shape, shapes[k + 1 :], document):
                return


def time_shape(
    run: Run,
    operation: str,
    calls: list[str],
    shape: Shape,
    following: list[Shape],
    document: dict,
) -> bool:
    """Time calls of an operation at a shape into the document.

    following: shapes of the operation that come later. False where a launch failed, which takes
    the device with it.
    """
    try:
        run.compile_ahead(operation, shape, following)
        inputs = make_inputs(operation, shape, run.dtype, run.device)
        for call in calls:
            found = run.time(operation, call, shape, inputs)
            document["results"] += found
            figure("kernels", {"results": found})
            print(results_text(found), flush=True)
    except torch.OutOfMemoryError as error:
        print(f"\n{operation} {shape_text(shape)}: {first_line(error)}")
    except RuntimeError as error:
        document["stopped"] = f"{operation} {shape_text(shape)}: {first_line(error)}"
        print(f"\nSTOPPED at {document['stopped']}")
        return False
    return True


if __name__ == "__main__":
    main()
