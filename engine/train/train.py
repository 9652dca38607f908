"""The training loop: LoRA on packed rows, every gradient written down (model/llama.py)

    for each optimizer step                      batch_rows examples in a seeded order
        step_gradients, step_update              engine/train/step.py
        metrics, validation, checkpoint          engine/{metrics,validate,checkpoint}.py

A step depends on (seed, step) alone, so a resumed run is the undisturbed run, bit for bit. With
several processes (engine/runtime/distributed.py) each does its share of every step and all hold
the same adapter; rank 0 writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.config import DataConfig
from engine.data.data_file import DataFile
from engine.data.distilled import is_distilled, load_distilled
from engine.data.encode import (
    Example,
    check_examples,
    encode,
    fingerprint,
    template_takes,
)
from engine.data.rows import Rows
from engine.data.show import show
from engine.measure.likelihood import nll
from engine.runtime import published_adapter
from engine.runtime.distributed import World
from engine.runtime.files import write_json
from engine.runtime.locking import lock_directory
from engine.runtime.process_memory import (
    TRAIN_LESS,
    memory_for,
)
from engine.runtime.run_record import environment
from engine.runtime.stopping import Stopping
from engine.session import Session
from engine.train import checkpoint
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.loop import Run
from engine.train.metrics import summary_text
from engine.train.optim import Optimizer
from engine.train.step import ALONE
from engine.train.validate import ValidateConfig, Validator
from model.llama import Llama
from model.lora import Lora, LoraConfig
from model.trained_chat import TrainedChat, common_system


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
    lora = Lora.init(lora_config, model.config, model.device, model.dtype)
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
                record |= {
                    "published": published_adapter.published(out),
                    "environment": environment(),
                }
                write_json(out / "meta.json", record)
            stop.kept = f"the adapter in {out} is finished"
            stopping = world.any(stop.asked)
        if stopping:
            stop.end(stop.kept)
    return lora, summary
