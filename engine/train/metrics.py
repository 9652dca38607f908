"""The record of a training run: one line a step, and the guards that look at each

Loss and norm stay on the device until `flush`, so a step waits for nobody. A checkpoint is written
behind a flush only: what lies on disk went through the guards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.encode import Example
from engine.runtime.distributed import World
from engine.runtime.files import AppendedLines
from engine.runtime.terminal import progress
from engine.train.mfu import stated_rate
from engine.train.step import StepResult

WINDOW = 10  # steps whose mean loss is compared with that of the first
EVERY = {"cpu": 1, "cuda": 10}  # steps between flushes: a CPU has nothing to wait for


class Metrics:
    """Appends to metrics.jsonl, shows the bar, stops a run that went wrong with ValueError."""

    def __init__(
        self, file: Path, name: str, before: list[dict[str, Any]], steps: int, world: World
    ) -> None:
        self.losses = [line["loss"] for line in before]
        self.log = AppendedLines(file) if world.first else None
        self.bar = progress(
            total=steps,
            initial=len(before),
            desc=f"train {name}",
            unit="step",
            disable=not world.first,
        )
        self.pending: list[tuple[dict[str, Any], StepResult, Sequence[Example]]] = []
        self.world = world
        self.since = time.perf_counter()

    def add(self, line: dict[str, Any], result: StepResult, examples: Sequence[Example]) -> None:
        """Take note of a step; `line` is what the host knows of it."""
        self.pending.append((line, result, examples))
        if len(self.pending) >= EVERY[result.loss.device.type]:
            self.flush()

    def flush(self) -> None:
        """Look at the pending steps and write them down; ValueError for the first bad one."""
        tokens = sum(line["tokens"] for line, _, _ in self.pending)
        if self.pending:
            self.world.settle(self.pending[-1][1].loss.device)
        found = [(r.loss.item(), r.norm.item()) for _, r, _ in self.pending]  # waits for the device
        rate = tokens / max(1e-9, time.perf_counter() - self.since)
        for (line, result, examples), (loss, norm) in zip(self.pending, found, strict=True):
            self._check(line["step"], loss, norm, result, examples)
            self.losses.append(loss)
            if self.log:
                known = {"loss": loss, "grad_norm": norm}
                self.log.write({**line, **known, "tokens_s": rate})
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} tokens/s", refresh=False)
            self.bar.update()
        self.pending.clear()
        self.since = time.perf_counter()

    def _check(
        self, step: int, loss: float, norm: float, result: StepResult, examples: Sequence[Example]
    ) -> None:
        advice = "Look at these rows, or lower --lr"
        if not math.isfinite(loss):
            bad = (~result.gradients.nll.isfinite()).nonzero()[:, 0].tolist()
            rows = sorted({result.gradients.owners[i] for i in bad}) or "of another process"
            raise ValueError(f"step {step}: the loss is {loss}; rows {rows}. {advice}")
        if not math.isfinite(norm):
            rows = [e.id for e in examples]
            raise ValueError(f"step {step}: the gradient norm is {norm}; rows {rows}. {advice}")
        if step == 1 and norm == 0:
            raise ValueError(
                "step 1: the gradient is exactly zero, so nothing can be learned; is B without a "
                "path to the loss (--modules), or every response token already certain?"
            )
        begun = self.losses[:WINDOW]
        recent = [*self.losses[1 - WINDOW :], loss]
        if len(self.losses) >= WINDOW:
            was, now = sum(begun) / len(begun), sum(recent) / len(recent)
            if now > 2 * was + 1:
                raise ValueError(
                    f"step {step}: the loss has exploded, {now:.2f} over the last {WINDOW} steps "
                    f"after {was:.2f} over the first; lower --lr, or use --warmup 0.1"
                )

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.log:
            self.log.close()


def summary_text(summary: dict[str, Any], out: Path) -> str:
    """What a person wants to know at the end."""
    best, rate = summary["best"], summary["operations_s"]
    stated = stated_rate(summary["device"])
    since = summary.get("since_step", 0)
    share = f", MFU {rate / stated / summary['processes']:.1%}" if stated else ""
    return (
        f"{summary['steps']} steps, {summary['tokens']} tokens ({summary['response_tokens']} with "
        f"loss) in {summary['seconds']:.0f} s"
        + (f" since step {since}" if since else "")
        + f", {summary['tokens_s']:.0f} tokens/s, "
        f"{rate / 1e12:.3g} TFLOP/s (4 P a token + 7 L^2 H d a row and layer){share}; loss "
        f"{summary['first_loss']:.4f} -> {summary['last_loss']:.4f}"
        + (f"; best {best['metric']} {best['value']:.4f} at step {best['step']}" if best else "")
        + f"; peak memory {summary['peak_bytes'] / 1e9:.2f} GB; ops {summary['ops']}; "
        f"LoRA on {summary['linears']} linears; adapter in {out}"
    )
