"""The training loop over the steps of a run."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.data.encode import (
    Example,
)
from engine.runtime.distributed import World
from engine.runtime.files import read_jsonl
from engine.runtime.process_memory import (
    first_line,
    held_memory,
    is_out_of_memory,
    peak_memory,
)
from engine.runtime.stopping import Stopping
from engine.train import checkpoint
from engine.train.config import TrainConfig
from engine.train.memory_plan import Plan, choose_policy
from engine.train.metrics import Metrics
from engine.train.mfu import step_operations
from engine.train.optim import Optimizer, learning_rate
from engine.train.step import Gradients, step_gradients, step_update
from engine.train.validate import Validator
from kernels.philox import mix
from model.llama import Llama
from model.lora import Lora
from model.trained_chat import TrainedChat


def batches(count: int, config: TrainConfig) -> Iterator[tuple[int, list[int]]]:
    """(epoch, example indices) of every optimizer step, a fresh order in every epoch."""
    left = config.steps(count)
    epoch = 0
    while left:
        generator = torch.Generator().manual_seed(mix("order", config.seed, epoch) >> 1)
        order = torch.randperm(count, generator=generator).tolist()
        for i in range(0, min(count, left * config.batch_rows), config.batch_rows):
            yield epoch, order[i : i + config.batch_rows]
            left -= 1
        epoch += 1


@dataclass
class Run:
    """A training run under way."""

    model: Llama
    lora: Lora
    optimizer: Optimizer
    examples: Sequence[Example]
    config: TrainConfig
    out: Path
    base: str
    validator: Validator | None
    world: World
    chat: TrainedChat | None = None  # written beside the adapter
    state: dict[str, Any] = dataclasses.field(default_factory=dict)  # kept in checkpoints
    # of the whole run, as far as it is in checkpoints: seconds, tokens, operations
    # (engine/train/step.py
    # says how they are counted), all processes together, and the largest peak of memory
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    since: float = 0.0  # when the time that is not yet in it began
    since_step: int = 0  # that begins here: above 0 for runs of before, which did not keep it

    def load_finished(self, meta: dict[str, Any]) -> None:
        """Put the adapter of a finished run into this one's, once it is what was written."""
        steps, best = meta["summary"].get("steps"), meta["summary"].get("best")
        best = best.get("step", steps) if isinstance(best, dict) else None
        if type(steps) is not int or type(best) is not int:
            raise ValueError(f"{self.out / 'meta.json'}: summary is not what was written")
        place = checkpoint.place_of(self.out, best)
        if self.world.first:
            checkpoint.check_published(self.out, meta.get("published"), place)
        self.world.barrier()
        if best == steps and place.exists() and self.lora.params.dtype == torch.float64:
            checkpoint.load_checkpoint(place, self.lora, self.optimizer)  # not rounded to fp32
        else:
            checkpoint.load_adapter(self.out, self.lora)

    def loop(self, lines: list[dict[str, Any]], stop: Stopping) -> None:
        """The steps that are left; `lines` are the metrics of those that are done."""
        config, optimizer, world = self.config, self.optimizer, self.world
        plan = list(batches(len(self.examples), config))
        self.state = {"micro_tokens": config.micro_tokens, "best": {}} | self.state
        self.spent = dict(self.state.get("spent", checkpoint.NOTHING_SPENT))
        self.since_step = self.state.get("since_step", 0)
        if optimizer.step and "spent" not in self.state:
            self.since_step = optimizer.step
        memory = self.plan_memory()
        print(memory.text())
        self.since = time.perf_counter()
        metrics_file = self.out / "metrics.jsonl"
        with Metrics(metrics_file, self.out.name, lines, len(plan), world) as metrics:
            for epoch, rows in plan[optimizer.step :]:
                step = optimizer.step + 1
                chosen = [self.examples[i] for i in rows]
                lr = learning_rate(config.schedule, step, len(plan), config.lr, config.warmup)

                # 1. forward and backward, one AdamW
                found = self.gradients(chosen, step, memory.policy)
                result = step_update(
                    self.model, self.lora, optimizer, found, lr, config.clip, world
                )
                lengths = [len(e.ids) for e in chosen]
                tokens = sum(lengths)
                self.spent["operations"] += step_operations(self.model.config, lengths)
                self.spent["tokens"] += tokens
                line = {"step": step, "epoch": epoch, "lr": lr, "tokens": tokens}
                metrics.add(line | {"response_tokens": found.response}, result, chosen)

                # 2. now and then: validation, a checkpoint; a request to stop
                last = step == len(plan)
                looked = self.validator and (last or step % self.validator.config.val_every == 0)
                stopping = world.any(stop.asked)
                if looked or last or stopping or step % config.save_every == 0:
                    metrics.flush()
                    better = looked and self.validate(step, epoch)
                    if better or last or stopping or step % config.save_every == 0:
                        self.save(step, epoch)
                if stopping and not last:
                    stop.end(f"step {step} of {len(plan)} is in {self.out}")
            metrics.flush()
        self.count_time()

    def count_time(self) -> None:
        """Add the time since the last call to what was spent."""
        now = time.perf_counter()
        self.spent["seconds"] += now - self.since
        self.since = now
        self.spent["peak_bytes"] = max(self.spent["peak_bytes"], peak_memory(self.model.device))

    def plan_memory(self) -> Plan:
        """The policy, and the peak it is predicted to have."""
        lengths = [len(e.ids) for e in self.examples]
        tokens = min(max(self.state["micro_tokens"], max(lengths)), sum(lengths))
        share = sum(n - e.n_prompt for n, e in zip(lengths, self.examples, strict=True))
        return choose_policy(
            self.config.recompute,
            self.config.memory_gb,
            self.model.config,
            self.lora.config,
            self.model.device,
            tokens=tokens,
            longest=max(lengths),
            response=round(tokens * share / sum(lengths)),
            dtype=self.model.dtype,
            held=held_memory(self.model.device) + self.model.weights.gather_bytes,
        )

    def gradients(self, chosen: Sequence[Example], step: int, policy: str) -> Gradients:
        """Forward and backward; out of memory halves the micro-batches of every process."""
        while True:
            micro_tokens, found, failure = self.state["micro_tokens"], None, None
            try:
                found = step_gradients(
                    self.model, self.lora, chosen, step, micro_tokens, policy, self.world
                )
            except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is the first
                if not is_out_of_memory(error):
                    raise
                failure = first_line(error)
                if self.model.is_sharded:
                    raise ValueError(
                        f"step {step}: out of memory ({failure}); under --shard no process can try "
                        "again alone: --resume with more of them, or begin anew (another --out) "
                        "with a lower --micro-tokens"
                    ) from None
            if not self.world.any(failure is not None):
                return found
            longest = max(chosen, key=lambda e: len(e.ids))
            if micro_tokens <= len(longest.ids):
                more = "" if policy == "full" else "--recompute full, or "
                raise ValueError(
                    f"step {step}: out of memory with one row at a time; the longest is "
                    f"{longest.id} of {len(longest.ids)} tokens: begin anew (another --out) with "
                    f"{more}a lower --max-length ({failure or 'in another process'})"
                )
            self.state["micro_tokens"] = max(micro_tokens // 2, 1)
            print(
                f"\nstep {step}: out of memory with micro-batches of {micro_tokens} tokens; "
                f"going on with {self.state['micro_tokens']}"
            )
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()

    def validate(self, step: int, epoch: int) -> bool:
        """Measure the adapter, note it; whether it is the best so far. Rank 0's values count."""
        names = self.validator.names
        values = torch.zeros(len(names), dtype=torch.float64)
        if self.world.first or self.model.is_sharded:  # all are needed to gather sharded weights
            values += (
                torch.tensor(self.validator(self.lora), dtype=torch.float64) * self.world.first
            )
        self.world.barrier()  # rank 0 may be long about it
        found = dict(zip(names, self.world.sum_(values).tolist(), strict=True))
        if self.world.first:
            checkpoint.note_validation(self.out, {"step": step, "epoch": epoch, **found})
        print(f"\nstep {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
        name, best = self.validator.config.best, self.state["best"]
        if name == "last" or found[name] >= best.get("value", math.inf):
            return False
        self.state["best"] = {"metric": name, "value": found[name], "step": step}
        return True

    def save(self, step: int, epoch: int) -> None:
        """A checkpoint, written by rank 0."""
        if self.world.first:
            self.count_time()
            state = {**self.state, "epoch": epoch, "seed": self.config.seed}
            state |= {"spent": self.spent, "since_step": self.since_step}
            spare = self.state["best"].get("step", 0)
            checkpoint.save_checkpoint(
                self.out,
                self.lora,
                self.optimizer,
                self.base,
                self.config.keep,
                state,
                spare,
                self.chat,
            )
        self.world.barrier()

    def finish(self) -> dict[str, Any]:
        """Publish the last or the best adapter; the summary."""
        best = self.state["best"].get("step", self.optimizer.step)
        place = checkpoint.place_of(self.out, best)
        if best != self.optimizer.step:
            checkpoint.load_adapter(place, self.lora)
        if not any(v.any() for k, v in self.lora.views(self.lora.params).items() if "lora_B" in k):
            raise ValueError(f"{self.out}: B is zero everywhere at the end: nothing was learned")
        if not self.world.first:
            return {}
        checkpoint.publish(self.out, place)
        if self.chat is not None:
            self.chat.write(self.out)
        lines = read_jsonl(self.out / "metrics.jsonl", checkpoint.METRICS)
        spent, seconds = self.spent, self.spent["seconds"]
        tenth = max(1, len(lines) // 10)
        adapted = sum(".lora_A." in name for name in self.lora.slots)
        return {
            "examples": len(self.examples),
            "steps": len(lines),
            "tokens": sum(m["tokens"] for m in lines),
            "response_tokens": sum(m["response_tokens"] for m in lines),
            "first_loss": sum(m["loss"] for m in lines[:tenth]) / tenth,
            "last_loss": sum(m["loss"] for m in lines[-tenth:]) / tenth,
            "best": self.state["best"],
            "tokens_s": spent["tokens"] / seconds if seconds else 0.0,
            "seconds": seconds,
            "operations_s": spent["operations"] / seconds if seconds else 0.0,
            "since_step": self.since_step,  # speeds are of the steps behind this one
            "peak_bytes": spent["peak_bytes"],
            "processes": self.world.size,
            "device": torch.cuda.get_device_name() if self.model.device.type == "cuda" else "cpu",
            "parameters": self.lora.params.numel(),
            "linears": f"{adapted}/{7 * self.model.config.num_layers}",
            "ops": self.model.ops.name,
        }
