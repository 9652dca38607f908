"""A training step as engine/train/step.py does it, timed: called by benchmarks/step.py and by
benchmarks/card/measure.py."""

# T = tokens of a micro-batch

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.clock import first_line
from engine.data.encode import Example
from engine.data.pack import MicroBatch, pack
from engine.runtime.process_memory import held_memory
from engine.train.memory_plan import StepSize, predict
from engine.train.optim import Optimizer
from engine.train.step import micro_step
from model.llama import Llama
from model.lora import Lora, LoraConfig

WARM_UP = 2  # steps before the timed ones: the first compiles


@dataclass(frozen=True)
class StepCase:
    """The step that is timed."""

    tokens: int  # of a step
    row: int  # tokens of a packed row
    rank: int = 8
    modules: str = "qv"  # as LoraConfig has it
    dropout: float = 0.0
    micro_tokens: int = 0  # most tokens of a micro-batch; 0: all of a step in one
    policy: str = "none"  # recomputation in the backward

    def row_lengths(self) -> list[int]:
        """Rows of `row` tokens, `tokens` together; a last row of one token is left out."""
        lengths = [self.row] * (self.tokens // self.row)
        rest = self.tokens % self.row
        if rest > 1:
            lengths.append(rest)
        return lengths

    def lora(self) -> LoraConfig:
        """The adapter's settings."""
        alpha = 2.0 * self.rank
        return LoraConfig(self.rank, alpha, dropout=self.dropout, modules=self.modules)


class Trainer:
    """One adapter trained with one table of operations, always on the same rows."""

    def __init__(self, model: Llama, case: StepCase) -> None:
        self.model = model
        self.case = case
        held = held_memory(model.device)
        self.lora = Lora.init(case.lora(), model.config, model.device, model.dtype)
        self.optimizer = Optimizer.fresh(self.lora, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1)
        vocab = model.config.vocab_size
        rows = [torch.randint(vocab, (n,), generator=generator) for n in case.row_lengths()]
        examples = [Example(f"row-{i}", ids.tolist(), 1) for i, ids in enumerate(rows)]
        lengths = [len(example.ids) for example in examples]
        self.batches = []
        for indices in pack(lengths, case.micro_tokens or sum(lengths)):
            batch = [examples[i] for i in indices]
            self.batches.append(MicroBatch.build(batch, 1, model.device))
        self.predicted = self._predicted_peak(lengths, held)

    def _predicted_peak(self, lengths: list[int], held: int) -> float:
        """GiB at the step's peak by the memory plan, beside which the measured peak stands."""
        model = self.model
        batch = max(self.batches, key=lambda batch: len(batch.tokens))
        size = StepSize(
            tokens=len(batch.tokens),
            longest=max(lengths),
            response=len(batch.select),
            dtype=model.dtype,
        )
        lora = self.lora.config
        plan = predict(model.config, lora, self.case.policy, size, model.device.type, held)
        return plan.total / 2**30

    def step(self) -> dict[str, float | None]:
        """One step: its seconds, loss, gradient norm and peak memory."""
        gpu = self.model.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        self.lora.grads.zero_()
        nlls = []
        for batch in self.batches:
            nlls.append(micro_step(self.model, self.lora, batch, self.case.policy))
        nll = torch.cat(nlls)
        scale = 1 / len(nll)
        norm = self.optimizer.update(self.model.ops, self.lora, 1e-4, scale, clip=1.0).item()
        loss = nll.mean().item()  # waits for the device
        if gpu:
            torch.cuda.synchronize()
        return {
            "seconds": time.perf_counter() - started,
            "loss": loss,
            "grad_norm": norm,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
            "predicted_gib": self.predicted,
        }


def attempt(runs: dict[str, Any], name: str, fn: Callable[[], dict]) -> None:
    """Add a result to the steps of `name`, or record why there is none; the others continue."""
    if "failed" in runs.get(name, {}):
        return
    try:
        result = fn()
    except Exception as error:
        runs[name] = {"failed": first_line(error)}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return
    runs.setdefault(name, {"steps": []})["steps"].append(result)


def training(models: dict[str, Llama], case: StepCase, steps: int) -> dict[str, dict]:
    """Steps of every table, taking turns; the first compiles and is reported apart."""
    trainers = {name: Trainer(model, case) for name, model in models.items()}
    runs: dict[str, Any] = {}
    for _ in range(steps + WARM_UP):
        for name, trainer in trainers.items():
            attempt(runs, name, trainer.step)
    return {name: summary(run) for name, run in runs.items()}


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """Median and spread of the steps after the first two."""
    if "failed" in run:
        return run
    steps = run["steps"][WARM_UP:]
    seconds = sorted(s["seconds"] for s in steps)
    last = {k: v for k, v in steps[-1].items() if k != "seconds"}
    first = run["steps"][0]
    return last | {
        "seconds": statistics.median(seconds),
        "spread": [seconds[0], seconds[-1]],
        "first_seconds": first["seconds"],
        "first_loss": first["loss"],
        "first_grad_norm": first["grad_norm"],
    }
