"""JSONL files of results: begun by a job, and continued by the same command after a kill

    OUT              one JSON object a line, appended as soon as it is finished
    OUT.meta.json    the settings of the job; OUT is not continued under other settings
    OUT.part<rank>   the lines of one process, where several processes write (torchrun); they are
                     merged into OUT when all processes are done

A line that is on disk is never computed again, whichever process of whichever run wrote it. The
finished lines are held in memory; stored_lines.py does the same where they may be larger.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

from engine.runtime.distributed import World
from engine.runtime.files import AppendedLines, Kinds, read_jsonl, write_json, write_jsonl
from engine.runtime.run_record import differing
from model.config import read_json

Line = dict[str, Any]
by_id = itemgetter("id")


class ResumedLines:
    """The finished lines of OUT by key (`done`), and the open file that takes the others.

    key       the key of a line; lines of one file have different keys
    wanted    fields that a line must have, with their types
    resume    False: ValueError where OUT exists already
    keep      whether a line of an earlier run counts as finished (default: every line does)
    world     the processes that share the work (default: this one)

    ValueError where OUT was begun under other settings, or a line lacks a field.
    """

    def __init__(
        self,
        out: Path,
        settings: dict[str, Any],
        *,
        key: Callable[[Line], Hashable] = by_id,
        wanted: Kinds | None = None,
        resume: bool = True,
        keep: Callable[[Line], bool] | None = None,
        world: World | None = None,
    ) -> None:
        self.out = out
        self.key = key
        self.wanted = wanted
        self.keep = keep
        self.world = world or World()
        if self.world.is_rank0:
            self._check_settings(settings, resume)
        self.world.barrier()
        self.done = self._no_lines()
        for file in (out, *self.parts()):
            self._read(file)
        own_file = self._part(self.world.rank) if self.world.size > 1 else out
        self.file = AppendedLines(own_file)
        self.world.barrier()  # no process merges the parts before all have read them

    def _no_lines(self) -> Any:
        """What holds the finished lines by their keys, without a line."""
        return {}

    def write(self, line: Line) -> None:
        """Append a finished line."""
        self.file.write(line)
        self.done[self.key(line)] = line

    def mine(self, items: list) -> list:
        """The items that this process works on, by their place in the data."""
        return items[self.world.rank :: self.world.size]

    def finish(self, order: Iterable[Hashable]) -> list[Line]:
        """The lines of these keys in that order; OUT is put into the same order.

        Lines are appended as they are finished, which is another order in every run. Lines of
        other keys (an earlier run asked for more) stay in OUT, after the others.
        """
        self.world.barrier()
        if self.world.size > 1:
            for file in self.parts():
                self._read(file)
        asked = list(order)
        ordered = list(dict.fromkeys([*asked, *self.done]))  # each key once
        if self.world.is_rank0 and (self.parts() or list(self.done) != ordered):
            write_jsonl(self.out, [self.done[key] for key in ordered])
        self.world.barrier()
        if self.world.is_rank0:
            for file in self.parts():
                file.unlink()
        return [self.done[key] for key in asked]

    def parts(self) -> list[Path]:
        """The parts on disk, of this job or of a killed one."""
        return sorted(self.out.parent.glob(f"{self.out.name}.part*"))

    def _part(self, rank: int) -> Path:
        return self.out.with_name(f"{self.out.name}.part{rank}")

    def _read(self, file: Path) -> None:
        """Add the finished lines of OUT or a part to `done`."""
        for line in read_jsonl(file, self.wanted):
            if self.keep is None or self.keep(line):
                self.done.setdefault(self.key(line), line)

    def _check_settings(self, settings: dict[str, Any], resume: bool) -> None:
        """Compare with the settings on disk, then write these."""
        meta = meta_file(self.out)
        begun = self.out.exists() or bool(self.parts())
        if not resume and (begun or meta.exists()):
            raise ValueError(
                f"{self.out} exists already; choose another --out, or --resume to continue it"
            )
        if begun and not meta.exists():
            raise ValueError(
                f"{self.out} has no {meta.name} beside it: not made by this program; choose "
                "another name"
            )
        if begun:
            changes = differing(read_json(meta), settings)
            if changes:
                raise ValueError(
                    f"{self.out} was begun with other settings and cannot be resumed under these "
                    "(choose another name, or delete it):\n  " + "\n  ".join(changes)
                )
        write_json(meta, settings)

    def __enter__(self) -> ResumedLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def meta_file(out: Path) -> Path:
    """The file with the settings of a JSONL file of results."""
    return out.with_name(out.name + ".meta.json")
