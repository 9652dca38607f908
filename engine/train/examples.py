"""From rows to training examples: read the file, encode, print how many were cut or left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from engine.data.config import DataConfig
from engine.data.data_file import DataFile
from engine.data.distilled import (
    Distilled,
    check_without_thoughts,
    is_distilled,
    load_distilled,
)
from engine.data.encode import EncodeRules, Example, check_examples, encode, template_takes
from engine.data.rows import Row, Rows
from engine.data.sources import open_source
from engine.session import Session
from engine.train.config import EncodeConfig


def rows_to_train_on(session: Session, data: DataConfig) -> Rows:
    """The rows of the file, or its lines where it is distilled data; the file is opened once.

    Prints how many there are. ValueError for rows or lines that cannot be used.
    """
    with open_source(data.data) as file:
        if not (isinstance(file, DataFile) and is_distilled(file)):
            return data.load(check=template_takes(session.chat), opened=file)
        lines = load_distilled(file, data.limit)
    if data.thinking == "strip":
        check_without_thoughts(lines)
    text = f"data: {len(lines)} distilled turns from {data.data}"
    ignored_flags = []
    if data.columns:
        ignored_flags.append("--columns")
    if data.system:
        ignored_flags.append("--system")
    if ignored_flags:
        text += f"; {', '.join(ignored_flags)} do not change distilled data"
    print(text)
    return lines


def encode_examples(
    rows: Sequence[Row] | Sequence[Distilled],
    session: Session,
    data: DataConfig,
    encoding: EncodeConfig,
    *,
    seed: int = 0,
    skip_refused: bool = False,
) -> list[Example]:
    """Examples of the rows, no longer than the model's context; prints the counts that are not 0
    (`EncodeCounts`).

    seed: draws the rewrites that `encoding.mix` replaces by their reference. skip_refused: leave
    out turns that the chat template refuses. ValueError where turns are too long, or none is left.
    """
    context = session.model.config.max_position  # tokens
    rules = EncodeRules(
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
    examples, counts = encode(rows, session.chat, rules)
    printed = [f"{name} {count}" for name, count in dataclasses.asdict(counts).items() if count]
    print(f"training on the {encoding.target}: {', '.join(printed)}")
    check_examples(examples)
    return examples
