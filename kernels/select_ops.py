"""Which table of operations runs on this machine: `--ops auto|torch|native|triton|reference`.

`auto` checks each operation that is not torch's against its definition, once per machine
(self_check/cases.py). An operation that fails its check, or raises, is taken from TORCH. Results
are kept (self_check/results.py). On a GPU the checks run in a process of their own
(self_check/process.py); elsewhere, and where no process can be started, they run here.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from kernels.cpu import native
from kernels.dtypes import sum_products_in_fp32
from kernels.launch import triton_launch
from kernels.registry import OPS, REFERENCE, SPECS, TORCH, Ops, functions
from kernels.self_check import results
from kernels.self_check.cases import cases, why_failing, why_unusable
from kernels.self_check.process import NoProcess, Result, check_in_process, is_lasting
from kernels.self_check.request import request_for
from kernels.self_check.sources import Sources
from kernels.spec import Widths

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


@dataclasses.dataclass(frozen=True)
class Checked:
    """A table of operations whose checks are wanted, and where."""

    candidate: Ops
    device: torch.device
    dtype: torch.dtype
    widths: Widths | None

    def here(self, operations: Sequence[str]) -> Iterator[Result]:
        """The results of these operations, checked in this process."""
        for name in operations:
            at = cases(SPECS[name], self.dtype, self.widths)
            reason = why_failing(SPECS[name], self.candidate, REFERENCE, self.device, at) or ""
            yield Result(name, reason, is_lasting(reason))
            if reason:
                self._ensure_alive(name, reason)

    def apart(self, operations: Sequence[str], say: Callable[[str], None]) -> Iterator[Result]:
        """The results of these operations, checked in a process of their own where one can be."""
        left = list(operations)
        try:
            request = request_for(self.candidate, operations, self.device, self.dtype, self.widths)
            for result in check_in_process(request, show_progress):
                left.remove(result.operation)
                yield result
        except (NoProcess, ValueError, OSError) as error:
            say(f"ops: the checks go on in this process, none of their own can run: {error}")
            yield from self.here(left)

    def _ensure_alive(self, name: str, reason: str) -> None:
        """RuntimeError where a kernel left the device unusable: nothing more can run here."""
        why = why_unusable(self.device)
        if why is not None:
            raise RuntimeError(
                f"the Triton form of {name} left {self.device} unusable ({reason}; {why}); this is "
                "remembered, so start the run again: it will do without it"
            )


def show_progress(text: str) -> None:
    """Write over the last line of a terminal; in a log the first and the last line suffice."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[Kops: {text}")
        sys.stderr.flush()


def with_fallback(
    candidate: Ops,
    fallback: Ops,
    device: torch.device,
    dtype: torch.dtype,
    widths: Widths | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Ops, dict[str, str]]:
    """The candidate with each operation that fails its check replaced by the fallback's.

    Also returns the failures, operation -> reason. Checks only what there is no result for.
    """
    wanted = Checked(candidate, device, dtype, widths)
    differ = [
        name
        for name, spec in SPECS.items()
        if functions(candidate, spec) != functions(fallback, spec)
        and (widths is None or spec.used_by(widths))
    ]
    reasons = {name: why for name, why in results_of(wanted, differ, say).items() if why}
    replaced = {}
    for name, reason in reasons.items():
        say(f"ops: {name} runs in its {fallback.name} form, its check failed here: {reason}")
        for field in SPECS[name].fields:
            replaced[field] = getattr(fallback, field)
    return dataclasses.replace(candidate, **replaced), reasons


def results_of(
    wanted: Checked, operations: Sequence[str], say: Callable[[str], None]
) -> dict[str, str]:
    """Operation -> why its check fails, "" if it passes; those that are not known are checked."""
    sources = Sources()
    valid_for = {}
    for name in operations:
        valid_for[name] = results.identity(
            SPECS[name], wanted.candidate, wanted.device, wanted.dtype, wanted.widths, sources
        )
    known = _known(valid_for)
    if len(known) < len(operations):
        with results.one_at_a_time():  # another process may have checked meanwhile
            known = _known(valid_for)
            unchecked = [name for name in operations if name not in known]
            if unchecked:
                known |= _check(wanted, {name: valid_for[name] for name in unchecked}, say)
    return {name: known[name] for name in operations}


def _known(valid_for: Mapping[str, dict[str, str]]) -> dict[str, str]:
    """Operation -> its result, for those that there is one for."""
    found = {name: results.read(results.file_of(of)) for name, of in valid_for.items()}
    return {name: reason for name, reason in found.items() if reason is not None}


def _check(
    wanted: Checked, valid_for: Mapping[str, dict[str, str]], say: Callable[[str], None]
) -> dict[str, str]:
    """Check these operations; each result is kept as soon as it is there."""
    started = time.perf_counter()
    card = next(iter(valid_for.values()))["card"]
    say(f"ops: checking the kernels on {card} (once per card, version and widths)")
    found, kept = {}, ""
    if wanted.device.type == "cuda":
        checked = wanted.apart(list(valid_for), say)
    else:
        checked = wanted.here(list(valid_for))
    for name, reason, lasting in checked:
        found[name] = reason
        if lasting:
            kept = results.write(results.file_of(valid_for[name]), valid_for[name], reason)
    show_progress("")
    say(f"ops: checked in {time.perf_counter() - started:.1f} s; {kept}")
    return found


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
