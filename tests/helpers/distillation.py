"""A small distillation for tests: made rows, settings, a model with its chat format, and a stand-in
for `judge`, which accepts a fifth of the noise that a tiny model writes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.rows import Row
from engine.distill.config import DistillConfig
from engine.distill.distill import distill
from engine.distill.distill_report import DistillReport
from engine.runtime.distributed import World
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import SamplerConfig
from model.chat import Chat
from model.llama import Llama
from model.tokenizer import load_tokenizer

SAMPLING = SamplerConfig(rows=3, temperature=1.0, top_k=60, seed=1)
CONFIG = DistillConfig(max_new_tokens="9")
CASCADE = DistillConfig(max_new_tokens="9", cascade="unguided:3,guided:2,cooler:1")


def rows(count: int = 14) -> list[Row]:
    """Single questions, and every third a conversation of three turns."""
    rng = random.Random(0)
    made = []
    for i in range(count):
        turns = 3 if i % 3 == 0 else 1
        messages = []
        for turn in range(turns):
            words = " ".join(rng.choice(["red", "two", "sky", "why"]) for _ in range(4))
            messages.append({"role": "user", "content": f"{words} {i} {turn}?"})
            messages.append({"role": "assistant", "content": f"{words}."})
        made.append(Row(f"r{i:02}", tuple(messages)))
    return made


def load(path: Path) -> tuple[Llama, Chat]:
    """The model of a directory and its chat format."""
    return Llama.from_pretrained(path), Chat.from_dir(path, load_tokenizer(path))


def run_distillation(
    path: Path,
    out: Path,
    config: DistillConfig = CONFIG,
    sampling: SamplerConfig = SAMPLING,
    *,
    given: Sequence[Row] | None = None,
    settings: dict[str, Any] | None = None,
    resume: bool = False,
    world: World | None = None,
) -> DistillReport:
    """Distil `given`, else `rows()`, with the model of a directory."""
    model, chat = load(path)
    return distill(
        ChatGenerator(model, chat, sampling),
        given or rows(),
        Path(out),
        config,
        settings=settings or {"sampling": "as above"},
        resume=resume,
        world=world,
    )


def judge_by_hash(
    context: object, reference: str, text: str, finish: str, verifier: object, **_: object
) -> str:
    """In place of `judge`: accepts a fifth of all texts, rejects the others for two reasons."""
    number = hashlib.sha256(repr((context, text)).encode()).digest()[0]
    if number < 52:
        return "accepted"
    return "mismatch" if number % 2 else "banned"
