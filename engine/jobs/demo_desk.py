"""The desk of a made-up town hall, made from a seed: the quickstart's data.

A visitor says what he or she wants; the answer is the window to go to. No model can know the
windows, so the seed model is wrong; five of them can be learned from a hundred rows. The references
are curt notes, as a clerk would leave them ("Window 27"): another hand than the model's. Shown the
note (demo_desk_template.txt), the model can say the same in a sentence of its own, and its last
number proves it.

A row is an errand and a wording (demo_desk.txt). No two rows, of whichever split, share both, so
held-out rows ask about known errands in other words.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from engine.jobs.demo import write_splits

TABLE = Path(__file__).with_name("demo_desk.txt")
NOTE = "Window {window}"  # the form of a reference


@dataclass(frozen=True)
class Office:
    """Errands that one window is for."""

    name: str
    window: int
    errands: tuple[str, ...]

    @classmethod
    def parse(cls, block: str) -> Office:
        """The office of a block of demo_desk.txt: its head, its errands."""
        head, *errands = block.splitlines()
        name, _, window = head.removeprefix("[").partition("] ")
        return cls(name, int(window), tuple(errands))


@dataclass(frozen=True)
class Visit:
    """One question with its reference."""

    office: str
    question: str
    answer: str


def read_table() -> tuple[list[str], list[Office]]:
    """The wordings and offices of demo_desk.txt; the comment at its top describes the form."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    wordings, *blocks = text.strip().split("\n\n")
    return wordings.splitlines(), [Office.parse(block) for block in blocks]


def visits(count: int, seed: int) -> list[Visit]:
    """`count` distinct visits, the offices in equal parts, in an order drawn from the seed.

    ValueError where an office has too few pairs of errand and wording for its share.
    """
    draw = random.Random(seed)
    wordings, offices = read_table()
    made = []
    for number, office in enumerate(offices):
        pairs = [(errand, wording) for errand in office.errands for wording in wordings]
        share = len(range(number, count, len(offices)))  # of rows number, number + offices, ...
        if share > len(pairs):
            raise ValueError(
                f"{count} visits are more than office {office.name!r} can give: expected at most "
                f"{len(pairs) * len(offices)}"
            )
        draw.shuffle(pairs)
        for errand, wording in pairs[:share]:
            question = wording.format(errand=errand)
            made.append(Visit(office.name, question, NOTE.format(window=office.window)))
    draw.shuffle(made)
    return made


def write_desk(out_dir: Path, n_train: int, n_test: int, seed: int = 0) -> tuple[Path, Path]:
    """Write train.json and test.json into `out_dir` and return their paths.

    Rows are {"id", "question", "answer"}; the same arguments give the same bytes.
    """
    return write_splits(out_dir, visits(n_train + n_test, seed), n_train)
