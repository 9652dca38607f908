"""An adapter merged into the weights of a checkpoint: W + s B A in place of every adapted W."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from model import quantised_file
from model.chat_formats import ADDITIONAL_TEMPLATES
from model.config import LlamaConfig, read_json
from model.durable import directory_beside
from model.file_checks import leads_out
from model.hf_checkpoint import (
    INDEX,
    ROWS_AT_ONCE,
    check_finite,
    checkpoint_files,
    locate,
    open_safetensors,
)
from model.layout import EMBEDDING
from model.lora import Lora
from model.peft_format import check_copies

MANIFEST = "merge.json"  # of a rewritten directory: where it is from, and what was merged


def merge(
    model_dir: str | Path,
    lora: Lora,
    out: str | Path,
    finish: Callable[[Path], None] | None = None,
    adapter: str = "",
) -> list[str]:
    """Write the model with W + s B A in place of every adapted W, as a Hugging Face directory.

    adapter: sha256 of the adapter's file, for merge.json; its strength is written there too. At
    strength 0 every weight keeps its bits.

    The sum is made in fp32 and rounded once to the checkpoint's own dtype; one shard is in memory
    at a time. Statements of config.json that the tensors contradict (tied embeddings, quantisation)
    are corrected; then `finish(directory)` may change files before the directory appears as `out`.
    Returns the names of files that were not copied, with reasons. ValueError where the adapter does
    not fit, a number is not finite, or `out` exists.
    """
    model_dir = Path(model_dir)
    stated = LlamaConfig.from_dir(model_dir)
    lora.check_fits(stated)
    checkpoint = locate(model_dir, stated)  # a model that does not load is not copied either
    config = checkpoint.config
    settings: dict[str, Any] = {}  # of config.json, to be corrected
    if config.tie_embeddings != stated.tie_embeddings:
        settings["tie_word_embeddings"] = config.tie_embeddings
    if config.quantised != stated.quantised:
        settings["quantization_config"] = None

    def rows_of(name: str) -> Iterable[tuple[Tensor, int]]:
        stored = name if name in checkpoint.files else EMBEDDING  # a tied head
        for first in range(0, config.vocab_size, ROWS_AT_ONCE):
            end = min(first + ROWS_AT_ONCE, config.vocab_size)
            yield checkpoint.rows(stored, first, end), first

    def change(name: str, weight: Tensor) -> Tensor:
        check_finite(weight, name, model_dir)
        delta = lora.delta(name)  # (N, K), as the weight
        if delta is None:
            return weight
        merged = (weight.float() + delta.cpu().float()).to(weight.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"{name} merged is not finite in {weight.dtype}")
        return merged

    check_copies(lora, config, rows_of)
    facts = {"adapter": adapter, "scale": lora.strength}
    return rewrite_checkpoint(model_dir, Path(out), change, settings, finish=finish, facts=facts)


def rewrite_checkpoint(
    source: Path,
    out: Path,
    change: Callable[[str, Tensor], Tensor],
    settings: dict[str, Any] | None = None,
    *,
    finish: Callable[[Path], None] | None = None,
    facts: dict[str, Any] | None = None,
) -> list[str]:
    """Copy a model directory to `out`, each tensor passed through `change(name, tensor)`.

    Shards, names, dtypes and every other file stay as they are; one shard is in memory at a time.
    `settings` go into config.json (None removes a key); then `finish(directory)` may change files
    before the directory appears as `out`. `facts` go into merge.json, beside the source. Returns
    the names of files that were not copied, with reasons: directories (but for that of further chat
    templates), weights in other forms, links out of the directory.
    """
    shards = checkpoint_files(source)
    is_sharded = source / "model.safetensors" not in shards
    left_out = []
    with directory_beside(out) as beside:
        for shard in shards:
            _rewrite_shard(shard, beside / shard.name, change)
        for file in sorted(set(source.iterdir()) - set(shards)):
            reason = _why_not_copied(file, is_sharded)
            if reason is not None:
                left_out.append(f"{file.name} ({reason})")
            elif file.is_dir():
                left_out += _copy_templates(file, beside / file.name)
            else:
                shutil.copyfile(file, beside / file.name)
        if settings:
            config = read_json(source / "config.json") | settings
            config = {key: value for key, value in config.items() if value is not None}
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (beside / "config.json").write_text(text, encoding="utf-8")
        manifest = json.dumps({"merged_from": str(source.resolve()), **(facts or {})}, indent=1)
        (beside / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        if finish is not None:
            finish(beside)
    return left_out


def _rewrite_shard(source: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Write one safetensors file with every tensor passed through `change`, in its old dtype."""
    tensors = {}
    with open_safetensors(source) as opened:
        metadata = opened.metadata() or {"format": "pt"}
        for name in opened.keys():
            old = opened.get_tensor(name)
            new = change(name, old).to(old.dtype)
            tensors[name] = new.contiguous()
    save_file(tensors, out, metadata=metadata)


def _copy_templates(source: Path, out: Path) -> list[str]:
    """Copy a directory of chat templates; returns the names of other files there, with reasons."""
    left_out = []
    out.mkdir()
    for file in sorted(source.iterdir()):
        is_template = file.suffix == ".jinja" and file.is_file() and leads_out(file) is None
        if is_template:
            shutil.copyfile(file, out / file.name)
        else:
            left_out.append(f"{source.name}/{file.name} (no chat template, or a link)")
    return left_out


def _why_not_copied(file: Path, is_sharded: bool) -> str | None:
    """Why a file beside the weights is not copied into a rewritten directory, None where it is.

    `is_sharded`: the weights are shards, which model.safetensors.index.json lists.
    """
    target = leads_out(file)
    if target is not None:
        return f"a link to {target}"
    if file.is_dir():
        return None if file.name == ADDITIONAL_TEMPLATES else "a directory"
    if not file.is_file():
        return "a broken link, a pipe or a device"
    holds_weights = file.suffix in (".safetensors", ".bin", ".gguf", ".pth", ".pt")
    if holds_weights or file.name == quantised_file.FILE:
        return "other weights, without the adapter"
    is_index_of_the_shards = is_sharded and file.name == INDEX
    if file.name.endswith(".index.json") and not is_index_of_the_shards:
        return "an index of other weights"
    return None
