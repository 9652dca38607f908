"""Rewrites a model directory as shards with an index, as large checkpoints come."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def split(source: Path, out: Path, shards: int, dtype: torch.dtype | None = None) -> Path:
    """Copy `source` to `out` in `shards` files, tensors cast to `dtype` where one is given."""
    out.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    weight_map, total = {}, 0
    with safe_open(source / "model.safetensors", framework="pt") as opened:
        names = list(opened.keys())
        for i in range(shards):
            name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            tensors = {n: opened.get_tensor(n) for n in names[i::shards]}
            tensors = {n: t.to(dtype or t.dtype) for n, t in tensors.items()}
            save_file(tensors, out / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return out
