"""A small training run for tests: made examples, settings, and the metrics without their speed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from engine.data.encode import Example
from engine.train.config import TrainConfig
from engine.train.train import FrozenModel, train
from model.llama import Llama
from model.lora import Lora, LoraConfig

SMALL = TrainConfig(lr=5e-3, epochs=2, batch_rows=4, micro_tokens=64, save_every=3, seed=5)
LORA = LoraConfig(rank=4, alpha=8, modules="all", dropout=0.1)


def examples(count: int = 20, vocab: int = 300, seed: int = 0) -> list[Example]:
    """Random prompts; responses that can be learnt."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        n_prompt = rng.randint(1, 20)
        n_response = rng.randint(1, 25)
        prompt = [rng.randrange(vocab) for _ in range(n_prompt)]
        response = [(7 * k) % 50 for k in range(n_response)]
        made.append(Example(f"r{i}/0", prompt + response, n_prompt))
    return made


def run_training(
    model: Llama,
    out: Path,
    config: TrainConfig = SMALL,
    rows: list[Example] | None = None,
    resume: bool = False,
    lora: LoraConfig = LORA,
) -> tuple[Lora, dict[str, Any]]:
    """Train on `rows` (`examples()`) into `out`."""
    frozen = FrozenModel(model, directory="b", fingerprint="h")
    return train(frozen, rows or examples(), lora, config, Path(out), resume=resume)


def metrics_lines(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the speed."""
    text = (Path(out) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [line | {"tokens_s": 0} for line in lines]
