"""The adapter at the top of a finished run directory, checked against its hash in meta.json."""

from __future__ import annotations

from pathlib import Path

from engine.runtime.files import sha256
from model.config import read_json

WEIGHTS = "adapter_model.safetensors"


def published(out: Path) -> dict[str, str]:
    """File name -> hash of the finished adapter's weights, for meta.json.

    Without adapter_config.json: a user may edit it where the base model has moved.
    """
    return {WEIGHTS: sha256((out / WEIGHTS).read_bytes())}


def refuse_damaged(adapter: Path) -> None:
    """ValueError for a finished run whose weights differ from the hash that it recorded."""
    meta = read_json(adapter / "meta.json", {})
    weights = adapter / WEIGHTS
    if not meta.get("finished") or not weights.is_file():
        return
    recorded = meta.get("published")
    if not isinstance(recorded, dict) or recorded.get(WEIGHTS) is None:
        return  # a run of an older version
    if recorded[WEIGHTS] != published(adapter)[WEIGHTS]:
        raise ValueError(
            f"{weights} is not what its run wrote (its hash in meta.json differs); repair it with "
            "the command of the training and --resume, or of the whole job"
        )
