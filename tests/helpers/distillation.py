"""A small distillation for tests: made rows, settings, and a loaded model with its chat."""

from __future__ import annotations

import random
from pathlib import Path

from engine.data.rows import Row
from engine.distill.config import DistillConfig
from engine.sampling.requests import SamplerConfig
from model.chat import Chat
from model.llama import Llama
from model.tokenizer import load_tokenizer

SAMPLING = SamplerConfig(rows=3, temperature=1.0, top_k=60, seed=1)
CONFIG = DistillConfig(max_new_tokens="9")


def rows(count: int = 14) -> list[Row]:
    """Single questions, and every third a conversation of three turns."""
    rng, made = random.Random(0), []
    for i in range(count):
        messages = []
        for turn in range(3 if i % 3 == 0 else 1):
            words = " ".join(rng.choice(["red", "two", "sky", "why"]) for _ in range(4))
            messages += [
                {"role": "user", "content": f"{words} {i} {turn}?"},
                {"role": "assistant", "content": f"{words}."},
            ]
        made.append(Row(f"r{i:02}", tuple(messages)))
    return made


def load(path: Path) -> tuple[Llama, Chat]:
    """The model of a directory and its chat format."""
    return Llama.from_pretrained(path), Chat.from_dir(path, load_tokenizer(path))
