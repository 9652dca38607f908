"""The adapter at the top of a finished run directory, held against the hash in meta.json."""

from __future__ import annotations

from pathlib import Path

from engine.runtime.files import sha256
from model.config import read_json

WEIGHTS = "adapter_model.safetensors"


def published(out: Path) -> dict[str, str]:
    """Hash of the finished adapter's numbers, for meta.json. Its config may be edited: its base
    may have moved."""
    return {WEIGHTS: sha256((out / WEIGHTS).read_bytes())}


def refuse_damaged(adapter: Path) -> None:
    """ValueError where an adapter is that of a finished run and not what the run wrote."""
    meta = read_json(adapter / "meta.json", {})
    recorded = meta.get("published") if meta.get("finished") else None
    if isinstance(recorded, dict) and (adapter / WEIGHTS).is_file():
        if recorded.get(WEIGHTS) not in (None, published(adapter)[WEIGHTS]):
            raise ValueError(
                f"{adapter / WEIGHTS} is not what its run wrote (its hash in meta.json differs); "
                "the training's command with --resume, or that of the whole job, mends it"
            )
