"""Training an adapter: LoRA on packed rows, every gradient written down (model/llama.py)

    train_job    scripts/train.py: rows -> examples -> train, or print encoded examples
    train        a run directory from beginning to end; the loop itself is `Run.loop` (loop.py)

A step depends on (seed, step) alone, so on a CPU a resumed run is the undisturbed run, bit for bit.
With several processes (engine/runtime/distributed.py) each does its share of every step and all
hold the same adapter; rank 0 writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
from engine.runtime.stopping import Stopping
from engine.session import Session
from engine.train import checkpoint
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.examples import encode_examples, rows_to_train_on
from engine.train.loop import Run
from engine.train.metrics import summary_text
from engine.train.optim import Optimizer
from engine.train.step import SINGLE_PROCESS
from engine.train.validate import ValidateConfig, Validator
from model.llama import Llama
from model.lora import Lora, LoraConfig
from model.trained_chat import TrainedChat, common_system

# settings that may change when a run is resumed: the result does not depend on them
FREE_TO_CHANGE = ("save_every", "keep", "memory_gb")


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
    """Train on a file of rows or of distilled data; returns the summary.

    With `show_rows` that many encoded examples are printed instead, and nothing is trained.
    """
    for settings in (data, encoding, config, lora_config, validating):
        settings.check()
    if show_rows is not None and show_rows < 1:
        raise ValueError(f"--show {show_rows}: expected at least 1 row")
    rows = rows_to_train_on(session, data)
    examples = encode_examples(
        rows, session, data, encoding, seed=config.seed, skip_refused=data.skip_bad
    )
    if show_rows is not None:
        print_examples(session, examples[:show_rows])
        return None
    config.highest_rate(len(examples))
    _, summary = train(
        session.model,
        examples,
        lora_config,
        config,
        out,
        base=session.config.model,
        model_hash=session.fingerprint,
        resume=resume,
        validator=Validator(validating, data, session) if validating.val_every else None,
        world=session.world,
        date=session.settings.get("date"),
        chat=TrainedChat.of(session.chat, common_system([row.messages for row in rows])),
    )
    if session.world.is_rank0:
        print(summary_text(summary, out))
    return summary


def print_examples(session: Session, examples: Sequence[Example]) -> None:
    """Print every token of the examples, those with loss with their nats under the seed."""
    losses = []
    for example in examples:
        prompt, answer = example.ids[: example.n_prompt], example.ids[example.n_prompt :]
        losses.append(nll(session.model, prompt, answer).tolist())
    print(show(examples, session.chat.tokenizer, len(examples), losses))


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
    world: World = SINGLE_PROCESS,
    date: str | None = None,
    chat: TrainedChat | None = None,
) -> tuple[Lora, dict[str, Any]]:
    """Train an adapter into the run directory `out`; returns it and the summary.

    base         the model's directory, as the adapter's config names it
    model_hash   of the model's files; a run is resumed on the same model only
    resume       load a finished run; continue a killed one from its last checkpoint, in any number
                 of processes
    date         the one that prompts tell, None where they tell none
    chat         how the prompts were made, written beside the adapter (chat.json)

    A step that is not finite or a loss that explodes stops with ValueError; the checkpoints stay.
    Ctrl-C or SIGTERM finishes the running step, writes a checkpoint and raises `Stopped`. Holds the
    lock of `out`.
    """
    config.check()
    check_examples(examples)
    _warn_of_long_warmup(config, len(examples))
    lora_config = dataclasses.replace(lora_config, seed=config.seed)
    lora = Lora.init(lora_config, model.config, model.device, model.dtype)
    optimizer = Optimizer.fresh(lora, config.weight_decay)
    run = Run(model, lora, optimizer, examples, config, out, base, validator, world, chat)
    settings = run_settings(model, examples, lora_config, config, model_hash, validator)
    with lock_directory(out):
        meta = _open_run(out, settings, resume, date, world)
        if meta["finished"]:
            run.load_finished(meta)
            return lora, meta["summary"]
        saved = _last_checkpoint(out)
        if saved is not None:
            run.state = checkpoint.load_checkpoint(saved, lora, optimizer)
        metrics_so_far = checkpoint.restore_metrics(out, saved) if world.is_rank0 else []
        with Stopping("the running step is finished and a checkpoint written") as stop:
            try:
                with world.report_lost_rank():
                    run.loop(metrics_so_far, stop)
            except ValueError as error:
                saved = _last_checkpoint(out)
                kept = "no checkpoint was written yet"
                if saved is not None:
                    kept = f"the last good state is {saved}"
                raise ValueError(f"{error}. {kept}") from None
            summary = run.finish()
            if world.is_rank0:
                _write_finished(out, meta, summary)
            stop.kept = f"the adapter in {out} is finished"
            stopping = world.any_rank(stop.asked)
        if stopping:
            stop.end(stop.kept)
    return lora, summary


def run_settings(
    model: Llama,
    examples: Sequence[Example],
    lora_config: LoraConfig,
    config: TrainConfig,
    model_hash: str,
    validator: Validator | None,
) -> dict[str, Any]:
    """The settings of a run in its meta.json; a run is resumed only under equal ones."""
    train_settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in FREE_TO_CHANGE
    }
    settings = {
        "train": train_settings,
        "lora": dataclasses.asdict(lora_config),
        "model": model_hash,
        "data": fingerprint(examples),
        "dtype": str(model.dtype),
    }
    if validator is not None:
        settings["validate"] = dataclasses.asdict(validator.config)
    return settings


def _warn_of_long_warmup(config: TrainConfig, count: int) -> None:
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
