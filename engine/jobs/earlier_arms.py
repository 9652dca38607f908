"""More arms for a run that has measured some already.

The settings of a file of measurements name the adapters by hash, and a file is continued under
equal settings only. Its lines are by arm, so further arms change none of them: they may join as
long as every adapter that was measured is still the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.runtime.files import write_json
from engine.runtime.resumable import meta_file
from model.config import read_json


def admit_arms(files: Sequence[Path], hashes: Mapping[str, str]) -> dict[str, str]:
    """The hashes, with those of the arms that these files have measured before.

    files     of measurements, begun or not
    hashes    name of an adapter's directory -> hash, of the arms that are measured now

    The settings of every file that is begun are set to the same, unless an adapter of theirs is
    another one now: such a file stays as it is, and is refused where it is opened.
    """
    metas = {file: read_json(meta_file(file), {}) for file in files}
    together: dict[str, str] = {}
    for meta in metas.values():
        together |= meta.get("adapters", {})
    together |= hashes
    for file, meta in metas.items():
        measured = meta.get("adapters", together)
        is_same = all(together[name] == value for name, value in measured.items())
        if is_same and measured != together:
            write_json(meta_file(file), meta | {"adapters": together})
    return together
