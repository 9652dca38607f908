"""Rewrites a model directory as shards with an index, the form of large checkpoints."""

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
    weight_map: dict[str, str] = {}  # tensor -> file
    total = 0  # bytes
    with safe_open(source / "model.safetensors", framework="pt") as opened:
        names = list(opened.keys())
        for i in range(shards):
            file_name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            tensors: dict[str, torch.Tensor] = {}
            for name in names[i::shards]:
                tensor = opened.get_tensor(name)
                tensors[name] = tensor.to(dtype or tensor.dtype)
                weight_map[name] = file_name
                total += tensors[name].nbytes
            save_file(tensors, out / file_name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return out
