"""Takes the steps of all searches in the order in which the worker processes have compiled them."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.tuning.ahead import Task, Workers, in_parts
from benchmarks.tuning.exploring import FINALISTS, Explorer
from benchmarks.tuning.searches import Case, Place, Search
from engine.runtime.terminal import progress
from kernels.launch import tile_config
from kernels.launch.tile_config import Config

PARTS = 4  # tasks that the launches of a whole operation are compiled in
COMPILE = 0.9  # seconds of a core for a kernel with products in a pipeline, roughly
SIMPLE = 0.3  # for another
MEASURE = 0.08  # seconds of a candidate at a case, roughly
RESERVE = 0.15  # of the budget at its end: forms are measured with the tiles known by then


def tasks(case: Case, place: Place, **how: Any) -> list[Task]:
    """The workers' tasks for a case: the kernels `names`, else all of its launches in parts."""
    dtype = str(place.dtype).removeprefix("torch.")
    about = (case.spec.name, case.ops.name, case.shape, dtype)
    if "names" in how:
        return [Task(*about, **how)]
    return in_parts(PARTS, *about, **how)


def frozen(config: Config) -> tuple:
    """The configuration as a tuple, which can be a key and travel to a worker."""
    return tuple(config.items())


def do_nothing() -> None:
    """The pause between two measurements where there are no workers to poll."""


class Turn:
    """A search whose next step waits for the workers."""

    def __init__(self, explorer: Explorer, urgency: int, workers: Workers | None) -> None:
        self.explorer = explorer
        self.search = explorer.search
        self.place = explorer.place
        self.urgency = urgency
        self.workers = workers
        self.asked = False  # whether the workers have the next step's tasks
        self.screened = False  # whether the first step is done
        self.presents: list[Task] = []  # tasks of the present configuration
        self.by_config: dict[tuple, list[Task]] = {}  # tasks of each candidate
        self.won: tuple = ()  # the configurations that a form is measured with

    def ask(self, won: tuple = ()) -> None:
        """Give the workers the tasks of the next step."""
        self.asked = True
        self.won = won
        search = self.search
        if self.screened:
            configs = self.explorer.finalists
            cases = search.cases[1:]
            compiled_only = []
        else:
            configs = self.explorer.configs
            cases = search.cases[:1]
            compiled_only = search.also
        self.presents = []
        for case in cases:
            self.presents += tasks(case, self.place, configs=won)
        self.by_config = {}
        for config in configs:
            how = {"configs": (*won, (search.kernel, search.shape_class, frozen(config)))}
            if not search.form:
                how["names"] = search.names
            to_compile = self.by_config[frozen(config)] = []
            for case in (*cases, *compiled_only):
                to_compile += tasks(case, self.place, **how)
        if self.workers is None:
            return
        self.workers.want(self.presents, (self.urgency, 0))
        for to_compile in self.by_config.values():
            self.workers.want(to_compile, (self.urgency, 0))
        if self.screened and configs:
            self.workers.want(self.proofs_of(configs[0]), (self.urgency, 1))

    def proofs_of(self, config: Config) -> list[Task]:
        """The tasks of proving a configuration; asked for the best so far, ahead of its proof."""
        proofs = []
        for case in self.search.proofs:
            override = (self.search.kernel, "", frozen(config))
            proofs += tasks(case, self.place, configs=(override,), masters=False)
        return proofs

    def ready(self) -> bool:
        """Whether all of the step is compiled; proofs need not be, they compile here too."""
        if not self.asked:
            return False
        if self.workers is None:
            return True
        lists = (self.presents, *self.by_config.values())
        return not any(self.workers.missing(to_compile) for to_compile in lists)

    def why_refused(self, config: Config) -> str | None:
        """Why this configuration must not be taken; None if it may be."""
        if self.workers is None:
            return None
        vetoes = not self.search.form
        return self.workers.why_refused(self.by_config[frozen(config)], vetoes)

    def take(self, until: float) -> None:
        """Measure the step that is ready."""
        explorer = self.explorer
        pause = do_nothing
        if self.workers is not None:
            pause = self.workers.poll
            reason = self.workers.why_refused(self.presents, vetoes=False)
            if reason is not None:
                explorer.outcome.refused[f"present configuration: {reason}"] += 1
                if not self.screened:
                    explorer.outcome.left += len(explorer.configs)
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
    turns = []
    for urgency, explorer in enumerate(explorers):
        if explorer.configs:
            turns.append(Turn(explorer, urgency, workers))
    for turn in turns:
        if not turn.search.form:
            turn.ask()
    bar = progress(total=len(turns), desc="searches")
    try:
        while turns:
            is_late = time.monotonic() > until - RESERVE * seconds
            for turn in turns:
                if turn.search.form and not turn.asked:
                    if is_late or not awaited(turn, turns):
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
    finally:  # also where a signal ends it: the candidates that were not tried are counted
        bar.close()
        for turn in turns:
            if not turn.screened:
                turn.explorer.outcome.left += len(turn.explorer.configs)
            turn.explorer.outcome.undecided = turn.screened


def awaited(form: Turn, turns: list[Turn]) -> list[Turn]:
    """The unfinished searches for tiles whose results the form is measured with."""
    found = []
    for turn in turns:
        if not turn.search.form and related(turn.search, form.search):
            found.append(turn)
    return found


def related(search: Search, form: Search) -> bool:
    """Whether the form's time depends on what the search finds."""
    same = search.cases[0].spec is form.cases[0].spec
    return same and search.shape_class in (form.shape_class, "drop", "any")


def known(explorers: list[Explorer]) -> tuple:
    """The configurations that have won: (kernel, shape class, items)."""
    won = []
    for explorer in explorers:
        search, best = explorer.search, explorer.outcome.best
        if best is not search.present:
            won.append((search.kernel, search.shape_class, frozen(best)))
    return tuple(won)


def shares(work: list[Search], seconds: float, jobs: int) -> list[int]:
    """How many candidates of each search the time is enough for: the same share of every list."""
    lengths = [len(search.candidates()) for search in work]
    screening = 0.0  # seconds of a core that compile all candidates at the largest cases
    deciding = 0.0  # seconds of a core that compile the finalists at all cases
    for search, length in zip(work, lengths, strict=True):
        is_pipelined = search.present.get("num_stages", 1) > 1
        cost = search.launches * (COMPILE if is_pipelined else SIMPLE)
        screening += cost * length
        deciding += cost * (FINALISTS * len(search.cases) + PARTS)
    compilable = (0.9 * seconds * max(1, jobs) - deciding) / max(1.0, screening)
    measurable = 0.5 * seconds / MEASURE / max(1, sum(lengths))  # the other half is the finalists'
    share = min(1.0, compilable, measurable)
    return [min(length, max(2, round(length * share))) for length in lengths]
