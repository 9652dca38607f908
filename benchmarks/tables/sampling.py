"""Tables of sampling and distilling: speed beside peers, drafts, other processes at work."""

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

MODEL = "smollm2-135m-instruct"
DATA = "alpaca_train.json, 64 rows, template using"
DRAFTED_DATA = {
    "Alpaca, `using`": "alpaca_train.json, 16 rows, template using",
    "GSM8K, `gsm8k`": "gsm8k_train.json, 16 rows, template gsm8k",
    "OpenFunctions, `refer`": "openfunction_train.json, 16 rows, template refer",
}
DECODED = {  # (table of operations, setting) -> label
    ("triton", "greedy, graphs"): "our kernels, CUDA graphs (the default)",
    ("triton", "sampled, graphs"): "the same, sampled at T 0.7, top-p 0.9",
    ("triton", "greedy, invariant, graphs"): "CUDA graphs, `--invariant`",
    ("triton", "greedy"): "our kernels, `--no-graphs`",
    ("triton", "sampled"): "the same, sampled",
    ("triton", "greedy, invariant"): "`--no-graphs`, `--invariant`",
    ("torch", "greedy"): "our torch form",
    ("torch", "sampled"): "the same, sampled",
}


# ---- on a GPU


def decoded(record: Record, form: str, setting: str) -> dict[str, Any] | None:
    return record["decoding"].get(form, {}).get(setting)


def decodings_with(records: list[Record], form: str, setting: str) -> list[Record]:
    """Decoding at Llama-2-7B's shapes, 32 rows, with a result of this form and setting."""

    def fits(record: Record) -> bool:
        asked = record["ask"]
        same = asked["model"], asked["rows"], asked["prompt"]
        if same != ("llama-2-7b", 32, 512) or asked.get("requests") or asked.get("adapter"):
            return False
        return decoded(record, form, setting) is not None

    return [record for record in of_kind(records, "step") if fits(record)]


def gpu_decoding(records: list[Record]) -> Table:
    header = ["", "tokens/s", "ms a step", "prefill tokens/s", "rows equal to those without graphs"]
    rows, used = [], []
    for (form, setting), label in DECODED.items():
        fitting = decodings_with(records, form, setting)
        if not fitting:
            continue
        record = fitting[-1]
        result = decoded(record, form, setting)
        equal = result.get("rows_as_without")
        tokens_per_second = fixed(result["tokens_s"])
        rows.append(
            [
                label,
                bold(tokens_per_second) if not rows else tokens_per_second,
                fixed(result["ms_per_step"], 1),
                fixed(result["prefill_tokens_s"]),
                "-" if equal is None else f"{equal} of {record['ask']['rows']}",
            ]
        )
        used.append(record)
    return Table(header, rows, used)


# ---- on a CPU, beside peers


def of_workload(records: list[Record], data: str) -> list[Record]:
    """Runs of the demo model on these rows (older records name the model in their command only)."""

    def fits(record: Record) -> bool:
        named = record.data.get("model")
        words = [named] if named else record.environment["command"]
        return record["data"] == data and any(word.endswith(MODEL) for word in words)

    return [record for record in of_kind(records, "sampler") if fits(record)]


def tokens_per_second(record: Record, *starts: str) -> float | None:
    """The best of the engines whose names begin so, in this record."""
    rates = [
        result["tokens_s"]
        for name, result in record["results"].items()
        if name.startswith(starts) and not name.endswith("malloc")
    ]
    return max(rates, default=None)


def ratio(rate: float, peer: float | None) -> str:
    return times(None if peer is None else rate / peer)


def cpu_sampling(records: list[Record]) -> Table:
    """Every engine and setting, from the newest record that has it; ratios within one record."""
    header = ["engine", "tokens/s", "of transformers' best batch", "of llama.cpp's best"]
    header += ["rows/s", "share of the floor", "peak GB", "texts equal to ours", "run"]
    latest: dict[str, Record] = {}
    for record in of_workload(records, DATA):
        latest |= {name: record for name in record["results"]}
    rows = []
    for name, record in sorted(latest.items(), key=lambda item: _order(item[0])):
        result = record["results"][name]
        rate, ours = result["tokens_s"], name.startswith("ours")
        rows.append(
            [
                name.replace("1 rows", "1 row").replace("1 sequences", "1 sequence"),
                bold(fixed(rate, 1)) if name == "ours, 32 rows, draft auto" else fixed(rate, 1),
                ratio(rate, tokens_per_second(record, "transformers")) if ours else "-",
                ratio(rate, tokens_per_second(record, "llama.cpp")) if ours else "-",
                fixed(result["rows_s"], 2),
                percent(result.get("share")),
                gigabytes(result["rss"]),
                f"{result['rows_as_ours']}/{len(result['new'])}",
                f"{record.commit_text}, {record.date}",
            ]
        )
    return Table(header, rows, _in_order(latest.values()))


def _order(name: str) -> tuple[int, int, str]:
    """Ours, transformers, llama.cpp; in each the larger batch first."""
    engine = ("ours", "transformers", "llama.cpp").index(name.split(",")[0].split()[0])
    numbers = [int(word) for word in name.replace(",", " ").split() if word.isdigit()]
    return engine, -numbers[0], name.replace("draft off", "draft 0")


def _in_order(records: Any) -> list[Record]:
    unique = {(record.kind, record.line): record for record in records}
    return [unique[key] for key in sorted(unique, reverse=True)]


def cpu_sampling_ratios(records: list[Record]) -> Table:
    scored = [record for record in of_workload(records, DATA) if "scoring" in record.data]
    record = newest(scored, "sampling with --score")
    rows = [[name, fixed(value, 2)] for name, value in record["ratios"].items()]
    scoring = record["scoring"]
    rows.append(["scoring, answer tokens/s", fixed(scoring["tokens_s"])])
    rows.append(["scoring, share of its floor", percent(scoring["share"])])
    return Table(["", ""], rows, [record])


def cpu_sampling_profile(records: list[Record]) -> Table:
    """Where the time of prefill and of decoding goes, the layers called one by one."""
    profiled = [record for record in of_workload(records, DATA) if "profile" in record.data]
    record = newest(profiled, "sampling with --profile")
    profile = record["profile"]
    parts = {phase: profile[phase] for phase in ("prefill", "decode")}
    header = ["layers one by one", "prefill s", "share", "decode s", "share"]
    names = sorted(parts["decode"], key=lambda name: -parts["decode"][name])
    rows = []
    for name in names:
        cells = [name]
        for part in parts.values():
            seconds = part.get(name, 0.0)
            cells += [fixed(seconds, 2), percent(seconds / sum(part.values()), 1)]
        rows.append(cells)
    together = "Python, all layers in one call"
    rows.append([together, "-", "-", "-", percent(profile["share"]["python"], 1)])
    return Table(header, rows, [record])


def cpu_drafts(records: list[Record]) -> Table:
    used = {
        label: newest(of_workload(records, data), f"sampling on {data}")
        for label, data in DRAFTED_DATA.items()
    }
    rows = []
    for count in (1, 4, 16):
        cells = [str(count)]
        for record in used.values():
            off = record["results"][f"ours, {count} rows, draft off"]
            auto = record["results"][f"ours, {count} rows, draft auto"]
            cells.append(f"{fixed(off['tokens_s'], 1)} -> {fixed(auto['tokens_s'], 1)}")
        rows.append(cells)
    cells = ["tokens per row and step, accepted draft tokens, at 1 row"]
    cells += [_drafting(record["results"]["ours, 1 rows, draft auto"]) for record in used.values()]
    return Table(["rows in flight", *used], [*rows, cells], list(used.values()))


def _drafting(result: dict[str, Any]) -> str:
    """Decoded tokens per row and step, and the share of the draft tokens that were accepted."""
    stats = result["stats"]
    accepted = stats["accepted"] if "accepted" in stats else stats["held"]  # older records
    decoded_tokens = stats["new_tokens"] - len(result["new"])  # prefill gives a row its first
    per_step = decoded_tokens / stats["row_steps"]
    return f"{per_step:.2f}, {percent(accepted / stats['drafted'])}"


# ---- several processes


def distill_processes(records: list[Record]) -> Table:
    record = newest(of_kind(records, "distill_processes"), "distilling by several processes")
    rows = [
        [
            f"{run['processes']} of {run['threads']}",
            " and ".join(fixed(seconds, 1) for seconds in run["seconds"]),
            " and ".join(fixed(seconds, 1) for seconds in run["generation_seconds"]),
        ]
        for run in record["runs"]
    ]
    header = ["processes of threads", "s, two runs", "of these generation"]
    return Table(header, rows, [record])


def busy(records: list[Record]) -> Table:
    record = newest(of_kind(records, "busy"), "a busy machine")
    header = ["tokens/s", "alone", "beside a process that never stops"]
    header += ["beside torch multiplying matrices with all threads"]
    rows = [
        [job, *(fixed(found["median"].get(kind)) for kind in ("none", "process", "torch"))]
        for job, found in record["found"].items()
    ]
    return Table(header, rows, [record])


DEFINITIONS = {
    "h100-decoding": Definition("decoding 32 rows on a GPU", gpu_decoding),
    "cpu-sampling": Definition("our sampler beside transformers and llama.cpp", cpu_sampling),
    "cpu-sampling-ratios": Definition("ratios of one run, and scoring", cpu_sampling_ratios),
    "cpu-sampling-profile": Definition("where the time goes", cpu_sampling_profile),
    "cpu-sampling-drafts": Definition("drafts off and auto on three files", cpu_drafts),
    "cpu-distill-processes": Definition("distilling by one and two processes", distill_processes),
    "busy": Definition("sampling and training beside other processes", busy),
}
