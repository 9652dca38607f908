"""The training loop: `Run.loop`, and the methods that it calls

batches        the order of the examples, fixed by the seed
Run.loop       per step: gradients, update, metrics; at times validation and a checkpoint
Run.finish     publish the last or the best adapter, and the summary
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.data.encode import Example
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
from engine.train.memory_plan import MemoryPlan, choose_policy
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
    """(epoch, example indices) of every optimizer step; each epoch has an order of its own."""
    steps_left = config.steps(count)
    epoch = 0
    while steps_left:
        generator = torch.Generator().manual_seed(mix("order", config.seed, epoch) >> 1)
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, min(count, steps_left * config.batch_rows), config.batch_rows):
            yield epoch, order[start : start + config.batch_rows]
            steps_left -= 1
        epoch += 1


@dataclass
class Run:
    """A training run: model, adapter and optimizer, and the account of its time and work."""

    model: Llama
    lora: Lora
    optimizer: Optimizer
    examples: Sequence[Example]
    config: TrainConfig
    out: Path
    base: str  # the model's directory, as the adapter's config names it
    validator: Validator | None
    world: World
    chat: TrainedChat | None = None  # written beside the adapter
    # of the last checkpoint: micro_tokens, best, and what `save` adds
    state: dict[str, Any] = dataclasses.field(default_factory=dict)
    # of all starts of the run, as far as checkpoints have it: seconds, tokens, operations (mfu.py)
    # of all ranks together, and the largest peak of memory
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    counted_until: float = 0.0  # time.perf_counter() up to which `spent` has the seconds
    spent_since_step: int = 0  # above 0 in a run whose first checkpoints did not have `spent`

    def loop(self, metrics_so_far: list[dict[str, Any]], stop: Stopping) -> None:
        """Do the steps that are left; `metrics_so_far` are the metrics of the finished ones."""
        config, optimizer, world = self.config, self.optimizer, self.world
        schedule = list(batches(len(self.examples), config))
        self._restore_state()
        plan = self.plan_memory()
        print(plan.text())
        self.counted_until = time.perf_counter()
        metrics_file = self.out / "metrics.jsonl"
        with Metrics(metrics_file, self.out.name, metrics_so_far, len(schedule), world) as metrics:
            for epoch, indices in schedule[optimizer.step :]:
                step = optimizer.step + 1
                examples = [self.examples[i] for i in indices]
                lr = learning_rate(config.schedule, step, len(schedule), config.lr, config.warmup)

                # 1. forward and backward, one AdamW
                gradients = self.gradients(examples, step, plan.policy)
                result = step_update(
                    self.model, self.lora, optimizer, gradients, lr, config.clip, world
                )
                tokens = self.count_work(examples)
                record = {"step": step, "epoch": epoch, "lr": lr, "tokens": tokens}
                record["response_tokens"] = gradients.n_response
                metrics.add(record, result, examples)

                # 2. validation and a checkpoint, where they are due
                last = step == len(schedule)
                stopping = world.any_rank(stop.asked)
                validation_due = self.validation_due(step, last)
                checkpoint_due = last or stopping or step % config.save_every == 0
                if validation_due or checkpoint_due:
                    metrics.flush()  # so that a checkpoint holds checked steps only
                    is_best = validation_due and self.validate(step, epoch)
                    if is_best or checkpoint_due:
                        self.save(step, epoch)
                if stopping and not last:
                    stop.end(f"step {step} of {len(schedule)} is in {self.out}")
            metrics.flush()
        self.count_time()

    def gradients(self, examples: Sequence[Example], step: int, policy: str) -> Gradients:
        """Forward and backward; out of memory halves the micro-batches on every rank."""
        while True:
            micro_tokens = self.state["micro_tokens"]
            gradients, failure = None, None
            try:
                gradients = step_gradients(
                    self.model, self.lora, examples, step, micro_tokens, policy, self.world
                )
            except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
                if not is_out_of_memory(error):
                    raise
                failure = first_line(error)
                if self.model.is_sharded:
                    raise ValueError(
                        f"step {step}: out of memory ({failure}); under --shard no process can try "
                        "again alone: --resume with more of them, or begin anew (another --out) "
                        "with a lower --micro-tokens"
                    ) from None
            if not self.world.any_rank(failure is not None):
                return gradients
            longest = max(examples, key=lambda example: len(example.ids))
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
                f"continuing with {self.state['micro_tokens']}"
            )
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()

    def plan_memory(self) -> MemoryPlan:
        """The recomputation policy, and the peak of memory it is predicted to have."""
        lengths = [len(example.ids) for example in self.examples]
        all_tokens, longest = sum(lengths), max(lengths)
        all_response = all_tokens - sum(example.n_prompt for example in self.examples)
        tokens = min(max(self.state["micro_tokens"], longest), all_tokens)
        return choose_policy(
            self.config.recompute,
            self.config.memory_gb,
            self.model.config,
            self.lora.config,
            self.model.device,
            tokens=tokens,
            longest=longest,
            response=round(tokens * all_response / all_tokens),
            dtype=self.model.dtype,
            held=held_memory(self.model.device) + self.model.weights.gather_bytes,
        )

    # ---- validation and checkpoints

    def validation_due(self, step: int, last: bool) -> bool:
        """Whether this step is followed by a validation; the last one is."""
        if self.validator is None:
            return False
        return last or step % self.validator.config.val_every == 0

    def validate(self, step: int, epoch: int) -> bool:
        """Measure the adapter, record it; whether it is the best so far. Rank 0's values count."""
        names = self.validator.names
        values = torch.zeros(len(names), dtype=torch.float64)
        # every rank helps to gather sharded weights
        if self.world.is_rank0 or self.model.is_sharded:
            measured = torch.tensor(self.validator(self.lora), dtype=torch.float64)
            if self.world.is_rank0:
                values += measured
        self.world.barrier()  # rank 0 may take long
        values = self.world.all_reduce_sum_(values).tolist()
        measures = dict(zip(names, values, strict=True))
        if self.world.is_rank0:
            line = {"step": step, "epoch": epoch, **measures}
            checkpoint.record_validation(self.out, line)
        text = ", ".join(f"{name} {value:.4f}" for name, value in measures.items())
        print(f"\nstep {step}: {text}")
        metric, best = self.validator.config.best, self.state["best"]
        if metric == "last" or measures[metric] >= best.get("value", math.inf):
            return False
        self.state["best"] = {"metric": metric, "value": measures[metric], "step": step}
        return True

    def save(self, step: int, epoch: int) -> None:
        """Rank 0 writes a checkpoint; all wait for it."""
        if self.world.is_rank0:
            self.count_time()
            state = {**self.state, "epoch": epoch, "seed": self.config.seed}
            state |= {"spent": self.spent, "since_step": self.spent_since_step}
            checkpoint.save_checkpoint(
                self.out,
                self.lora,
                self.optimizer,
                self.base,
                state,
                keep=self.config.keep,
                best_step=self.state["best"].get("step", 0),
                chat=self.chat,
            )
        self.world.barrier()

    def _restore_state(self) -> None:
        """The state of the last checkpoint, or that of a new run."""
        self.state = {"micro_tokens": self.config.micro_tokens, "best": {}} | self.state
        self.spent = dict(self.state.get("spent", checkpoint.NOTHING_SPENT))
        self.spent_since_step = self.state.get("since_step", 0)
        if self.optimizer.step and "spent" not in self.state:  # of an older version
            self.spent_since_step = self.optimizer.step

    # ---- account of time and work

    def count_work(self, examples: Sequence[Example]) -> int:
        """Add a step's operations and tokens to what was spent; returns the tokens."""
        lengths = [len(example.ids) for example in examples]
        self.spent["operations"] += step_operations(self.model.config, lengths)
        self.spent["tokens"] += sum(lengths)
        return sum(lengths)

    def count_time(self) -> None:
        """Add the time since the last call to what was spent."""
        now = time.perf_counter()
        self.spent["seconds"] += now - self.counted_until
        self.counted_until = now
        self.spent["peak_bytes"] = max(self.spent["peak_bytes"], peak_memory(self.model.device))

    # ---- the end of a run

    def finish(self) -> dict[str, Any]:
        """Publish the last or the best adapter; returns the summary (rank 0)."""
        best_step = self.state["best"].get("step", self.optimizer.step)
        best = checkpoint.checkpoint_dir(self.out, best_step)
        if best_step != self.optimizer.step:
            checkpoint.load_adapter(best, self.lora)
        parameters = self.lora.views(self.lora.params)
        if not any(view.any() for name, view in parameters.items() if "lora_B" in name):
            raise ValueError(f"{self.out}: B is zero everywhere at the end: nothing was learned")
        if not self.world.is_rank0:
            return {}
        checkpoint.publish(self.out, best)
        if self.chat is not None:
            self.chat.write(self.out)
        return self._summary()

    def _summary(self) -> dict[str, Any]:
        lines = read_jsonl(self.out / "metrics.jsonl", checkpoint.METRICS)
        losses = [line["loss"] for line in lines]
        tenth = max(1, len(lines) // 10)
        spent, seconds = self.spent, self.spent["seconds"]
        adapted = sum(".lora_A." in name for name in self.lora.slots)
        on_gpu = self.model.device.type == "cuda"
        return {
            "examples": len(self.examples),
            "steps": len(lines),
            "tokens": sum(line["tokens"] for line in lines),
            "response_tokens": sum(line["response_tokens"] for line in lines),
            "first_loss": sum(losses[:tenth]) / tenth,
            "last_loss": sum(losses[-tenth:]) / tenth,
            "best": self.state["best"],
            "tokens_s": spent["tokens"] / seconds if seconds else 0.0,
            "seconds": seconds,
            "operations_s": spent["operations"] / seconds if seconds else 0.0,
            "since_step": self.spent_since_step,  # speeds are those of the steps after this one
            "peak_bytes": spent["peak_bytes"],
            "processes": self.world.size,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "parameters": self.lora.params.numel(),
            "linears": f"{adapted}/{7 * self.model.config.num_layers}",
            "ops": self.model.ops.name,
        }

    def load_finished(self, meta: dict[str, Any]) -> None:
        """Put the adapter of a finished run into `self.lora`, once its hash is checked."""
        steps, best = meta["summary"].get("steps"), meta["summary"].get("best")
        best_step = best.get("step", steps) if isinstance(best, dict) else None
        if type(steps) is not int or type(best_step) is not int:
            raise ValueError(f"{self.out / 'meta.json'}: summary is not what was written")
        saved = checkpoint.checkpoint_dir(self.out, best_step)
        if self.world.is_rank0:
            checkpoint.check_published(self.out, meta.get("published"), saved)
        self.world.barrier()
        if best_step == steps and saved.exists() and self.lora.params.dtype == torch.float64:
            checkpoint.load_checkpoint(saved, self.lora, self.optimizer)  # not rounded to fp32
        else:
            checkpoint.load_adapter(self.out, self.lora)
