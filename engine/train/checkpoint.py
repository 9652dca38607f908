"""Run directories: what lies in one, and how a killed run goes on

    RUN/meta.json                 settings, hashes of model and data; at the end the summary
    RUN/metrics.jsonl             one line per optimizer step
    RUN/checkpoints/step-000050/  adapter_model.safetensors, adapter_config.json (PEFT's layout),
                                  optimizer.safetensors, state.json (step, data position, best
                                  so far), metrics.jsonl (the lines up to here)
    RUN/adapter_model.safetensors, adapter_config.json     the finished adapter
    chat.json                     beside each adapter: chat format, end token, system message of the
                                  training (model/trained_chat.py)

A checkpoint directory appears only when all of it is on disk. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from engine.runtime.files import cut_torn_line, read_jsonl, sha256, write_json, write_jsonl
from engine.runtime.published_adapter import WEIGHTS
from engine.runtime.run_record import differing
from engine.train.optim import Optimizer
from model.config import read_json
from model.durable import directory_beside, file_beside
from model.hf_checkpoint import open_safetensors
from model.lora import Lora
from model.peft_format import load_lora, write_lora
from model.trained_chat import TrainedChat

HASHED = ("optimizer.safetensors", "metrics.jsonl")  # in state.json, as are those of ADAPTER
METRICS = {"step": int, "loss": float, "tokens": int, "response_tokens": int}  # of a line
# what training took, of which checkpoints keep account (those of before do not)
NOTHING_SPENT = {"seconds": 0.0, "tokens": 0, "operations": 0.0, "peak_bytes": 0}
ADAPTER = (WEIGHTS, "adapter_config.json")


def open_run(
    out: Path, settings: dict[str, Any], resume: bool, date: str | None = None
) -> dict[str, Any]:
    """Create a run directory, or check that the one there is the same run; returns its meta.

    `date`, where prompts tell one, is kept for when the run goes on (session.as_begun).
    """
    meta_file = out / "meta.json"
    if not out.exists() or all(p.name.startswith(".") for p in out.iterdir()):  # killed at once
        meta = {"settings": settings, "finished": False} | ({"date": date} if date else {})
        write_json(meta_file, meta)
        return meta
    if not resume:
        raise ValueError(f"{out} exists already; choose another --out, or --resume to go on")
    if not meta_file.exists():
        raise ValueError(
            f"{out} exists but has no meta.json: it is not a run; choose another --out"
        )
    meta = read_json(meta_file)
    summary = dict if meta.get("finished") else type(None)
    if type(meta.get("finished")) is not bool or type(meta.get("summary")) is not summary:
        raise ValueError(f"{meta_file}: finished or summary is not what was written")
    if not isinstance(meta.get("settings"), dict):
        raise ValueError(f"{meta_file}: settings is {meta.get('settings')!r}")
    changes = differing(meta["settings"], settings)
    if changes and date and "date" not in meta:  # runs of before
        changes.append("(prompts tell a date: --date YYYY-MM-DD, the day on which it was begun)")
    if changes:
        raise ValueError(
            f"{out} was started with other settings (its meta.json) and cannot be resumed under "
            "these:\n  " + "\n  ".join(changes)
        )
    return meta


def save_checkpoint(
    out: Path,
    lora: Lora,
    optimizer: Optimizer,
    base: str,
    keep: int,
    state: dict[str, Any],
    spare: int = 0,
    chat: TrainedChat | None = None,
) -> Path:
    """Write checkpoints/step-N with the metrics so far, delete all but the newest `keep`.

    `state` is what else a resumed run needs to know; the checkpoint of step `spare` stays.
    """
    place = place_of(out, optimizer.step)
    if not place.exists():
        with directory_beside(place) as beside:
            write_lora(lora, beside, base)
            if chat is not None:
                chat.write(beside)
            moments = {"m": optimizer.m.cpu(), "v": optimizer.v.cpu(), "params": lora.params.cpu()}
            save_file(moments, beside / "optimizer.safetensors")
            shutil.copyfile(out / "metrics.jsonl", beside / "metrics.jsonl")
            names = (*HASHED, *ADAPTER)
            hashes = {name: sha256((beside / name).read_bytes()) for name in names}
            text = json.dumps({**state, "step": optimizer.step, "sha256": hashes})
            (beside / "state.json").write_text(text + "\n", encoding="utf-8")
    for old in checkpoints(out)[:-keep]:
        if old.name != f"step-{spare:06d}":
            shutil.rmtree(old)
    return place


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def place_of(out: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return out / "checkpoints" / f"step-{step:06d}"


def note_validation(out: Path, found: dict[str, Any]) -> None:
    """Append to validation.jsonl; a step that is there already (before a kill) is replaced."""
    file = out / "validation.jsonl"
    cut_torn_line(file)
    lines = read_jsonl(file, {"step": int})
    write_jsonl(file, [*(x for x in lines if x["step"] < found["step"]), found])


def load_adapter(place: Path, lora: Lora) -> None:
    """Put the adapter of a checkpoint into one of the same shape."""
    lora.params.copy_(load_lora(place).params)
    if lora.compute is not lora.params:
        lora.compute.copy_(lora.params)


def load_checkpoint(place: Path, lora: Lora, optimizer: Optimizer) -> dict[str, Any]:
    """Put a checkpoint into an adapter and an optimizer of the same shape; returns its state.

    ValueError names the file that is missing or broken.
    """
    state, file = read_json(place / "state.json"), place / "optimizer.safetensors"
    kinds = {"step": int, "micro_tokens": int, "best": dict, "sha256": dict}
    for name, kind in kinds.items():
        if type(state.get(name)) is not kind:
            raise ValueError(f"{place / 'state.json'}: {name} is {state.get(name)!r}")
    spent, since = state.get("spent", NOTHING_SPENT), state.get("since_step", 0)
    known = isinstance(spent, dict) and set(spent) == set(NOTHING_SPENT)
    if type(since) is not int or not known or not all(map(_is_amount, spent.values())):
        raise ValueError(f"{place / 'state.json'}: spent or since_step is not what was written")
    if place != place_of(place.parent.parent, state["step"]) or state["micro_tokens"] < 1:
        raise ValueError(f"{place / 'state.json'}: step or micro_tokens is not what was written")
    _check_hashes(place, state, HASHED)
    with open_safetensors(file) as opened:
        for name, target in (("m", optimizer.m), ("v", optimizer.v), ("params", lora.params)):
            tensor = opened.get_tensor(name)
            if tensor.shape != target.shape:
                raise ValueError(f"{file}: {name} has {tensor.numel()}, not {target.numel()}")
            target.copy_(tensor)
    if lora.compute is not lora.params:
        lora.compute.copy_(lora.params)
    optimizer.step = state["step"]
    return state


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _check_hashes(place: Path, state: dict[str, Any], names: Sequence[str]) -> None:
    """ValueError where a file of a checkpoint is not what its state.json says."""
    hashes = state.get("sha256")
    for name in names:
        if name in ADAPTER and isinstance(hashes, dict) and name not in hashes:
            continue  # a checkpoint of before
        if (
            not isinstance(hashes, dict)
            or not (place / name).exists()
            or hashes.get(name) != sha256((place / name).read_bytes())
        ):
            raise ValueError(
                f"{place / name} is missing or not what was written (its hash in state.json "
                f"differs); delete {place} to go on from the checkpoint before it"
            )


def restore_metrics(out: Path, saved: Path | None) -> list[dict[str, Any]]:
    """Make metrics.jsonl what it was at a checkpoint (None: the start); returns its lines."""
    metrics = out / "metrics.jsonl"
    lines = read_jsonl(saved / "metrics.jsonl", METRICS) if saved else []
    write_jsonl(metrics, lines)
    return lines


def publish(out: Path, place: Path) -> None:
    """Copy a checkpoint's adapter to the top of the run, each file written beside and renamed."""
    _check_hashes(place, read_json(place / "state.json"), ADAPTER)
    for name in ADAPTER:
        with file_beside(out / name) as beside:
            shutil.copyfile(place / name, beside)


def check_published(out: Path, recorded: Any, place: Path) -> None:
    """Hold the adapter of a finished run against what was recorded, or against its checkpoint.

    One that is damaged or gone is published anew, which is said; ValueError where it cannot be.
    Runs of before have no record: without their checkpoint nothing can be compared.
    """
    now, kept = (
        sha256(file.read_bytes()) if file.is_file() else None
        for file in (out / WEIGHTS, place / WEIGHTS)
    )
    right = recorded.get(WEIGHTS, kept) if isinstance(recorded, dict) else kept
    if now is not None and right in (None, now) and (out / ADAPTER[1]).is_file():
        return
    if kept is None or kept != right:
        raise ValueError(
            f"{out / WEIGHTS} is not what the run wrote, and {place} cannot replace it; take it "
            f"from a copy, or delete {out} and train again"
        )
    publish(out, place)
    print(f"{out}: the adapter was damaged or gone; it is written again from {place.name}")
