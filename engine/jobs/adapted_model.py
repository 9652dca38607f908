"""A model with an adapter in it, as the scripts name it that write the two as one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.jobs.model_names import find_model
from engine.runtime.published_adapter import refuse_damaged, refuse_scale
from model.lora import Lora, check_strength
from model.peft_format import load_lora
from model.trained_chat import TrainedChat


@dataclass(frozen=True)
class AdaptedModelConfig:
    """Which model, which adapter, and how much of it."""

    model: str  # Hugging Face model directory, a .gguf file, or ORG/NAME in the local Hugging Face
    #   cache
    adapter: Path | None = None  # PEFT adapter directory
    scale: float | None = None  # strength of the adapter: 0 (the model stays as it is) to 1 (as it
    #   was trained), at most 10 [default: 1]

    def check(self) -> None:
        """ValueError for a strength out of range."""
        check_strength(self.strength)

    @property
    def strength(self) -> float:
        """The strength of the adapter."""
        return 1.0 if self.scale is None else self.scale

    def model_dir(self) -> Path:
        """The directory of the model; ValueError where there is none, and for a strength that
        would scale nothing."""
        model = find_model(self.model)
        refuse_scale(self.scale, model, [] if self.adapter is None else [self.adapter])
        return model

    def load(self) -> tuple[Lora | None, TrainedChat | None]:
        """The adapter at its strength, and the chat format of its training; None where there is
        none. ValueError for damaged files."""
        if self.adapter is None:
            return None, None
        refuse_damaged(self.adapter)
        return load_lora(self.adapter).scaled(self.strength), TrainedChat.read(self.adapter)
