"""The arms of a comparison: the seed model, and adapters over its frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.runtime.files import sha256
from model.lora import Lora

Arms = dict[str, Lora | None]  # name -> adapter; the seed is None

# the arms of the main job and of a study: name on disk -> name for people
ARM_NAMES = {"seed": "seed", "sft": "SFT", "sdft": "SDFT"}
# the arms that are trained -> the answer of a distilled line that they are trained on
ARM_TARGETS = {"sft": "reference", "sdft": "target"}
TUNED = tuple(ARM_TARGETS)


def tuned(arms: Arms) -> dict[str, Lora]:
    """The arms with an adapter."""
    return {arm: lora for arm, lora in arms.items() if lora is not None}


def adapter_hashes(paths: Sequence[str]) -> dict[str, str]:
    """Directory name -> hash of the adapter's bytes, for the settings of a file."""
    file = "adapter_model.safetensors"
    return {Path(p).resolve().name: sha256((Path(p) / file).read_bytes()) for p in paths}
