"""The searches of benchmarks/tuning/tune.py: tile configurations, their cases, their order.

A search is for the configuration of a kernel, or of a public function that has several forms, at a
shape class. Which shapes look it up, and which kernels they compile, is recorded; nothing is run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks._common import Launch, record, specs_of, tables
from benchmarks.clock import Clock
from benchmarks.operations import make_inputs
from benchmarks.tuning.ahead import Target
from benchmarks.tuning.candidates import FORM_CALLS, TIMED_WITH, WORTH, candidates_of
from benchmarks.work import WORK, rows_of
from kernels.launch import tile_config
from kernels.launch.tile_config import Config, Lookup
from kernels.registry import SPECS, Ops
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
    def looks_up(self, place: Place, masters: bool = True) -> tuple[list[Lookup], list[Launch]]:
        """The look-ups of tile configurations, and the launches. Nothing is run.

        Both are empty where a grid is: nothing can be measured there.
        """
        lookups: list[Lookup] = []
        with tile_config.watching(lookups.append):
            launches = record(
                self.spec, self.ops, self.shape, place.dtype, place.device_class, masters
            )
        if any(0 in launch.grid for launch in launches):
            return [], []
        return lookups, launches

    def tokens(self) -> int:
        return rows_of(self.spec.name, self.shape)

    def work(self) -> float:
        """Operations and bytes together of its most expensive call: only for comparisons."""
        most = 0.0
        for (operation, _), work in WORK.items():
            if operation == self.spec.name:
                operations, size = work(*self.shape, e=2)
                most = max(most, operations + size)
        return most

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
    """One tile configuration, the cases that look it up, and those that prove a candidate."""

    kernel: str
    shape_class: str
    present: Config
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

    def candidates(self) -> list[Config]:
        """Configurations to try, the likeliest first."""
        found: list[Config] = []
        for changes in candidates_of(self.kernel, self.shape_class):
            config = self.present | changes
            if config != self.present and config not in found:
                found.append(config)
        return found

    def with_config(self, config: Config) -> dict[tuple[str, str], Config]:
        """For `tile_config.overriding`: look-ups of this search find `config`."""
        return {(self.kernel, self.shape_class): config}


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


def searches(
    patterns: list[str], place: Place, most: int = 3, only_tokens: frozenset[int] = frozenset()
) -> list[Search]:
    """A search for every configuration that a case looks up, the most valuable first.

    Only for kernels and operations whose name contains one of `patterns`; with `only_tokens`, only
    for shapes of so many tokens.
    """
    found: dict[tuple[str, str], Search] = {}
    proofs: dict[tuple[str, Spec, str], Case] = {}  # kernel, operation, table -> a small shape
    for spec in specs_for(patterns):
        small = sorted(spec.interpreter_shapes or spec.test_shapes, key=sum)
        bench = []
        for shape in dict.fromkeys(spec.bench_shapes):
            if not only_tokens or rows_of(spec.name, shape) in only_tokens:
                bench.append(shape)
        for n, ops in enumerate(tables(spec)):
            for shape in reversed(small) if place.dry else small:
                case = Case(spec, ops, shape)
                lookups, _ = case.looks_up(place, False)
                for lookup in lookups:
                    proofs[lookup.kernel, spec, ops.name] = case
            shapes = small if place.dry else bench
            if n:  # a variant: the shapes of most tokens are enough for the kernels only it reaches
                top = max((rows_of(spec.name, shape) for shape in shapes), default=0)
                shapes = [shape for shape in shapes if rows_of(spec.name, shape) == top]
            for shape in shapes:
                case = Case(spec, ops, shape)
                rehearsed = {kernel for kernel, _ in found} if place.dry else set()
                lookups, _ = case.looks_up(place)
                for kernel, shape_class, config in lookups:
                    is_named = any(part in kernel or part in spec.name for part in patterns)
                    can_be_proved = (kernel, spec, ops.name) in proofs  # a small shape reaches it
                    if not is_named or not can_be_proved or kernel in rehearsed:
                        continue
                    new = Search(kernel, shape_class, config)
                    search = found.setdefault((kernel, shape_class), new)
                    if all(case.shape != other.shape for other in search.cases):
                        search.cases.append(case)  # in the first of the tables that reach it
    for search in found.values():
        search.cases = largest(search.cases, most)
        settle_variants(search, place)
        for case in (*search.cases, *search.also):
            proof = proofs[search.kernel, case.spec, case.ops.name]
            if proof not in search.proofs:
                search.proofs.append(proof)
    return by_worth(list(found.values()))


def specs_for(patterns: list[str]) -> list[Spec]:
    """The specs that reach a kernel, or a form, whose name or operation has one of `patterns`."""
    found = {}
    for pattern in patterns:
        for spec in specs_of(pattern):
            found[spec.name] = spec
    for form in FORM_CALLS:
        if any(pattern in form for pattern in patterns):
            for name, spec in SPECS.items():
                if form.startswith(f"{name}_"):
                    found[name] = spec
    return list(found.values())


def settle_variants(search: Search, place: Place) -> None:
    """Count the kernels that the largest case compiles; note the tables that compile others."""

    def made(case: Case) -> set[str]:
        _, launches = case.looks_up(place)
        found = set()
        for launch in launches:
            name = launch.kernel.__name__
            if name in search.names and launch.shape_class in (search.shape_class, "any"):
                found.add(f"{name} {launch.options}")
        return found

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
        is_minor = size < top[search.kernel] / 4 or search.shape_class.startswith("fixed")
        rank = 0
        while not search.kernel.startswith(WORTH[rank]):  # the last, "", begins every name
            rank += 1
        return is_minor, rank, -size

    return sorted(work, key=key)
