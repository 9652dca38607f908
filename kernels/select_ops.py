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
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from kernels import disk_cache
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
    tables: Mapping[str, Ops] = OPS,
) -> Ops:
    """The table of that name for a model on this device; the result's name lists its parts.

    `auto` on a CPU is TORCH; in fp32 it samples with NATIVE, if that compiles here and passes its
    checks at the model's widths. On a GPU it is TRITON, with TORCH's form of each operation that
    fails its check. Where `auto` takes a slower form than the machine could have, it prints why.

    dtype, widths: of the model, for the checks. tables: the tables by name, chosen from.
    ValueError for an unknown name, and for `native` and `triton` where they cannot run, with the
    reason.
    """
    device = torch.device(device)
    if device.type == "cuda":
        sum_products_in_fp32()
    if name != "auto" and name not in tables:
        raise ValueError(f"--ops {name!r} is not known; choose one of auto, {', '.join(tables)}")
    if name == "auto" and device.type == "cpu":
        return _torch_sampling_native(tables["native"], device, dtype, widths)
    if name == "auto":
        return _triton_with_fallback(tables["triton"], device, dtype, widths)
    reason = None
    if name == "native":
        reason = _why_not_native(tables["native"], device, dtype, widths)
    if name == "triton":
        reason = triton_launch.why_unavailable(device)
    if reason is not None:
        raise ValueError(f"--ops {name} cannot run here: {reason}; use --ops auto or torch")
    if name == "triton":
        return _named_by_parts(tables["triton"], tables["triton"], {})
    return tables[name]


def _triton_with_fallback(
    triton: Ops, device: torch.device, dtype: torch.dtype, widths: Widths | None
) -> Ops:
    """TRITON with TORCH's form of what fails its check; TORCH, saying why, where none can run."""
    reason = triton_launch.why_unavailable(device)
    if reason is None and dtype == torch.float64:
        reason = "they compute in fp32, and float64 was asked for"
    if reason is not None:
        print(f"ops: all runs in torch's slower form on {device}, without Triton kernels: {reason}")
        return TORCH
    ops, reasons = with_fallback(triton, TORCH, device, dtype, widths)
    return _named_by_parts(ops, triton, reasons)


def _torch_sampling_native(
    native_ops: Ops, device: torch.device, dtype: torch.dtype, widths: Widths | None
) -> Ops:
    """TORCH that samples with NATIVE; TORCH alone, saying why, where that cannot run."""
    reason = _why_not_native(native_ops, device, dtype, widths)
    if reason is not None:
        print(f"ops: sampling goes the slower way of torch, without native kernels: {reason}")
        return TORCH
    return dataclasses.replace(TORCH, name="torch, sampling native", sampled=native_ops)


def _why_not_native(
    native_ops: Ops, device: torch.device, dtype: torch.dtype, widths: Widths | None
) -> str | None:
    """Why NATIVE must not be used here; None if it may. Its operations are taken together."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"they are for fp32 on a CPU, not {dtype} on {device}"
    reason = native.why_unavailable()
    if reason is not None:
        return reason
    _, reasons = with_fallback(native_ops, TORCH, device, dtype, widths)
    if not reasons:
        return None
    return "; ".join(f"{operation}: {why}" for operation, why in reasons.items())


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
    unchecked = []
    for name, spec in SPECS.items():
        if functions(candidate, spec) == functions(fallback, spec):
            results.pop(name, None)
        elif name not in results:
            unchecked.append(name)
    if unchecked:
        started = time.perf_counter()
        card = valid_for["card"]
        say(f"ops: checking the kernels on {card} (once per card, version and widths)")
        for name in unchecked:
            reason = why_failing(SPECS[name], candidate, device, dtype, widths)
            results[name] = reason
            if reason is not None:
                _write(path, valid_for, results)  # before the process may end
                _ensure_alive(name, reason, device)
        kept = _write(path, valid_for, results)
        say(f"ops: checked in {time.perf_counter() - started:.1f} s; {kept}")
    reasons = {name: why for name, why in results.items() if why is not None and name in SPECS}
    replaced = {}
    for name, reason in reasons.items():
        say(f"ops: {name} runs in its {fallback.name} form, its check failed here: {reason}")
        for field in SPECS[name].fields:
            replaced[field] = getattr(fallback, field)
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
        by_size = _largest_first(spec)
        shapes = by_size[:2]
        if widths is not None:
            shapes += spec.model_shapes(widths)
        cases = [(shape, dtype) for shape in shapes]
        cases.append((by_size[0], torch.float32))
        for shape, case_dtype in dict.fromkeys(cases):  # each once
            check(spec, ops, REFERENCE, shape, case_dtype, str(device))
    except Exception as error:  # anything that a compiler, a launch or the check may raise
        return _first_line(error) or "failed"
    return None


def _first_line(error: Exception) -> str:
    """The beginning of an error's message, with its type unless the check itself raised it."""
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else ""
    if not isinstance(error, AssertionError):
        message = f"{type(error).__name__}: {message}"
    return message[:REASON]


def _largest_first(spec: Spec) -> list[tuple[int, ...]]:
    """The test shapes by the size of their inputs. (Each costs a compilation of every kernel.)"""

    def num_elements(shape: tuple[int, ...]) -> int:
        inputs = spec.make_inputs(shape, torch.Generator().manual_seed(0))
        tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() for tensor in tensors)

    return sorted(spec.test_shapes, key=num_elements, reverse=True)


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
        if not path.is_file() or ignored or path.suffix == ".md":
            continue
        content = path.read_bytes()
        header = f"{name.as_posix()} {len(content)} "
        digest.update(header.encode())
        digest.update(content)
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
    folder = disk_cache.folder()
    if folder is None:
        return None
    text = json.dumps(valid_for, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return folder / f"kernels-{key}.json"


def _read(path: Path | None) -> dict[str, str | None]:
    """Operation -> why it fails, None where it passed; {} where there is no file of ours.

    In the file "" stands for None.
    """
    try:
        if path is None or disk_cache.why_distrusted(path) is not None:
            return {}
        document = json.loads(path.read_text(encoding="utf-8"))
        results = document["results"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if not isinstance(results, dict):
        return {}
    if not all(isinstance(reason, str) for reason in results.values()):
        return {}
    return {name: reason or None for name, reason in results.items()}


def _write(path: Path | None, valid_for: dict[str, str], results: dict[str, str | None]) -> str:
    """Keep the results; returns the words that say where they are kept, or why they are not."""
    if path is None:
        return "not remembered, there is no home directory: set XDG_CACHE_HOME"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        reason = disk_cache.why_distrusted(path)
        if reason is not None:
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


def _named_by_parts(ops: Ops, triton: Ops, reasons: dict[str, str]) -> Ops:
    return dataclasses.replace(ops, name=parts_of(ops, [TORCH, triton], reasons))


def parts_of(ops: Ops, tables: list[Ops], reasons: dict[str, str]) -> str:
    """Which operation is from which table: "triton (rms_norm, rope), torch (adamw)".

    An operation whose functions come from several tables is listed by its functions. `reasons`,
    operation -> why its check failed, are added.
    """
    groups: dict[str, list[str]] = {}  # table name -> its operations
    for operation, spec in SPECS.items():
        fields_by_table: dict[str, list[str]] = {}
        for field in spec.fields:
            source = _table_with(tables, field, getattr(ops, field))
            fields_by_table.setdefault(source, []).append(field)
        for table_name, fields in fields_by_table.items():
            label = operation if len(fields) == len(spec.fields) else "/".join(fields)
            if operation in reasons:
                label += f": check failed: {reasons[operation]}"
            groups.setdefault(table_name, []).append(label)
    parts = [f"{name} ({', '.join(labels)})" for name, labels in groups.items()]
    return ", ".join(parts)


def _table_with(tables: list[Ops], field: str, function: Callable) -> str:
    """The name of the first table with this function in the field, "own" if none has it."""
    for table in tables:
        if getattr(table, field) is function:
            return table.name
    return "own"
