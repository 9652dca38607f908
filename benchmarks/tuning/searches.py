"""What benchmarks/tuning/tune.py searches: rows of the table, their cases, their order.

A row is a kernel, or a public function of a form, at a shape class. Which shapes look it up, and
which kernels they compile, is recorded; nothing is run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks._common import Launch, record, specs_of, tables
from benchmarks.clock import Clock
from benchmarks.operations import WORK, make_inputs, rows_of
from benchmarks.tuning.ahead import Target
from benchmarks.tuning.candidates import FORM_CALLS, TIMED_WITH, WORTH, candidates_of
from kernels.launch import tile_config
from kernels.registry import REFERENCE, SPECS, Ops
from kernels.spec import Spec, cast


@dataclass(frozen=True)
class Place:
    """Where is measured, and with what."""

    device: torch.device
    dtype: torch.dtype
    clock: Clock
    target: Target | None = None  # None: the interpreter, where nothing is compiled
    repeats: int = 30  # pairs at most

    @property
    def dry(self) -> bool:
        return self.target is None

    @property
    def device_class(self) -> str:
        return tile_config.device_class(self.device)


@dataclass(frozen=True)
class Case:
    """An operation of a table at a shape."""

    spec: Spec
    ops: Ops
    shape: tuple[int, ...]

    @functools.cache  # noqa: B019 (cases are few, and live as long as the process)
    def looks_up(self, place: Place, masters: bool = True) -> tuple[list, list[Launch]]:
        """[(kernel, its first shape class, row)] of the looks into the table; the launches.

        Nothing is run. Empty where there is nothing to do: an empty grid teaches nothing.
        """
        seen, find = [], tile_config._row

        def noted(kernel: str, device: str, shapes: tuple[str, ...]) -> dict:
            row = find(kernel, device, shapes)
            seen.append((kernel, (*shapes, "any")[0], dict(row)))
            return row

        tile_config._row = noted
        try:
            args = (self.spec, self.ops, self.shape, place.dtype, place.device_class, masters)
            launches = record(*args)
        finally:
            tile_config._row = find
        return ([], []) if any(0 in launch.grid for launch in launches) else (seen, launches)

    def tokens(self) -> int:
        return rows_of(self.spec.name, self.shape)

    def work(self) -> float:
        """Operations and bytes of its dearest call, for comparisons."""
        return max(
            sum(f(*self.shape, e=2)) for (name, _), f in WORK.items() if name == self.spec.name
        )

    def inputs(self, place: Place) -> dict[str, Any]:
        """Fresh copies of the same inputs every time, for some are written into."""
        return cast(
            _inputs(self.spec.name, self.shape, place.dtype, place.device), None, place.device
        )


@functools.lru_cache(maxsize=4)
def _inputs(operation: str, shape: tuple, dtype: torch.dtype, device: torch.device) -> dict:
    return make_inputs(operation, shape, dtype, str(device))


@dataclass
class Search:
    """One row of the table, the cases that look it up, and those that prove a candidate."""

    kernel: str
    shape_class: str
    present: dict[str, Any]
    cases: list[Case] = field(default_factory=list)  # the largest first
    proofs: list[Case] = field(default_factory=list)
    launches: int = 1  # of the largest case that are compiled apart
    also: list[Case] = field(default_factory=list)  # the largest in the other tables' forms

    @property
    def form(self) -> bool:
        return self.kernel in FORM_CALLS

    @property
    def names(self) -> tuple[str, ...]:
        """The kernels that are timed."""
        second = TIMED_WITH.get(self.kernel)
        return (self.kernel, second) if second else (self.kernel,)

    def candidates(self) -> list[dict[str, Any]]:
        """Rows to try, the likeliest first."""
        tried = [self.present | row for row in candidates_of(self.kernel, self.shape_class)]
        return [row for n, row in enumerate(tried) if row != self.present and row not in tried[:n]]


@contextlib.contextmanager
def instead(kernel: str, shape_class: str, row: dict[str, Any]) -> Iterator[None]:
    """Inside, look-ups for the kernel find this row: of the class, of every one for ""."""
    tile_config.overrides[kernel, shape_class] = dict(row)
    try:
        yield
    finally:
        del tile_config.overrides[kernel, shape_class]


def largest(cases: list[Case], most: int) -> list[Case]:
    """At most so many, the largest first: spread over the larger half of those of most tokens."""
    by_work = sorted(cases, key=Case.work, reverse=True)
    tokens = max(case.tokens() for case in cases)
    full = [case for case in by_work if case.tokens() == tokens]
    by_work = full if len(full) >= most else by_work
    if most == 1 or len(by_work) <= most:
        return by_work[:most]
    last = max(most, len(by_work) // 2) - 1
    return [by_work[round(i * last / (most - 1))] for i in range(most)]


def searches(wanted: list[str], place: Place, most: int = 3, rows: frozenset = frozenset()) -> list:
    """Every row that a case looks up for a kernel, or an operation, whose name has one of `wanted`.

    `rows`: only shapes of so many tokens. Those worth most come first.
    """
    found: dict[tuple[str, str], Search] = {}
    proofs: dict[tuple[str, Spec, str], Case] = {}  # kernel, operation, table -> a small shape
    for spec in specs_for(wanted):
        small = sorted(spec.interpreter_shapes or spec.test_shapes, key=sum)
        bench = [Case(spec, REFERENCE, s) for s in dict.fromkeys(spec.bench_shapes)]
        bench = [case.shape for case in bench if not rows or case.tokens() in rows]
        for n, ops in enumerate(tables(spec)):
            for shape in reversed(small) if place.dry else small:
                case = Case(spec, ops, shape)
                seen = case.looks_up(place, False)[0]
                proofs.update({(kernel, spec, ops.name): case for kernel, *_ in seen})
            shapes = small if place.dry else bench
            if n:  # a variant: for what only it reaches
                top = max((Case(spec, ops, s).tokens() for s in shapes), default=0)
                shapes = [s for s in shapes if Case(spec, ops, s).tokens() == top]
            for shape in shapes:
                case = Case(spec, ops, shape)
                rehearsed = {kernel for kernel, _ in found} if place.dry else set()
                for kernel, shape_class, row in case.looks_up(place)[0]:
                    named = any(w in kernel or w in spec.name for w in wanted)
                    proved = (kernel, spec, ops.name) in proofs
                    if not named or not proved or kernel in rehearsed:
                        continue  # what no small shape reaches cannot be proved
                    new = Search(kernel, shape_class, row)
                    search = found.setdefault((kernel, shape_class), new)
                    if all(case.shape != other.shape for other in search.cases):
                        search.cases.append(case)  # in the first of the tables that reach it
    for search in found.values():
        search.cases = largest(search.cases, most)
        settle_variants(search, place)
        for case in (*search.cases, *search.also):
            if (proof := proofs[search.kernel, case.spec, case.ops.name]) not in search.proofs:
                search.proofs.append(proof)
    return by_worth(list(found.values()))


def specs_for(wanted: list[str]) -> list[Spec]:
    """The specs that reach a kernel, or a form, whose name or operation has one of `wanted`."""
    found = {spec.name: spec for name in wanted for spec in specs_of(name)}
    for form in (f for f in FORM_CALLS if any(name in f for name in wanted)):
        found |= {name: spec for name, spec in SPECS.items() if form.startswith(f"{name}_")}
    return list(found.values())


def settle_variants(search: Search, place: Place) -> None:
    """Count the kernels that the largest case compiles; note the tables that compile others."""

    def made(case: Case) -> set[str]:
        launches = [x for x in case.looks_up(place)[1] if x.kernel.__name__ in search.names]
        mine = [x for x in launches if x.shape_class in (search.shape_class, "any")]
        return {f"{x.kernel.__name__} {x.options}" for x in mine}

    case = search.cases[0]
    first = made(case)
    search.launches = max(1, len(first))
    others = [Case(case.spec, ops, case.shape) for ops in tables(case.spec)]
    search.also = [other for other in others if made(other) - first]


def by_worth(work: list[Search]) -> list[Search]:
    """Worth most first: classes of large shapes before those of small ones, then by kernel."""
    top: dict[str, float] = {}
    for search in work:
        top[search.kernel] = max(top.get(search.kernel, 0.0), search.cases[0].work())

    def key(search: Search) -> tuple:
        size = search.cases[0].work()
        minor = size < top[search.kernel] / 4 or search.shape_class.startswith("fixed")
        worth = next(n for n, name in enumerate(WORTH) if search.kernel.startswith(name))
        return minor, worth, -size

    return sorted(work, key=key)
