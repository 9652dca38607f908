"""Run directories: what lies in one, and how a killed run goes on

    RUN/meta.json                 settings, hashes of model and data; at the end the summary
    RUN/metrics.jsonl             one line per optimizer step
    RUN/checkpoints/step-000050/  adapter_model.safetensors, adapter_config.json (PEFT's layout),
                                  optimizer.safetensors, state.json
    RUN/adapter_model.safetensors, adapter_config.json     the finished adapter

A checkpoint directory appears only when all of it is on disk. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from engine.log import differing, write_json
from engine.optim import Optimizer
from model.config import read_json
from model.lora import Lora
from model.weights import open_safetensors, written_beside

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


def open_run(out: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Create a run directory, or check that the one there is the same run; returns its meta."""
    meta_file = out / "meta.json"
    if not out.exists() or all(p.name.startswith(".") for p in out.iterdir()):  # killed at once
        meta = {"settings": settings, "finished": False}
        write_json(meta_file, meta)
        return meta
    if not resume:
        raise ValueError(f"{out} exists already; choose another --out, or --resume to go on")
    if not meta_file.exists():
        raise ValueError(
            f"{out} exists but has no meta.json: it is not a run; choose another --out"
        )
    meta = read_json(meta_file)
    changes = differing(meta.get("settings", {}), settings)
    if changes:
        raise ValueError(
            f"{out} was started with other settings and cannot be resumed under these:\n  "
            + "\n  ".join(changes)
        )
    return meta


def save_checkpoint(out: Path, lora: Lora, optimizer: Optimizer, base: str, keep: int) -> Path:
    """Write checkpoints/step-N and delete all but the newest `keep`."""
    place = out / "checkpoints" / f"step-{optimizer.step:06d}"
    if not place.exists():
        with written_beside(place) as beside:
            lora.write(beside, base)
            moments = {"m": optimizer.m.cpu(), "v": optimizer.v.cpu(), "params": lora.params.cpu()}
            save_file(moments, beside / "optimizer.safetensors")
            state = json.dumps({"step": optimizer.step})
            (beside / "state.json").write_text(state + "\n", encoding="utf-8")
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)
    return place


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def load_checkpoint(place: Path, lora: Lora, optimizer: Optimizer) -> None:
    """Put the state of a checkpoint into an adapter and an optimizer of the same shape."""
    file = place / "optimizer.safetensors"
    with open_safetensors(file) as opened:
        for name, target in (("m", optimizer.m), ("v", optimizer.v), ("params", lora.params)):
            tensor = opened.get_tensor(name)
            if tensor.shape != target.shape:
                raise ValueError(f"{file}: {name} has {tensor.numel()}, not {target.numel()}")
            target.copy_(tensor)
    if lora.compute is not lora.params:
        lora.compute.copy_(lora.params)
    optimizer.step = int(read_json(place / "state.json")["step"])


def publish(out: Path, place: Path) -> None:
    """Copy a checkpoint's adapter to the top of the run, each file written beside and renamed."""
    for name in ADAPTER:
        beside = out / f".{name}.partial"
        shutil.copyfile(place / name, beside)
        os.replace(beside, out / name)
