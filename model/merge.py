"""An adapter merged into the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from model.config import LlamaConfig
from model.weights import (
    COMPARED,
    EMBEDDING,
    check_finite,
    locate,
    rewrite_checkpoint,
)

if TYPE_CHECKING:
    pass
from model.lora import Lora


def merge(
    model_dir: str | Path,
    lora: Lora,
    out: str | Path,
    finish: Callable[[Path], None] | None = None,
) -> list[str]:
    """Write the model with W + s B A in place of every adapted W, as a Hugging Face directory.

    The sum is made in fp32 and rounded once to the checkpoint's own dtype; one shard is in memory
    at a time. config.json says what is so of a head that is stored and of quantisation; then
    `finish(directory)` may change what lies there before it appears as `out`. Returns what was not
    copied. ValueError where the adapter does not fit, a number is not finite, or `out`
    exists.
    """
    model_dir = Path(model_dir)
    said = LlamaConfig.from_dir(model_dir)
    lora.check_fits(said)
    checkpoint = locate(model_dir, said)  # what does not load is not copied either
    config, settings = checkpoint.config, {}
    if config.tie_embeddings != said.tie_embeddings:
        settings["tie_word_embeddings"] = config.tie_embeddings
    if config.quantised != said.quantised:
        settings["quantization_config"] = None

    def rows_of(name: str) -> Iterable[tuple[Tensor, int]]:
        stored = name if name in checkpoint.files else EMBEDDING  # a tied head
        for first in range(0, config.vocab_size, COMPARED):
            yield checkpoint.rows(stored, first, min(first + COMPARED, config.vocab_size)), first

    def change(name: str, weight: Tensor) -> Tensor:
        check_finite(weight, name, model_dir)
        delta = lora.delta(name)
        if delta is None:
            return weight
        merged = (weight.float() + delta.cpu().float()).to(weight.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"{name} merged is not finite in {weight.dtype}")
        return merged

    lora.check_copies(config, rows_of)
    return rewrite_checkpoint(model_dir, Path(out), change, settings, finish=finish)
