"""The short table of speed: two rows a machine, training and decoding."""

from __future__ import annotations

from benchmarks.tables import sampling, training
from benchmarks.tables.records import Record, newest, of_kind
from benchmarks.tables.table import Definition, Table, bold, fixed, times


def speed(records: list[Record]) -> Table:
    rows, used = [], []
    parts = (cpu_training, cpu_sampling, gpu_training, gpu_decoding)
    for part in parts:
        cells, from_records = part(records)
        rows.append(cells)
        used += from_records
    header = ["machine", "work", "ours, tokens/s", "beside", "tokens/s", "ratio"]
    return Table(header, rows, used)


def _row(machine: str, work: str, ours: float, beside: str, theirs: float) -> list[str]:
    digits = 0 if ours > 1000 else 1
    rate, peer = fixed(ours, digits), fixed(theirs, digits)
    return [machine, work, bold(rate), beside, peer, times(ours / theirs)]


def _cpu(record: Record) -> str:
    environment = record.environment
    return f"{environment['device']}, {environment['threads']} threads"


def cpu_training(records: list[Record]) -> tuple[list[str], list[Record]]:
    fitting = [record for record in of_kind(records, "train") if "qv" in record["modules"]]
    record = newest(fitting, "training on q and v")
    result = record["modules"]["qv"]
    best = result["best_peer"]
    ours = result["engines"]["ours"]["tokens_s"]
    theirs = result["engines"][best]["tokens_s"]
    work = "training SmolLM2-135M, r 8 on q and v, fp32"
    beside = f"transformers + {best} a micro-batch"
    return _row(_cpu(record), work, ours, beside, theirs), [record]


def cpu_sampling(records: list[Record]) -> tuple[list[str], list[Record]]:
    our_name = "ours, 32 rows, draft auto"
    peer_name = "transformers, batch 16"
    fitting = []
    for record in sampling.of_workload(records, sampling.DATA):
        if our_name in record["results"] and peer_name in record["results"]:
            fitting.append(record)
    record = newest(fitting, f"{our_name} and {peer_name}")
    ours = record["results"][our_name]["tokens_s"]
    theirs = record["results"][peer_name]["tokens_s"]
    work = "sampling SmolLM2-135M, 64 Alpaca rows, fp32"
    return _row(_cpu(record), work, ours, "transformers `generate`, batch 16", theirs), [record]


def gpu_training(records: list[Record]) -> tuple[list[str], list[Record]]:
    with_kernels = newest(training.steps_with(records, 8, "qv", "triton"), "a step on our kernels")
    with_peft = newest(training.steps_with(records, 8, "qv", "peft"), "a step by peft")
    ours = training.step_tokens_per_second(with_kernels, "triton")
    theirs = training.step_tokens_per_second(with_peft, "peft")
    work = "training step of Llama-2-7B's shapes, r 8 on q and v, bf16"
    row = _row(with_kernels.environment["device"], work, ours, "transformers + peft", theirs)
    return row, [with_kernels, with_peft]


def gpu_decoding(records: list[Record]) -> tuple[list[str], list[Record]]:
    setting = "greedy, graphs"
    with_kernels = newest(sampling.decodings_with(records, "triton", setting), "decoding, kernels")
    with_torch = newest(sampling.decodings_with(records, "torch", "greedy"), "decoding, torch form")
    ours = with_kernels["decoding"]["triton"][setting]["tokens_s"]
    theirs = with_torch["decoding"]["torch"]["greedy"]["tokens_s"]
    work = "decoding Llama-2-7B's shapes, 32 rows, bf16"
    row = _row(with_kernels.environment["device"], work, ours, "our torch form", theirs)
    return row, [with_kernels, with_torch]


DEFINITIONS = {"speed": Definition("two rows a machine: training and decoding", speed)}
