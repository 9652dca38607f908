"""The arms of a comparison: the seed model, and adapters over its frozen weights."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from engine.runtime.files import sha256
from engine.session import ScaledAdapter
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


def arms_without_line(arms: Arms, item: str, done: Container[tuple[str, str]]) -> Arms:
    """The arms for which `done`, the finished lines by (arm, item), holds no line of this item."""
    return {arm: lora for arm, lora in arms.items() if (arm, item) not in done}


def arms_of_group(arms: Arms, items: Iterable[str], done: Container[tuple[str, str]]) -> Arms:
    """The arms for which `done` lacks a line of any of these items."""
    found: Arms = {}
    for item in items:
        found |= arms_without_line(arms, item, done)
    return {arm: lora for arm, lora in arms.items() if arm in found}


def adapter_hashes(paths: Sequence[str], scales: Sequence[float] = (1.0,)) -> dict[str, str]:
    """Arm of each adapter, at each scale -> sha256 of its weights, for the settings of a file.

    An arm's name holds its scale (`sft@0.5`), so a file is not continued at other scales.
    """
    hashes = {}
    for path in paths:
        weights = (Path(path) / "adapter_model.safetensors").read_bytes()
        for scale in scales:
            hashes[ScaledAdapter(path, scale).name] = sha256(weights)
    return hashes
