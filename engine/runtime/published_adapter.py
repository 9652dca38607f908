"""The adapter at the top of a finished run directory, checked against its hash in meta.json; and
whether it can be used at another strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.runtime.files import sha256
from model.config import read_json
from model.merge import MANIFEST

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


def refuse_scale(scale: str | float | None, model: str | Path, adapters: Sequence[str]) -> None:
    """ValueError for a `--scale` (None: not typed) that would scale nothing, or not all.

    An adapter that was merged into the weights cannot be scaled any more.
    """
    if scale is None:
        return
    merged = read_json(Path(model) / MANIFEST, {})
    into = ""
    if merged:
        into = f"; {model} is a merged checkpoint (its {MANIFEST}): its adapter is in the weights"
    if not adapters:
        source = merged.get("merged_from", "the seed model")
        raise ValueError(
            f"--scale {scale}: there is no --adapter to scale{into}; give the adapter with "
            f"--adapter, and --model {source if merged else model}"
        )
    for adapter in adapters:
        weights = Path(adapter) / WEIGHTS
        if weights.is_file() and merged.get("adapter") == sha256(weights.read_bytes()):
            raise ValueError(
                f"--scale {scale}: {adapter} is already merged into {model} (its {MANIFEST}), and "
                f"would count twice; give --model {merged.get('merged_from')}"
            )
