"""Training and decoding at a 7B model's shapes, in one process: `scripts/gpu.sh measure`, `decode`.

    python -m benchmarks.card.measure --seconds 190
    python -m benchmarks.card.measure --only decode --seconds 60
    python -m benchmarks.card.measure --dry          a tiny model on a CPU

The random weights are made once. Measurements stand in `plan` in the order of their worth; each is
a JSON line as soon as it exists, and those for which no time is left are named. One that fails
leaves the others. The sustained rate of a large product stands beside the burst that
benchmarks/clock.py measures: training steps run at a card's power limit, bursts do not.
The last line is JSON, appended to $OUT/measure.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.clock import (
    DTYPES,
    ceilings,
    figure,
    first_line,
    header,
    machine,
    record,
    sustained,
)
from benchmarks.shapes import model_config, random_weights
from benchmarks.step import peer
from benchmarks.step_decoding import DecodeCase, decode
from benchmarks.step_training import StepCase, training
from engine.train.mfu import stated_rate, step_operations
from kernels.select_ops import choose
from model.llama import Llama

RESERVE = 5.0  # seconds in which the record is written
FEWEST = 4.0  # seconds with which a measurement is begun
STEPS = 4  # timed steps of a training
SUSTAINED = 4.0  # seconds of the large product


@dataclass(frozen=True)
class Sizes:
    """The sizes of a session: those of a card, or tiny ones."""

    model: str
    small: str  # the small model
    sdft: tuple[int, int]  # tokens of a step and of a row: 8 rows as SDFT has them
    long: tuple[int, int]  # rows as long as they get
    micro: int  # tokens of a micro-batch as they are on a CPU
    rows: tuple[int, ...]  # decoded together
    prompt: int
    new: int


ON_A_CARD = Sizes(
    model="llama-2-7b",
    small="smollm2-135m",
    sdft=(2304, 288),
    long=(8192, 2048),
    micro=1024,
    rows=(256, 128, 64),
    prompt=150,
    new=140,
)
TINY = Sizes("tiny", "tiny", (16, 8), (24, 12), 8, rows=(2, 1), prompt=4, new=3)


@dataclass(frozen=True)
class Measurement:
    """One measurement: of a training step or of decoding."""

    kind: str  # train, decode or peer
    model: str
    case: StepCase | DecodeCase
    ops: str = "triton"

    def about(self) -> dict[str, Any]:
        """What is measured, as the record has it."""
        return {"what": self.kind, "model": self.model, "ops": self.ops} | dataclasses.asdict(
            self.case
        )


def plan(sizes: Sizes) -> list[Measurement]:
    """All measurements, those worth most first."""
    first = [
        *trainings(sizes, sizes.sdft, modules=("all",), dropouts=(0.1,)),
        *decodings(sizes, sizes.rows[:1], adapters=("",)),
        automatic_rows(sizes),
        *trainings(sizes, sizes.long, modules=("qv",), dropouts=(0.0,)),
        *decodings(sizes, sizes.rows[1:], adapters=("",)),
        *trainings(sizes, sizes.sdft, modules=("qv", "all"), dropouts=(0.0, 0.1)),
        *decodings(sizes, sizes.rows, adapters=("all",)),
        *trainings(sizes, sizes.long, modules=("qv", "all"), dropouts=(0.0, 0.1)),
        *policies(sizes),
        *small_model(sizes),
        *uncommon_decodings(sizes),
    ]
    tokens, row = sizes.long
    first.append(Measurement("peer", sizes.model, StepCase(tokens, row), ops="peft"))
    return list(dict.fromkeys(first))  # each once, where it stands first


def trainings(
    sizes: Sizes, shape: tuple[int, int], modules: Sequence[str], dropouts: Sequence[float]
) -> list[Measurement]:
    """Steps of this shape at rank 8: all tokens in one micro-batch, then divided."""
    tokens, row = shape
    found = []
    for adapted in modules:
        for dropout in dropouts:
            for micro in (0, sizes.micro):
                case = StepCase(tokens, row, 8, adapted, dropout, micro)
                found.append(Measurement("train", sizes.model, case))
    return found


def decodings(sizes: Sizes, rows: Sequence[int], adapters: Sequence[str]) -> list[Measurement]:
    """Decoding with refill, greedy and with the paper's sampling."""
    found = []
    for count in rows:
        for adapter in adapters:
            for setting in ("greedy", "paper"):
                case = DecodeCase(
                    count, sizes.prompt, sizes.new, 2 * count, setting, adapter=adapter
                )
                found.append(Measurement("decode", sizes.model, case))
    return found


def automatic_rows(sizes: Sizes) -> Measurement:
    """Decoding with as many rows as the sampler takes by itself on this machine."""
    case = DecodeCase(0, sizes.prompt, sizes.new, requests=2 * sizes.rows[0])
    return Measurement("decode", sizes.model, case)


def policies(sizes: Sizes) -> list[Measurement]:
    """Recomputation: peak memory beside the plan's, and what it costs."""
    tokens, row = sizes.long
    found = []
    for policy in ("selective", "full"):
        case = StepCase(tokens, row, policy=policy)
        found.append(Measurement("train", sizes.model, case))
    return found


def small_model(sizes: Sizes) -> list[Measurement]:
    """The embedded model's shapes, on our kernels and on torch's products."""
    case = StepCase(*sizes.sdft, rank=8, modules="all")
    return [Measurement("train", sizes.small, case, ops) for ops in ("triton", "torch")]


def uncommon_decodings(sizes: Sizes) -> list[Measurement]:
    """Batch-invariant products, steps launched one by one, and torch's forms."""
    usual = DecodeCase(sizes.rows[-1], sizes.prompt, sizes.new)
    return [
        Measurement("decode", sizes.model, dataclasses.replace(usual, invariant=True)),
        Measurement("decode", sizes.model, dataclasses.replace(usual, graphs=False)),
        Measurement("decode", sizes.model, dataclasses.replace(usual, graphs=False), ops="torch"),
    ]


@dataclass
class Measuring:
    """The session: its device, the models made so far, the results so far."""

    args: argparse.Namespace
    sizes: Sizes
    device: str
    dtype: str  # a key of DTYPES
    started: float = field(default_factory=time.monotonic)
    results: list[dict[str, Any]] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    models: dict[tuple[str, str], Llama] = field(default_factory=dict)

    def left(self) -> float:
        return self.args.seconds - RESERVE - (time.monotonic() - self.started)

    def keep(self, line: dict[str, Any]) -> None:
        """Keep a result, and print it."""
        self.results.append(line)
        figure("measure", line)
        print(json.dumps(line), flush=True)

    def model_of(self, name: str, ops: str) -> Llama:
        """A model of these shapes with random weights, which two tables of operations share.

        Only one set of weights is held at a time.
        """
        if (name, ops) in self.models:
            return self.models[name, ops]
        weights = None
        for (other, _), model in self.models.items():
            if other == name:
                weights = model.weights
        config = model_config(name)
        if weights is None:
            self.models.clear()
            self.give_back()
            weights = random_weights(config, self.device, DTYPES[self.dtype])
        table = choose(ops, self.device, DTYPES[self.dtype], config.widths)
        self.models[name, ops] = Llama(config, weights, table)
        return self.models[name, ops]

    def give_back(self) -> None:
        """Give what torch has cached back to the card."""
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def measure_rates(self) -> None:
        """The ceilings: a burst, a copy, and what the card sustains."""
        dtype = DTYPES[self.dtype]
        self.rates = ceilings(self.device, dtype)
        seconds = 0.05 if self.args.dry else SUSTAINED
        self.rates["sustained_flops"] = sustained(self.device, dtype, seconds)
        self.keep({"what": "ceilings"} | self.rates)

    def measure(self, measurement: Measurement) -> None:
        """One measurement; its failure is a result too."""
        about = measurement.about()
        try:
            about |= MEASURED_BY[measurement.kind](self, measurement)
        except Exception as error:
            about["failed"] = first_line(error)
        self.keep(about)
        self.give_back()


def measure_training(session: Measuring, measurement: Measurement) -> dict[str, Any]:
    """A training step: its speed, and the shares of both ceilings."""
    case = measurement.case
    model = session.model_of(measurement.model, measurement.ops)
    steps = 1 if session.args.dry else STEPS
    result = training({"it": model}, case, steps)["it"]
    if "failed" in result:
        return result
    lengths = case.row_lengths()
    rate = step_operations(model.config, lengths) / result["seconds"]
    return result | {
        "tokens_s": sum(lengths) / result["seconds"],
        "flops": rate,
        "mfu_burst": rate / session.rates["flops"],
        "mfu_sustained": rate / session.rates["sustained_flops"],
    }


def measure_decoding(session: Measuring, measurement: Measurement) -> dict[str, Any]:
    """Decoding: its speed, without the answers."""
    model = session.model_of(measurement.model, measurement.ops)
    result = decode(model, measurement.case)
    stats = result.pop("stats")
    del result["answers"]
    return result | {
        "replayed": stats.replayed / stats.steps,
        "captured": stats.captured,
        "capture_s": stats.capture_seconds,
        "not_captured": stats.why_not_captured or "",
        "cache_gb": stats.cache_bytes / 1e9,
        "fitting": stats.fitting_sequences,
    }


def measure_peer(session: Measuring, measurement: Measurement) -> dict[str, Any]:
    """The same training step by transformers and peft, in a process of its own."""
    session.models.clear()
    session.give_back()
    case = measurement.case
    asked = argparse.Namespace(
        tokens=case.tokens,
        row=case.row,
        rank=case.rank,
        modules=case.modules,
        dropout=case.dropout,
        micro_tokens=case.micro_tokens,
        recompute=case.policy,
        steps=1 if session.args.dry else STEPS,
        device=session.device,
        dtype=session.dtype,
        peer_python=sys.executable,
    )
    result = peer(asked, model_config(measurement.model))
    if "seconds" in result:
        result["tokens_s"] = sum(case.row_lengths()) / result["seconds"]
    return result


MEASURED_BY: dict[str, Callable[[Measuring, Measurement], dict[str, Any]]] = {
    "train": measure_training,
    "decode": measure_decoding,
    "peer": measure_peer,
}


def for_rehearsal(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The same list for a CPU: only the first of each kind on our kernels, in the interpreter.

    The peer is left out, since importing it takes longer than all the rest.
    """
    seen = set()
    rehearsed = []
    for measurement in measurements:
        if measurement.kind == "peer":
            continue
        if measurement.kind in seen:
            measurement = dataclasses.replace(measurement, ops="torch")
        if measurement.kind == "decode" and measurement.case.invariant:
            continue  # torch's forms have none
        seen.add(measurement.kind)
        rehearsed.append(measurement)
    return list(dict.fromkeys(rehearsed))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=MEASURED_BY, help="this kind alone")
    parser.add_argument("--seconds", type=float, default=190.0, help="in all")
    parser.add_argument("--dry", action="store_true", help="a tiny model on a CPU")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device, dtype, sizes = ("cpu", "fp32", TINY) if args.dry else ("cuda", "bf16", ON_A_CARD)
    session = Measuring(args, sizes, device, dtype)
    about = machine(device)
    measurements = plan(sizes)
    if args.dry:
        measurements = for_rehearsal(measurements)
    if args.only:
        measurements = [m for m in measurements if m.kind == args.only]
    document = {
        "benchmark": "measure",
        "environment": about,
        "stated": stated_rate(about["device"]),
        "left_out": [],
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the results so far are recorded
    try:
        session.measure_rates()
        print(header(about, session.rates, dtype))
        for n, measurement in enumerate(measurements):
            if session.left() < FEWEST:
                document["left_out"] = [m.about() for m in measurements[n:]]
                break
            session.measure(measurement)
    finally:
        document |= {"ceilings": session.rates, "results": session.results}
        record(document, wanted=False)
    left_out = len(document["left_out"])
    failed = [line for line in session.results if "failed" in line]
    print(f"{len(session.results)} results, {left_out} left out, {len(failed)} failed")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
