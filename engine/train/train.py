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

import torch

from engine.data.config import DataConfig
from engine.data.encode import (
    Example,
    check_examples,
    fingerprint,
    names,
    sizes,
)
from engine.data.example_store import ExampleStore, JoinedExamples
from engine.measure.seed_nll import nll_under_seed
from engine.runtime import published_adapter
from engine.runtime.distributed import World
from engine.runtime.files import write_json
from engine.runtime.locking import lock_directory
from engine.runtime.process_memory import TRAIN_LESS, memory_for
from engine.runtime.run_record import environment
from engine.runtime.short_memory import tried_twice
from engine.runtime.stopping import Stopping
from engine.sampling.requests import SamplerConfig
from engine.session import Session
from engine.train import checkpoint
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.examples import encode_rules
from engine.train.file_examples import stored_examples
from engine.train.loop import Run
from engine.train.losses import Loss, Tokens
from engine.train.memory_plan import Job, automatic_micro_tokens
from engine.train.metrics import summary_text
from engine.train.optim import Optimizer
from engine.train.replay import (
    DECODING,
    ReplayConfig,
    is_replay,
    replay_examples,
    replay_pool,
    replayed_prompts,
)
from engine.train.show_examples import show_examples
from engine.train.step import SINGLE_PROCESS
from engine.train.validate import ValidateConfig, Validator
from engine.train.weighted_loss import WeightedLoss
from model.layout import parameter_count
from model.llama import Llama
from model.lora import Lora, LoraConfig
from model.trained_chat import TrainedChat

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
    replay: ReplayConfig = ReplayConfig()

    def check(self) -> None:
        """ValueError for settings that cannot run."""
        parts = (self.data, self.encode, self.train, self.lora, self.validate, self.replay)
        for settings in parts:
            settings.check()


@dataclass(frozen=True)
class FrozenModel:
    """The model that an adapter is trained over, and what a run records of it."""

    model: Llama
    directory: str  # as the adapter's config names it
    fingerprint: str  # hash of the model's files; a run is resumed on the same model only
    date: str | None = None  # the one that prompts tell, None where they tell none
    world: World = SINGLE_PROCESS  # the processes of the job
    # directory of the likelihoods under this model that some losses need (measure/seed_nll.py),
    # which runs over the same examples share; None: the run directory
    seed_nll_dir: Path | None = None

    @classmethod
    def of(cls, session: Session, seed_nll_dir: Path | None = None) -> FrozenModel:
        """The model of a session."""
        return cls(
            session.model,
            session.config.model,
            session.fingerprint,
            session.settings.get("date"),
            session.world,
            seed_nll_dir,
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
    rules = encode_rules(
        session,
        config.data,
        config.encode,
        seed=config.train.seed,
        skip_refused=config.data.skip_bad,
    )
    if show_rows is not None:
        show_examples(session, config.data, rules, show_rows)
        return None
    with lock_directory(out):
        if session.world.is_rank0:
            checkpoint.is_new_run(out, resume)  # ValueError before hours of encoding
        with stored_examples(session, config.data, rules, out) as stored:
            summary = _train_on(session, config, out, stored, resume)
    if session.world.is_rank0:
        print(summary_text(summary, out))
    return summary


def _train_on(
    session: Session, config: TrainJobConfig, out: Path, stored: ExampleStore, resume: bool
) -> dict[str, Any]:
    """Train on the examples of the file, and on replay where that is asked for."""
    examples: Sequence[Example] = stored
    if config.replay.replay is not None:
        examples = JoinedExamples(stored, _replay(session, config, out, len(stored)))
    config.train.highest_rate(len(examples))  # ValueError before the validator's work
    validator = None
    if config.validate.val_every:
        validator = Validator(config.validate, config.data, session)
    _, summary = train(
        FrozenModel.of(session),
        examples,
        config.lora,
        config.train,
        out,
        chat=TrainedChat.of(session.chat, stored.account.system),
        validator=validator,
        resume=resume,
    )
    return summary


def _replay(session: Session, config: TrainJobConfig, out: Path, rows: int) -> list[Example]:
    """The replay rows beside `rows` others; their answers are kept in OUT.replay.jsonl."""
    pool = replay_pool(session, config.replay, skip_bad=config.data.skip_bad)
    return replay_examples(
        session,
        config.replay,
        out.with_name(out.name + ".replay.jsonl"),
        pool,
        task_rows=rows,
        max_length=config.encode.max_length,
        seed=config.train.seed,
        sampling=SamplerConfig(seed=config.train.seed, **DECODING),
    )


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
        losses_so_far = _restore(run)
        run.weighted = weighted_loss(frozen, examples, config, out)
        with Stopping("the running step is finished and a checkpoint written") as stop:
            _do_steps(run, losses_so_far, stop)
            summary = run.finish()
            if world.is_rank0:
                _write_finished(out, meta, summary)
            stop.kept = f"the adapter in {out} is finished"
            is_stopping = world.any_rank(stop.asked)
        if is_stopping:
            stop.end(stop.kept)
    return lora, summary


def finished_summary(
    frozen: FrozenModel,
    examples: Sequence[Example],
    lora_config: LoraConfig,
    config: TrainConfig,
    out: Path,
) -> dict[str, Any]:
    """The summary of a finished run in `out`, whose weights are not read and may be gone.

    ValueError where the run is not finished, or was made under other settings or on other examples.
    """
    lora_config = dataclasses.replace(lora_config, seed=config.seed)
    config = with_micro_tokens(config, frozen, examples, lora_config, out)
    settings = run_settings(frozen, examples, lora_config, config, None)
    with lock_directory(out):
        meta = _open_run(out, settings, True, frozen.date, frozen.world)
    if not meta["finished"]:
        raise ValueError(f"{out} is not finished; expected a run that wrote its adapter")
    return meta["summary"]


def weighted_loss(
    frozen: FrozenModel, examples: Sequence[Example], config: TrainConfig, out: Path
) -> WeightedLoss | None:
    """The loss of a run, with the likelihoods under the seed where it needs them; None for plain
    SFT.

    The likelihoods are read from `frozen.seed_nll_dir` (None: from `out`), those that are missing
    computed and kept there. ValueError where stm leaves out every token of the examples.
    """
    loss = Loss.parse(config.loss)
    if loss.is_plain:
        return None
    if not loss.needs_seed:
        return WeightedLoss(loss)
    directory = out if frozen.seed_nll_dir is None else frozen.seed_nll_dir
    seed_nll = nll_under_seed(frozen.model, examples, directory, frozen.fingerprint, frozen.world)
    nats = torch.cat(list(seed_nll.values()))  # (response tokens of all examples,)
    before_the_first_step = loss.weigh(Tokens(nats, nats))
    kept = (before_the_first_step.weights != 0).double().mean().item()
    if not kept:
        raise ValueError(
            f"loss {loss} leaves out all {len(nats)} response tokens, expected some that it keeps: "
            f"the likeliest one has perplexity {nats.min().exp():.4g} under the seed; raise TAU"
        )
    print(
        f"loss {loss}: {len(nats)} response tokens, {nats.mean():.3f} nats each under the seed; "
        f"{kept:.1%} of them are kept"
    )
    return WeightedLoss(loss, seed_nll)


def _fresh(model: Llama, lora_config: LoraConfig, config: TrainConfig) -> tuple[Lora, Optimizer]:
    """A new adapter and its optimizer."""
    lora = Lora.init(lora_config, model.config, model.device, model.dtype)
    return lora, Optimizer.fresh(lora, config.weight_decay)


def _restore(run: Run) -> list[float]:
    """Put the last checkpoint, if there is one, into the run; returns its losses (rank 0)."""
    saved = _last_checkpoint(run.out)
    if saved is not None:
        run.state = checkpoint.load_checkpoint(saved, run.lora, run.optimizer)
    if not run.world.is_rank0:
        return []
    return checkpoint.restore_metrics(run.out, saved)


def _do_steps(run: Run, losses_so_far: list[float], stop: Stopping) -> None:
    """Do the steps that are left; a ValueError is raised again with the last good checkpoint."""
    try:
        with run.world.report_lost_rank():
            run.loop(losses_so_far, stop)
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
        longest=max(size.tokens for size in sizes(examples)),
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
    """The settings of a run in its meta.json; a run is resumed only under equal ones.

    `frozen.seed_nll_dir` is none of them: the same likelihoods are found or computed anywhere.
    """
    train_settings = dataclasses.asdict(config)
    train_settings["loss"] = str(Loss.parse(config.loss))  # eaft, eaft:1 and eaft:1.0 are one loss
    for setting in FREE_TO_CHANGE:
        del train_settings[setting]
    settings = {
        "train": train_settings,
        "lora": dataclasses.asdict(lora_config),
        "model": frozen.fingerprint,
        "data": fingerprint(examples),
        "dtype": str(frozen.model.dtype),
    }
    replayed = replayed_prompts(examples)
    if replayed:  # retention refuses to be measured over them
        rows = sum(is_replay(name) for name in names(examples))
        settings["replay"] = {"rows": rows, "prompts": replayed}
    if validator is not None:
        settings["validate"] = dataclasses.asdict(validator.config)
        for setting in ("patience", "stop_kl"):  # runs of older versions do not have them
            if not settings["validate"][setting]:
                del settings["validate"][setting]
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
