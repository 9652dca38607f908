"""The examples of a data file, encoded one after the other and kept on disk

    FileExamples       reads the file once and gives its examples: no row stays in memory
    stored_examples    writes them into RUN/examples (data/example_store.py), or takes those that
                       are there, if they were made of the same file in the same way

A file of distilled data is read a second time where its lines depend on others: for the references
of earlier turns (--target reference, --drop-long), and to know that --drop-rejected leaves some.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.data.config import DataConfig
from engine.data.data_file import DataFile
from engine.data.disk_tables import TextsById
from engine.data.distilled import (
    Distilled,
    DistilledStream,
    check_without_thoughts,
    is_distilled,
)
from engine.data.encode import (
    EncodeRules,
    Encoding,
    Example,
    check_examples,
    check_some_are_left,
    refuse_plain_rows,
    template_takes,
)
from engine.data.example_store import ExampleStore, ExampleWriter, read_account, why_damaged
from engine.data.rows import Row
from engine.data.sources import Source, open_source
from engine.data.turns import References, check_target
from engine.runtime.run_record import differing
from engine.runtime.terminal import progress
from engine.session import Session
from engine.train.checkpoint import EXAMPLES
from engine.train.examples import counts_text, keep_references
from model.durable import directory_beside, remove_directory
from model.trained_chat import CommonSystem

# files of a checkpoint on which token ids depend, beside the chat template
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*config.json")
SHOW_AFTER = 2  # seconds after which reading shows its progress


class FileExamples:
    """The examples of a data file, one after the other: rows, or lines of distilled data.

    To be iterated once; ValueError for rows that cannot be used, at the end of the file. From then
    on it has what there is to say about the file:

    text      the lines to print: how many rows there were, what was cut or left out
    system    the system message of all rows (trained_chat.common_system)
    sha256    the hash of the file's bytes
    """

    def __init__(self, session: Session, data: DataConfig, rules: EncodeRules) -> None:
        self.session = session
        self.data = data
        self.rules = rules
        self.text: list[str] = []
        self.system: str | None = None
        self.sha256 = ""

    def __iter__(self) -> Iterator[Example]:
        with open_source(self.data.data) as source:
            if isinstance(source, DataFile) and is_distilled(source):
                yield from self._of_lines(source)
            else:
                yield from self._of_rows(source)

    def _of_rows(self, source: Source) -> Iterator[Example]:
        """The examples of plain rows."""
        rules = self.rules
        check_target(rules.target, rules.mix, are_plain=True)
        if rules.drop_rejected:
            refuse_plain_rows()
        rows = self.data.stream(source, check=template_takes(self.session.chat))
        yield from self._encoded(rows, {})
        self.text = [*self.data.account(rows), *self.text]
        self.sha256 = rows.file_sha256

    def _of_lines(self, file: DataFile) -> Iterator[Example]:
        """The examples of distilled data."""
        rules = self.rules
        check_target(rules.target, rules.mix, are_plain=False)
        if rules.drop_rejected:
            check_some_are_left(self._lines())
        lines = DistilledStream(file, self.data.limit)
        with contextlib.closing(TextsById()) as references:
            if rules.target == "reference" or rules.leaves_out_long:
                keep_references(references, self._lines)
            yield from self._encoded(self._checked(lines), references)
        self.text = [self._account(lines), *self.text]
        self.sha256 = lines.sha256

    def _lines(self) -> DistilledStream:
        """The lines of the file, which is opened once more."""
        return DistilledStream(DataFile(self.data.data), self.data.limit)

    def _checked(self, lines: DistilledStream) -> Iterator[Distilled]:
        """The lines; ValueError for one with a thought where those are to be removed."""
        for line in lines:
            if self.data.thinking == "strip":
                check_without_thoughts(line, lines.file.path)
            yield line

    def _encoded(
        self, rows: Iterable[Row] | Iterable[Distilled], references: References
    ) -> Iterator[Example]:
        """The examples of the rows; then their counts and their common system message."""
        encoding = Encoding(self.session.chat, self.rules, references)
        system = CommonSystem()
        quiet = not self.session.world.is_rank0
        for row in progress(
            rows, desc="encode", unit="row", leave=False, delay=SHOW_AFTER, disable=quiet
        ):
            system.add(row.messages)
            yield from encoding.examples(row)
        self.text = [counts_text(self.rules.target, encoding.finish())]
        self.system = system.text

    def _account(self, lines: DistilledStream) -> str:
        """What to print of distilled lines that have all been read."""
        text = f"data: {lines.count} distilled turns from {self.data.data}"
        ignored_flags = []
        if self.data.columns:
            ignored_flags.append("--columns")
        if self.data.system:
            ignored_flags.append("--system")
        if ignored_flags:
            text += f"; {', '.join(ignored_flags)} do not change distilled data"
        return text


# ---- kept on disk


def stored_examples(
    session: Session, data: DataConfig, rules: EncodeRules, run: Path
) -> ExampleStore:
    """The examples of the file, in RUN/examples; prints how many there are.

    Examples that are there are taken if they were made of the same bytes in the same way, and are
    what was written; else they are made again. Rank 0 makes them for all. ValueError for rows that
    cannot be used, and where there is something else at their place.
    """
    directory = run / EXAMPLES
    if session.world.is_rank0:
        made_in = _made_in(session, data, rules)
        if _are_there(directory, made_in, data):
            print(f"examples: as they were encoded before, in {directory}")
        else:
            _make(directory, session, data, rules, made_in)
    session.world.barrier()
    store = ExampleStore(directory)
    for line in store.account.text:
        print(line)
    return store


def _made_in(session: Session, data: DataConfig, rules: EncodeRules) -> dict[str, Any]:
    """Everything but the file on which its examples depend."""
    read = dataclasses.asdict(data)
    del read["data"]  # the file may be moved
    return {
        "read": read,
        "rules": dataclasses.asdict(rules),
        "model": session.fingerprint,
        **session.chat.sources.settings,
        "date": session.settings.get("date"),
        "tokenizer": _tokenizer_hash(Path(session.config.model)),
    }


def _tokenizer_hash(model: Path) -> str:
    """The hash of the files of a checkpoint on which token ids depend."""
    digest = hashlib.sha256()
    files = {file for pattern in TOKENIZER_FILES for file in model.glob(pattern)}
    for file in sorted(files):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _are_there(directory: Path, made_in: dict[str, Any], data: DataConfig) -> bool:
    """Whether the directory holds the examples of the file; one that holds others is removed."""
    if not directory.exists():
        return False
    why = _why_others(directory, made_in, data)
    if why is None:
        return True
    print(f"examples: those in {directory} are made again: {why}")
    remove_directory(directory)
    return False


def _why_others(directory: Path, made_in: dict[str, Any], data: DataConfig) -> str | None:
    """Why a directory does not hold the examples of the file, None where it does.

    ValueError where it holds something else than examples.
    """
    account = read_account(directory)
    if account is None:
        return "their meta.json is not what this version writes"
    changes = differing(account.key, made_in | {"data": account.key.get("data")})
    if changes:
        return ", ".join(changes)
    with open_source(data.data) as source:
        sha256 = source.sha256()
    if sha256 != account.key["data"]:
        return f"{data.data} has changed"
    return why_damaged(directory, account)


def _make(
    directory: Path,
    session: Session,
    data: DataConfig,
    rules: EncodeRules,
    made_in: dict[str, Any],
) -> None:
    """Encode the file into the directory."""
    examples = FileExamples(session, data, rules)
    with directory_beside(directory) as beside:
        writer = ExampleWriter(beside, session.model.config.vocab_size)
        for example in examples:
            writer.add(example)
        if not writer.count:
            print(*examples.text, sep="\n")
            check_examples([])  # ValueError: there is nothing to train on
        writer.finish(made_in | {"data": examples.sha256}, examples.text, examples.system)
