"""Measure candidate tile configurations on this GPU; write the fastest to kernels/launch/tiles.

    python -m benchmarks.tuning.tune
    python -m benchmarks.tuning.tune --kernel lora_linear,attention --rows 8192,4096 --seconds 75
    python -m benchmarks.tuning.tune --dry --kernel rms_norm --out /tmp/tiles

A search is a tile configuration that a benchmark shape looks up (a kernel at a shape class), with a
few shapes as its cases, the largest first. Worker processes compile every candidate ahead
(benchmarks.tuning.ahead), searches worth most first (benchmarks.tuning.candidates), and drop those
that fail, spill registers, serialise wgmma or need more shared memory than there is; meanwhile the
searches that are compiled are measured. At the largest case the launches of a candidate and of the
present configuration take turns, the L2 cache flushed before each; a time is the median. Candidates
more than 15 % slower are out; the best few are measured at the other cases too, and ranked by the
geometric mean of their ratio to the present one. The best replaces it if it wins by more than 2 %,
does so again in a second measurement, gives nearly the same outputs at every case, and passes the
operation's check against its definition in fp64 at a small shape; else the next is taken.
A kernel whose tile decides another's work is timed with it. Where a configuration names a form
instead of a tile, the public function is timed, after its kernels' tiles are known.

A budget too short for all candidates cuts every list by the same share, at least two are left.
`--dry` rehearses all but the compiling in triton's interpreter, which takes tiny shapes and two
candidates and says nothing about speed: it writes to --out only. The last line is JSON, also after
a SIGTERM, with the results so far.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.clock import DTYPES, Clock
from benchmarks.tuning.ahead import Target, Workers, prepare
from benchmarks.tuning.exploring import Explorer, Outcome
from benchmarks.tuning.measuring import PAIRS
from benchmarks.tuning.searches import Place, searches
from benchmarks.tuning.turns import explore, shares
from engine.runtime.terminal import table
from kernels.launch import tile_config, triton_launch

FLUSH = 1 << 30  # bytes written before a measurement: meanwhile the host gets ahead of the card

# ---- writing


def keep(outcomes: list[Outcome], device_class: str, origin: str, folder: Path) -> list[Path]:
    """Write the configurations that won into `folder`; returns the files, each of them whole."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted(tile_config.FOLDER.glob("*.json")):
        existing = folder / path.name
        content = json.loads((existing if existing.exists() else path).read_text())
        won = []
        for outcome in outcomes:
            if outcome.search.kernel in content and outcome.best is not outcome.search.present:
                won.append(outcome)
        for outcome in won:
            by_class = content[outcome.search.kernel].setdefault(device_class, {})
            by_class[outcome.search.shape_class] = outcome.best | {"from": origin}
        if won:
            tile_config.write(existing, content)
            written.append(existing)
    tile_config.forget()
    return written


def origin(place: Place) -> str:
    card = "the interpreter, rehearsed"
    if not place.dry:
        card = torch.cuda.get_device_name(place.device)
    versions = f"triton {triton_launch.triton.__version__}, torch {torch.__version__}"
    return f"measured on {card}, {versions}, {datetime.now(timezone.utc):%Y-%m-%d}"


COLUMNS = [
    "kernel",
    "class",
    "tried",
    "slower",
    "refused",
    "no time",
    "ms",
    "best",
    "speed",
    "config",
]


def line(outcome: Outcome) -> list[str]:
    """A line of the printed table, as COLUMNS names its cells.

    "ms" is of the present configuration and "best" of the new one, both at the largest case.
    """
    search = outcome.search
    present_ms, best_ms = "-", "-"
    if outcome.ms is not None:
        present_ms, best_ms = f"{outcome.ms[0]:.4f}", f"{outcome.ms[1]:.4f}"
    if outcome.undecided:
        verdict = "kept: finalists not decided, no time"
    elif outcome.best is search.present:
        verdict = "kept"
    else:
        verdict = json.dumps(outcome.best)
    return [
        search.kernel,
        search.shape_class,
        str(outcome.tried),
        str(outcome.slower),
        " ".join(f"{n} {reason}" for reason, n in outcome.refused.items()) or "-",
        str(outcome.left),
        present_ms,
        best_ms,
        f"{1 / outcome.ratio:.2f}x",
        verdict,
    ]


# ---- the command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only names with one of these in them: a,b")
    parser.add_argument("--rows", default="", help="only shapes of so many tokens, as 8192,4096")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=1800, help="in all")
    parser.add_argument("--cases", type=int, default=3, help="shapes a finalist is measured at")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument(
        "--out", type=Path, help="folder to write to; kernels/launch/tiles if not given"
    )
    parser.add_argument("--dry", action="store_true", help="rehearse without a GPU")
    args = parser.parse_args()
    if not all(n.isdecimal() for n in args.rows.split(",") if n):
        parser.error(f"--rows {args.rows}: expected numbers of tokens, as 8192,4096")
    if args.cases < 1 or args.jobs < 0:
        parser.error(f"--cases {args.cases} --jobs {args.jobs}: expected at least 1 and 0")
    return args


def place_for(args: argparse.Namespace) -> Place:
    """The GPU, or the interpreter for --dry; where there is neither it ends with the reason."""
    if args.dry:
        if args.out is None or args.out.resolve() == tile_config.FOLDER:
            sys.exit("--dry measures nothing real: give it a folder of its own by --out")
        if not triton_launch.INTERPRETED:
            command = [sys.executable, "-m", "benchmarks.tuning.tune", *sys.argv[1:]]
            os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
        return Place(torch.device("cpu"), torch.float32, Clock("cpu", 0.0), None, PAIRS)
    reason = triton_launch.why_unavailable("cuda")
    if reason is None and not torch.cuda.is_available():
        reason = "there is no GPU here"
    if reason is not None:
        print(f"nothing can be measured: {reason}; --dry rehearses without one", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", torch.cuda.current_device())
    clock = Clock(str(device), 0.0)
    clock.flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
    return Place(device, DTYPES[args.dtype], clock, Target.of(device))


def main() -> int:
    args = parse_args()
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the results so far are written
    if args.jobs and not args.dry:
        prepare()
    place = place_for(args)
    workers = Workers(args.jobs, place.target) if args.jobs and not place.dry else None
    outcomes: list[Outcome] = []
    ended = None
    try:
        tokens = frozenset(int(n) for n in args.rows.split(",") if n)
        work = searches(args.kernel.split(","), place, args.cases, tokens)
        if not work:
            raise ValueError(
                f"no tile configuration has --kernel {args.kernel!r} in its name and --rows "
                f"{args.rows!r}"
            )
        left = args.seconds - (time.monotonic() - started)
        counts = [2] * len(work) if place.dry else shares(work, left, args.jobs)
        explorers = []
        for search, count in zip(work, counts, strict=True):
            explorer = Explorer(search, place, search.candidates()[:count])
            explorers.append(explorer)
            outcomes.append(explorer.outcome)
        explore(explorers, workers, left)
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # the results so far are written
        ended = f"{type(error).__name__}: {error}"
        print(f"ended early by {ended}")
    if workers:
        workers.close()
    written = keep(outcomes, place.device_class, origin(place), args.out or tile_config.FOLDER)
    lines = [line(outcome) for outcome in outcomes]
    print(table([COLUMNS, *lines]))
    for path in written:
        print(f"wrote {path}")
    document = {
        "benchmark": "tune",
        "from": origin(place),
        "device_class": place.device_class,
        "seconds": round(time.monotonic() - started, 1),
        "compiled": len(workers.outcomes) if workers else 0,
        "ended": ended,
        "columns": COLUMNS,
        "rows": lines,
        "written": [str(path) for path in written],
    }
    print(json.dumps(document))
    return 1 if ended else 0


if __name__ == "__main__":
    sys.exit(main())
