"""Shared by the benchmarks that measure time: machine, clock, ceilings, record."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from engine.runtime.cores import cores
from engine.runtime.run_record import environment
from kernels.launch import triton_launch

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Fields that the `environment` of every record must have.
ORIGIN = ("commit", "date", "cpu_model", "cores", "gpu", "python", "torch", "triton")
SLOW = 2.0  # seconds of one call from which on it is called only once

# ---- the machine


def first_line(error: Exception) -> str:
    """The error's type and the first line of its message, short enough for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def cpu_model() -> str:
    """The processor's name as Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def triton_version() -> str | None:
    """Of the installed triton, which need not be imported; None where there is none."""
    imported = getattr(triton_launch.triton, "__version__", None)
    try:
        return imported or version("triton")
    except PackageNotFoundError:
        return None


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return answer.stdout.strip().splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"


def machine(device: str) -> dict[str, Any]:
    """Origin of the figures: processor, card, versions, commit, date. `record` demands it."""
    on_gpu = device.startswith("cuda")
    processor = cpu_model()
    return environment() | {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu_model": processor,
        "cores": cores(),
        "device": torch.cuda.get_device_name(device) if on_gpu else processor,
        "driver": driver_version() if on_gpu else None,
        "triton": triton_version(),
    }


def header(about: dict[str, Any], rates: dict[str, float], dtype: str) -> str:
    """The machine and its two ceilings, for people."""
    names = ("device", "driver", "torch", "triton", "python", "threads", "commit", "date")
    return (
        ", ".join(f"{name} {about[name]}" for name in names)
        + f"\nceilings measured now: {dtype} product {rates['flops'] / 1e12:.3g} TFLOP/s, "
        f"copy {rates['bytes'] / 1e9:.1f} GB/s"
    )


def record(document: dict[str, Any], wanted: bool) -> None:
    """Print the document; append it to $OUT, if there is one, and where `wanted` to results/.

    The tables in pages are made of these records (`python -m benchmarks.tables`), so a record
    without `machine`'s answer in `environment` is refused.
    """
    missing = [name for name in ORIGIN if name not in document.get("environment", {})]
    assert not missing, f"{document['benchmark']}: environment lacks {', '.join(missing)}"
    folders = [Path(os.environ["OUT"])] if os.environ.get("OUT") else []
    folders += [RESULTS] if wanted else []
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{document['benchmark']}.jsonl").open("a") as log:
            log.write(json.dumps(document) + "\n")
    print(json.dumps(document))


def figure(benchmark: str, values: dict[str, Any]) -> None:
    """Append figures to $OUT/figures.jsonl, if there is an $OUT, as soon as they are known.

    A benchmark that is killed before its `record` leaves them there.
    """
    folder = os.environ.get("OUT")
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = json.dumps({"benchmark": benchmark, "date": now} | values)
    with (Path(folder) / "figures.jsonl").open("a") as log:
        log.write(line + "\n")  # closing writes it out


# ---- time


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str, seconds: float, repeats: int = 50) -> None:
        self.gpu = device.startswith("cuda")
        self.seconds = seconds  # aimed at for all forms of one `measure`
        self.repeats = repeats  # most calls of one form
        size = 64 << 20
        if self.gpu:
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            size = max(2 * cache, 256 << 20)
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def once(self, fn: Callable[[], Any]) -> Callable[[], float]:
        """Call `fn`; returns a function that tells its milliseconds after a synchronisation."""
        self.flush.zero_()
        if not self.gpu:
            started = time.perf_counter()
            fn()
            taken = 1e3 * (time.perf_counter() - started)
            return lambda: taken
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        end.record()
        return lambda: start.elapsed_time(end)

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def peak(self, fn: Callable[[], Any]) -> float | None:
        """Call `fn` once; returns the MiB it allocates at its peak, None on a CPU."""
        if not self.gpu:
            fn()
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def measure(self, forms: dict[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
        """Time the forms in turn: name -> {"ms": sorted, "peak_mib"}, or {"skipped": reason}."""
        found: dict[str, dict[str, Any]] = {}
        costs: dict[str, float] = {}  # seconds of one call
        for name, fn in forms.items():
            try:
                fn()  # compiles
                self.wait()
                started = time.perf_counter()
                found[name] = {"ms": [], "peak_mib": self.peak(fn)}
                costs[name] = time.perf_counter() - started
            except Exception as error:
                found[name] = {"skipped": first_line(error)}
                if self.gpu:
                    torch.cuda.empty_cache()
        quick = [name for name, cost in costs.items() if cost < SLOW]
        total = sum(costs[name] for name in quick)
        affordable = int(self.seconds / (total or 1))
        count = max(min(3, self.repeats), min(self.repeats, affordable))
        pending = []
        for n in range(count):
            turn = quick if n else list(costs)  # slow forms are called in the first round only
            for k in range(len(turn)):
                name = turn[(n + k) % len(turn)]  # every round begins with another form
                pending.append((name, self.once(forms[name])))
        self.wait()
        for name, taken in pending:
            found[name]["ms"].append(taken())
        for name in costs:
            found[name]["ms"].sort()
        return found


def sustained(device: str, dtype: torch.dtype, seconds: float) -> float:
    """Operations/s of a large product, repeated without a pause for at least so many seconds.

    `ceilings` gives a burst: a card that works on draws more power than it may, and slows down.
    """
    n = 8192 if device.startswith("cuda") else 512
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    out = torch.empty_like(a)
    clock = Clock(device, seconds)
    torch.mm(a, b, out=out)
    clock.wait()
    started = time.perf_counter()
    products = 0
    while time.perf_counter() - started < seconds:
        for _ in range(10):
            torch.mm(a, b, out=out)
        products += 10
        clock.wait()
    return 2 * n**3 * products / (time.perf_counter() - started)


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Rates of a large product (operations/s) and of a large copy (bytes/s) on this machine."""
    if device.startswith("cuda"):
        n, size = 8192, 1 << 30
    else:
        n, size = 1536, 128 << 20
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    forms = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = Clock(device, seconds=1.0, repeats=20).measure(forms)
    product_seconds = times["product"]["ms"][0] / 1e3  # the fastest call: times are sorted
    copy_seconds = times["copy"]["ms"][0] / 1e3
    return {"flops": 2 * n**3 / product_seconds, "bytes": 2 * size / copy_seconds}
