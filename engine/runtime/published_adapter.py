"""The adapter at the top of a finished run directory, checked against its hash in meta.json."""

from __future__ import annotations

from pathlib import Path

from engine.runtime.files import sha256
from model.config import read_json

WEIGHTS = "adapter_model.safetensors"


def published(out: Path) -> dict[str, str]:
    """{file: sha256} of the finished adapter's weights, for meta.json.

    Its adapter_config.json may be edited: the base model may have moved.
    """
    return {WEIGHTS: sha256((out / WEIGHTS).read_bytes())}


def refuse_damaged(adapter: Path) -> None:
    """ValueError for the adapter of a finished run whose weights the run did not write."""
    meta = read_json(adapter / "meta.json", {})
    recorded = meta.get("published") if meta.get("finished") else None
    if isinstance(recorded, dict) and (adapter / WEIGHTS).is_file():
        if recorded.get(WEIGHTS) not in (None, published(adapter)[WEIGHTS]):
            raise ValueError(
                f"{adapter / WEIGHTS} is not what its run wrote (its hash in meta.json differs); "
                "repair it with the command of the training and --resume, or of the whole job"
            )
