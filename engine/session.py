"""A session: the model with its tokenizer and chat format, opened, checked and announced."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from engine.runtime.cores import waiting, within_limits
from engine.runtime.distributed import World, start
from engine.runtime.limits import check_numbers
from engine.runtime.process_memory import keep_freed_memory, memory_for, return_freed_memory
from engine.runtime.published_adapter import refuse_damaged
from engine.runtime.run_record import model_fingerprint
from kernels.select_ops import choose
from model.chat import Chat
from model.config import LlamaConfig, read_json
from model.layout import checkpoint_shapes
from model.llama import Llama, default_dtype, has_bf16_units
from model.lora import Lora
from model.peft_format import load_lora
from model.terminal import visible
from model.tokenizer import load_tokenizer
from model.trained_chat import FILE, OWN, TrainedChat, common_system

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

LOAD_LESS = "--dtype bfloat16 takes half of float32; else a smaller model, or a larger machine"


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it runs."""

    model: str  # directory of a Llama model (Hugging Face layout, safetensors)
    device: str = "auto"  # auto, cpu or cuda: where to compute; auto takes a GPU if there is one
    dtype: str = "auto"  # float32, bfloat16 or float64: number format of weights and activations
    #   [default: auto (bfloat16 on a GPU that computes in it; else float32)]
    ops: str = "auto"  # torch, native, triton or reference: which implementation of the operations
    #   to use [default: auto (the fastest one that passes its self-check here)]
    threads: int = 0  # CPU threads to compute with
    #   [default: auto (torch's choice, at most the cores that a container may use)]
    chat_format: str | None = None  # prompt format: chatml, llama2, llama3, alpaca, or own (the
    #   model's chat template) [default: what the adapter was trained with; else own]
    shard: bool = False  # under torchrun, split the weights over the processes (FSDP2), for a model
    #   too large for one device; training and scoring only
    date: str | None = None  # YYYY-MM-DD, the day told to chat templates that ask for it
    #   [default: today]

    def check(self) -> None:
        """ValueError for settings that cannot run."""
        # many times the CPUs is slow; a hundred thousand threads end the process
        check_numbers(self, threads=(0, max(256, os.cpu_count() or 1)))
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}: expected auto or one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Session:
    """A loaded model with its chat format, and the processes that share the job."""

    config: ModelConfig
    model: Llama
    chat: Chat
    fingerprint: str  # of the checkpoint
    settings: dict[str, Any]  # what can change a result; a file is resumed under equal ones
    world: World = World()  # the processes of the job

    @classmethod
    def open(cls, config: ModelConfig) -> Session:
        """Load the model and print where it runs.

        ValueError for anything missing or unknown, before the weights are loaded.
        """
        config.check()
        device = device_of(config)
        world = start(device)
        if config.shard and world.size == 1:
            raise ValueError(
                "--shard shares the weights out over several processes, this is one; start it with "
                "torchrun --nproc-per-node N, or leave --shard out"
            )
        if config.shard:
            return_freed_memory()
        else:
            keep_freed_memory()
        dtype = dtype_of(config, device)
        path = Path(config.model)
        ops = choose(config.ops, device, dtype, LlamaConfig.from_dir(path).widths)
        set_threads(config.threads)
        started = time.perf_counter()
        now = date_of(config)
        chat = open_chat(config, now)
        with memory_for("loading the weights", LOAD_LESS):
            model = Llama.from_pretrained(
                path, device=device, dtype=dtype, ops=ops, shard=config.shard
            )
        settings = {
            "model": model_fingerprint(path),
            "dtype": str(model.dtype),
            "chat": chat.name,
            "template": chat.source_hash,
        }
        if chat.tells_date:
            settings["date"] = now.date().isoformat()
        session = cls(config, model, chat, settings["model"], settings, world)
        session.announce(time.perf_counter() - started)
        if chat.notice:
            print(f"note: {chat.notice}")
        return session

    def facts(self) -> dict[str, Any]:
        """The model, its size and where it runs, as summary.json holds them."""
        model = self.model
        return {
            "path": self.config.model,
            "parameters": sum(map(math.prod, checkpoint_shapes(model.config).values())),
            "dtype": str(model.dtype),
            "device": str(model.device),
            "ops": model.ops.name,
            "ops_table": model.ops.table(),
            "chat_format": self.chat.name,
            "fingerprint": self.fingerprint,
        }

    def require_one_process(self, job: str) -> None:
        """ValueError under torchrun, for a job that several processes cannot share."""
        if self.world.size > 1:
            raise ValueError(
                f"{job} is done by one process, this is a job of {self.world.size}; start "
                "scripts/distill.py and scripts/train.py under torchrun, the rest without it"
            )

    def announce(self, seconds: float) -> None:
        """Print the model, where it runs, and the seconds that loading took."""
        facts = self.facts()
        shared = f", shared out over {self.world.size} processes" if self.model.is_sharded else ""
        threads = f"{torch.get_num_threads()} threads"
        if waiting():
            threads += f" ({waiting()})"
        text = (
            f"model: {facts['path']}, {facts['parameters'] / 1e6:.1f} M parameters, "
            f"{facts['dtype']} on {facts['device']}{shared}, {threads}, ops {facts['ops']}, "
            f"chat format {facts['chat_format']}; loaded in {seconds:.1f} s"
        )
        print(visible(text))

    def adapters(self, paths: Sequence[str]) -> dict[str, Lora]:
        """Adapters by the name of their directory, which must differ."""
        adapters: dict[str, Lora] = {}
        for path in paths:
            name = Path(path).resolve().name
            if name in adapters or name == "seed":
                raise ValueError(
                    f"adapter {path}: the name {name!r} is taken; rename the directory"
                )
            adapters[name] = self.adapter(path)
        return adapters

    def adapter(self, path: str | Path) -> Lora:
        """The adapter of a directory; warns where it was trained in another chat format."""
        refuse_damaged(Path(path))
        lora = load_lora(path)
        self.model.bind(lora)
        trained = TrainedChat.read(path)
        if trained is not None and (why := trained.why_other(self.chat)):
            print(f"WARNING: adapter {path}: {why}")
        return lora

    def note_other_system(self, adapters: Sequence[str], rows: Sequence[Any]) -> None:
        """Print a note where an adapter was trained with a system message that `rows` lack."""
        given = common_system([row.messages for row in rows])
        for path in adapters:
            trained = TrainedChat.read(path)
            if trained is not None and trained.system not in (None, given):
                print(
                    f"note: adapter {path} was trained with the system message {trained.system!r}, "
                    f"these prompts have {'another' if given else 'none'}: --system gives one"
                )


def device_of(config: ModelConfig) -> str:
    """ "cpu" or "cuda"; ValueError where the device is unknown or missing."""
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {config.device!r}: expected auto, cpu or cuda")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no GPU here; use --device cpu")
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(config: ModelConfig, device: str) -> torch.dtype:
    """The dtype to compute in; prints a line where the GPU has no units for bfloat16."""
    if device == "cuda" and config.dtype in ("auto", "bfloat16") and not has_bf16_units(device):
        taken = "float32 is taken" if config.dtype == "auto" else "bfloat16 is emulated, slowly"
        print(f"dtype: {torch.cuda.get_device_name()} has no units for bfloat16: {taken}")
    return DTYPES.get(config.dtype) or default_dtype(device)


def set_threads(asked: int) -> None:
    """Use that many CPU threads; 0: torch's choice within the limits of the container."""
    threads = asked or within_limits(torch.get_num_threads())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def date_of(config: ModelConfig) -> datetime:
    """The date that chat templates are told."""
    if not config.date:
        return datetime.now()
    try:
        return datetime.fromisoformat(config.date)
    except ValueError:
        raise ValueError(f"date {config.date!r}: expected YYYY-MM-DD") from None


def open_chat(config: ModelConfig, now: datetime) -> Chat:
    """The chat format over the checkpoint's tokenizer."""
    path = Path(config.model)
    name = None if config.chat_format == OWN else config.chat_format
    return Chat.from_dir(path, load_tokenizer(path), name, now=now)


def as_trained(config: ModelConfig, adapters: Sequence[str]) -> ModelConfig:
    """The config with the chat format that the adapters were trained with, unless one was typed.

    ValueError where they were trained with several.
    """
    records = {path: TrainedChat.read(path) for path in adapters}
    formats = {path: record.chat_format for path, record in records.items() if record is not None}
    if config.chat_format is not None or not formats:
        return config
    if len(set(formats.values())) > 1:
        listed = ", ".join(f"{path}: {name}" for path, name in formats.items())
        raise ValueError(
            f"the adapters were trained with different chat formats ({listed}); ask them apart, or "
            "name the one for all with --chat-format"
        )
    name = next(iter(formats.values()))
    if name != OWN:
        print(f"chat format {name}: as the adapter was trained (its {FILE})")
    return dataclasses.replace(config, chat_format=name)


def as_begun(config: ModelConfig, *metas: Path) -> ModelConfig:
    """The config with the date and dtype of the run that these meta files belong to.

    Defaults that change by themselves (the day's date, the dtype of the device) are taken from the
    first meta file that exists, and printed where they differ from today's; what was typed stays.
    """
    existing = [file for file in metas if file.exists()]
    if not existing:
        return config
    file = existing[0]
    meta = read_json(file)
    settings = meta.get("settings")
    begun = meta | (settings if isinstance(settings, dict) else {})
    date, dtype = begun.get("date"), str(begun.get("dtype")).removeprefix("torch.")
    changes = {}
    if config.date is None and isinstance(date, str):
        changes["date"] = date
    if config.dtype == "auto" and dtype in DTYPES:
        changes["dtype"] = dtype
    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    default = str(default_dtype("cuda" if on_gpu else "cpu")).removeprefix("torch.")
    today = {"date": datetime.now().date().isoformat(), "dtype": default}
    differ = [f"{name} {value}" for name, value in changes.items() if value != today[name]]
    if differ:
        print(f"going on with what {file} was begun with: {', '.join(differ)}")
    return dataclasses.replace(config, **changes)
