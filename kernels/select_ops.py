"""What `--ops auto` does: each operation that is not torch's is held to its definition, once.

The check is the SPEC's, at its two largest test shapes in the run's dtype, at the largest in fp32,
and for a few tokens at the model's own widths: those are the kernels that will run. An operation
that fails it, or raises, is taken from the other table. Results lie in $XDG_CACHE_HOME (~/.cache)
/sdft-engine/kernels-<key>.json; the key is made of the card (on a CPU: the compiled library), the
versions of torch and triton, the dtype, the widths and the contents of this folder and all below
it. A file that is not understood is written anew; without a home directory, or where other users
could have written it (kernels/disk_cache.py), each run checks anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernels import disk_cache
from kernels.cpu import native
from kernels.spec import Spec, Widths, check

FOLDER = Path(__file__).resolve().parent
REASON = 200  # characters of a reason that are kept


def sources_hash(folder: Path = FOLDER) -> str:
    """Hash of the names and contents of every file in the folder, at any depth.

    What Python or an editor leaves there is none of them: __pycache__ and hidden files.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        left = any(part == "__pycache__" or part.startswith(".") for part in name.parts)
        if path.is_file() and not left:
            content = path.read_bytes()
            digest.update(f"{name.as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()


def identity(
    device: torch.device, dtype: torch.dtype, widths: Widths | None = None
) -> dict[str, str]:
    """What a result is valid for."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else native.name()
    versions = {"torch": torch.__version__, "triton": triton}
    model = {"dtype": str(dtype), "widths": str(widths)}
    return {"card": card, **versions, **model, "kernels": sources_hash()}


def cache_file(valid_for: dict[str, str]) -> Path | None:
    """Where the results of this card and version lie; None without a home directory."""
    key = hashlib.sha256(json.dumps(valid_for, sort_keys=True).encode()).hexdigest()[:16]
    folder = disk_cache.folder()
    return folder and folder / f"kernels-{key}.json"


def _read(path: Path | None) -> dict[str, str]:
    """Operation -> reason of its failure, "" where it passed; {} for a file we did not write."""
    try:
        if path is None or disk_cache.distrusted(path):
            return {}
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        fine = all(isinstance(text, str) for pair in results.items() for text in pair)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return results if fine else {}


def _write(path: Path | None, valid_for: dict[str, str], results: dict[str, str]) -> str:
    """Keep the results; where they lie then, or why nowhere."""
    if path is None:
        return "not remembered, there is no home directory: set XDG_CACHE_HOME"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if reason := disk_cache.distrusted(path):
            return f"not remembered, {reason}: set XDG_CACHE_HOME to a folder of your own"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = json.dumps({"valid_for": valid_for, "results": results}, indent=1) + "\n"
        beside.write_text(text, encoding="utf-8")
        beside.chmod(0o600)  # whatever the umask lets others write
        os.replace(beside, path)
    except OSError as error:
        return f"not remembered, {path} cannot be written ({error}); the next run checks again"
    return f"remembered in {path}"


def _shapes(spec: Spec) -> list[tuple[int, ...]]:
    """The test shapes with the most numbers in them: each costs a compilation of every kernel."""

    def numbers(shape: tuple[int, ...]) -> int:
        inputs = spec.make_inputs(shape, torch.Generator().manual_seed(0))
        return sum(v.numel() for v in inputs.values() if isinstance(v, torch.Tensor))

    return sorted(spec.test_shapes, key=numbers, reverse=True)


def _failure(
    spec: Spec,
    ops: Any,
    reference: Any,
    device: torch.device,
    dtype: torch.dtype,
    widths: Widths | None,
) -> str:
    """Why this operation of `ops` must not be used here, "" when it passes."""
    try:
        first, *others = _shapes(spec)
        own = () if widths is None else spec.model_shapes(widths)
        cases = [(s, dtype) for s in (first, *others[:1], *own)]
        for shape, kind in dict.fromkeys([*cases, (first, torch.float32)]):
            check(spec, ops, reference, shape, kind, str(device))
    except Exception as error:  # whatever a compiler, a launch or the check may raise
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return f"{kind}{lines[0]}"[:REASON] or "failed"
    return ""


def _ensure_alive(name: str, reason: str, device: torch.device) -> None:
    """RuntimeError where a kernel has taken the device with it: nothing more can run here."""
    try:
        torch.zeros(1, device=device).sum().item()
    except RuntimeError as error:
        raise RuntimeError(
            f"the Triton form of {name} left {device} unusable ({reason}); this is remembered, so "
            "start the run again: it will do without it"
        ) from error


def checked(
    candidate: Any,
    fallback: Any,
    reference: Any,
    specs: dict[str, Spec],
    fields: dict[str, tuple[str, ...]],
    device: torch.device,
    dtype: torch.dtype,
    widths: Widths | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Any, dict[str, str]]:
    """The candidate with what fails replaced from the fallback, and the failures' reasons."""
    valid_for = identity(device, dtype, widths)
    path = cache_file(valid_for)
    results, new, started = _read(path), False, time.perf_counter()
    for name, spec in specs.items():
        if all(getattr(candidate, f) is getattr(fallback, f) for f in fields[name]):
            results.pop(name, None)
        elif name not in results:
            if not new:
                card = valid_for["card"]
                say(f"ops: checking the kernels on {card} (once per card, version and widths)")
            new = True
            results[name] = _failure(spec, candidate, reference, device, dtype, widths)
            if results[name]:
                _write(path, valid_for, results)
                _ensure_alive(name, results[name], device)
    if new:
        kept = _write(path, valid_for, results)
        say(f"ops: checked in {time.perf_counter() - started:.1f} s; {kept}")
    reasons = {name: reason for name, reason in results.items() if reason and name in specs}
    for name, reason in reasons.items():
        say(f"ops: {name} runs in its {fallback.name} form, its check failed here: {reason}")
    replaced = {f: getattr(fallback, f) for name in reasons for f in fields[name]}
    return dataclasses.replace(candidate, **replaced), reasons


def described(
    ops: Any,
    tables: list[Any],
    fields: dict[str, tuple[str, ...]],
    reasons: dict[str, str],
) -> str:
    """Which operation is from which table: "triton (rms_norm, rope), torch (adamw)"."""
    groups: dict[str, list[str]] = {}
    for operation, names in fields.items():
        origins = {}
        for name in names:
            found = (t.name for t in tables if getattr(t, name) is getattr(ops, name))
            origins[name] = next(found, "own")
        for origin in dict.fromkeys(origins.values()):
            mine = [name for name in names if origins[name] == origin]
            what = operation if len(mine) == len(names) else "/".join(mine)
            if reason := reasons.get(operation):
                what += f": check failed: {reason}"
            groups.setdefault(origin, []).append(what)
    return ", ".join(f"{origin} ({', '.join(names)})" for origin, names in groups.items())
