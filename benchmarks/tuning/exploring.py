"""One search in two steps: all candidates at the largest case, then the finalists at every case."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.tuning.measuring import LOSING, Run, alike, compare, prove, run
from benchmarks.tuning.searches import Case, Place, Search
from kernels.launch.tile_config import Config

GAIN = 0.98  # times the present configuration's time: a candidate must be faster than this
FINALISTS = 3  # candidates that are measured at the other cases too


@dataclass
class Outcome:
    """The outcome of a search."""

    search: Search
    best: dict[str, Any]  # the configuration to use: the present one where no candidate won
    ratio: float = 1.0  # time of `best` over the present configuration's
    tried: int = 0  # candidates
    slower: int = 0  # candidates dropped after the largest case
    left: int = 0  # candidates not tried for lack of time
    undecided: bool = False  # whether the finalists were not compared for lack of time
    refused: Counter = field(default_factory=Counter)  # reason -> candidates
    ms: tuple[float, float] | None = None  # at the largest case: of the present one, of `best`


class Explorer:
    """One search in two steps: `screen` at the largest case, `decide` among the finalists."""

    def __init__(self, search: Search, place: Place, configs: list[Config]) -> None:
        self.search = search
        self.place = place
        self.configs = configs
        self.outcome = Outcome(search, search.present)
        self.outcome.left = len(search.candidates()) - len(configs)
        self.presents: dict[Case, Run] = {}  # runs of the present configuration
        self.finalists: list[Config] = []
        # At the largest case, by id of a configuration: its ratio to the present one, and the
        # milliseconds of itself and of the present one.
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
            ms, present_ms = compare(ours, self.presents[case], self.place)
            if case is self.search.cases[0]:
                self.outcome.ms = self.outcome.ms or (present_ms, present_ms)
                self.at_largest[id(config)] = (ms, present_ms)
            logs.append(math.log(ms / present_ms))
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
        self, why_refused: Callable[[Config], str | None], until: float, pause: Callable
    ) -> None:
        """Measure every candidate at the largest case; `why_refused` says why one is left out."""
        found = []
        for n, config in enumerate(self.configs):
            if time.monotonic() > until:
                self.outcome.left += len(self.configs) - n
                break
            reason = why_refused(config)
            if reason is not None:
                self.outcome.refused[reason] += 1
                continue
            self.outcome.tried += 1
            ratio = self.attempt(lambda config=config: self.ratio(config, self.search.cases[:1]))
            if ratio is not None:
                if ratio <= LOSING or self.place.dry:
                    found.append((ratio, config))
                    self.screened[id(config)] = ratio
                else:
                    self.outcome.slower += 1
            pause()
        found.sort(key=lambda pair: pair[0])
        self.finalists = [config for _, config in found[:FINALISTS]]
        self.done = not self.finalists
        self.presents.clear()

    def decide(
        self, why_refused: Callable[[Config], str | None], until: float, pause: Callable
    ) -> None:
        """Measure the finalists at every case; take the best that wins again and is proved."""
        limit = math.inf if self.place.dry else GAIN  # a rehearsal always has something to write
        ranked = []
        for config in self.finalists:
            if time.monotonic() > until:
                self.outcome.undecided = not ranked
                break
            reason = why_refused(config)
            if reason is not None:
                self.outcome.refused[reason] += 1
                continue
            ratio = self.attempt(lambda config=config: self.ratio_everywhere(config))
            if ratio is not None and ratio < limit:
                ranked.append((ratio, config))
            pause()
        ranked.sort(key=lambda pair: pair[0])
        for ratio, config in ranked:
            again = self.attempt(lambda config=config: self.proved_ratio(config))
            pause()
            if again is None:
                continue
            ratio = max(ratio, again)  # the first measurement may have been lucky
            if ratio < limit:
                ms, present_ms = self.at_largest[id(config)]
                self.outcome.best = config
                self.outcome.ratio = ratio
                self.outcome.ms = (present_ms, ms)
                break
        self.done = True
        self.presents.clear()

    def ratio_everywhere(self, config: Config) -> float:
        """The ratio over all cases, from the screening at the largest and the others measured."""
        at_largest = self.screened[id(config)]
        others = self.search.cases[1:]
        if not others:
            return at_largest
        product = at_largest * self.ratio(config, others) ** len(others)
        return product ** (1 / (len(others) + 1))

    def proved_ratio(self, config: Config) -> float:
        """The ratio at all cases, measured again; raises where the configuration is wrong."""
        prove(self.search, config, self.place)
        return self.ratio(config, self.search.cases)
