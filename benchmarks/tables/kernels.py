"""The table of kernels: every operation and shape that was timed on a GPU."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.records import Record, of_kind
from benchmarks.tables.table import Definition, Table, bold, fixed, percent

BY_HAND = ("peft", "sdpa")  # forms that one would write without this project
PREFIX = "triton "  # of the names of our other forms
Point = tuple[str, str, tuple[int, ...], str]  # operation, call, shape, dtype


def newest_points(records: list[Record]) -> dict[Point, tuple[Record, dict[str, dict[str, Any]]]]:
    """Every point that was timed, with its forms, from the newest record that has it."""
    found: dict[Point, tuple[Record, dict[str, dict[str, Any]]]] = {}
    for record in of_kind(records, "kernels"):
        forms: dict[Point, dict[str, dict[str, Any]]] = {}
        for result in record["results"]:
            point = result["operation"], result["call"], tuple(result["shape"]), result["dtype"]
            forms.setdefault(point, {})[result["form"]] = result
        found |= {point: (record, by_form) for point, by_form in forms.items()}
    return dict(sorted(found.items()))


def milliseconds(forms: dict[str, dict[str, Any]], name: str) -> str:
    """Median of a form, "-" where it was not timed."""
    measured = forms.get(name, {}).get("ms")
    if not measured:
        return "-"
    median = measured[len(measured) // 2]
    return fixed(median, 3) if median < 1 else fixed(median, 2)


def gpu_kernels(records: list[Record]) -> Table:
    header = ["operation, call", "shape", "ours", "of its floor", "rate", "torch.compile"]
    header += ["by hand", "torch form", "eager", "other forms of ours", "peak MiB, ours and eager"]
    rows, used = [], []
    for (operation, call, shape, dtype), (record, forms) in newest_points(records).items():
        ours = forms.get("triton")
        if not ours or not ours.get("ms"):
            continue
        by_hand = [f"{name} {milliseconds(forms, name)}" for name in BY_HAND if name in forms]
        others = [
            f"{name.removeprefix(PREFIX)} {milliseconds(forms, name)}"
            for name in forms
            if name.startswith(PREFIX)
        ]
        peaks = [forms[name].get("peak_mib") for name in ("triton", "eager") if name in forms]
        rows.append(
            [
                f"{operation}, {call}",
                f"{' x '.join(map(str, shape))} {dtype}",
                bold(milliseconds(forms, "triton")),
                percent(1 / ours["x_floor"]),
                f"{fixed(ours['rate'])} {ours['unit']}",
                milliseconds(forms, "compiled"),
                ", ".join(by_hand) or "-",
                milliseconds(forms, "torch"),
                milliseconds(forms, "eager"),
                ", ".join(others) or "-",
                ", ".join(fixed(peak) for peak in peaks),
            ]
        )
        used.append(record)
    return Table(header, rows, used)


DEFINITIONS = {
    "h100-kernels": Definition("milliseconds of every operation on a GPU", gpu_kernels),
}
