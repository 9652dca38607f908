"""Training an adapter: LoRA on packed rows, every gradient written down (model/llama.py)

    train_job    the job of scripts/train.py: rows -> examples -> train, or print encoded examples
    train        a run directory from beginning to end; the loop itself is `Run.loop` (loop.py)

A step depends on (seed, step) alone, so on a CPU a resumed run is the undisturbed run, bit for bit.
With several processes (engine/runtime/distributed.py) each does its share of every step and all
hold the same adapter; rank 0 writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.config import DataConfig
from engine.data.encode import Example, check_examples, fingerprint
from engine.data.show import show
from engine.measure.likelihood import nll
from engine.runtime import published_adapter
from engine.runtime.distributed import World
from engine.runtime.files import write_json
from engine.runtime.locking import lock_directory
from engine.runtime.process_memory import TRAIN_LESS, memory_for
from engine.runtime.run_record import environment
from engine.runtime.short_memory import tried_twice
from engine.runtime.stopping import Stopping
from engine.session import Session
from engine.train import checkpoint
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.examples import encode_examples, rows_to_train_on
from engine.train.loop import Run
from engine.train.memory_plan import Job, automatic_micro_tokens
from engine.train.metrics import summary_text
from engine.train.optim import Optimizer
from engine.train.step import SINGLE_PROCESS
from engine.train.validate import ValidateConfig, Validator
from model.layout import parameter_count
from model.llama import Llama
from model.lora import Lora, LoraConfig
from model.trained_chat import TrainedChat, common_system

# settings that may change when a run is resumed: the result does not depend on them
FREE_TO_CHANGE = ("save_every", "keep", "memory_gb")


@dataclass(frozen=True)
class TrainJobConfig:
    """All settings of `train_job`."""

    data: DataConfig
    encode: EncodeConfig
    train: TrainConfig
    lora: LoraConfig
    validate: ValidateConfig

    def check(self) -> None:
        """ValueError for settings that cannot run."""
        for settings in (self.data, self.encode, self.train, self.lora, self.validate):
            settings.check()


@dataclass(frozen=True)
class FrozenModel:
    """The model that an adapter is trained over, and what a run records of it."""

    model: Llama
    directory: str  # as the adapter's config names it
    fingerprint: str  # hash of the model's files; a run is resumed on the same model only
    date: str | None = None  # the one that prompts tell, None where they tell none
    world: World = SINGLE_PROCESS  # the processes of the job

    @classmethod
    def of(cls, session: Session) -> FrozenModel:
        """The model of a session."""
        return cls(
            session.model,
            session.config.model,
            session.fingerprint,
            session.settings.get("date"),
            session.world,
        )


# ---- the job of scripts/train.py


def train_job(
    session: Session,
    config: TrainJobConfig,
    out: Path | None,
    *,
    show_rows: int | None = None,
    resume: bool = False,
) -> dict[str, Any] | None:
    """Train on a file of rows or of distilled data into `out`; returns the summary.

    With `show_rows` that many encoded examples are printed instead; nothing is trained, and the
    result is None.
    """
    config.check()
    if show_rows is not None and show_rows < 1:
        raise ValueError(f"--show {show_rows}: expected at least 1 row")
    rows = rows_to_train_on(session, config.data)
    examples = encode_examples(
        rows,
        session,
        config.data,
        config.encode,
        seed=config.train.seed,
        skip_refused=config.data.skip_bad,
    )
    if show_rows is not None:
        print_examples(session, examples[:show_rows])
        return None
    config.train.highest_rate(len(examples))  # ValueError before the validator's work
    validator = None
    if config.validate.val_every:
        validator = Validator(config.validate, config.data, session)
    system = common_system([row.messages for row in rows])
    _, summary = train(
        FrozenModel.of(session),
        examples,
        config.lora,
        config.train,
        out,
        chat=TrainedChat.of(session.chat, system),
        validator=validator,
        resume=resume,
    )
    if session.world.is_rank0:
        print(summary_text(summary, out))
    return summary


def print_examples(session: Session, examples: Sequence[Example]) -> None:
    """Print every token of the examples, those with loss with their nats under the seed."""
    losses = []
    for example in examples:
        prompt = example.ids[: example.n_prompt]
        answer = example.ids[example.n_prompt :]
        losses.append(nll(session.model, prompt, answer).tolist())
    print(show(examples, session.chat.tokenizer, len(examples), losses))


# ---- a run directory from beginning to end


@memory_for("training", TRAIN_LESS)
def train(
    frozen: FrozenModel,
    examples: Sequence[Example],
    lora_config: LoraConfig,
    config: TrainConfig,
    out: Path,
    *,
    chat: TrainedChat | None = None,
    validator: Validator | None = None,
    resume: bool = False,
) -> tuple[Lora, dict[str, Any]]:
    """Train an adapter into the run directory `out`; returns it and the summary.

    chat       how the prompts were made, written beside the adapter (chat.json)
    validator  measures the adapter between steps (validate.py)
    resume     load a finished run; continue a killed one from its last checkpoint, in any number
               of processes

    ValueError for a step that is not finite or a loss that explodes; the checkpoints stay. Ctrl-C
    or SIGTERM finishes the running step, writes a checkpoint and raises `Stopped`. Holds the lock
    of `out`.
    """
    config.check()
    check_examples(examples)
    _warn_of_long_warmup(config, len(examples))
    model = frozen.model
    world = frozen.world
    lora_config = dataclasses.replace(lora_config, seed=config.seed)
    config = with_micro_tokens(config, frozen, examples, lora_config, out)
    lora, optimizer = tried_twice(
        "a fresh adapter", model.device, _fresh, model, lora_config, config
    )
    run = Run(
        model=model,
        lora=lora,
        optimizer=optimizer,
        examples=examples,
        config=config,
        out=out,
        base=frozen.directory,
        validator=validator,
        world=world,
        chat=chat,
    )
    settings = run_settings(frozen, examples, lora_config, config, validator)
    with lock_directory(out):
        meta = _open_run(out, settings, resume, frozen.date, world)
        if meta["finished"]:
            run.load_finished(meta)
            return lora, meta["summary"]
        metrics_so_far = _restore(run)
        with Stopping("the running step is finished and a checkpoint written") as stop:
            _do_steps(run, metrics_so_far, stop)
            summary = run.finish()
            if world.is_rank0:
                _write_finished(out, meta, summary)
            stop.kept = f"the adapter in {out} is finished"
            is_stopping = world.any_rank(stop.asked)
        if is_stopping:
            stop.end(stop.kept)
    return lora, summary


def _fresh(model: Llama, lora_config: LoraConfig, config: TrainConfig) -> tuple[Lora, Optimizer]:
    """A new adapter and its optimizer."""
    lora = Lora.init(lora_config, model.config, model.device, model.dtype)
    return lora, Optimizer.fresh(lora, config.weight_decay)


def _restore(run: Run) -> list[dict[str, Any]]:
    """Put the last checkpoint, if there is one, into the run; returns its metrics (rank 0)."""
    saved = _last_checkpoint(run.out)
    if saved is not None:
        run.state = checkpoint.load_checkpoint(saved, run.lora, run.optimizer)
    if not run.world.is_rank0:
        return []
    return checkpoint.restore_metrics(run.out, saved)


def _do_steps(run: Run, metrics_so_far: list[dict[str, Any]], stop: Stopping) -> None:
    """Do the steps that are left; a ValueError is raised again with the last good checkpoint."""
    try:
        with run.world.report_lost_rank():
            run.loop(metrics_so_far, stop)
    except ValueError as error:
        saved = _last_checkpoint(run.out)
        kept = "no checkpoint was written yet"
        if saved is not None:
            kept = f"the last good state is {saved}"
        raise ValueError(f"{error}. {kept}") from None


def with_micro_tokens(
    config: TrainConfig,
    frozen: FrozenModel,
    examples: Sequence[Example],
    lora_config: LoraConfig,
    out: Path | None = None,
) -> TrainConfig:
    """These settings with automatic micro-batches (0) resolved, which is printed.

    A run directory `out` that exists keeps the size in its meta.json, on whatever device: sums
    depend on it in their last bits. Several processes take the smallest that one of them would.
    """
    if config.micro_tokens:
        return config
    model = frozen.model
    world = frozen.world
    job = Job(
        model=model.config,
        lora=lora_config,
        dtype=model.dtype,
        longest=max(len(example.ids) for example in examples),
        batch_rows=config.batch_rows,
        recompute=config.recompute,
    )
    held = parameter_count(model.config) * model.dtype.itemsize  # bytes
    if model.is_sharded:
        held = held // world.size + model.weights.gather_bytes
    chosen, why = automatic_micro_tokens(job, model.device, config.memory_gb, held)
    chosen = -world.max_over_ranks(-chosen)
    begun = checkpoint.micro_tokens_of(out) if out is not None and world.is_rank0 else 0
    begun = world.max_over_ranks(begun)
    if begun and begun != chosen:
        why = f"as {out} was begun; {chosen} would be automatic here"
    tokens = begun or chosen
    print(f"micro-batches of up to {tokens} tokens ({why})")
    return dataclasses.replace(config, micro_tokens=tokens)


def run_settings(
    frozen: FrozenModel,
    examples: Sequence[Example],
    lora_config: LoraConfig,
    config: TrainConfig,
    validator: Validator | None,
) -> dict[str, Any]:
    """The settings of a run in its meta.json; a run is resumed only under equal ones."""
    train_settings = dataclasses.asdict(config)
    for name in FREE_TO_CHANGE:
        del train_settings[name]
    settings = {
        "train": train_settings,
        "lora": dataclasses.asdict(lora_config),
        "model": frozen.fingerprint,
        "data": fingerprint(examples),
        "dtype": str(frozen.model.dtype),
    }
    if validator is not None:
        settings["validate"] = dataclasses.asdict(validator.config)
    return settings


def _warn_of_long_warmup(config: TrainConfig, count: int) -> None:
    """Print a warning where the learning rate never reaches its peak over `count` examples."""
    highest = config.highest_rate(count)
    if highest < config.lr:
        print(
            f"WARNING: the warm-up (--warmup {config.warmup:g}) takes the whole run: the rate ends "
            f"at {highest:.2g} and never reaches {config.lr:g}"
        )


def _open_run(
    out: Path, settings: dict[str, Any], resume: bool, date: str | None, world: World
) -> dict[str, Any]:
    """meta.json of the run: rank 0 creates or checks the directory, then the others check it."""
    if world.is_rank0:
        meta = checkpoint.open_run(out, settings, resume, date)
    world.barrier()
    if not world.is_rank0:
        meta = checkpoint.open_run(out, settings, True, date)
    return meta


def _last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint; None where there is none."""
    saved = checkpoint.checkpoints(out)
    return saved[-1] if saved else None


def _write_finished(out: Path, meta: dict[str, Any], summary: dict[str, Any]) -> None:
    """Record in meta.json that the run is finished, and the hash of its adapter."""
    record = meta | {
        "finished": True,
        "summary": summary,
        "published": published_adapter.published(out),
        "environment": environment(),
    }
    write_json(out / "meta.json", record)
