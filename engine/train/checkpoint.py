"""Run directories: what lies in one, and how a killed run is resumed from it

    RUN/meta.json                 settings, hashes of model and data; at the end the summary
    RUN/examples/                 the encoded rows of scripts/train.py (data/example_store.py);
                                  may be deleted, and is then made again
    RUN/metrics.jsonl             one line per optimizer step
    RUN/validation.jsonl          one line per validation
    RUN/checkpoints/step-000050/  adapter_model.safetensors, adapter_config.json (PEFT's layout),
                                  chat.json
                                  optimizer.safetensors (m, v and the masters, all fp32 or fp64)
                                  state.json (step, micro-batch size and where it was halved, best
                                  step so far, whether the run stops here, time spent, hashes of
                                  the files above, bytes and hash of metrics.jsonl up to this step)
    RUN/adapter_model.safetensors, adapter_config.json, chat.json     the finished adapter
                                  (chat.json: chat format, end token, system message of the
                                  training, model/trained_chat.py)

Files and checkpoint directories are written beside their place and renamed, so one that is there is
whole. metrics.jsonl alone grows: a resumed run cuts off what follows its checkpoint (those of older
versions have a copy of it). Nothing is ever unpickled.

In the order of a run:  open_run -> [load_checkpoint, restore_metrics] -> save_checkpoint,
record_validation -> publish; of a finished one: check_published.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from engine.runtime.files import (
    cut_torn_line,
    each_of_jsonl,
    read_jsonl,
    sha256,
    sha256_of_first,
    write_json,
    write_jsonl,
)
from engine.runtime.published_adapter import WEIGHTS
from engine.runtime.run_record import differing
from engine.train.optim import Optimizer
from model.config import read_json
from model.durable import directory_beside, file_beside, sync
from model.hf_checkpoint import open_safetensors
from model.lora import Lora
from model.peft_format import load_lora, write_lora
from model.trained_chat import TrainedChat

EXAMPLES = "examples"  # the directory of the encoded rows
ADAPTER_FILES = (WEIGHTS, "adapter_config.json")
METRICS_FILE = "metrics.jsonl"
STATE_FILES = ("optimizer.safetensors",)
METRICS = {"step": int, "loss": float, "tokens": int, "response_tokens": int}  # of a line
# settings of `train` that runs of older versions lack in meta.json -> the value that they had
ADDED_LATER = {"loss": "sft"}
# time and work of a run up to a checkpoint; checkpoints of older versions do not have it
NOTHING_SPENT = {"seconds": 0.0, "tokens": 0, "operations": 0.0, "peak_bytes": 0}


# ---- begin or resume


def open_run(
    out: Path, settings: dict[str, Any], resume: bool, date: str | None = None
) -> dict[str, Any]:
    """Create a run directory, or check that the one there is the same run; returns its meta.

    date: the one that prompts tell, kept for when the run is resumed (session.as_begun); None where
    they tell none. ValueError where the directory exists without `resume`, is no run, or was begun
    under other settings.
    """
    meta_file = out / "meta.json"
    if is_new_run(out, resume):
        meta = {"settings": settings, "finished": False}
        if date:
            meta["date"] = date
        write_json(meta_file, meta)
        return meta
    meta = _read_meta(meta_file)
    begun = dict(meta["settings"])
    if isinstance(begun.get("train"), dict):
        begun["train"] = ADDED_LATER | begun["train"]
    changes = differing(begun, settings)
    if changes and date and "date" not in meta:  # it was begun by an older version
        changes.append("(prompts tell a date: --date YYYY-MM-DD, the day on which it was begun)")
    if changes:
        raise ValueError(
            f"{out} was started with other settings (its meta.json) and cannot be resumed under "
            "these:\n  " + "\n  ".join(changes)
        )
    return meta


def is_new_run(out: Path, resume: bool) -> bool:
    """Whether a run in `out` would be a new one; ValueError where none may be begun or continued.

    A run that was killed before its meta.json was written has hidden files or examples alone.
    """
    if not out.exists():
        return True
    found = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    if not found or found == [EXAMPLES]:
        return True
    if not resume:
        raise ValueError(f"{out} exists already; choose another --out, or --resume to continue")
    if not (out / "meta.json").exists():
        raise ValueError(
            f"{out} exists but has no meta.json: it is not a run; choose another --out"
        )
    return False


def _read_meta(meta_file: Path) -> dict[str, Any]:
    """The content of meta.json; ValueError where it is not what was written."""
    meta = read_json(meta_file)
    finished = meta.get("finished")
    summary = meta.get("summary")
    right_summary = isinstance(summary, dict) if finished else summary is None
    if type(finished) is not bool or not right_summary:
        raise ValueError(f"{meta_file}: finished or summary is not what was written")
    settings = meta.get("settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{meta_file}: settings is {settings!r}, expected an object")
    return meta


def micro_tokens_of(out: Path) -> int:
    """The tokens of a micro-batch with which a run was begun; 0 where there is no run."""
    meta_file = out / "meta.json"
    if not meta_file.exists():
        return 0
    tokens = _read_meta(meta_file)["settings"].get("train", {}).get("micro_tokens")
    return tokens if type(tokens) is int and tokens > 0 else 0


def load_checkpoint(saved: Path, lora: Lora, optimizer: Optimizer) -> dict[str, Any]:
    """Put a checkpoint into an adapter and an optimizer of the same shape; returns its state.

    Masters and moments are read exactly. ValueError names the file that is missing or broken.
    """
    state = _read_state(saved)
    _check_hashes(saved, state, STATE_FILES)
    file = saved / "optimizer.safetensors"
    targets = {"m": optimizer.m, "v": optimizer.v, "params": lora.params}
    with open_safetensors(file) as tensors:
        for name, target in targets.items():
            tensor = tensors.get_tensor(name)
            if tensor.shape != target.shape:
                raise ValueError(
                    f"{file}: {name} has {tensor.numel()} numbers, expected {target.numel()}"
                )
            target.copy_(tensor)
    _refresh_compute_copy(lora)
    optimizer.step = state["step"]
    return state


def _read_state(saved: Path) -> dict[str, Any]:
    """The content of state.json; ValueError where it is not what was written."""
    file = saved / "state.json"
    state = read_json(file)
    expected = {"step": int, "micro_tokens": int, "best": dict, "sha256": dict}
    for name, kind in expected.items():
        if type(state.get(name)) is not kind:
            raise ValueError(f"{file}: {name} is {state.get(name)!r}, expected {kind.__name__}")
    if type(state.get("waited", 0)) is not int or type(state.get("stopped", "")) is not str:
        raise ValueError(f"{file}: waited or stopped is not what was written")
    if not _is_halved(state.get("halved", [])):
        raise ValueError(f"{file}: halved is not what was written")
    spent = state.get("spent", NOTHING_SPENT)
    since_step = state.get("since_step", 0)
    if not _is_spent(spent) or type(since_step) is not int:
        raise ValueError(f"{file}: spent or since_step is not what was written")
    has_copy = METRICS_FILE in state["sha256"]  # a checkpoint of an older version
    if not has_copy and not _is_part(state.get("metrics")):
        raise ValueError(f"{file}: metrics is not what was written")
    out = saved.parent.parent
    if saved != checkpoint_dir(out, state["step"]) or state["micro_tokens"] < 1:
        raise ValueError(f"{file}: step or micro_tokens is not what was written")
    return state


def _is_halved(value: Any) -> bool:
    """Whether a value is a list of [step, tokens], from which step on micro-batches were smaller.

    Checkpoints of older versions do not have it.
    """
    if not isinstance(value, list):
        return False
    for entry in value:
        if not isinstance(entry, list) or [type(number) for number in entry] != [int, int]:
            return False
    return True


def _is_part(value: Any) -> bool:
    """Whether a value is {"bytes", "sha256"} of a file (`GrowingHash.part`)."""
    if not isinstance(value, dict) or set(value) != {"bytes", "sha256"}:
        return False
    return type(value["bytes"]) is int and value["bytes"] >= 0 and type(value["sha256"]) is str


def _is_spent(value: Any) -> bool:
    """Whether a value has the names of NOTHING_SPENT, with finite numbers that are not negative."""
    if not isinstance(value, dict) or set(value) != set(NOTHING_SPENT):
        return False
    for amount in value.values():
        if type(amount) not in (int, float) or not math.isfinite(amount) or amount < 0:
            return False
    return True


def _check_hashes(saved: Path, state: dict[str, Any], names: Sequence[str]) -> None:
    """ValueError where a file of a checkpoint is not what its state.json says."""
    hashes = state.get("sha256")
    is_readable = isinstance(hashes, dict)
    for name in names:
        if is_readable and name in ADAPTER_FILES and name not in hashes:
            continue  # a checkpoint of an older version, which has no hashes of the adapter
        file = saved / name
        is_right = is_readable and file.exists() and hashes.get(name) == sha256(file.read_bytes())
        if not is_right:
            raise ValueError(
                f"{file} is missing or not what was written (its hash in state.json differs); "
                f"delete {saved} to resume from the checkpoint before it"
            )


def restore_metrics(out: Path, saved: Path | None) -> list[float]:
    """Set metrics.jsonl back to a checkpoint (None: to the start); returns the losses of its lines.

    ValueError where the file is not what it was at the checkpoint, up to that place.
    """
    file = out / METRICS_FILE
    if saved is None:
        write_jsonl(file, [])
        return []
    state = _read_state(saved)
    if METRICS_FILE in state["sha256"]:  # a checkpoint of an older version, which has a copy
        _check_hashes(saved, state, (METRICS_FILE,))
        with file_beside(file) as beside:
            shutil.copyfile(saved / METRICS_FILE, beside)
    else:
        _cut_metrics(file, saved, state["metrics"])
    return [line["loss"] for line in each_of_jsonl(file, METRICS)]


def _cut_metrics(file: Path, saved: Path, part: dict[str, Any]) -> None:
    """Cut off the lines behind a part of a file; ValueError where that part has changed."""
    if sha256_of_first(file, part["bytes"]) != part["sha256"]:
        raise ValueError(
            f"{file} is missing, or not what was written up to step {saved.name[5:]} (its hash in "
            f"{saved / 'state.json'} differs); take it from a copy, or delete {saved} to resume "
            "from the checkpoint before it"
        )
    os.truncate(file, part["bytes"])


# ---- checkpoints


def checkpoint_dir(out: Path, step: int) -> Path:
    """The directory of the checkpoint of a step, whether it exists or not."""
    return out / "checkpoints" / f"step-{step:06d}"


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints that exist, oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def save_checkpoint(
    out: Path,
    lora: Lora,
    optimizer: Optimizer,
    base: str,
    state: dict[str, Any],
    *,
    keep: int,
    best_step: int = 0,
    chat: TrainedChat | None = None,
) -> Path:
    """Write checkpoints/step-N, then delete all but the newest `keep` and that of `best_step`.

    base: the model's directory, for the adapter's config. state: the values that a resumed run
    needs beside the tensors, `metrics` among them (GrowingHash.part). best_step: 0 where no
    validation was the best yet. chat: written into the checkpoint as chat.json.
    """
    saved = checkpoint_dir(out, optimizer.step)
    if not saved.exists():
        with directory_beside(saved) as beside:
            write_lora(lora, beside, base)
            if chat is not None:
                chat.write(beside)
            tensors = {"m": optimizer.m.cpu(), "v": optimizer.v.cpu(), "params": lora.params.cpu()}
            save_file(tensors, beside / "optimizer.safetensors")
            sync(out / METRICS_FILE)  # no checkpoint is on the disk before its lines are
            hashes = {}
            for name in STATE_FILES + ADAPTER_FILES:
                hashes[name] = sha256((beside / name).read_bytes())
            text = json.dumps({**state, "step": optimizer.step, "sha256": hashes})
            (beside / "state.json").write_text(text + "\n", encoding="utf-8")
    best = checkpoint_dir(out, best_step)
    for old in checkpoints(out)[:-keep]:
        if old != best:
            shutil.rmtree(old)
    return saved


def record_validation(out: Path, line: dict[str, Any]) -> None:
    """Append to validation.jsonl; lines of this step or a later one (of a killed run) go."""
    file = out / "validation.jsonl"
    cut_torn_line(file)
    lines = read_jsonl(file, {"step": int})
    earlier = [old for old in lines if old["step"] < line["step"]]
    write_jsonl(file, [*earlier, line])


def load_adapter(saved: Path, lora: Lora) -> None:
    """Put an adapter on disk into one of the same shape."""
    lora.params.copy_(load_lora(saved).params)
    _refresh_compute_copy(lora)


def _refresh_compute_copy(lora: Lora) -> None:
    """Copy the masters into the compute copy, where the model is 16-bit and has one."""
    if lora.compute is not lora.params:
        lora.compute.copy_(lora.params)


# ---- the finished adapter


def publish(out: Path, saved: Path) -> None:
    """Copy a checkpoint's adapter to the top of the run, each file written beside and renamed.

    ValueError where the checkpoint's files are not what its state.json says.
    """
    _check_hashes(saved, read_json(saved / "state.json"), ADAPTER_FILES)
    for name in ADAPTER_FILES:
        with file_beside(out / name) as beside:
            shutil.copyfile(saved / name, beside)


def check_published(out: Path, recorded: Any, saved: Path) -> None:
    """Compare the adapter of a finished run with its recorded hash, or with its checkpoint.

    One that is damaged or missing is published again from the checkpoint `saved`, with a message;
    ValueError where that is impossible. Runs of older versions have no record: without their
    checkpoint nothing can be compared.
    """
    published = _hash_of(out / WEIGHTS)
    in_checkpoint = _hash_of(saved / WEIGHTS)
    expected = in_checkpoint
    if isinstance(recorded, dict):
        expected = recorded.get(WEIGHTS, in_checkpoint)
    is_whole = published is not None and (out / "adapter_config.json").is_file()
    if is_whole and (expected is None or expected == published):
        return
    if in_checkpoint is None or in_checkpoint != expected:
        raise ValueError(
            f"{out / WEIGHTS} is not what the run wrote, and {saved} cannot replace it; take it "
            f"from a copy, or delete {out} and train again"
        )
    publish(out, saved)
    print(f"{out}: the adapter was damaged or gone; it is written again from {saved.name}")


def _hash_of(file: Path) -> str | None:
    """The sha256 of a file; None where there is none."""
    return sha256(file.read_bytes()) if file.is_file() else None
