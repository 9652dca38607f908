"""Which table of operations runs on this machine: `--ops auto|torch|native|triton|reference`.

`auto` checks each operation that is not torch's against its definition, once per machine. The check
is the SPEC's (kernels/spec.py), at its two largest test shapes in the run's dtype, at the largest
in fp32, and for a few tokens at the model's own widths: those are the kernels that will run. An
operation that fails its check, or raises, is taken from TORCH.

Results are kept in $XDG_CACHE_HOME (~/.cache)/sdft-engine/kernels-<key>.json. The key is made of
the card (on a CPU: the compiled library), the versions of torch and triton, the dtype, the widths
and the contents of this folder and of all folders below it. A file that is not understood is
replaced. Without a home directory, or where other users could have written the file
(kernels/disk_cache.py), each run checks again.
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

import torch

from kernels import disk_cache, registry
from kernels.cpu import native
from kernels.dtypes import sum_products_in_fp32
from kernels.launch import triton_launch
from kernels.registry import OPS, REFERENCE, SPECS, TORCH, Ops, functions
from kernels.spec import Spec, Widths, check

FOLDER = Path(__file__).resolve().parent
REASON = 200  # characters of a reason that are kept

# ---- the choice


def choose(
    name: str = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    widths: Widths | None = None,
) -> Ops:
    """The table of that name for a model on this device; the result's name lists its parts.

    `auto` on a CPU is TORCH; in fp32 it samples with NATIVE, if that compiles here and passes its
    checks at the model's widths. On a GPU it is TRITON, with TORCH's form of each operation that
    fails its check. Where `auto` takes a slower form than the machine could have, it prints why.
    ValueError for an unknown name, and for `native` and `triton` where they cannot run, with the
    reason.
    """
    device = torch.device(device)
    if device.type == "cuda":
        sum_products_in_fp32()
    if name not in ("auto", *OPS):
        raise ValueError(f"--ops {name!r} is not known; choose one of auto, {', '.join(OPS)}")
    if name == "native" or (name == "auto" and device.type == "cpu"):
        return _choose_native(name, device, dtype, widths)
    if name == "auto":
        return _choose_triton(device, dtype, widths)
    if name == "triton":
        if reason := triton_launch.why_unavailable(device):
            raise ValueError(f"--ops triton cannot run here: {reason}; use --ops auto or torch")
        return _named_by_parts(registry.TRITON, {})
    return OPS[name]


def _choose_triton(device: torch.device, dtype: torch.dtype, widths: Widths | None) -> Ops:
    """TRITON with TORCH's form of what fails its check; TORCH, saying why, where none can run."""
    reason = triton_launch.why_unavailable(device)
    if reason is None and dtype == torch.float64:
        reason = "they compute in fp32, and float64 was asked for"
    if reason is not None:
        print(f"ops: all runs in torch's slower form on {device}, without Triton kernels: {reason}")
        return TORCH
    ops, reasons = with_fallback(registry.TRITON, TORCH, device, dtype, widths)
    return _named_by_parts(ops, reasons)


def _choose_native(
    name: str, device: torch.device, dtype: torch.dtype, widths: Widths | None
) -> Ops:
    """NATIVE, or for `auto` TORCH that samples with it; TORCH, saying why, where it cannot run.

    The native operations of a table are taken together or not at all.
    """
    if device.type != "cpu" or dtype != torch.float32:
        reason = f"they are for fp32 on a CPU, not {dtype} on {device}"
    else:
        reason = native.why_unavailable()
    if reason is None:
        _, reasons = with_fallback(registry.NATIVE, TORCH, device, dtype, widths)
        failures = [f"{operation}: {why}" for operation, why in reasons.items()]
        reason = "; ".join(failures) or None
    if reason is not None and name == "native":
        raise ValueError(f"--ops native cannot run here: {reason}; use --ops auto or torch")
    if reason is not None:
        print(f"ops: sampling goes the slower way of torch, without native kernels: {reason}")
        return TORCH
    if name == "native":
        return registry.NATIVE
    return dataclasses.replace(TORCH, name="torch, sampling native", sampled=registry.NATIVE)


def with_fallback(
    candidate: Ops,
    fallback: Ops,
    device: torch.device,
    dtype: torch.dtype,
    widths: Widths | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Ops, dict[str, str]]:
    """The candidate with each operation that fails its check replaced by the fallback's.

    Also returns the failures, operation -> reason. Checks only what the cache has no result for.
    """
    valid_for = identity(device, dtype, widths)
    path = cache_file(valid_for)
    results = _read(path)
    checked_any, started = False, time.perf_counter()
    for name, spec in SPECS.items():
        if functions(candidate, spec) == functions(fallback, spec):
            results.pop(name, None)
        elif name not in results:
            if not checked_any:
                card = valid_for["card"]
                say(f"ops: checking the kernels on {card} (once per card, version and widths)")
            checked_any = True
            reason = why_failing(spec, candidate, device, dtype, widths)
            results[name] = reason
            if reason is not None:
                _write(path, valid_for, results)
                _ensure_alive(name, reason, device)
    if checked_any:
        kept = _write(path, valid_for, results)
        say(f"ops: checked in {time.perf_counter() - started:.1f} s; {kept}")
    reasons = {name: why for name, why in results.items() if why is not None and name in SPECS}
    for name, reason in reasons.items():
        say(f"ops: {name} runs in its {fallback.name} form, its check failed here: {reason}")
    replaced = {f: getattr(fallback, f) for name in reasons for f in SPECS[name].fields}
    return dataclasses.replace(candidate, **replaced), reasons


# ---- the check


def why_failing(
    spec: Spec,
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    widths: Widths | None,
) -> str | None:
    """Why this operation of `ops` must not be used here; None when it passes its checks."""
    try:
        largest, *others = _largest_first(spec)
        at_widths = () if widths is None else spec.model_shapes(widths)
        cases = [(shape, dtype) for shape in (largest, *others[:1], *at_widths)]
        cases.append((largest, torch.float32))
        for shape, case_dtype in dict.fromkeys(cases):
            check(spec, ops, REFERENCE, shape, case_dtype, str(device))
    except Exception as error:  # anything that a compiler, a launch or the check may raise
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return f"{kind}{lines[0]}"[:REASON] or "failed"
    return None


def _largest_first(spec: Spec) -> list[tuple[int, ...]]:
    """The test shapes by the size of their inputs. (Each costs a compilation of every kernel.)"""

    def numbers(shape: tuple[int, ...]) -> int:
        inputs = spec.make_inputs(shape, torch.Generator().manual_seed(0))
        return sum(v.numel() for v in inputs.values() if isinstance(v, torch.Tensor))

    return sorted(spec.test_shapes, key=numbers, reverse=True)


def _ensure_alive(name: str, reason: str, device: torch.device) -> None:
    """RuntimeError where a kernel left the device unusable: nothing more can run here."""
    try:
        torch.zeros(1, device=device).sum().item()
    except RuntimeError as error:
        raise RuntimeError(
            f"the Triton form of {name} left {device} unusable ({reason}); this is remembered, so "
            "start the run again: it will do without it"
        ) from error


# ---- results that are kept


def sources_hash(folder: Path = FOLDER) -> str:
    """Hash of the names and contents of every source in the folder, at any depth.

    All files count but pages (*.md), __pycache__ and hidden files, which an editor may leave.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        ignored = any(part == "__pycache__" or part.startswith(".") for part in name.parts)
        if path.is_file() and not ignored and path.suffix != ".md":
            content = path.read_bytes()
            digest.update(f"{name.as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()


def identity(
    device: torch.device, dtype: torch.dtype, widths: Widths | None = None
) -> dict[str, str]:
    """The card, versions, dtype, widths and sources that a result is valid for."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else native.name()
    return {
        "card": card,
        "torch": torch.__version__,
        "triton": triton,
        "dtype": str(dtype),
        "widths": str(widths),
        "kernels": sources_hash(),
    }


def cache_file(valid_for: dict[str, str]) -> Path | None:
    """The file with the results of this identity; None without a home directory."""
    key = hashlib.sha256(json.dumps(valid_for, sort_keys=True).encode()).hexdigest()[:16]
    folder = disk_cache.folder()
    return folder and folder / f"kernels-{key}.json"


def _read(path: Path | None) -> dict[str, str | None]:
    """Operation -> why it fails, None where it passed; {} where there is no file of ours.

    In the file "" stands for None.
    """
    try:
        if path is None or disk_cache.why_distrusted(path):
            return {}
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        well_formed = all(isinstance(text, str) for pair in results.items() for text in pair)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    if not well_formed:
        return {}
    return {name: reason or None for name, reason in results.items()}


def _write(path: Path | None, valid_for: dict[str, str], results: dict[str, str | None]) -> str:
    """Keep the results; returns where they are kept, or why they are not."""
    if path is None:
        return "not remembered, there is no home directory: set XDG_CACHE_HOME"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if reason := disk_cache.why_distrusted(path):
            return f"not remembered, {reason}: set XDG_CACHE_HOME to a folder of your own"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        texts = {name: reason or "" for name, reason in results.items()}
        document = json.dumps({"valid_for": valid_for, "results": texts}, indent=1)
        beside.write_text(document + "\n", encoding="utf-8")
        beside.chmod(0o600)  # other users must not write it, whatever the umask allows
        os.replace(beside, path)
    except OSError as error:
        return f"not remembered, {path} cannot be written ({error}); the next run checks again"
    return f"remembered in {path}"


# ---- the name of a mixed table


def _named_by_parts(ops: Ops, reasons: dict[str, str]) -> Ops:
    return dataclasses.replace(ops, name=parts_of(ops, [TORCH, registry.TRITON], reasons))


def parts_of(ops: Ops, tables: list[Ops], reasons: dict[str, str]) -> str:
    """Which operation is from which table: "triton (rms_norm, rope), torch (adamw)".

    An operation whose functions come from several tables is listed by its functions. `reasons`,
    operation -> why its check failed, are added.
    """
    groups: dict[str, list[str]] = {}  # table name -> its operations
    for operation, spec in SPECS.items():
        fields_by_table: dict[str, list[str]] = {}
        for field in spec.fields:
            same = (t.name for t in tables if getattr(t, field) is getattr(ops, field))
            fields_by_table.setdefault(next(same, "own"), []).append(field)
        for table_name, fields in fields_by_table.items():
            label = operation if len(fields) == len(spec.fields) else "/".join(fields)
            if reason := reasons.get(operation):
                label += f": check failed: {reason}"
            groups.setdefault(table_name, []).append(label)
    return ", ".join(f"{name} ({', '.join(labels)})" for name, labels in groups.items())
