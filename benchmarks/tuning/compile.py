"""Every kernel compiled ahead of time, at every benchmark shape, for three GPUs. Needs no GPU.

    python -m benchmarks.tuning.compile
    python -m benchmarks.tuning.compile --kernel rms_norm --target sm_90
    python -m benchmarks.tuning.compile --quick --triton 3.6.0

Launches are recorded, not written down: the operations run on tensors without memory, and triton's
own launcher says what it would specialise for each launch. A configuration that several shapes
lead to is compiled once. `--triton` takes a version, which is fetched once into .triton/, or a
folder with the package in it. `--quick` is for every day: bf16, and of the configurations that
differ only in sizes of the model two, the smallest and the largest.

The exit code is 1 and the configuration is named when
    spill      registers are spilled, or ptxas gives up (32 registers and a stack)
    shared     shared memory is over the limit of the target (the smallest card of its class)
    mma        a product of 16-bit operands is not on tensor cores; 64 rows or more need wgmma on
               sm_90 (fewer have mma.sync); what is a product is read from triton's intermediate
               code, not from names
    tf32       a product of fp32 operands is rounded to TF32, as triton's default has it
    serial     ptxas serialises wgmma
    loads      less than half of the bytes that the global loads name come 16 at a time. Each load
               instruction counts once, with the bytes it brings to a thread; a TMA load as 64
    compiler   it does not compile, or takes the compiler down
    coverage   no benchmark shape launches a kernel, or no kernel calls a helper
unless EXCEPTIONS below has the reason why that is right. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import Launch, jitted, record, settle, specs_of, tables
from kernels.launch import tile_config, triton_launch

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED = {"sm_80": 101376, "sm_90": 232448, "gfx942": 65536}  # bytes a program may have
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TMA = r"cp\.async\.bulk\.tensor\S*"
SERIAL = "wgmma.mma_async instructions are serialized"

# (complaint, kernel, target, dtype), each a pattern -> why it is right. Reviewed.
EXCEPTIONS: dict[tuple[str, str, str, str], str] = {
    ("loads", "penalise_kernel", "*", "*"): "it gathers logits of ids scattered over the row",
    ("loads", "sample_sorted_kernel", "*", "*"): "it gathers at most 256 logits of a row",
}


WIDTHS = (30, 6, 4, 52, 4, 5, 6, 12, 9, 3, 0)  # of the printed columns

# ---- the plan


@dataclass(frozen=True)
class Job:
    """One configuration of one kernel for one target."""

    kernel: Any
    target: str
    dtype: str  # of the run that led here first
    signature: dict[str, str]  # argument -> type, or "constexpr"
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list]  # divisibility by 16 and, for AMD, 32-bit ranges
    options: Any

    @property
    def key(self) -> str:
        parts = (self.signature, self.constexprs, self.attrs, self.options)
        return f"{self.kernel.__name__} {self.target} {parts}"

    @property
    def constants(self) -> dict[str, Any]:
        """The launch's values of `tl.constexpr` arguments."""
        declared = {p.name for p in self.kernel.params if p.is_constexpr}
        names = list(self.signature)
        return {names[i]: v for (i,), v in self.constexprs.items() if names[i] in declared}

    @property
    def tile(self) -> str:
        """The constants, warps and stages."""
        given = self.constants.items()
        shown = [f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in given]
        return " ".join((*shown, f"w{self.options.num_warps} s{self.options.num_stages}"))

    @property
    def form(self) -> tuple:
        """The constants without those that come from the sizes of the model."""
        by_device = tile_config.configurations().get(self.kernel.__name__, {})
        configs = by_device.get(self.target, {}).values()
        chosen = {name for config in configs for name in config}
        given = self.constants.items()
        kept = [(k, v) for k, v in given if k in chosen or type(v) is not int]
        return (self.kernel, self.target, self.options.num_warps, self.options.num_stages, *kept)


def job(launch: Launch, target: str, dtype: str) -> Job:
    """The job that triton's launcher would compile for this launch."""
    return Job(launch.kernel, target, dtype, *specialised(launch, TARGETS[target]))


def specialised(launch: Launch, target: tuple[str, int | str, int]) -> tuple[dict, dict, dict, Any]:
    """Signature, constants, attributes and options of a launch: triton's own code decides."""
    kernel = launch.kernel
    backend, bind = binder(kernel, target)
    bound, values, options = bind(*launch.args, **launch.options)
    options, *found = kernel._pack_args(backend, dict(launch.options), bound, values, options)
    return *found, options


@functools.cache
def binder(kernel: Any, target: tuple[str, int | str, int]) -> tuple[Any, Any]:
    """triton's backend, and its function from arguments to their specialisation."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget(*target))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


@dataclass
class Plan:
    """The configurations to compile."""

    jobs: dict[str, Job] = field(default_factory=dict)  # by key: each configuration once
    ran: set[str] = field(default_factory=set)  # kernels that were launched
    failures: list[str] = field(default_factory=list)  # operations that did not get that far


def plan(pattern: str, targets: list[str], dtypes: list[str]) -> Plan:
    """Every configuration of the kernels whose name, or whose operation's, contains `pattern`."""
    made = Plan()
    for target, spec, dtype in itertools.product(targets, specs_of(pattern), dtypes):
        for ops, shape in itertools.product(tables(spec), dict.fromkeys(spec.bench_shapes)):
            try:
                launches = record(spec, ops, shape, DTYPES[dtype], target)
            except Exception as error:  # an operation that cannot run is a finding like others
                where = f"{spec.name} ({ops.name}) {target} {dtype} {shape}"[:120]
                made.failures.append(f"{where} record: {type(error).__name__}: {error}"[:400])
                continue
            for launch in launches:
                name = launch.kernel.__name__
                made.ran.add(name)
                if pattern in name or pattern in spec.name:
                    new = job(launch, target, dtype)
                    made.jobs.setdefault(new.key, new)
    return made


def extremes(work: list[Job]) -> list[Job]:
    """Of the jobs that differ only in sizes of the model: the one of the smallest, of the largest.

    Sizes are compared by the sum of their logarithms.
    """
    forms: dict[tuple, list[Job]] = {}
    for one in work:
        forms.setdefault(one.form, []).append(one)

    def size(one: Job) -> float:
        values = one.constants.values()
        return sum(math.log2(v) for v in values if isinstance(v, int) and v > 0)

    chosen = {id(f(jobs, key=size)) for jobs in forms.values() for f in (min, max)}
    return [one for one in work if id(one) in chosen]


def uncovered(pattern: str, ran: set[str]) -> list[str]:
    """Kernels that nothing launched and helpers that nothing launched calls."""
    functions = jitted()
    reached, pending = set(), [name for name in functions if name in ran]
    while pending:
        name = pending.pop()
        reached.add(name)
        called = set(functions[name].fn.__code__.co_names) & functions.keys()
        pending.extend(called - reached)
    return [name for name in functions if pattern in name and name not in reached]


# ---- the compiled kernel


@dataclass(frozen=True)
class Dot:
    """A product in triton's intermediate code."""

    rows: int
    dtype: str
    unit: str  # wgmma, mma (any other tensor-core instruction) or fma
    tf32: bool = False


def dots(ttgir: str) -> list[Dot]:
    """Every product of the kernel, read from Triton's GPU dialect.

    wgmma is an operation of its own; a tt.dot whose operands have a plain blocked layout is
    computed by fused multiply-adds, any other by tensor cores.
    """
    pattern = r"(tt\.dot|ttng\.warp_group_dot)\b[^\n]*? : (?:tensor|!ttg\.memdesc)<((?:\d+x)+)(\w+)"
    found = []
    for match in re.finditer(pattern, ttgir):
        operation, sizes, dtype = match.groups()
        rest_of_line = ttgir[match.end() : ttgir.index("\n", match.end())]
        if operation != "tt.dot":
            unit = "wgmma"
        elif "parent = #blocked" in rest_of_line:
            unit = "fma"
        else:
            unit = "mma"
        # The precision "ieee" is not printed; wgmma reads fp32 operands as tf32 only.
        is_tf32 = dtype == "f32" and ("inputPrecision =" in match[0] or unit == "wgmma")
        rows = int(sizes.split("x")[-3])  # sizes end in "ROWSxCOLUMNSx"
        found.append(Dot(rows, dtype, unit, is_tf32))
    return found


def ptx_widths(ptx: str, which: str) -> list[int]:
    """Bytes per thread of every global `ld` or `st` in PTX; copies to shared memory are loads."""
    widths = []
    for suffix in re.findall(rf"\b{which}\.global(\S*)", ptx):  # as ".v4.b32"
        vector = re.search(r"\.v(\d)", suffix)
        bits = re.search(r"\.[busf](\d+)$", suffix)
        elements = int(vector[1]) if vector else 1
        widths.append(elements * int(bits[1]) // 8)
    direction = r"\.shared::\w+\.global" if which == "ld" else r"\.global\.shared"
    widths += [64] * len(re.findall(TMA + direction, ptx))
    if which == "ld":
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x\w+|\d+)", ptx)
        widths += [int(size, 0) for size in copies]
    return widths


def gcn_widths(assembly: str, which: str) -> list[int]:
    """Bytes per thread of every vector load or store of global memory in AMD assembly."""
    sizes = {"byte": 1, "short": 2, "dword": 4}
    pattern = rf"^\s+(?:global|buffer|flat)_{which}_(?:lds_)?[us]?(byte|short|dword)(?:x(\d))?"
    widths = []
    for size, count in re.findall(pattern, assembly, re.MULTILINE):
        widths.append(sizes[size] * int(count or 1))
    return widths


def facts(job: Job, compiled: Any, log: str) -> dict[str, Any]:
    """The facts about a compiled kernel, as plain values that `complaints` checks."""
    asm = compiled.asm
    result = {
        "kernel": job.kernel.__name__,
        "target": job.target,
        "dtype": job.dtype,
        "tile": job.tile,
        "shared": compiled.metadata.shared,
        "dots": dots(asm["ttgir"]),
    }
    if job.target == "gfx942":
        text = asm["amdgcn"]
        result["registers"] = number_after(r"\.vgpr_count:\s*", text)
        result["stack"] = number_after(r"\.private_segment_fixed_size:\s*", text)
        result["spilled"] = 4 * number_after(r"\.vgpr_spill_count:\s*", text)  # registers -> bytes
        result["serial"] = False
        instructions = {"mfma": len(re.findall(r"\bv_mfma", text))}
        loads = gcn_widths(text, "load")
        stores = gcn_widths(text, "store")
    else:
        usage = resources(asm["cubin"])
        ptx = asm["ptx"]
        result["registers"] = number_after("REG:", usage)
        result["stack"] = number_after("STACK:", usage)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        stored, loaded = spills.groups()
        result["spilled"] = max(int(stored), int(loaded))
        result["serial"] = SERIAL in log
        instructions = {
            "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
            "mma.sync": len(re.findall(r"\bmma\.sync", ptx)),
        }
        loads = ptx_widths(ptx, "ld")
        stores = ptx_widths(ptx, "st")
    result["mma"] = {name: count for name, count in instructions.items() if count}
    result["load"] = max(loads, default=0)
    result["store"] = max(stores, default=0)
    wide_bytes = sum(width for width in loads if width >= 16)
    result["wide"] = wide_bytes / max(1, sum(loads))  # share of the bytes loaded 16 at a time
    return result


def number_after(pattern: str, text: str) -> int:
    """The first whole number that follows `pattern` in the text."""
    return int(re.search(rf"{pattern}(\d+)", text)[1])


def resources(cubin: bytes) -> str:
    """The line of cuobjdump about registers and stack."""
    tool = Path(triton_launch.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.check_output([tool, "-res-usage", file.name], text=True)


def complaints(result: dict[str, Any]) -> dict[str, str]:
    """Complaints about a result of `facts`: kind -> the finding."""
    if "error" in result:
        return {"compiler": result["error"]}
    found = {}
    if result["spilled"] or result["stack"]:
        gave_up = " (ptxas gave up)" if result["registers"] == 32 else ""
        found["spill"] = f"{result['spilled']} bytes spilled, stack {result['stack']}{gave_up}"
    if result["shared"] > SHARED[result["target"]]:
        found["shared"] = (
            f"{result['shared']} bytes of shared memory, {SHARED[result['target']]} allowed"
        )
    for dot in result["dots"]:
        if dot.tf32:
            found["tf32"] = f"a product of {dot.rows} rows of fp32 in TF32"
        if dot.dtype not in ("bf16", "f16"):
            continue
        wgmma = result["target"] == "sm_90" and dot.rows >= 64
        if dot.unit == "fma" or (wgmma and dot.unit != "wgmma") or not result["mma"]:
            found["mma"] = (
                f"a product of {dot.rows} rows of {dot.dtype} by {dot.unit}, {result['mma']}"
            )
    if result["serial"]:
        found["serial"] = "ptxas serialises wgmma"
    if result["wide"] < 0.5:
        found["loads"] = (
            f"{result['wide']:.0%} of load bytes are wide; the widest is {result['load']}"
        )
    return found


def excused(kind: str, result: dict[str, Any]) -> str | None:
    """The reason why this complaint about this result is accepted."""
    is_now = (kind, result["kernel"], result["target"], result["dtype"])
    for patterns, reason in EXCEPTIONS.items():
        if all(fnmatch(a, b) for a, b in zip(is_now, patterns, strict=True)):
            return reason
    return None


# ---- compiling

_jobs: list[Job] = []  # forked processes take a job by its number: kernels do not travel


def compiled(index: int) -> dict[str, Any]:
    """Compile job `index` in this process."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    job, log, started = _jobs[index], io.StringIO(), time.perf_counter()
    try:
        with contextlib.redirect_stdout(log), stderr_kept() as errors:
            source = ASTSource(job.kernel, job.signature, job.constexprs, job.attrs)
            target = GPUTarget(*TARGETS[job.target])
            done = compile_kernel(source, target=target, options=job.options.__dict__)
        result = facts(job, done, log.getvalue())
    except Exception as error:  # whatever the compiler raises is the finding
        first = next((line for line in errors if "error:" in line), "")
        result = failed(job, f"{type(error).__name__}: {error} {first}")
    return result | {"seconds": time.perf_counter() - started}


@contextlib.contextmanager
def stderr_kept() -> Iterator[list[str]]:
    """Inside, the compiler's C++ output (whole modules, on failure) is kept off the screen."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        text: list[str] = []
        try:
            yield text
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text += file.read().decode(errors="replace").splitlines()


def failed(job: Job, why: str) -> dict[str, Any]:
    """The result of a job that failed; of a long message its two ends."""
    why = " ".join(why.split())
    result = {"kernel": job.kernel.__name__, "target": job.target, "dtype": job.dtype}
    result |= {"tile": job.tile, "seconds": 0.0}
    return result | {"error": why if len(why) < 400 else f"{why[:100]} ... {why[-300:]}"}


def compile_all(work: list[Job], processes: int) -> Iterator[dict[str, Any]]:
    """A result for every job, in order; a compiler that dies ends its own job only."""
    _jobs[:] = work
    fork = get_context("fork")
    after = 0
    while after < len(work):
        with ProcessPoolExecutor(processes, fork) as pool:
            try:
                for result in pool.map(compiled, range(after, len(work))):
                    yield result
                    after += 1
                return
            except BrokenProcessPool:
                pass
        with ProcessPoolExecutor(1, fork) as alone:  # whichever died: the next job by itself
            try:
                result = alone.submit(compiled, after).result()
            except BrokenProcessPool:
                result = failed(work[after], "the compiler took its process down")
        yield result
        after += 1


# ---- the command


def cells(result: dict[str, Any], verdict: str) -> list[str]:
    """A line of the printed table."""
    short = result["kernel"].removesuffix("_kernel")
    if "error" in result:
        return [short, result["target"], result["dtype"], result["tile"], *["-"] * 6, verdict]
    mma = " ".join(f"{name} {count}" for name, count in result["mma"].items()) or "-"
    spill = str(result["spilled"] or result["stack"])
    numbers = [str(result["registers"]), spill, str(result["shared"]), mma]
    moved = [f"{result['load']} ({result['wide']:.0%})", str(result["store"])]
    return [short, result["target"], result["dtype"], result["tile"], *numbers, *moved, verdict]


def ptxas_versions() -> list[str]:
    folder = Path(triton_launch.triton.__file__).parent / "backends/nvidia/bin"
    texts = [subprocess.check_output([t, "--version"], text=True) for t in folder.glob("ptxas*")]
    return sorted(re.search(r"release ([\d.]+)", text)[1] for text in texts)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only those whose name contains this")
    parser.add_argument("--target", default=",".join(TARGETS))
    parser.add_argument("--dtype", help=f"some of {','.join(DTYPES)}; all, or for --quick bf16")
    parser.add_argument("--triton", help="another version, or a folder with it")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--quick", action="store_true", help="extreme sizes only")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    settle("benchmarks.tuning.compile", args.triton)
    started = time.perf_counter()
    dtypes = (args.dtype or ("bf16" if args.quick else ",".join(DTYPES))).split(",")
    planned = plan(args.kernel, args.target.split(","), dtypes)
    work = list(planned.jobs.values())
    if args.quick:
        work = extremes(work)
    failures = planned.failures
    failures += [f"{name} coverage: no launch" for name in uncovered(args.kernel, planned.ran)]
    lines = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        os.environ["TRITON_ALWAYS_COMPILE"] = "1"
        os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
        for result in compile_all(work, args.jobs):
            found = complaints(result)
            reasons = {kind: excused(kind, result) for kind in found}
            bad = [f"{kind}: {found[kind]}" for kind, reason in reasons.items() if not reason]
            verdict = "; ".join(bad) or ", ".join(f"{k} excused" for k in found) or "ok"
            lines.append(cells(result, verdict))
            print(
                "  ".join(f"{c:<{w}}" for c, w in zip(lines[-1], WIDTHS, strict=True)), flush=True
            )
            failures += [" ".join((*lines[-1][:4], b)) for b in bad]
    for line in failures:
        print("FAILED", line)
    record = {
        "benchmark": "compile",
        "triton": triton_launch.triton.__version__,
        "ptxas": ptxas_versions(),
        "configurations": len(lines),
        "kernels": len(planned.ran),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(sum(os.times()[:4]), 1),
        "failures": failures,
        "rows": lines,
    }
    print(json.dumps(record))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
