"""Tables of training: speed beside peers, memory, a long run."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.records import Record, newest, of_kind
from benchmarks.tables.table import (
    Definition,
    Table,
    bold,
    fixed,
    gigabytes,
    percent,
    times,
)

ADAPTERS = [(8, "qv"), (16, "all")]  # rank and modules of the steps measured on a GPU
MODULES = {"qv": "q, v", "all": "all linears"}
FORMS = {
    "triton": "our kernels",
    "torch": "our torch form (cuBLAS, torch's flash attention)",
    "peft": "transformers + peft, sdpa, no checkpointing",
}


def steps_with(records: list[Record], rank: int, modules: str, form: str) -> list[Record]:
    """Steps of 8,192 tokens at Llama-2-7B's shapes with this adapter, and a result of this form.

    Without dropout, in one micro-batch: records from before these could be asked for are so.
    """

    def fits(record: Record) -> bool:
        asked = record["ask"]
        if (asked["model"], asked["rank"], asked["modules"]) != ("llama-2-7b", rank, modules):
            return False
        if asked["tokens"] != 8192 or asked.get("dropout") or asked.get("micro_tokens"):
            return False
        return "seconds" in record["training"].get(form, {})

    return [record for record in of_kind(records, "step") if fits(record)]


def step_tokens_per_second(record: Record, form: str) -> float:
    return record["ask"]["tokens"] / record["training"][form]["seconds"]


def gpu_training(records: list[Record]) -> Table:
    header = ["adapter", "form", "tokens/s", "s a step", "fastest, slowest step"]
    header += ["MFU of the measured ceiling", "peak GiB"]
    rows, used = [], []
    for rank, modules in ADAPTERS:
        for form, label in FORMS.items():
            adapter = f"r {rank} on {MODULES[modules]}"
            fitting = steps_with(records, rank, modules, form)
            if not fitting:
                rows.append([adapter, label, "not measured", "-", "-", "-", "-"])
                continue
            record = fitting[-1]
            result = record["training"][form]
            tokens_per_second = fixed(step_tokens_per_second(record, form))
            achieved = record["operations"] / result["seconds"]
            rows.append(
                [
                    adapter,
                    label,
                    bold(tokens_per_second) if form == "triton" else tokens_per_second,
                    fixed(result["seconds"], 3),
                    ", ".join(fixed(seconds, 3) for seconds in result["spread"]),
                    percent(achieved / record["ceilings"]["flops"]),
                    fixed(result["peak_gib"], 1),
                ]
            )
            used.append(record)
    return Table(header, rows, used)


# ---- on a CPU


def steady_peak(engine: dict[str, Any]) -> float:
    """Resident bytes at the last step."""
    return engine["steps"][-1]["rss"]


def cpu_training(records: list[Record]) -> Table:
    """A row for every run and choice of modules: runs differ, and none is left out."""
    header = ["adapted", "run", "timed steps", "ours, tokens/s", "peak GB"]
    header += ["transformers + peft, tokens/s", "peak GB", "ratio to its best"]
    header += ["share of the products alone", "load before"]
    rows, used = [], of_kind(records, "train")
    for modules, label in MODULES.items():
        for record in used:
            result = record["modules"].get(modules)
            if not result or not result["engines"]:
                continue
            engines = dict(result["engines"])
            ours = engines.pop("ours")
            sizes = [name.removeprefix("peft, ").removesuffix(" rows") for name in engines]
            peers = [
                f"{fixed(engine['tokens_s'])} ({size} rows)"
                for size, engine in zip(sizes, engines.values(), strict=True)
            ]
            floor = fixed(result["floor_tokens_s"])
            rows.append(
                [
                    f"r {record['ask']['rank']} on {label}",
                    f"{record.commit_text}, {record.date}",
                    str(len(ours["steps"]) - 1),
                    bold(fixed(ours["tokens_s"])),
                    gigabytes(steady_peak(ours)),
                    ", ".join(peers),
                    ", ".join(gigabytes(steady_peak(engine)) for engine in engines.values()),
                    times(result["ratio"]),
                    f"{percent(result['share_of_floor'])} of {floor}",
                    fixed(record["load_before"], 1),
                ]
            )
    return Table(header, rows, used)


# ---- memory, and long runs


def memory_plan(records: list[Record]) -> Table:
    """Predictions of the memory plan, by arithmetic, for the models that fit one GPU."""
    planned = [record for record in of_kind(records, "memory") if "arithmetic" in record.data]
    record = newest(planned, "the memory plan")
    header = ["model", "tokens", "recompute", "MB a layer", "saved GB", "weights GB", "peak GB"]
    rows = [
        [
            row["model"],
            fixed(row["tokens"]),
            row["policy"],
            fixed(row["layer_mb"]),
            *(fixed(row[name] / 1e9, 1) for name in ("saved", "weights", "peak")),
        ]
        for row in record["arithmetic"]
        if row["model"].startswith("llama")
    ]
    return Table(header, rows, [record])


def memory_measured(records: list[Record]) -> Table:
    measured = [record for record in of_kind(records, "memory") if "measured" in record.data]
    record = newest(measured, "measured memory")
    header = ["recompute", "tokens", "predicted GB", "measured GB", "predicted / measured"]
    rows = [
        [
            row["policy"],
            fixed(row["tokens"]),
            gigabytes(row["predicted"]),
            gigabytes(row["measured"]),
            fixed(row["predicted"] / row["measured"], 2),
        ]
        for row in record["measured"]
    ]
    return Table(header, rows, [record])


def rows_memory(records: list[Record]) -> Table:
    """Peak memory of reading and of distilling files of rows: all records."""
    measured = of_kind(records, "rows")
    forms = {
        "disk": "read, on disk",
        "memory": "read, in memory",
        "distill": "distilled, on disk",
        "distill, older": "distilled, in memory",
    }
    header = ["rows", "work", "file MB", "peak MB", "bytes a row", "CPU s"]
    rows = []
    for result in (result for record in measured for result in record["results"]):
        peak = result["peak_bytes"]
        rows.append(
            [
                fixed(result["rows"]),
                forms[result["form"]],
                fixed(result["file_bytes"] / 1e6, 1),
                fixed(peak / 1e6, 1),
                fixed(peak / result["rows"]),
                fixed(result["seconds"]),
            ]
        )
    return Table(header, rows, measured)


def sharded_memory(records: list[Record]) -> Table:
    record = newest(of_kind(records, "sharded"), "sharded training")
    header = ["frozen weights", "MB resident after loading", "MB at the peak of a step"]
    rows = [
        [run["weights"], fixed(run["loaded_mb"]), fixed(run["peak_mb"])] for run in record["runs"]
    ]
    return Table(header, rows, [record])


def soak(records: list[Record]) -> Table:
    record = newest(of_kind(records, "soak"), "a long run")
    second, last = record["rss"]
    second_rate, last_rate = record["tokens_s"]
    rows = [
        ["steps", fixed(record["steps"])],
        ["killed at steps", ", ".join(map(str, record["kills"]))],
        ["resident MB, second and last quarter", f"{second / 1e6:.1f}, {last / 1e6:.1f}"],
        ["tokens/s, second and last quarter", f"{fixed(second_rate)}, {fixed(last_rate)}"],
    ]
    rows += [[claim, "yes" if held else "NO"] for claim, held in record["found"].items()]
    return Table(["", ""], rows, [record])


DEFINITIONS = {
    "h100-training": Definition("a training step of 8,192 tokens on a GPU", gpu_training),
    "cpu-training": Definition("each run beside transformers + peft on a CPU", cpu_training),
    "memory-plan": Definition("the memory plan of Llama-2-7B and Llama-3-8B", memory_plan),
    "memory-measured": Definition("predicted and measured peak on a CPU", memory_measured),
    "rows-memory": Definition("reading and distilling files of rows", rows_memory),
    "sharded-memory": Definition("memory of two processes, sharded and whole", sharded_memory),
    "soak": Definition("2,000 steps, killed three times", soak),
}
