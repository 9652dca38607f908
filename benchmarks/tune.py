"""Measures candidate tiles on this GPU and writes the fastest into kernels/tiles. Needs a GPU.

    python -m benchmarks.tune
    python -m benchmarks.tune --kernel rms_norm --seconds 120 --out /tmp/tiles
    python -m benchmarks.tune --dry --kernel rms_norm --out /tmp/tiles

For every row of the table that a benchmark shape looks up (a kernel at a shape class), candidates
are tried, those nearest to the present row first. A candidate must compile, pass the operation's
check against its definition on a small shape, and give nearly the present row's outputs at the
benchmark shapes. Its launches at those shapes are kept and repeated in turn with the present row's,
the L2 cache flushed before each; its time is the median, and its ratio to the present row's the
geometric mean over the shapes. The best replaces the present row if it wins by more than 2 % and
does so again when measured anew. A kernel whose tile decides another's work is timed with it.

`--dry` rehearses all of this in triton's interpreter, which takes tiny shapes and two candidates
and says nothing about speed: it writes to --out only. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import record, specs_of, tables
from engine.log import progress, table
from kernels import _triton, tiles
from kernels.registry import REFERENCE, Ops
from kernels.spec import Spec, cast, check

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GAIN = 0.98  # of the present row's time: slower than that, and the present row stays
CASES = 6  # shapes that a row is measured at
FLUSH = 256 << 20  # bytes written before a measurement: more than any L2 cache


def rows(warps: tuple[int, ...] = (4, 8), stages: tuple[int, ...] = (1,), **sizes) -> list[dict]:
    """Every combination; sizes not named stay as in the present row."""
    lists = sizes | {"num_warps": warps, "num_stages": stages}
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def forms(*names: str) -> list[dict]:
    """For an operation that the table gives a form instead of a tile."""
    return [{"form": name} for name in names]


CANDIDATES: dict[str, list[dict]] = {
    # elementwise and by rows: bandwidth
    "rms_norm_forward_kernel": rows((1, 2, 4, 8, 16), BT=(1, 2, 4, 8)),
    "rms_norm_backward_kernel": rows((1, 2, 4, 8, 16), BT=(1, 2, 4, 8)),
    "rope_kernel": rows((2, 4, 8), BT=(1, 2, 4, 8, 16), BH=(4, 8, 16)),
    "swiglu_forward_kernel": rows((4, 8), BT=(1, 2, 4), BF=(512, 1024, 2048, 4096)),
    "swiglu_backward_kernel": rows((4, 8), BT=(1, 2, 4), BF=(512, 1024, 2048, 4096)),
    "adamw_kernel": rows((4, 8), BP=(512, 1024, 2048, 4096)),
    "sum_of_squares_kernel": rows((4, 8), BP=(2048, 4096, 8192, 16384)),
    "root_of_sum_kernel": rows((4, 8), BP=(512, 1024, 2048, 4096)),
    "kv_write_kernel": rows((2, 4, 8), BW=(256, 512, 1024, 2048)),
    "lora_reduce_kernel": rows((4, 8), BN=(256, 512, 1024, 2048)),
    "cross_entropy_rows_kernel": rows((4, 8, 16), BV=(2048, 4096, 8192)),
    "cross_entropy_combine_kernel": rows((1, 2, 4), BN=(32, 64, 128, 256)),
    "penalise_kernel": rows((2, 4, 8), BL=(128, 256, 512, 1024)),
    "sample_largest_kernel": rows((4, 8, 16), (1, 2, 3), BV=(1024, 2048, 4096, 8192)),
    "sample_weights_kernel": rows((4, 8, 16), (1, 2), BV=(512, 1024, 2048, 4096)),
    "sample_draw_kernel": rows((4, 8, 16), (1, 2, 3), BM=(2, 4, 8), BV=(512, 1024, 2048)),
    # attention
    "cached_decode_kernel": rows(
        (2, 4, 8), (1, 2, 3, 4), SPLIT=(64, 128, 256, 512), BN=(16, 32, 64)
    ),
    "attention_forward_kernel": rows((4, 8), (1, 2, 3), BM=(64, 128), BN=(32, 64, 128)),
    "attention_dq_kernel": rows((4, 8), (1, 2, 3), BM=(64, 128), BN=(32, 64, 128)),
    "attention_dkv_kernel": rows((4, 8), (1, 2, 3), BM=(32, 64, 128), BN=(64, 128)),
    "cached_join_kernel": rows((1, 2, 4), BS=(4, 8, 16)),
    "cached_extend_kernel": rows((4, 8), (1, 2, 3), BM=(32, 64, 128), BN=(32, 64, 128)),
    # products
    "lora_linear_forward": forms("fused", "split", "addmm"),
    "lora_linear_backward": forms("kernels", "addmm"),
    "lora_down_kernel": rows((4, 8), (2, 3, 4), BM=(16, 32, 64, 128), BK=(32, 64, 128)),
    "lora_linear_kernel": rows(
        (4, 8), (2, 3, 4), BM=(16, 64, 128), BN=(64, 128, 256), BK=(32, 64, 128), GROUP=(8,)
    ),
    "lora_up_backward_kernel": rows((4, 8), (1, 2, 3), BM=(64, 128, 256), BN=(32, 64, 128)),
    "lora_da_kernel": rows((4, 8), (1, 2, 3), BM=(32, 64), BK=(64, 128), CHUNK=(512, 1024, 2048)),
    "lora_dx_kernel": rows(
        (4, 8), (2, 3, 4), BM=(16, 64, 128), BN=(64, 128, 256), BK=(32, 64), GROUP=(8,)
    ),
    "cross_entropy_slices_kernel": rows(
        (4, 8), (2, 3, 4), BN=(64, 128), BV=(128, 256), BD=(32, 64), SLICE=(512, 1024, 2048)
    ),
    "cross_entropy_window_kernel": rows(
        (4, 8), (2, 3, 4), BN=(64, 128), BV=(128, 256), BD=(32, 64)
    ),
}

# The tile of the first decides how much the second has to do.
TIMED_WITH = {
    "sum_of_squares_kernel": "root_of_sum_kernel",
    "cached_decode_kernel": "cached_join_kernel",
    "lora_da_kernel": "lora_reduce_kernel",
    "cross_entropy_slices_kernel": "cross_entropy_combine_kernel",
}


# ---- what to tune


@dataclass(frozen=True)
class Place:
    """Where is measured, and with what."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    flush: Tensor | None  # None: the interpreter, by wall clock

    @property
    def dry(self) -> bool:
        return self.flush is None

    @property
    def device_class(self) -> str:
        return tiles.device_class(self.device)


@dataclass(frozen=True)
class Case:
    """An operation of a table at a shape."""

    spec: Spec
    ops: Ops
    shape: tuple[int, ...]

    def looks_up(self, place: Place) -> list[tuple[str, str, dict]]:
        """(kernel, its first shape class, row) of every look into the table; nothing is run.

        None where there is nothing to do: a look-up for an empty grid teaches nothing.
        """
        seen, find = [], tiles._row

        def noted(kernel: str, device: str, shapes: tuple[str, ...]) -> dict:
            row = find(kernel, device, shapes)
            seen.append((kernel, (*shapes, "any")[0], dict(row)))
            return row

        tiles._row = noted
        try:
            args = (self.spec, self.ops, self.shape, place.dtype, place.device_class)
            launches = record(*args)
        finally:
            tiles._row = find
        return [] if any(0 in launch.grid for launch in launches) else seen

    def inputs(self, place: Place) -> dict[str, Any]:
        """Fresh copies of the same inputs every time."""
        return cast(_host_inputs(self, place.dtype), place.dtype, place.device)


@functools.lru_cache(maxsize=32)
def _host_inputs(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return cast(case.spec.make_inputs(case.shape, torch.Generator().manual_seed(0)), dtype)


@dataclass
class Search:
    """One row of the table, the cases that look it up, and those that prove a candidate."""

    kernel: str
    shape_class: str
    present: dict[str, Any]
    cases: list[Case] = field(default_factory=list)
    proofs: list[Case] = field(default_factory=list)

    def candidates(self) -> list[dict[str, Any]]:
        """Rows to try, those with the fewest differences from the present one first."""
        tried = [self.present | row for row in CANDIDATES[self.kernel]]
        tried = [row for row in tried if row != self.present]
        return sorted(tried, key=lambda row: sum(row[k] != v for k, v in self.present.items()))


@contextlib.contextmanager
def instead(kernel: str, row: dict[str, Any]) -> Iterator[None]:
    """Inside, every look-up for the kernel finds this row."""
    tiles.overrides[kernel] = dict(row)
    try:
        yield
    finally:
        del tiles.overrides[kernel]


def spread(cases: list[Case], most: int) -> list[Case]:
    """At most so many of the cases, from the smallest to the largest."""
    by_size = sorted(cases, key=lambda case: sum(case.shape))
    if len(by_size) <= most:
        return by_size
    return [by_size[round(i * (len(by_size) - 1) / (most - 1))] for i in range(most)]


def searches(wanted: str, place: Place) -> list[Search]:
    """Every row that a case looks up for a kernel, or an operation, whose name has `wanted`."""
    found: dict[tuple[str, str], Search] = {}
    for spec in specs_of(wanted):
        small = sorted(spec.interpreter_shapes or spec.test_shapes, key=sum)
        for ops in tables(spec):
            proofs: dict[str, Case] = {}  # the largest small shape that reaches the kernel
            for shape in reversed(small) if place.dry else small:
                case = Case(spec, ops, shape)
                proofs.update({kernel: case for kernel, *_ in case.looks_up(place)})
            for shape in small if place.dry else dict.fromkeys(spec.bench_shapes):
                case = Case(spec, ops, shape)
                rehearsed = {kernel for kernel, _ in found} if place.dry else set()
                for kernel, shape_class, row in case.looks_up(place):
                    named = wanted in kernel or wanted in spec.name
                    if not named or kernel not in proofs or kernel in rehearsed:
                        continue  # what no small shape reaches cannot be proved
                    new = Search(kernel, shape_class, row)
                    search = found.setdefault((kernel, shape_class), new)
                    for case_list, one in ((search.cases, case), (search.proofs, proofs[kernel])):
                        if one not in case_list:
                            case_list.append(one)
    for search in found.values():
        search.cases = spread(search.cases, CASES)
    return list(found.values())


# ---- measuring


@dataclass(frozen=True)
class Run:
    """A case that has been run with a row: how to repeat what is timed, and the outputs."""

    again: Callable[[], None]
    outputs: dict[str, Tensor]


def run(case: Case, place: Place, kernel: str, row: dict[str, Any]) -> Run:
    """Run the case with `row` for `kernel`. Its launches are repeated; all, if it has none."""
    names = {kernel, TIMED_WITH.get(kernel)}
    launches, inputs = [], case.inputs(place)

    def note(which: Any, grid: tuple[int, ...], args: tuple, options: dict) -> None:
        if which.__name__ in names:
            launches.append((which, grid, args, options))
        _triton.recorder = None
        try:
            _triton.launch(which, grid, *args, **options)
        finally:
            _triton.recorder = note

    def whole() -> None:
        with instead(kernel, row):
            case.spec.run(case.ops, inputs)

    def launched() -> None:
        for which, grid, args, options in launches:
            _triton.launch(which, grid, *args, **options)

    _triton.recorder = note
    try:
        with instead(kernel, row):
            outputs = case.spec.run(case.ops, inputs)
    finally:
        _triton.recorder = None
    return Run(launched if launches else whole, outputs)


def alike(ours: dict[str, Tensor], present: dict[str, Tensor]) -> bool:
    """Whether two rows give nearly the same: garbage at a large shape is found, rounding is not."""
    for name, want in present.items():
        if want.is_floating_point() and want.numel():
            difference = (ours[name].float() - want.float()).abs().max()
            if not difference <= 0.05 * want.float().abs().max():
                return False
    return True


def seconds(again: Callable[[], None], place: Place) -> float:
    """Time of one repetition."""
    if place.dry:
        started = time.perf_counter()
        again()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    place.flush.zero_()  # and while it runs, the host gets ahead of the card
    start.record()
    again()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def prove(search: Search, row: dict[str, Any], place: Place) -> None:
    """Hold the operation with this row to its definition; raises where it does not."""
    for case in search.proofs:
        with instead(search.kernel, row):
            check(case.spec, case.ops, REFERENCE, case.shape, place.dtype, str(place.device))


def ratio(search: Search, row: dict[str, Any], place: Place) -> float:
    """Time of `row` over the present row's, geometric mean over the cases."""
    logs = []
    for case in search.cases:
        ours = run(case, place, search.kernel, row)
        present = run(case, place, search.kernel, search.present)
        assert alike(ours.outputs, present.outputs), f"other outputs at {case.shape}"
        pairs = []
        for n in range(place.repeats):  # in turn, and each goes first as often as the other
            order = (ours, present) if n % 2 else (present, ours)
            took = {id(r): seconds(r.again, place) for r in order}
            pairs.append((took[id(ours)], took[id(present)]))
        mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        logs.append(math.log(mine / theirs))
    return math.exp(statistics.mean(logs))


@dataclass
class Outcome:
    """What came of a search."""

    search: Search
    best: dict[str, Any]
    ratio: float = 1.0
    tried: int = 0
    left: int = 0  # not tried: no time
    refused: dict[str, int] = field(default_factory=dict)  # reason -> candidates


def explore(search: Search, place: Place, until: float, most: int | None) -> Outcome:
    """Try candidates until the time is up."""
    outcome = Outcome(search, search.present)
    limit = math.inf if place.dry else GAIN  # a rehearsal always has something to write
    name = f"{search.kernel} {search.shape_class}"
    bar = progress(search.candidates()[:most], desc=name, leave=False)
    for row in bar:
        if time.monotonic() > until:
            outcome.left += 1
            continue
        outcome.tried += 1
        try:
            prove(search, row, place)
            found = ratio(search, row, place)
            if found < limit:  # twice: the luckiest of many looks fast once
                found = max(found, ratio(search, row, place))
        except Exception as error:  # the compiler's, the check's, the launcher's
            reason = type(error).__name__
            outcome.refused[reason] = outcome.refused.get(reason, 0) + 1
            if not place.dry:
                torch.cuda.synchronize()  # raises again where the card itself is lost
            continue
        if found < limit:
            outcome.best, outcome.ratio, limit = row, found, found
            bar.set_postfix_str(f"{1 / found:.2f}x")
    return outcome


# ---- writing


def keep(outcomes: list[Outcome], device_class: str, origin: str, folder: Path) -> list[Path]:
    """Write the rows that won into `folder`, each operation's file whole; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted(tiles.FOLDER.glob("*.json")):
        existing = folder / path.name
        content = json.loads((existing if existing.exists() else path).read_text())
        won = [o for o in outcomes if o.search.kernel in content and o.best is not o.search.present]
        for outcome in won:
            by_class = content[outcome.search.kernel].setdefault(device_class, {})
            by_class[outcome.search.shape_class] = outcome.best | {"from": origin}
        if won:
            tiles.write(existing, content)
            written.append(existing)
    tiles.table.cache_clear()
    tiles._row.cache_clear()
    return written


def origin(place: Place) -> str:
    card = "the interpreter, rehearsed"
    if not place.dry:
        card = torch.cuda.get_device_name(place.device)
    versions = f"triton {_triton.triton.__version__}, torch {torch.__version__}"
    return f"measured on {card}, {versions}, {datetime.now(timezone.utc):%Y-%m-%d}"


# ---- the command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only those whose name contains this")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=1800, help="in all")
    parser.add_argument("--repeats", type=int, default=20, help="of a measurement")
    parser.add_argument("--out", type=Path, help="folder to write to; kernels/tiles if not given")
    parser.add_argument("--dry", action="store_true", help="rehearse without a GPU")
    return parser.parse_args()


def place_for(args: argparse.Namespace) -> Place:
    """The GPU, or the interpreter for --dry; says why and ends where there is neither."""
    if args.dry:
        if args.out is None or args.out.resolve() == tiles.FOLDER:
            sys.exit("--dry measures nothing real: give it a folder of its own by --out")
        if not _triton.INTERPRETED:
            command = [sys.executable, "-m", "benchmarks.tune", *sys.argv[1:]]
            os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
        return Place(torch.device("cpu"), torch.float32, 2, None)
    reason = _triton.usable("cuda") or ("" if torch.cuda.is_available() else "there is no GPU here")
    if reason:
        print(f"nothing can be measured: {reason}; --dry rehearses without one", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", torch.cuda.current_device())
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
    return Place(device, DTYPES[args.dtype], args.repeats, flush)


def main() -> int:
    args = parse_args()
    place = place_for(args)
    started = time.monotonic()
    work = searches(args.kernel, place)
    outcomes = []
    for n, search in enumerate(work):
        now = time.monotonic()
        share = (started + args.seconds - now) / (len(work) - n)
        try:
            outcomes.append(explore(search, place, now + share, 2 if args.dry else None))
        except (RuntimeError, KeyboardInterrupt) as error:  # what was found so far is written
            print(f"ended in {search.kernel}: {type(error).__name__} {error}")
            break
    written = keep(outcomes, place.device_class, origin(place), args.out or tiles.FOLDER)
    lines = [["kernel", "class", "tried", "refused", "no time", "speed", "row"]]
    for o in outcomes:
        refused = " ".join(f"{n} {reason}" for reason, n in o.refused.items()) or "-"
        row = "kept" if o.best is o.search.present else json.dumps(o.best)
        where = [o.search.kernel, o.search.shape_class]
        lines.append([*where, str(o.tried), refused, str(o.left), f"{1 / o.ratio:.2f}x", row])
    print(table(lines))
    for path in written:
        print(f"wrote {path}")
    record = {
        "benchmark": "tune",
        "from": origin(place),
        "device_class": place.device_class,
        "seconds": round(time.monotonic() - started, 1),
        "rows": lines[1:],
        "written": [str(path) for path in written],
    }
    print(json.dumps(record))
    return 0 if len(outcomes) == len(work) else 1


if __name__ == "__main__":
    sys.exit(main())
