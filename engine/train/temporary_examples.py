"""Training examples of rows that lie on disk: encoded one after the other, kept in temporary files

For the jobs that encode anew at every start: the main job, a study, preflight. scripts/train.py
keeps its examples in the run directory (file_examples.py); both give the same examples.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from engine.data.config import DataConfig
from engine.data.disk_tables import TextsById
from engine.data.distilled import Distilled
from engine.data.encode import (
    Encoding,
    Example,
    ExamplesOnDisk,
    check_examples,
    check_some_are_left,
)
from engine.data.example_store import ExampleStore, ExampleWriter, JoinedExamples
from engine.data.rows import Row
from engine.data.turns import check_target
from engine.runtime.temporary import temporary_folder
from engine.session import Session
from engine.train.config import EncodeConfig
from engine.train.examples import counts_text, encode_rules, keep_references
from model.trained_chat import CommonSystem


def temporary_examples(
    rows: Sequence[Row] | Sequence[Distilled],
    session: Session,
    data: DataConfig,
    encoding: EncodeConfig,
    *,
    seed: int = 0,
) -> ExampleStore:
    """Examples of the rows, as `encode` gives them; prints the counts that are not 0.

    rows    read several times, and not kept
    seed    as in `encode_rules`

    `account.system` of the store is the system message of all rows, if they have the same. Its
    files have no name any more: they are gone with the store. ValueError where turns are too long,
    or none is left.
    """
    rules = encode_rules(session, data, encoding, seed=seed)
    are_plain = any(isinstance(row, Row) for row in rows[:1])  # rows are all of one kind
    check_target(rules.target, rules.mix, are_plain)
    if rules.drop_rejected:
        check_some_are_left(rows)
    system = CommonSystem()
    with (
        tempfile.TemporaryDirectory(dir=temporary_folder()) as folder,
        contextlib.closing(TextsById()) as references,
    ):
        needs_references = rules.target == "reference" or rules.leaves_out_long
        if needs_references and not are_plain:
            keep_references(references, lambda: rows)
        encoder = Encoding(session.chat, rules, references)
        writer = ExampleWriter(Path(folder), session.model.config.vocab_size)
        for row in rows:
            system.add(row.messages)
            for example in encoder.examples(row):
                writer.add(example)
        text = counts_text(encoding.target, encoder.finish())
        print(text)
        writer.finish({}, [text], system.text)
        store = ExampleStore(Path(folder))
        for file in store.files:
            weakref.finalize(store, file.close)
    check_examples(store)
    return store


def joined(stored: ExamplesOnDisk, others: Sequence[Example]) -> ExamplesOnDisk:
    """Stored examples, followed by others in memory where there are any."""
    return JoinedExamples(stored, others) if others else stored
