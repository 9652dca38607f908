"""A JSONL file that is begun, killed, gone on with, and written by one or several processes

    OUT              the lines; those of a job of several processes come here when all are done
    OUT.meta.json    the settings it was begun with; other settings are refused, naming them
    OUT.part<rank>   what each process of a job has written so far

A line that was written once is never made again, whichever process of whichever job wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.runtime.distributed import World
from engine.runtime.files import AppendedLines, Kinds, read_jsonl, write_json, write_jsonl
from engine.runtime.run_record import differing
from model.config import read_json


class ResumedLines:
    """The lines of OUT by id: what is `done`, and a file for what is not.

    resume False: ValueError where OUT exists. True: ValueError where it was begun with other
    settings, or a line lacks what is `wanted` beside its id.
    """

    def __init__(
        self,
        out: Path,
        settings: dict[str, Any],
        *,
        resume: bool,
        wanted: Kinds | None = None,
        world: World | None = None,
    ) -> None:
        self.out, self.world, self.wanted = out, world or World(), {"id": str} | (wanted or {})
        self.meta = out.with_name(out.name + ".meta.json")
        if self.world.is_rank0:
            self._check(settings, resume)
        self.world.barrier()
        self.done: dict[str, dict[str, Any]] = {}
        for file in (out, *self.parts()):
            for record in read_jsonl(file, self.wanted):
                self.done.setdefault(record["id"], record)
        alone = self.world.size == 1
        self.file = AppendedLines(out if alone else self._part(self.world.rank))
        self.world.barrier()  # nobody joins parts that another has not read

    def parts(self) -> list[Path]:
        """Parts that are there, of this job or of a killed one."""
        return sorted(self.out.parent.glob(f"{self.out.name}.part*"))

    def _part(self, rank: int) -> Path:
        return self.out.with_name(f"{self.out.name}.part{rank}")

    def _check(self, settings: dict[str, Any], resume: bool) -> None:
        begun = self.out.exists() or bool(self.parts())
        if begun or self.meta.exists():
            if not resume:
                raise ValueError(
                    f"{self.out} exists already; choose another --out, or --resume to go on"
                )
            if begun and not self.meta.exists():
                raise ValueError(
                    f"{self.out} has no {self.meta.name} beside it: not made by this program; "
                    "choose another name"
                )
            changes = differing(read_json(self.meta), settings) if begun else []
            if changes:
                raise ValueError(
                    f"{self.out} was begun with other settings and cannot be resumed under these "
                    "(choose another name, or delete it):\n  " + "\n  ".join(changes)
                )
        write_json(self.meta, settings)

    def mine(self, items: list) -> list:
        """The share of this process, by the items' place in the data."""
        return items[self.world.rank :: self.world.size]

    def write(self, record: dict[str, Any]) -> None:
        """Keep a line."""
        self.file.write(record)
        self.done[record["id"]] = record

    def finish(self, order: Iterable[str]) -> list[dict[str, Any]]:
        """All lines in that order, also on disk, so that the file does not tell who wrote what."""
        self.world.barrier()
        if self.world.size > 1:
            for file in self.parts():
                for record in read_jsonl(file, self.wanted):
                    self.done.setdefault(record["id"], record)
        ordered = [self.done[name] for name in order]
        if self.world.is_rank0 and (self.parts() or list(self.done.values()) != ordered):
            write_jsonl(self.out, ordered)
        self.world.barrier()
        if self.world.is_rank0:
            for file in self.parts():
                file.unlink()
        return ordered

    def __enter__(self) -> ResumedLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
