"""Runs a case with a tile configuration, times it against the present one, and proves it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.operations import CALLS
from benchmarks.tuning.candidates import FORM_CALLS
from benchmarks.tuning.searches import Case, Place, Search
from kernels.launch import tile_config, triton_launch
from kernels.launch.tile_config import Config, Lookup
from kernels.registry import REFERENCE
from kernels.spec import check

LOSING = 1.15  # times the present configuration's time: a candidate slower than this is dropped
PAIRS = 5  # fewest pairs of measurements
SLOT = 20.0  # milliseconds that the pairs of measurements should fill


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
