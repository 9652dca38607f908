"""The training loop: `Run.loop`, and the methods that it calls

Run.loop           for each step: train_step, then validation and a checkpoint where they are due
Run.train_step     gradients, update, metrics
Run.finish         publishes the last or the best adapter, and returns the summary
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.data.encode import Example, sizes
from engine.runtime.distributed import World
from engine.runtime.files import GrowingHash, each_of_jsonl
from engine.runtime.process_memory import held_memory, peak_memory
from engine.runtime.short_memory import attempt, tried_twice
from engine.runtime.stopping import Stopping
from engine.train import checkpoint
from engine.train.config import TrainConfig
from engine.train.early_stop import FRESH, after_validation
from engine.train.memory_plan import MemoryPlan, StepSize, choose_policy
from engine.train.metrics import Metrics
from engine.train.mfu import step_operations
from engine.train.optim import Optimizer, learning_rate
from engine.train.order import Batch, batches
from engine.train.step import Gradients, step_gradients, step_update
from engine.train.validate import Validator
from engine.train.weighted_loss import WeightedLoss
from model.llama import Llama
from model.lora import Lora
from model.tape import POLICIES
from model.trained_chat import TrainedChat


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
    weighted: WeightedLoss | None = None  # the loss; None is plain SFT
    # state.json of the last checkpoint; in a new run only `micro_tokens`, the size of micro-batches
    # that fits the memory, `halved`, every [step, size] from which on it was smaller than before,
    # and what validations decide (early_stop.FRESH)
    state: dict[str, Any] = dataclasses.field(default_factory=dict)
    # of all starts of the run, as far as checkpoints have it: seconds, tokens, operations (mfu.py)
    # of all ranks together, and the largest peak of memory
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    counted_until: float = 0.0  # time.perf_counter() up to which `spent` has the seconds
    failed_alone: bool = False  # this step ran out of memory with one row at a time
    recompute_at_least: str = POLICIES[0]  # a stronger one where memory was short
    spent_since_step: int = 0  # above 0 in a run whose first checkpoints did not have `spent`

    # ---- the steps

    def loop(self, losses_so_far: list[float], stop: Stopping) -> None:
        """Do the steps that are left; `losses_so_far` are the losses of the finished ones.

        ValueError for a step that the guards refuse (metrics.py), or that does not fit the memory.
        Raises `Stopped` after a checkpoint where `stop` was asked on any rank.
        """
        steps = self.config.steps(len(self.examples))
        self._restore_state()
        plan = self.plan_memory()
        print(plan.text())
        self.counted_until = time.perf_counter()
        metrics_file = self.out / "metrics.jsonl"
        with Metrics(metrics_file, self.out.name, losses_so_far, steps, self.world) as metrics:
            for batch in self._steps_left():
                step = self.optimizer.step + 1
                self.train_step(step, steps, batch, plan.policy, metrics)

                # validation and a checkpoint, where they are due
                is_last = step == steps
                is_stopping = self.world.any_rank(stop.asked)
                validation_due = self.validation_due(step, is_last)
                checkpoint_due = is_last or is_stopping or step % self.config.save_every == 0
                if validation_due or checkpoint_due:
                    metrics.flush()  # so that a checkpoint holds checked steps only
                if validation_due and self.validate(step, batch.epoch):
                    checkpoint_due = True  # the best adapter so far must be on disk
                if self.state["stopped"]:
                    print(f"stopped at step {step} of {steps}: {self.state['stopped']}")
                    is_last = True
                if is_last or checkpoint_due:
                    self.save(step, batch.epoch)
                if is_last:
                    break
                if is_stopping:
                    stop.end(f"step {step} of {steps} is in {self.out}")
            metrics.flush()
        self.count_time()

    def _steps_left(self) -> Iterable[Batch]:
        """The batches of the steps that are left: none where the run has stopped early."""
        if self.state["stopped"]:
            return []
        return batches(len(self.examples), self.config, done=self.optimizer.step)

    def train_step(
        self, step: int, steps: int, batch: Batch, policy: str, metrics: Metrics
    ) -> None:
        """Step `step` of `steps`: forward and backward, one AdamW, a line of metrics.

        policy: recomputation in the backward (model/tape.py).
        """
        config = self.config
        examples = [self.examples[i] for i in batch.indices]
        gradients = self.gradients(examples, step, policy)
        lr = learning_rate(config.schedule, step, steps, config.lr, config.warmup)
        result = step_update(
            self.model, self.lora, self.optimizer, gradients, lr, config.clip, self.world
        )
        record = {
            "step": step,
            "epoch": batch.epoch,
            "lr": lr,
            "tokens": self.count_work(examples),
            "response_tokens": gradients.n_response,
        }
        metrics.add(record, result, examples)

    def gradients(self, examples: Sequence[Example], step: int, policy: str) -> Gradients:
        """`step_gradients`; where any rank runs out of memory, all try again with micro-batches of
        half the size, and with one row under the next stronger policy.

        ValueError where one row at a time is too much, or under sharded weights.
        """
        while True:
            policy = max(policy, self.recompute_at_least, key=POLICIES.index)
            micro_tokens = self.state["micro_tokens"]
            gradients, failure = attempt(
                self.model.device,
                step_gradients,
                self.model,
                self.lora,
                examples,
                step,
                micro_tokens,
                policy,
                self.world,
                self.weighted,
            )
            if failure is not None and self.model.is_sharded:
                raise ValueError(
                    f"step {step}: out of memory ({failure}); under --shard no process can try "
                    "again alone: --resume with more of them, or begin anew (another --out) "
                    "with a lower --micro-tokens"
                )
            if not self.world.any_rank(failure is not None):
                self.failed_alone = False
                return gradients
            self._take_on_less(examples, step, policy, failure or "in another process")

    def _take_on_less(
        self, examples: Sequence[Example], step: int, policy: str, failure: str
    ) -> None:
        """After a step that ran out of memory: halve the micro-batches.

        Where they hold only one row already, more is computed again, as far as `--recompute auto`
        allows; then the same is tried once more, and ValueError where it fails again.
        """
        micro_tokens = self.state["micro_tokens"]
        longest = max(examples, key=lambda example: len(example.ids))
        alone = micro_tokens <= len(longest.ids)
        stronger = POLICIES[POLICIES.index(policy) + 1 :]
        if not alone:
            self._halve_micro_tokens(step)
            smaller = self.state["micro_tokens"]
            change = f"micro-batches of {micro_tokens} tokens; continuing with {smaller}"
        elif stronger and self.config.recompute == "auto":
            self.recompute_at_least = stronger[0]
            change = f"one row at a time; continuing with recompute {stronger[0]}"
        elif not self.failed_alone:
            self.failed_alone = True
            change = "one row at a time; trying again"
        else:
            recompute_more = "--recompute full, or " if stronger else ""
            raise ValueError(
                f"step {step}: out of memory with one row at a time; the longest is "
                f"{longest.id} of {len(longest.ids)} tokens: begin anew (another --out) with "
                f"{recompute_more}a lower --max-length ({failure})"
            )
        print(f"\nstep {step}: out of memory with {change} ({failure})")

    def plan_memory(self) -> MemoryPlan:
        """The recomputation policy, and the peak of memory that is predicted for it.

        Where not even the strongest policy fits what is free, the micro-batches are halved, on all
        ranks together. ValueError where one row alone does not fit.
        """
        while True:
            size = self._largest_micro_batch()
            plan = None
            try:
                plan = choose_policy(
                    self.config.recompute,
                    self.config.memory_gb,
                    self.model.config,
                    self.lora.config,
                    size,
                    self.model.device,
                    held=held_memory(self.model.device) + self.model.weights.gather_bytes,
                )
            except ValueError:
                if size.tokens == size.longest:
                    raise
            if not self.world.any_rank(plan is None):
                return plan
            before = self.state["micro_tokens"]
            self._halve_micro_tokens(self.optimizer.step + 1)
            print(
                f"micro-batches of {before} tokens do not fit the memory that is free; "
                f"taking {self.state['micro_tokens']}"
            )

    def _largest_micro_batch(self) -> StepSize:
        """The size that decides a step's peak: of the fullest micro-batch that may occur."""
        all_tokens = 0
        all_response = 0
        for size in sizes(self.examples):
            all_tokens += size.tokens
            all_response += size.tokens - size.n_prompt
        lengths = (size.tokens for size in sizes(self.examples))
        longest_of_step = heapq.nlargest(self.config.batch_rows, lengths)  # at most
        longest = longest_of_step[0]
        tokens_of_step = sum(longest_of_step)
        tokens = min(max(self.state["micro_tokens"], longest), tokens_of_step)
        return StepSize(
            tokens=tokens,
            longest=longest,
            response=round(tokens * all_response / all_tokens),
            dtype=self.model.dtype,
        )

    def _halve_micro_tokens(self, step: int) -> None:
        """Halve the micro-batches from this step on, and keep that in the state."""
        halved = max(self.state["micro_tokens"] // 2, 1)
        self.state["micro_tokens"] = halved
        self.state["halved"] = [*self.state["halved"], [step, halved]]

    # ---- validation and checkpoints

    def validation_due(self, step: int, is_last: bool) -> bool:
        """Whether this step is followed by a validation; the last one is, where there are any."""
        if self.validator is None:
            return False
        return is_last or step % self.validator.config.val_every == 0

    def validate(self, step: int, epoch: int) -> bool:
        """Measure the adapter and record the values; returns whether it is the best so far.

        Sets `stopped` of the state where the run ends here (early_stop.py).
        """
        measures = self._measure()
        if self.world.is_rank0:
            line = {"step": step, "epoch": epoch, **measures}
            checkpoint.record_validation(self.out, line)
        text = ", ".join(f"{name} {value:.4f}" for name, value in measures.items())
        print(f"\nstep {step}: {text}")
        if not has_learned(self.lora):
            return False  # it is the seed model, which is no result of the run
        verdict = after_validation(self.validator.config, self.state, measures, step)
        self.state |= verdict.state
        return verdict.is_best

    def _measure(self) -> dict[str, float]:
        """The validator's values by name: those of rank 0, which all ranks get."""
        names = self.validator.names
        values = torch.zeros(len(names), dtype=torch.float64)
        # every rank helps to gather sharded weights
        if self.world.is_rank0 or self.model.is_sharded:
            measured = torch.tensor(self.validator(self.lora), dtype=torch.float64)
            if self.world.is_rank0:
                values += measured
        self.world.barrier()  # validation may take rank 0 longer than a sum waits
        self.world.all_reduce_sum_(values)  # the other ranks add zeros
        return dict(zip(names, values.tolist(), strict=True))

    def save(self, step: int, epoch: int) -> None:
        """Rank 0 writes a checkpoint; all wait for it."""
        if self.world.is_rank0:
            self.count_time()
            state = {
                **self.state,
                "epoch": epoch,
                "seed": self.config.seed,
                "spent": self.spent,
                "since_step": self.spent_since_step,
                "metrics": self._metrics_hash.part(),
            }
            write = functools.partial(
                checkpoint.save_checkpoint,
                self.out,
                self.lora,
                self.optimizer,
                self.base,
                state,
                keep=self.config.keep,
                best_step=self.state["best"].get("step", 0),
                chat=self.chat,
            )
            tried_twice("checkpoint", self.model.device, write)
        self.world.barrier()

    @functools.cached_property
    def _metrics_hash(self) -> GrowingHash:
        """The hash of metrics.jsonl, which is read once."""
        return GrowingHash(self.out / checkpoint.METRICS_FILE)

    def _restore_state(self) -> None:
        """Begin with the state of the last checkpoint, or with that of a new run."""
        new = {"micro_tokens": self.config.micro_tokens, "halved": []} | FRESH
        self.state = new | self.state
        self.spent = dict(self.state.get("spent", checkpoint.NOTHING_SPENT))
        self.spent_since_step = self.state.get("since_step", 0)
        is_resumed = self.optimizer.step > 0
        if is_resumed and "spent" not in self.state:  # the checkpoint is of an older version
            self.spent_since_step = self.optimizer.step

    # ---- account of time and work

    def count_work(self, examples: Sequence[Example]) -> int:
        """Add a step's operations and tokens to what was spent; returns the tokens."""
        lengths = [len(example.ids) for example in examples]
        tokens = sum(lengths)
        self.spent["operations"] += step_operations(self.model.config, lengths)
        self.spent["tokens"] += tokens
        return tokens

    def count_time(self) -> None:
        """Add the time since the last call to what was spent."""
        now = time.perf_counter()
        self.spent["seconds"] += now - self.counted_until
        self.counted_until = now
        self.spent["peak_bytes"] = max(self.spent["peak_bytes"], peak_memory(self.model.device))

    # ---- the end of a run

    def finish(self) -> dict[str, Any]:
        """Publish the last or the best adapter; returns the summary, {} on the ranks after 0.

        ValueError where every B is zero, so that the adapter changes nothing.
        """
        best_step = self.state["best"].get("step", self.optimizer.step)
        best = checkpoint.checkpoint_dir(self.out, best_step)
        if best_step != self.optimizer.step:
            checkpoint.load_adapter(best, self.lora)
        if not has_learned(self.lora):
            raise ValueError(f"{self.out}: B is zero everywhere at the end: nothing was learned")
        if not self.world.is_rank0:
            return {}
        checkpoint.publish(self.out, best)
        if self.chat is not None:
            self.chat.write(self.out)
        return self._summary()

    def _summary(self) -> dict[str, Any]:
        """Losses, speed, memory and sizes of the whole run, as meta.json keeps them."""
        losses: list[float] = []
        tokens = 0
        response_tokens = 0
        for line in each_of_jsonl(self.out / "metrics.jsonl", checkpoint.METRICS):
            losses.append(line["loss"])
            tokens += line["tokens"]
            response_tokens += line["response_tokens"]
        tenth = max(1, len(losses) // 10)  # steps whose mean is the first and the last loss
        spent = self.spent
        seconds = spent["seconds"]
        adapted = sum(".lora_A." in name for name in self.lora.slots)
        all_linears = 7 * self.model.config.num_layers
        on_gpu = self.model.device.type == "cuda"
        return {
            "examples": len(self.examples),
            "steps": len(losses),
            "tokens": tokens,
            "response_tokens": response_tokens,
            "first_loss": sum(losses[:tenth]) / tenth,
            "last_loss": sum(losses[-tenth:]) / tenth,
            "best": self.state["best"],
            "planned_steps": self.config.steps(len(self.examples)),
            "stopped": self.state["stopped"],  # why it ended before the planned steps, or ""
            "halved": self.state["halved"],  # micro-batches, where memory was short
            "tokens_s": spent["tokens"] / seconds if seconds else 0.0,
            "seconds": seconds,
            "operations_s": spent["operations"] / seconds if seconds else 0.0,
            "since_step": self.spent_since_step,  # speeds are those of the steps after this one
            "peak_bytes": spent["peak_bytes"],
            "processes": self.world.size,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "parameters": self.lora.params.numel(),
            "linears": f"{adapted}/{all_linears}",
            "ops": self.model.ops.name,
        }

    def load_finished(self, meta: dict[str, Any]) -> None:
        """Put the adapter of a finished run into `self.lora`, once its hash is checked.

        ValueError where meta.json or the adapter is not what the run wrote.
        """
        steps = meta["summary"].get("steps")
        best = meta["summary"].get("best")
        best_step = best.get("step", steps) if isinstance(best, dict) else None
        if type(steps) is not int or type(best_step) is not int:
            raise ValueError(f"{self.out / 'meta.json'}: summary is not what was written")
        saved = checkpoint.checkpoint_dir(self.out, best_step)
        if self.world.is_rank0:
            checkpoint.check_published(self.out, meta.get("published"), saved)
        self.world.barrier()
        # adapter files are fp32; the masters of an fp64 run are in the last checkpoint alone
        in_last_checkpoint = best_step == steps and saved.exists()
        if in_last_checkpoint and self.lora.params.dtype == torch.float64:
            checkpoint.load_checkpoint(saved, self.lora, self.optimizer)
        else:
            checkpoint.load_adapter(self.out, self.lora)


def has_learned(lora: Lora) -> bool:
    """Whether any B is not zero; else the adapter is the seed model (as after a step at rate 0)."""
    parameters = lora.views(lora.params)
    return any(bool(view.any()) for name, view in parameters.items() if "lora_B" in name)
