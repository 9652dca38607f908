"""The training loop: LoRA on packed rows, every gradient written down (model/llama.py)

    for each optimizer step                      batch_rows examples in a seeded order
        step_gradients, step_update              engine/step.py
        metrics, validation, checkpoint          engine/{metrics,validate,checkpoint}.py

A step depends on (seed, step) alone, so a resumed run is the undisturbed run, bit for bit. With
several processes (engine/distributed.py) each does its share of every step and all hold the same
adapter; rank 0 writes.
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

from engine import checkpoint
from engine.data import (
    MAX_LENGTH,
    TARGETS,
    Example,
    Rows,
    check_examples,
    encode,
    fingerprint,
    is_distilled,
    load_distilled,
    show,
    template_takes,
)
from engine.distributed import World
from engine.limits import MOST, check_numbers
from engine.locking import lock_directory
from engine.log import environment, read_jsonl, write_json
from engine.memory import Plan, choose_policy
from engine.metrics import Metrics, summary_text
from engine.optim import SCHEDULES, Optimizer, highest_rate, learning_rate
from engine.process import (
    TRAIN_LESS,
    first_line,
    held_memory,
    is_out_of_memory,
    memory_for,
    peak_memory,
)
from engine.records import DataFile
from engine.score import nll
from engine.session import DataConfig, Session
from engine.step import (
    ALONE,
    Gradients,
    step_gradients,
    step_operations,
    step_update,
)
from engine.stopping import Stopping
from engine.validate import ValidateConfig, Validator
from kernels.philox import mix
from model.llama import POLICIES, Llama
from model.lora import Lora, LoraConfig
from model.trained_chat import TrainedChat, common_system


@dataclass(frozen=True)
class TrainConfig:
    """How an adapter is trained. Defaults are the paper's where it has one."""

    lr: float = 1e-4  # peak learning rate
    epochs: int = 2  # passes over the examples
    max_steps: int = 0  # optimizer steps instead of epochs; 0: by epochs
    batch_rows: int = 8  # examples per optimizer step
    micro_tokens: int = 1024  # tokens per forward and backward: memory and speed, not the result
    schedule: str = "cosine"  # cosine | linear | constant, behind the warm-up
    warmup: float = 0.0  # share of the steps with rising rate
    weight_decay: float = 0.0  # decoupled
    clip: float = 1.0  # largest gradient norm; 0 does not clip
    seed: int = 0  # of the adapter's start, the order of the rows and dropout
    recompute: str = "auto"  # none | selective | full: what the backward computes again; auto: plan
    memory_gb: float = 0.0  # that --recompute auto plans for; 0: what is held, and what is free
    save_every: int = 50  # optimizer steps between checkpoints
    keep: int = 2  # checkpoints kept, beside the best

    def steps(self, count: int) -> int:
        """Optimizer steps of a run over `count` examples."""
        return self.max_steps or self.epochs * -(-count // self.batch_rows)

    def highest_rate(self, count: int) -> float:
        """The highest rate that a run over `count` examples comes to, as far as the warm-up lets
        it; ValueError where that is 0."""
        return highest_rate(self.schedule, self.steps(count), self.lr, self.warmup)

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
        if self.max_steps < 0 or self.memory_gb < 0:
            raise ValueError(
                f"max_steps {self.max_steps}, memory_gb {self.memory_gb}: 0 or more is wanted"
            )
        if self.recompute not in ("auto", *POLICIES):
            raise ValueError(f"recompute {self.recompute!r}: one of auto, {', '.join(POLICIES)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r}: one of {', '.join(SCHEDULES)}")
        check_numbers(self, lr=(0, 100), epochs=(1, 10**5), max_steps=(0, 10**7))


@dataclass(frozen=True)
class EncodeConfig:
    """What of a row is trained on."""

    target: str = "target"  # target | response | reference: which answer of distilled data
    mix: float = 0.0  # share of the kept rewrites whose reference is trained on instead
    max_length: int = MAX_LENGTH  # tokens of prompt and answer
    truncate: bool = False  # cut the end of longer answers (counted) instead of stopping
    cut_in_proportion: bool = False  # cut prompt and answer alike, as --paper-exact (counted)

    def check(self) -> None:
        """ValueError for what cannot be trained on."""
        if self.target not in TARGETS:
            raise ValueError(f"target {self.target!r}: one of {', '.join(TARGETS)} is wanted")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix {self.mix}: a share from 0 to 1 is wanted")
        check_numbers(self, max_length=(1, MOST))


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


def train_job(
    session: Session,
    data: DataConfig,
    encoding: EncodeConfig,
    config: TrainConfig,
    lora_config: LoraConfig,
    validating: ValidateConfig,
    out: Path | None,
    *,
    show_rows: int | None = None,
    resume: bool = False,
) -> dict[str, Any] | None:
    """Encode a file of rows or of distilled data and train on it, or print encoded rows."""
    for settings in (data, encoding, config, lora_config, validating):
        settings.check()
    if show_rows is not None and show_rows < 1:
        raise ValueError(f"--show {show_rows}: at least 1 row is wanted")
    rows = rows_to_train_on(session, data)
    examples, counts = encode(
        rows,
        session.chat,
        target=encoding.target,
        max_length=min(encoding.max_length, session.model.config.max_position),
        model_limit=session.model.config.max_position,
        truncate=encoding.truncate,
        drop_long=data.drop_long,
        in_proportion=encoding.cut_in_proportion,
        skip_refused=data.skip_bad,
        mix=encoding.mix,
        seed=config.seed,
    )
    print(", ".join(f"{name} {value}" for name, value in dataclasses.asdict(counts).items()))
    if show_rows is not None:
        losses = [
            nll(session.model, e.ids[: e.n_prompt], e.ids[e.n_prompt :]).tolist()
            for e in examples[:show_rows]
        ]
        print(show(examples, session.chat.tokenizer, show_rows, losses))
        return None
    check_examples(examples)
    config.highest_rate(len(examples))
    validator = None
    if validating.val_every:
        validator = Validator(validating, session.model, session.chat, data)
    _, summary = train(
        session.model,
        examples,
        lora_config,
        config,
        out,
        base=session.config.model,
        model_hash=session.fingerprint,
        resume=resume,
        validator=validator,
        world=session.world,
        note={"validate": dataclasses.asdict(validating)} if validator else None,
        date=session.settings.get("date"),
        chat=TrainedChat.of(session.chat, common_system([row.messages for row in rows])),
    )
    if session.world.first:
        print(summary_text(summary, out))
    return summary


def rows_to_train_on(session: Session, data: DataConfig) -> Rows:
    """The file's rows, or its lines where it is distilled data; opened once."""
    with DataFile(data.data) as file:
        if not is_distilled(file):
            return data.load(check=template_takes(session.chat), opened=file)
        rows = load_distilled(file, data.limit)
    given = {"--columns": data.columns, "--system": data.system}
    unused = ", ".join(flag for flag, value in given.items() if value)
    without = f"; {unused} do not change distilled data" if unused else ""
    print(f"data: {len(rows)} distilled turns from {data.data}{without}")
    return rows


@memory_for("training", TRAIN_LESS)
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
    validator: Validator | None = None,
    world: World = ALONE,
    note: dict[str, Any] | None = None,
    date: str | None = None,
    chat: TrainedChat | None = None,
) -> tuple[Lora, dict[str, Any]]:
    """Train an adapter into the run directory `out`; returns it and the summary.

    `chat` goes with the adapter, for those who use it (chat.json).
    With resume a finished run is loaded, a killed one goes on from its last checkpoint, in any
    number of processes. A step that is not finite or a loss that explodes stops with ValueError;
    the checkpoints stay. Ctrl-C or SIGTERM writes a checkpoint behind the step in flight and raises
    `Stopped`. Holds the lock of `out`. `date` is the one that prompts tell, if they tell any.
    """
    config.check()
    check_examples(examples)
    if (highest := config.highest_rate(len(examples))) < config.lr:
        print(
            f"WARNING: the warm-up (--warmup {config.warmup:g}) takes the whole run: the rate ends "
            f"at {highest:.2g} and never reaches {config.lr:g}"
        )
    lora_config = dataclasses.replace(lora_config, seed=config.seed)
    lora = Lora.init(model, **dataclasses.asdict(lora_config))
    keys = {"save_every", "keep", "memory_gb"}  # may change: the result does not depend on them
    settings = {
        "train": {k: v for k, v in dataclasses.asdict(config).items() if k not in keys},
        "lora": dataclasses.asdict(lora_config),
        "model": model_hash,
        "data": fingerprint(examples),
        "dtype": str(model.dtype),
        **(note or {}),
    }
    optimizer = Optimizer.fresh(lora, config.weight_decay)
    run = Run(model, lora, optimizer, examples, config, out, base, validator, world, chat)
    with lock_directory(out):
        if world.first:
            meta = checkpoint.open_run(out, settings, resume, date)
        world.barrier()
        if not world.first:
            meta = checkpoint.open_run(out, settings, True, date)
        saved = checkpoint.checkpoints(out)
        if meta["finished"]:
            run.load_finished(meta)
            return lora, meta["summary"]
        if saved:
            run.state = checkpoint.load_checkpoint(saved[-1], lora, optimizer)
        lines = checkpoint.restore_metrics(out, saved[-1] if saved else None) if world.first else []
        with Stopping("the step in flight is finished and a checkpoint written") as stop:
            try:
                with world.together():
                    run.loop(lines, stop)
            except ValueError as error:
                saved = checkpoint.checkpoints(out)
                good = f"the last good state is {saved[-1]}" if saved else None
                raise ValueError(f"{error}. {good or 'no checkpoint was written yet'}") from None
            summary = run.finish()
            if world.first:
                record = meta | {"finished": True, "summary": summary}
                record |= {"published": checkpoint.published(out), "environment": environment()}
                write_json(out / "meta.json", record)
            stop.kept = f"the adapter in {out} is finished"
            stopping = world.any(stop.asked)
        if stopping:
            stop.end(stop.kept)
    return lora, summary


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
    # of the whole run, as far as it is in checkpoints: seconds, tokens, operations (engine/step.py
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
            held=held_memory(self.model.device) + getattr(self.model.weights, "gathered", 0),
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
                if self.model.sharded:
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
        if self.world.first or self.model.sharded:  # all are needed to gather sharded weights
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
