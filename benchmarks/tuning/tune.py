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
candidates and says nothing about speed: it writes to --out only. The last line is JSON; on SIGTERM
too, with what is known by then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import DTYPES, Clock
from benchmarks.operations import CALLS
from benchmarks.tuning.ahead import Target, Task, Workers, in_parts, prepare
from benchmarks.tuning.candidates import FORM_CALLS
from benchmarks.tuning.searches import Case, Place, Search, searches
from engine.runtime.terminal import progress, table
from kernels.launch import tile_config, triton_launch
from kernels.launch.tile_config import Config, Lookup
from kernels.registry import REFERENCE
from kernels.spec import check

GAIN = 0.98  # of the present configuration's time: slower, and it stays
LOSING = 1.15  # times the present one's at the largest case: not looked at again
FINALISTS = 3  # candidates that are measured at the other cases too
PAIRS = 5  # of measurements at least; more as long as they fit into
SLOT = 20.0  # milliseconds of each of the two
FLUSH = 1 << 30  # bytes written before a measurement: meanwhile the host gets ahead of the card
PARTS = 4  # tasks that the launches of a whole operation are compiled in
COMPILE = 0.9  # seconds of a core for a kernel with products in a pipeline, roughly
SIMPLE = 0.3  # for another
MEASURE = 0.08  # seconds of a candidate at a case, roughly
RESERVE = 0.15  # of the budget at its end: forms are measured with the tiles known by then


# ---- measuring


@dataclass(frozen=True)
class Run:
    """A case after a run with a configuration: how to repeat the timed part, and the outputs."""

    again: Callable[[], Any]
    outputs: dict[str, Tensor]


def run(search: Search, case: Case, place: Place, config: Config) -> Run:
    """Run the case with `config`; the kernel's launches are timed, or the call of a form."""
    if search.form:
        return run_form(search, case, place, config)
    launches: list[tuple] = []
    looked_up: dict[str, str] = {}  # kernel -> shape class: a launch follows its look-up

    def note_lookup(lookup: Lookup) -> None:
        looked_up[lookup.kernel] = lookup.shape_class

    def note_launch(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict) -> None:
        name = kernel.__name__
        of_another_class = name == search.kernel and looked_up[name] != search.shape_class
        if name in search.names and not of_another_class:
            launches.append((kernel, grid, args, options))
        triton_launch.launch_now(kernel, grid, *args, **options)

    def launch_again() -> None:
        for kernel, grid, args, options in launches:
            triton_launch.launch(kernel, grid, *args, **options)

    with (
        triton_launch.recording_launches(note_launch),
        tile_config.watching(note_lookup),
        tile_config.overriding(search.with_config(config)),
    ):
        outputs = case.spec.run(case.ops, case.inputs(place))
    return Run(launch_again, kept(outputs))


def run_form(search: Search, case: Case, place: Place, config: Config) -> Run:
    """As `run`, for a configuration that names a form: the public function's call is timed."""
    call = CALLS[case.spec.name, FORM_CALLS[search.kernel]]
    inputs = case.inputs(place)
    override = search.with_config(config)

    def call_again() -> None:
        with tile_config.overriding(override):
            call.run(case.ops, inputs, saved)

    with tile_config.overriding(override):
        outputs = case.spec.run(case.ops, case.inputs(place))
        saved = call.saved(case.ops, inputs)
    return Run(call_again, kept(outputs))


def kept(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies: an in-place operation writes there again when it is repeated."""
    return {name: value.clone() for name, value in outputs.items()}


def alike(ours: dict[str, Tensor], present: dict[str, Tensor]) -> bool:
    """Whether the outputs are nearly the same: finds garbage at a large shape, ignores rounding."""
    for name, want in present.items():
        if want.is_floating_point() and want.numel():
            difference = (ours[name].float() - want.float()).abs().max()
            if not difference <= 0.05 * want.float().abs().max():
                return False
    return True


def compare(ours: Run, present: Run, place: Place) -> tuple[float, float]:
    """Median milliseconds of both, timed in turn; of two calls only where ours is far slower."""
    our_times: list[float] = []
    present_times: list[float] = []

    def time_pairs(count: int) -> None:
        pending = []
        for n in range(count):  # each goes first as often as the other
            if n % 2:
                our_time = place.clock.once(ours.again)
                present_time = place.clock.once(present.again)
            else:
                present_time = place.clock.once(present.again)
                our_time = place.clock.once(ours.again)
            pending.append((our_time, present_time))
        place.clock.wait()
        for our_time, present_time in pending:
            our_times.append(our_time())
            present_times.append(present_time())

    time_pairs(2)
    our_best, present_best = min(our_times), min(present_times)
    if our_best <= 2 * LOSING * present_best:
        fitting = int(SLOT / max(our_best, present_best, 1e-3))  # pairs
        time_pairs(min(max(PAIRS, fitting), place.repeats) - 2)
    return statistics.median(our_times), statistics.median(present_times)


def prove(search: Search, config: Config, place: Place) -> None:
    """Check the operation with this configuration against its definition; raises if it fails."""
    for case in search.proofs:
        with tile_config.overriding({(search.kernel, ""): config}):
            check(case.spec, case.ops, REFERENCE, case.shape, place.dtype, str(place.device))


# ---- searching


@dataclass
class Outcome:
    """The outcome of a search."""

    search: Search
    best: dict[str, Any]
    ratio: float = 1.0
    tried: int = 0
    slower: int = 0  # of them out after the largest case
    left: int = 0  # not tried: no time
    undecided: bool = False  # the finalists were not compared: no time
    refused: Counter = field(default_factory=Counter)  # reason -> candidates
    ms: tuple[float, float] | None = None  # the present one's at the largest case, the best one's


class Explorer:
    """One search in two steps: `screen` at the largest case, `decide` among the finalists."""

    def __init__(self, search: Search, place: Place, configs: list[Config]) -> None:
        self.search, self.place, self.configs = search, place, configs
        self.outcome = Outcome(search, search.present)
        self.outcome.left = len(search.candidates()) - len(configs)
        self.presents: dict[Case, Run] = {}
        self.finalists: list[Config] = []
        # by id of a configuration, at the largest case: its ratio; (its, the present one's) ms
        self.screened: dict[int, float] = {}
        self.at_largest: dict[int, tuple[float, float]] = {}
        self.done = False

    def ratio(self, config: Config, cases: list[Case]) -> float:
        """Time of `config` over the present configuration's, geometric mean over the cases."""
        logs = []
        for case in cases:
            if case not in self.presents:
                self.presents[case] = run(self.search, case, self.place, self.search.present)
            ours = run(self.search, case, self.place, config)
            assert alike(ours.outputs, self.presents[case].outputs), (
                f"other outputs at {case.shape}"
            )
            mine, theirs = compare(ours, self.presents[case], self.place)
            if case is self.search.cases[0]:
                self.outcome.ms = self.outcome.ms or (theirs, theirs)
                self.at_largest[id(config)] = (mine, theirs)
            logs.append(math.log(mine / theirs))
        return math.exp(statistics.mean(logs))

    def attempt(self, step: Callable[[], Any]) -> Any:
        """The result of the step; None, counted as refused, where it raises."""
        try:
            return step()
        except Exception as error:  # the compiler's, the check's, the launcher's
            self.outcome.refused[type(error).__name__] += 1
            self.place.clock.wait()  # raises again where the card itself is lost
            return None

    def screen(
        self, refused: Callable[[Config], str | None], until: float, pause: Callable
    ) -> None:
        """Every candidate at the largest case; `refused` says which did not compile, and why."""
        found = []
        for n, config in enumerate(self.configs):
            if time.monotonic() > until:
                self.outcome.left += len(self.configs) - n
                break
            if reason := refused(config):
                self.outcome.refused[reason] += 1
                continue
            self.outcome.tried += 1
            ratio = self.attempt(lambda config=config: self.ratio(config, self.search.cases[:1]))
            if ratio is not None and (ratio <= LOSING or self.place.dry):
                found.append((ratio, config))
                self.screened[id(config)] = ratio
            elif ratio is not None:
                self.outcome.slower += 1
            pause()
        found.sort(key=lambda pair: pair[0])
        self.finalists = [config for _, config in found[:FINALISTS]]
        self.done = not self.finalists
        self.presents.clear()

    def decide(
        self, refused: Callable[[Config], str | None], until: float, pause: Callable
    ) -> None:
        """The finalists at all cases; the best that wins again and is proved is taken."""
        limit = math.inf if self.place.dry else GAIN  # a rehearsal always has something to write
        ranked, others = [], self.search.cases[1:]

        def everywhere(config: Config) -> float:
            first, n = self.screened[id(config)], len(others)
            return (first * self.ratio(config, others) ** n) ** (1 / (n + 1)) if n else first

        for config in self.finalists:
            if time.monotonic() > until:
                self.outcome.undecided = not ranked
                break
            if reason := refused(config):
                self.outcome.refused[reason] += 1
                continue
            ratio = self.attempt(lambda config=config: everywhere(config))
            if ratio is not None and ratio < limit:
                ranked.append((ratio, config))
            pause()
        for ratio, config in sorted(ranked, key=lambda pair: pair[0]):

            def again(config: Config = config, ratio: float = ratio) -> float:
                prove(self.search, config, self.place)
                return max(ratio, self.ratio(config, self.search.cases))  # luck does not come twice

            found = self.attempt(again)
            pause()
            if found is not None and found < limit:
                self.outcome.best, self.outcome.ratio = config, found
                self.outcome.ms = self.at_largest[id(config)][::-1]
                break
        self.done = True
        self.presents.clear()


def tasks(case: Case, place: Place, **how: Any) -> list[Task]:
    """The case for the workers: without `names` all of its launches, in parts."""
    about = (case.spec.name, case.ops.name, case.shape, str(place.dtype).removeprefix("torch."))
    if "names" in how:
        return [Task(*about, **how)]
    return in_parts(PARTS, *about, **how)


def frozen(config: Config) -> tuple:
    return tuple(config.items())


class Turn:
    """A search whose next step waits for the workers."""

    def __init__(self, explorer: Explorer, urgency: int, workers: Workers | None) -> None:
        self.explorer, self.search, self.place = explorer, explorer.search, explorer.place
        self.urgency, self.workers = urgency, workers
        self.asked = self.screened = False
        self.presents: list[Task] = []
        self.by_config: dict[tuple, list[Task]] = {}
        self.won: tuple = ()  # the configurations that a form is measured with

    def ask(self, won: tuple = ()) -> None:
        """Have the next step compiled."""
        self.asked, self.won = True, won
        search, place, at = self.search, self.place, self.search.cases
        cases = at[1:] if self.screened else at[:1]
        configs = self.explorer.finalists if self.screened else self.explorer.configs
        self.presents = [t for case in cases for t in tasks(case, place, configs=won)]
        self.by_config = {frozen(config): [] for config in configs}
        proofs: list[Task] = []
        for config, to_compile in self.by_config.items():
            how = {"configs": (*won, (search.kernel, search.shape_class, config))}
            how |= {} if search.form else {"names": search.names}
            for case in (*cases, *(() if self.screened else search.also)):
                to_compile += tasks(case, place, **how)
            how = {"configs": ((search.kernel, "", config),), "masters": False}
            for case in search.proofs if self.screened and not proofs else ():
                proofs += tasks(case, place, **how)
        if self.workers:
            self.workers.want(self.presents, (self.urgency, 0))
            for to_compile in self.by_config.values():
                self.workers.want(to_compile, (self.urgency, 0))
            self.workers.want(proofs, (self.urgency, 1))  # of the best so far only

    def ready(self) -> bool:
        """Whether all of the step is compiled; proofs need not be, they compile here too."""
        lists = (self.presents, *self.by_config.values())
        return self.asked and not (self.workers and any(map(self.workers.missing, lists)))

    def why_refused(self, config: Config) -> str | None:
        """Why this configuration must not be taken; None if it may be."""
        if not self.workers:
            return None
        vetoes = not self.search.form
        return self.workers.why_refused(self.by_config[frozen(config)], vetoes)

    def take(self, until: float) -> None:
        """Measure the step that is ready."""
        pause = self.workers.poll if self.workers else lambda: None
        explorer = self.explorer
        if self.workers and (why := self.workers.why_refused(self.presents, vetoes=False)):
            explorer.outcome.refused[f"present configuration: {why}"] += 1
            explorer.outcome.left += 0 if self.screened else len(explorer.configs)
            explorer.done = True
            return
        step = explorer.decide if self.screened else explorer.screen
        won = {(kernel, at): dict(items) for kernel, at, items in self.won}
        with tile_config.overriding(won):
            step(self.why_refused, until, pause)
        self.screened = True


def explore(explorers: list[Explorer], workers: Workers | None, seconds: float) -> None:
    """Take the searches' steps as they are compiled, worth most first, until the time is up."""
    until = time.monotonic() + seconds
    turns = [Turn(explorer, n, workers) for n, explorer in enumerate(explorers) if explorer.configs]
    for turn in turns:
        if not turn.search.form:
            turn.ask()
    bar = progress(total=len(turns), desc="searches")
    try:
        while turns:
            for turn in turns:
                if turn.search.form and not turn.asked:
                    rest = [
                        t for t in turns if not t.search.form and related(t.search, turn.search)
                    ]
                    if not rest or time.monotonic() > until - RESERVE * seconds:
                        turn.ask(known(explorers))
            ready = next((turn for turn in turns if turn.ready()), None)
            if time.monotonic() > until:
                break
            if ready is None:
                workers.poll(0.1)
                continue
            bar.set_postfix_str(f"{ready.search.kernel} {ready.search.shape_class}")
            ready.take(until)
            if ready.explorer.done:
                turns.remove(ready)
                bar.update()
            else:
                ready.ask(ready.won)
    finally:  # also where a signal ends it: what was not tried is counted
        bar.close()
        for turn in turns:
            turn.explorer.outcome.left += 0 if turn.screened else len(turn.explorer.configs)
            turn.explorer.outcome.undecided = turn.screened


def related(search: Search, form: Search) -> bool:
    """Whether the form's time depends on what the search finds."""
    same = search.cases[0].spec is form.cases[0].spec
    return same and search.shape_class in (form.shape_class, "drop", "any")


def known(explorers: list[Explorer]) -> tuple:
    """The configurations that have won: (kernel, shape class, items)."""
    won = [e.outcome for e in explorers if e.outcome.best is not e.search.present]
    return tuple((o.search.kernel, o.search.shape_class, frozen(o.best)) for o in won)


def shares(work: list[Search], seconds: float, jobs: int) -> list[int]:
    """How many candidates of each search the time is enough for: of all lists the same part."""
    lengths = [len(search.candidates()) for search in work]
    both = list(zip(work, lengths, strict=True))
    first = final = 0.0  # seconds of a core
    for search, n in both:
        cost = search.launches * (COMPILE if search.present.get("num_stages", 1) > 1 else SIMPLE)
        first += cost * n
        final += cost * (FINALISTS * len(search.cases) + PARTS)
    compiled = (0.9 * seconds * max(1, jobs) - final) / max(1.0, first)
    measured = 0.5 * seconds / MEASURE / max(1, sum(lengths))  # the other half is the finalists'
    part = min(1.0, compiled, measured)
    return [min(n, max(2, round(n * part))) for n in lengths]


# ---- writing


def keep(outcomes: list[Outcome], device_class: str, origin: str, folder: Path) -> list[Path]:
    """Write the configurations that won into `folder`; returns the files, each of them whole."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted(tile_config.FOLDER.glob("*.json")):
        existing = folder / path.name
        content = json.loads((existing if existing.exists() else path).read_text())
        won = [o for o in outcomes if o.search.kernel in content and o.best is not o.search.present]
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
    """A line of the printed table; ms and best: of the present configuration and of the new one, at
    the largest case."""
    search = outcome.search
    refused = " ".join(f"{n} {reason}" for reason, n in outcome.refused.items()) or "-"
    ms = [f"{t:.4f}" for t in outcome.ms] if outcome.ms else ["-", "-"]
    verdict = "kept" if outcome.best is search.present else json.dumps(outcome.best)
    if outcome.undecided:
        verdict = "kept: finalists not decided, no time"
    counts = [str(outcome.tried), str(outcome.slower), refused, str(outcome.left)]
    return [search.kernel, search.shape_class, *counts, *ms, f"{1 / outcome.ratio:.2f}x", verdict]


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
    """The GPU, or the interpreter for --dry; says why and ends where there is neither."""
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is known by then is written
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
        chosen = zip(work, counts, strict=True)
        explorers = [Explorer(search, place, search.candidates()[:n]) for search, n in chosen]
        outcomes += [explorer.outcome for explorer in explorers]
        explore(explorers, workers, left)
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # what was found is written
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
