"""From rows in memory to training examples: encode, print how many were cut or left out.

file_examples.py does the same with a file whose rows do not stay in memory, temporary_examples.py
with rows that lie on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from engine.data.config import DataConfig
from engine.data.disk_tables import TextsById
from engine.data.distilled import Distilled
from engine.data.encode import EncodeCounts, EncodeRules, Example, check_examples, encode
from engine.data.rows import Row
from engine.session import Session
from engine.train.config import EncodeConfig


def encode_rules(
    session: Session,
    data: DataConfig,
    encoding: EncodeConfig,
    *,
    seed: int = 0,
    skip_refused: bool = False,
) -> EncodeRules:
    """How rows are encoded, no longer than the model's context.

    seed: draws the rewrites that `encoding.mix` replaces by their reference. skip_refused: leave
    out turns that the chat template refuses.
    """
    context = session.model.config.max_position  # tokens
    return EncodeRules(
        max_length=min(encoding.max_length, context),
        target=encoding.target,
        model_limit=context,
        truncate=encoding.truncate,
        drop_long=data.drop_long,
        in_proportion=encoding.cut_in_proportion,
        skip_refused=skip_refused,
        mix=encoding.mix,
        drop_rejected=encoding.drop_rejected,
        answer_only=data.thinking == "answer-only",
        seed=seed,
    )


def encode_examples(
    rows: Sequence[Row] | Sequence[Distilled],
    session: Session,
    data: DataConfig,
    encoding: EncodeConfig,
    *,
    seed: int = 0,
) -> list[Example]:
    """Examples of the rows; prints the counts that are not 0 (`EncodeCounts`).

    seed: as in `encode_rules`. ValueError where turns are too long, or none is left.
    """
    rules = encode_rules(session, data, encoding, seed=seed)
    examples, counts = encode(rows, session.chat, rules)
    print(counts_text(encoding.target, counts))
    check_examples(examples)
    return examples


def keep_references(references: TextsById, lines: Callable[[], Iterable[Distilled]]) -> None:
    """Keep the references of all lines, where one of them has an earlier turn.

    lines: gives the lines from the first one, each time it is called.
    """
    if all(line.id.endswith("/0") for line in lines()):
        return
    for line in lines():
        references.add(line.id, line.reference)


def counts_text(target: str, counts: EncodeCounts) -> str:
    """The counts that are not 0, for printing."""
    printed = [f"{name} {count}" for name, count in dataclasses.asdict(counts).items() if count]
    return f"training on the {target}: {', '.join(printed)}"
