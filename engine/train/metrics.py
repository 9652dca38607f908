"""The record of a training run: one line per step, and the guards that check each step

`loss` of a line is the mean nll of the response tokens, whatever they weigh. Under a weighted loss
(losses.py) a line also has `weighted_loss`, `mean_weight` and `kept`, the share of the response
tokens whose weight is not 0.

Loss and gradient norm stay on the device until `flush`, so a step never synchronises with it. A
checkpoint is written only after a flush, so it holds steps that passed the guards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.encode import Example
from engine.runtime.distributed import World
from engine.runtime.files import AppendedLines
from engine.runtime.terminal import progress
from engine.train.mfu import stated_rate
from engine.train.step import Gradients, StepResult

WINDOW = 10  # steps whose mean loss is compared with that of the first WINDOW steps
FLUSH_EVERY = {"cpu": 1, "cuda": 10}  # steps; on a CPU there is nothing to wait for


class PendingStep(NamedTuple):
    """A step whose numbers are still on the device."""

    record: dict[str, Any]  # the part of its line in metrics.jsonl that the host knows
    result: StepResult
    examples: Sequence[Example]


class Metrics:
    """Appends to metrics.jsonl, shows the progress bar, checks every step. A context manager.

    ValueError, which ends the run, for a loss or gradient norm that is not finite, a gradient of
    zero in the first step, and a loss that explodes.
    """

    def __init__(
        self,
        file: Path,
        name: str,
        finished: Sequence[float],
        steps: int,
        world: World,
    ) -> None:
        """name: of the run, for the bar. finished: losses of the finished steps. steps: of the
        whole run. Only rank 0 writes and shows."""
        self.losses = list(finished)
        self.log = AppendedLines(file) if world.is_rank0 else None
        self.bar = progress(
            total=steps,
            initial=len(finished),
            desc=f"train {name}",
            unit="step",
            disable=not world.is_rank0,
        )
        self.pending: list[PendingStep] = []
        self.world = world
        self.last_flush = time.perf_counter()

    def add(self, record: dict[str, Any], result: StepResult, examples: Sequence[Example]) -> None:
        """Keep a step for the next flush; `record` holds at least its step and tokens."""
        self.pending.append(PendingStep(record, result, examples))
        if len(self.pending) >= FLUSH_EVERY[result.loss.device.type]:
            self.flush()

    def flush(self) -> None:
        """Read the pending steps' numbers, check them, write them; ValueError at the first bad one.

        tokens_s of a line is the rate of all steps since the last flush.
        """
        if self.pending:
            self.world.wait_for_device(self.pending[-1].result.loss.device)
        losses = [step.result.loss.item() for step in self.pending]  # waits for the device
        norms = [step.result.norm.item() for step in self.pending]
        weighted = [_weighted_means(step.result) for step in self.pending]
        tokens = sum(step.record["tokens"] for step in self.pending)
        seconds = max(1e-9, time.perf_counter() - self.last_flush)
        tokens_s = tokens / seconds
        for step, loss, norm, means in zip(self.pending, losses, norms, weighted, strict=True):
            self._check_step(step, loss, norm, means)
            self._check_not_exploded(step, loss)
            self.losses.append(loss)
            if self.log is not None:
                numbers = {"loss": loss, **means, "grad_norm": norm, "tokens_s": tokens_s}
                self.log.write({**step.record, **numbers})
            self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_s:.0f} tokens/s", refresh=False)
            self.bar.update()
        self.pending.clear()
        self.last_flush = time.perf_counter()

    def _check_step(
        self, pending: PendingStep, loss: float, norm: float, means: dict[str, float]
    ) -> None:
        """ValueError for a loss or norm that is not finite, or a first gradient of zero.

        means: those of a weighted loss, {} under plain SFT.
        """
        step = pending.record["step"]
        advice = "Look at these rows, or lower --lr"
        if not math.isfinite(loss):
            rows = _rows_that_are_not_finite(pending.result.gradients)
            named = rows if rows else "of another process"
            raise ValueError(f"step {step}: the loss is {loss}; rows {named}. {advice}")
        for name, value in means.items():
            if not math.isfinite(value):
                rows = [example.id for example in pending.examples]
                raise ValueError(f"step {step}: {name} is {value}; rows {rows}. {advice}")
        if not math.isfinite(norm):
            rows = [example.id for example in pending.examples]
            raise ValueError(f"step {step}: the gradient norm is {norm}; rows {rows}. {advice}")
        is_masked = means.get("kept") == 0  # the loss leaves every token of the step out
        if step == 1 and norm == 0 and not is_masked:
            raise ValueError(
                "step 1: the gradient is exactly zero, so nothing can be learned; is B without a "
                "path to the loss (--modules), or every response token already certain?"
            )

    def _check_not_exploded(self, pending: PendingStep, loss: float) -> None:
        """ValueError where the mean loss of the last WINDOW steps, this one among them, is far
        above that of the first WINDOW steps."""
        if len(self.losses) < WINDOW:
            return
        first = self.losses[:WINDOW]
        recent = [*self.losses[1 - WINDOW :], loss]
        first_mean = sum(first) / len(first)
        recent_mean = sum(recent) / len(recent)
        if recent_mean > 2 * first_mean + 1:
            step = pending.record["step"]
            raise ValueError(
                f"step {step}: the loss has exploded, {recent_mean:.2f} over the last {WINDOW} "
                f"steps after {first_mean:.2f} over the first; lower --lr, or use --warmup 0.1"
            )

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.log is not None:
            self.log.close()


def _weighted_means(result: StepResult) -> dict[str, float]:
    """Name -> mean over the response tokens of a step, as metrics.jsonl has them; {} under plain
    SFT."""
    if result.weighted is None:
        return {}
    names = ("weighted_loss", "mean_weight", "kept")
    return dict(zip(names, result.weighted.tolist(), strict=True))


def _rows_that_are_not_finite(gradients: Gradients) -> list[str]:
    """Ids of the examples of this rank with a response token whose loss is not finite."""
    bad = (~gradients.nll.isfinite()).nonzero()[:, 0]  # indices of such tokens
    return sorted({gradients.owners[index] for index in bad.tolist()})


def summary_text(summary: dict[str, Any], out: Path) -> str:
    """The summary of a run (`Run.finish`) in one line, for the terminal."""
    since_step = summary.get("since_step", 0)
    since = f" since step {since_step}" if since_step else ""
    work = (
        f"{summary['steps']} steps, {summary['tokens']} tokens ({summary['response_tokens']} with "
        f"loss) in {summary['seconds']:.0f} s{since}"
    )

    rate = summary["operations_s"]  # of all processes together
    speed = (
        f"{summary['tokens_s']:.0f} tokens/s, "
        f"{rate / 1e12:.3g} TFLOP/s (4 P a token + 7 L^2 H d a row and layer)"
    )
    stated = stated_rate(summary["device"])  # of one card
    if stated is not None:
        mfu = rate / stated / summary["processes"]
        speed += f", MFU {mfu:.1%}"

    loss = f"loss {summary['first_loss']:.4f} -> {summary['last_loss']:.4f}"
    parts = [f"{work}, {speed}", loss]
    if summary.get("stopped"):
        planned = f"step {summary['steps']} of {summary['planned_steps']}"
        parts.append(f"stopped at {planned} because {summary['stopped']}")
    best = summary["best"]
    if best:
        name = f"best {best['metric']}"
        if best["metric"] == "last":
            name = "adapter: the last within --stop-kl, KL"
        parts.append(f"{name} {best['value']:.4f} at step {best['step']}")
    halved = summary.get("halved", [])
    if halved:
        step, tokens = halved[-1]
        parts.append(f"memory was short: micro-batches of {tokens} tokens from step {step} on")
    parts += [
        f"peak memory {summary['peak_bytes'] / 1e9:.2f} GB",
        f"ops {summary['ops']}",
        f"LoRA on {summary['linears']} linears",
        f"adapter in {out}",
    ]
    return "; ".join(parts)
