"""A study killed several times beside the same study undisturbed, in children of one process

    python -m tests.helpers.killed_study OUT KILLS FLAGS...     the flags of scripts/pareto.py

Every life of the study is a fork of this process, which has imported everything and computed
nothing. A life that is to be killed ends by `os._exit`, with no clean-up, at the line of results
whose turn it is: every second time half of the line is on the disk, the other times the next file
to be renamed stays beside its place. Prints one line of JSON: the files at which it was killed.

Drift is measured over the first PROMPTS_USED general prompts alone, which takes less time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import engine.jobs.study
from engine.measure.general_prompts import PROMPTS
from engine.runtime.files import AppendedLines, PlacedLine
from scripts import pareto

KILLED = 77  # exit code of a life that was killed
PROMPTS_USED = 12


class Death:
    """Ends this process at the `at`-th line that is appended to any file; 0: never."""

    def __init__(self, at: int, torn: bool, note: Path) -> None:
        self.at = at
        self.torn = torn  # in the middle of the line; else at the next renaming
        self.note = note  # file that is told where, or how many lines there were
        self.lines = 0
        self.is_due = False

    def patch(self) -> None:
        """Count lines and renamings of this process from now on."""
        write, replace = AppendedLines.write, os.replace

        def counted_write(file: AppendedLines, record: dict) -> PlacedLine:
            self.lines += 1
            self.is_due = self.lines == self.at or self.is_due
            if self.is_due and self.torn:
                line = json.dumps(record).encode()
                file.file.write(line[: len(line) // 2])
                self.die(file.path)
            return write(file, record)

        def counted_replace(source: str, target: str, **how: int) -> None:
            if self.is_due:
                self.die(Path(target))
            replace(source, target, **how)

        AppendedLines.write = counted_write
        os.replace = counted_replace

    def die(self, place: Path) -> None:
        """End at once."""
        self.note.write_text(str(place))
        os._exit(KILLED)


def live(work: Callable[[], None], at: int, torn: bool, note: Path) -> int:
    """Do the work in a fork that dies at line `at`; returns its exit code."""
    child = os.fork()
    if child == 0:
        death = Death(at, torn, note)
        death.patch()
        code = 1
        try:
            work()
            note.write_text(str(death.lines))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def study(out: Path, flags: list[str]) -> None:
    """The script with these flags, its printed text in OUT.log."""
    sys.argv = ["pareto.py", *flags, "--out", str(out)]
    with Path(f"{out}.log").open("a") as log:
        sys.stdout = log
        pareto.main()


def main() -> None:
    out, kills, flags = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    few = partial(engine.jobs.study.seed_answers, prompts=PROMPTS[:PROMPTS_USED])
    engine.jobs.study.seed_answers = few
    note = out / "note.txt"
    whole = partial(study, out / "whole", flags)
    assert live(whole, 0, False, note) == 0, "the undisturbed study failed"
    lines = int(note.read_text())

    killed = partial(study, out / "killed", flags)
    places = []
    for number in range(kills):
        code = live(killed, lines // (kills + 3), number % 2 == 0, note)
        assert code == KILLED, f"life {number + 1} ended with {code} before its kill"
        places.append(str(Path(note.read_text()).relative_to(out / "killed")))
    assert live(killed, 0, False, note) == 0, "the last life failed"
    print(json.dumps({"lines": lines, "places": places}))


if __name__ == "__main__":
    main()
