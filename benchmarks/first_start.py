"""The first start of `--ops auto` on a card: seconds to compile and check every kernel

    python -m benchmarks.first_start                                on a GPU: the whole check
    python -m benchmarks.first_start --compile sm_90 --processes 1,2 --operations rope,swiglu

Nothing is remembered from earlier runs: triton's cache and ours are empty folders. Without
`--compile` the check runs as `--ops auto` runs it. With it kernels are only compiled, for a card
that need not be here, by so many processes, one number after the other. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

import benchmarks.with_triton  # noqa: F401 before kernels
from benchmarks._common import settle
from benchmarks.tuning.compile import TARGETS
from kernels import select_ops
from kernels.launch.compile_ahead import Compilers, Target
from kernels.launch.tile_config import H100_PROCESSORS
from kernels.registry import SPECS, TORCH, TRITON, functions
from kernels.self_check.cases import cases
from kernels.self_check.program import launches_of
from kernels.spec import MODELS, Widths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="llama-2-7b", help="its widths")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--compile", choices=list(TARGETS), help="only compile, for this card")
    parser.add_argument("--processes", default="1,2", help="that compile, as 1,2")
    parser.add_argument(
        "--operations", default="", help="to compile, as rope,swiglu [default: all]"
    )
    args = parser.parse_args()
    settle("benchmarks.first_start", None)
    dtype, widths = getattr(torch, args.dtype), MODELS[args.model]
    if args.compile is None and not torch.cuda.is_available():
        parser.error("there is no GPU here: --compile sm_90 measures the compilation")
    with tempfile.TemporaryDirectory() as folder:
        if args.compile is None:
            found = whole_check(Path(folder), dtype, widths)
        else:
            names = args.operations.split(",") if args.operations else own_operations()
            counts = [int(count) for count in args.processes.split(",")]
            found = compilation(Path(folder), names, dtype, widths, args.compile, counts)
    print(json.dumps(found))


def own_operations() -> list[str]:
    """Those with Triton kernels."""
    return [n for n, spec in SPECS.items() if functions(TRITON, spec) != functions(TORCH, spec)]


def whole_check(folder: Path, dtype: torch.dtype, widths: Widths) -> dict:
    """Seconds of the first `choose` and of the second, and the number of kernels.

    `kernels` were compiled, `ahead` of them before they were launched.
    """
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    torch.zeros(1, device="cuda")  # the context is the run's own
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        ops = select_ops.choose("auto", "cuda", dtype, widths)
        seconds.append(time.perf_counter() - started)
    target = Target.of(torch.device("cuda"))
    at = {name: cases(SPECS[name], dtype, widths) for name in own_operations()}
    launches, _ = launches_of(TRITON, at, target)
    return {
        "card": torch.cuda.get_device_name(),
        "first": seconds[0],
        "second": seconds[1],
        "kernels": len(list((folder / "triton").rglob("*.cubin"))),
        "ahead": len(launches),
        "ops": ops.name,
    }


def compilation(
    folder: Path,
    names: list[str],
    dtype: torch.dtype,
    widths: Widths,
    card: str,
    counts: list[int],
) -> dict:
    """Seconds to compile the checks' kernels, by each number of processes."""
    target = Target(card, H100_PROCESSORS if card == "sm_90" else 0, *TARGETS[card])
    started = time.perf_counter()
    launches, wanted = launches_of(
        TRITON, {name: cases(SPECS[name], dtype, widths) for name in names}, target
    )
    found = {"kernels": len(launches), "record": time.perf_counter() - started, "seconds": {}}
    print(f"{len(launches)} kernels, recorded in {found['record']:.1f} s")
    for count in counts:
        os.environ["TRITON_CACHE_DIR"] = str(folder / str(count))
        started = time.perf_counter()
        compilers = Compilers(launches, target, count)
        compilers.wait_for(set().union(*wanted.values()), lambda _: None)
        seconds = time.perf_counter() - started
        compilers.close()
        found["seconds"][count] = seconds
        print(f"compiled by {count} processes in {seconds:.1f} s")
    return found


if __name__ == "__main__":
    main()
