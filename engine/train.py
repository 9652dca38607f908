"""The training loop: LoRA on packed rows, every gradient written down (model/llama.py)

    for each optimizer step                      batch_rows examples in a seeded order
        for each micro-batch                     packed, at most micro_tokens tokens
            hidden  = forward(tokens, tape)
            nll, d  = linear_cross_entropy(hidden where a response token comes next)
            backward(d)                          adds into the flat gradient
        g = grads / response tokens of the step; clip by the global norm; AdamW

The loss is the mean over the response tokens of the whole step, whatever the micro-batches are.
A step depends on (seed, step) alone, so a resumed run is the undisturbed run, bit for bit.
"""

# T = tokens of a micro-batch, N = response tokens of it

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import checkpoint
from engine.data import Example, encode, is_distilled, load_distilled, pack, show
from engine.log import (
    AppendedLines,
    cut_torn_line,
    environment,
    progress,
    read_jsonl,
    write_json,
    write_jsonl,
)
from engine.optim import Optimizer, cosine_rate
from engine.session import DataConfig, Session
from kernels.context import Packed
from kernels.philox import MASK32, mix
from model.llama import POLICIES, Llama, Tape
from model.lora import Lora, LoraConfig


@dataclass(frozen=True)
class TrainConfig:
    """How an adapter is trained. Defaults are the paper's where it has one."""

    lr: float = 1e-4  # peak learning rate
    epochs: int = 2  # passes over the examples
    batch_rows: int = 8  # examples per optimizer step
    micro_tokens: int = 1024  # tokens per forward and backward: memory and speed, not the result
    warmup: float = 0.0  # share of the steps with rising rate, then a cosine
    weight_decay: float = 0.0  # decoupled
    clip: float = 1.0  # largest gradient norm; 0 does not clip
    seed: int = 0  # of the adapter's start, the order of the rows and dropout
    recompute: str = "none"  # none | selective | full: what the backward computes again
    save_every: int = 50  # optimizer steps between checkpoints
    keep: int = 2  # checkpoints kept

    def check(self) -> None:
        """ValueError for numbers that cannot train."""
        counts = ("epochs", "batch_rows", "micro_tokens", "save_every", "keep")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1 is wanted")
        if self.lr <= 0 or self.clip < 0 or self.weight_decay < 0 or not 0 <= self.warmup < 1:
            raise ValueError(
                f"lr {self.lr}, clip {self.clip}, weight_decay {self.weight_decay}, warmup "
                f"{self.warmup}: lr > 0, clip and decay >= 0, 0 <= warmup < 1 are wanted"
            )
        if self.recompute not in POLICIES:
            raise ValueError(f"recompute {self.recompute!r}: one of {', '.join(POLICIES)}")


@dataclass(frozen=True)
class EncodeConfig:
    """What of a row is trained on."""

    target: str = "target"  # target | response | reference: which answer of distilled data
    max_length: int = 1024  # tokens of prompt and answer
    truncate: bool = False  # cut the end of longer answers (counted) instead of stopping


@dataclass
class MicroBatch:
    """Packed examples and where their loss is."""

    tokens: Tensor  # (T,)
    packed: Packed
    select: Tensor  # (N,) positions whose next token is a response token
    targets: Tensor  # (N,) that token
    owners: list[str]  # (N,) example id of each, to name a row that went wrong

    @classmethod
    def build(cls, examples: Sequence[Example], step: int, device: torch.device) -> MicroBatch:
        """Lay the examples end to end."""
        tokens, select, targets, owners = [], [], [], []
        for example in examples:
            start = len(tokens)
            tokens += example.ids
            for at in range(example.n_prompt, len(example.ids)):
                select.append(start + at - 1)
                targets.append(example.ids[at])
                owners.append(example.id)
        packed = Packed.from_lengths(
            [len(e.ids) for e in examples],
            device,
            row_keys=[mix("row", e.id) & MASK32 for e in examples],
            step=step,
        )

        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(column(tokens), packed, column(select), column(targets), owners)


def micro_step(model: Llama, lora: Lora, batch: MicroBatch, policy: str) -> Tensor:
    """Forward, loss, backward of one micro-batch: nll (N,); adds sum-of-nll gradients to lora."""
    tape = Tape(policy)
    hidden = model.forward(batch.tokens, batch.packed, lora=lora, tape=tape)
    nll, dselected = model.ops.linear_cross_entropy(
        hidden[batch.select], model.weights["head"], batch.targets
    )
    dhidden = torch.zeros_like(hidden).index_copy_(0, batch.select, dselected)
    model.backward(dhidden, tape)
    return nll


def check_examples(examples: Sequence[Example]) -> None:
    """ValueError naming rows that cannot be trained on."""
    if not examples:
        raise ValueError("there is nothing to train on: no example")
    empty = [e.id for e in examples if not 0 < e.n_prompt < len(e.ids)]
    if empty:
        raise ValueError(f"{len(empty)} rows have no prompt or no response token: {empty[:10]}")


def fingerprint(examples: Sequence[Example]) -> str:
    """Hash of what is trained on: ids, tokens, where the loss begins."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.ids, example.n_prompt]).encode())
    return digest.hexdigest()


def batches(count: int, config: TrainConfig) -> Iterator[tuple[int, list[int]]]:
    """(epoch, example indices) of every optimizer step, a fresh order in every epoch."""
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(mix("order", config.seed, epoch) >> 1)
        order = torch.randperm(count, generator=generator).tolist()
        for i in range(0, count, config.batch_rows):
            yield epoch, order[i : i + config.batch_rows]


def train_job(
    session: Session,
    data: DataConfig,
    encoding: EncodeConfig,
    config: TrainConfig,
    lora_config: LoraConfig,
    out: Path | None,
    *,
    show_rows: int | None = None,
    resume: bool = False,
) -> dict[str, Any] | None:
    """Encode a file of rows or of distilled data and train on it, or print encoded rows."""
    config.check()
    lora_config.check()
    rows = load_distilled(data.data)[: data.limit] if is_distilled(data.data) else data.load()
    examples, counts = encode(
        rows,
        session.chat,
        target=encoding.target,
        max_length=min(encoding.max_length, session.model.config.max_position),
        truncate=encoding.truncate,
    )
    print(", ".join(f"{name} {value}" for name, value in dataclasses.asdict(counts).items()))
    if show_rows is not None:
        print(show(examples, session.chat.tokenizer, show_rows))
        return None
    _, summary = train(
        session.model,
        examples,
        lora_config,
        config,
        out,
        base=session.config.model,
        model_hash=session.fingerprint,
        resume=resume,
    )
    print(
        f"{summary['steps']} steps, {summary['tokens']} tokens ({summary['response_tokens']} with "
        f"loss), {summary['tokens_s']:.0f} tokens/s; loss {summary['first_loss']:.4f} -> "
        f"{summary['last_loss']:.4f}; LoRA on {summary['linears']} linears; adapter in {out}"
    )
    return summary


def train(
    model: Llama,
    examples: Sequence[Example],
    lora_config: LoraConfig,
    config: TrainConfig,
    out: Path,
    *,
    base: str,
    model_hash: str,
    resume: bool = False,
    note: dict[str, Any] | None = None,
) -> tuple[Lora, dict[str, Any]]:
    """Train an adapter into the run directory `out`; returns it and the summary.

    With resume a finished run is loaded, a killed one goes on from its last checkpoint. A loss or
    gradient that is not finite stops with ValueError naming the rows; the checkpoints stay.
    """
    config.check()
    check_examples(examples)
    lora_config = dataclasses.replace(lora_config, seed=config.seed)
    lora = Lora.init(model, **dataclasses.asdict(lora_config))
    keys = {"save_every", "keep"}  # may change on the way: the result does not depend on them
    settings = {
        "train": {k: v for k, v in dataclasses.asdict(config).items() if k not in keys},
        "lora": dataclasses.asdict(lora_config),
        "model": model_hash,
        "data": fingerprint(examples),
        "dtype": str(model.dtype),
        **(note or {}),
    }
    meta = checkpoint.open_run(out, settings, resume)
    optimizer = Optimizer.fresh(lora, config.weight_decay)
    saved = checkpoint.checkpoints(out)
    if saved:
        checkpoint.load_checkpoint(saved[-1], lora, optimizer)
    if meta["finished"]:
        return lora, meta["summary"]
    plan = list(batches(len(examples), config))
    tokens, seconds = _loop(model, lora, optimizer, examples, plan, config, out, base)
    last = checkpoint.save_checkpoint(out, lora, optimizer, base, config.keep)
    checkpoint.publish(out, last)
    summary = _summary(out, examples, lora, model, tokens, seconds)
    record = {"settings": settings, "finished": True, "summary": summary}
    write_json(out / "meta.json", record | {"environment": environment()})
    return lora, summary


def _loop(
    model: Llama,
    lora: Lora,
    optimizer: Optimizer,
    examples: Sequence[Example],
    plan: list[tuple[int, list[int]]],
    config: TrainConfig,
    out: Path,
    base: str,
) -> tuple[int, float]:
    """The steps that are left; returns tokens trained in this process and the seconds they took."""
    metrics = out / "metrics.jsonl"
    if metrics.exists():  # lines behind the checkpoint are written again
        cut_torn_line(metrics)
        kept = [m for m in read_jsonl(metrics) if m["step"] <= optimizer.step]
        write_jsonl(metrics, kept)
    trained, begin = 0, time.perf_counter()
    bar = progress(total=len(plan), initial=optimizer.step, desc=f"train {out.name}", unit="step")
    with AppendedLines(metrics) as log, bar:
        for epoch, rows in plan[optimizer.step :]:
            started = time.perf_counter()
            step = optimizer.step + 1
            chosen = [examples[i] for i in rows]
            response = sum(len(e.ids) - e.n_prompt for e in chosen)
            total = sum(len(e.ids) for e in chosen)

            # 1. forward and backward of every micro-batch
            lora.grads.zero_()
            nlls, owners = [], []
            for places in pack(chosen, config.micro_tokens):
                batch = MicroBatch.build([chosen[i] for i in places], step, model.device)
                nlls.append(micro_step(model, lora, batch, config.recompute))
                owners += batch.owners
            nll = torch.cat(nlls)
            loss = (nll.sum() / response).item()

            # 2. one AdamW over the flat buffer, unless something is not finite
            lr = cosine_rate(step, len(plan), config.lr, config.warmup)
            norm = math.nan
            if math.isfinite(loss):
                norm = optimizer.update(model.ops, lora, lr, 1 / response, config.clip)
            if not math.isfinite(norm):
                raise ValueError(_not_finite(step, loss, norm, nll, owners, chosen, out))

            # 3. the record
            trained += total
            rate = total / (time.perf_counter() - started)
            line = {"step": step, "epoch": epoch, "loss": loss, "grad_norm": norm, "lr": lr}
            log.write(line | {"tokens": total, "response_tokens": response, "tokens_s": rate})
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} tokens/s", refresh=False)
            bar.update()
            if step % config.save_every == 0 and step < len(plan):
                checkpoint.save_checkpoint(out, lora, optimizer, base, config.keep)
    return trained, time.perf_counter() - begin


def _not_finite(
    step: int,
    loss: float,
    norm: float,
    nll: Tensor,
    owners: list[str],
    chosen: list[Example],
    out: Path,
) -> str:
    """What to say when a step went wrong: the rows, and where the last good state lies."""
    if math.isfinite(loss):
        what, rows = f"the gradient norm is {norm}", [e.id for e in chosen]
    else:
        bad = (~torch.isfinite(nll)).nonzero()[:, 0].tolist()
        what, rows = f"the loss is {loss}", sorted({owners[i] for i in bad})
    saved = checkpoint.checkpoints(out)
    where = f"the last good state is {saved[-1]}" if saved else "no checkpoint was written yet"
    return f"step {step}: {what}; rows {rows}. {where}. Look at these rows, or lower --lr"


def _summary(
    out: Path, examples: Sequence[Example], lora: Lora, model: Llama, tokens: int, seconds: float
) -> dict[str, Any]:
    """What a person wants to know at the end."""
    lines = read_jsonl(out / "metrics.jsonl")
    tenth = max(1, len(lines) // 10)
    adapted = sum(".lora_A." in name for name in lora.slots)
    return {
        "examples": len(examples),
        "steps": len(lines),
        "tokens": sum(m["tokens"] for m in lines),
        "response_tokens": sum(m["response_tokens"] for m in lines),
        "first_loss": sum(m["loss"] for m in lines[:tenth]) / tenth,
        "last_loss": sum(m["loss"] for m in lines[-tenth:]) / tenth,
        "tokens_s": tokens / seconds if seconds else 0.0,
        "seconds": seconds,
        "parameters": lora.params.numel(),
        "linears": f"{adapted}/{7 * model.config.num_layers}",
        "ops": model.ops.name,
    }
