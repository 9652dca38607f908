"""What every script needs first: the model with its tokenizer and chat format, checked."""

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
        """ValueError for what cannot be run."""
        # many times the CPUs is slow; a hundred thousand threads end the process
        check_numbers(self, threads=(0, max(256, os.cpu_count() or 1)))


@dataclass(frozen=True)
class Session:
    """A loaded model and everything that goes with it."""

    config: ModelConfig
    model: Llama
    chat: Chat
    fingerprint: str  # of the checkpoint
    settings: dict[str, Any]  # what of this may change a result, for resuming
    world: World = World()  # the processes of the job

    @classmethod
    def open(cls, config: ModelConfig) -> Session:
        """Load and announce; ValueError for anything missing or unknown, before the weights."""
        config.check()
        if config.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device {config.device!r}: auto, cpu or cuda is wanted")
        if config.dtype != "auto" and config.dtype not in DTYPES:
            raise ValueError(f"dtype {config.dtype!r}: auto or one of {', '.join(DTYPES)}")
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: torch finds no GPU here; use --device cpu")
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        world = start(device)
        if config.shard and world.size == 1:
            raise ValueError(
                "--shard shares the weights out over several processes, this is one; start it with "
                "torchrun --nproc-per-node N, or leave --shard out"
            )
        return_freed_memory() if config.shard else keep_freed_memory()
        dtype = DTYPES.get(config.dtype) or default_dtype(device)
        if device == "cuda" and config.dtype in ("auto", "bfloat16") and not has_bf16_units(device):
            what = "float32 is taken" if config.dtype == "auto" else "bfloat16 is emulated, slowly"
            print(f"dtype: {torch.cuda.get_device_name()} has no units for bfloat16: {what}")
        path = Path(config.model)
        ops = choose(config.ops, device, dtype, LlamaConfig.from_dir(path).widths)
        threads = config.threads or within_limits(torch.get_num_threads())
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        started = time.perf_counter()
        tokenizer = load_tokenizer(path)
        try:
            now = datetime.fromisoformat(config.date) if config.date else datetime.now()
        except ValueError:
            raise ValueError(f"date {config.date!r}: YYYY-MM-DD is wanted") from None
        wanted = None if config.chat_format == OWN else config.chat_format
        chat = Chat.from_dir(path, tokenizer, wanted, now=now)
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
        """What runs where, for people."""
        m = self.model
        return {
            "path": self.config.model,
            "parameters": sum(map(math.prod, checkpoint_shapes(m.config).values())),
            "dtype": str(m.dtype),
            "device": str(m.device),
            "ops": m.ops.name,
            "ops_table": m.ops.table(),
            "chat_format": self.chat.name,
            "fingerprint": self.fingerprint,
        }

    def alone(self, what: str) -> None:
        """ValueError under torchrun, for what one process does."""
        if self.world.size > 1:
            raise ValueError(
                f"{what} is done by one process, this is a job of {self.world.size}; start "
                "scripts/distill.py and scripts/train.py under torchrun, the rest without it"
            )

    def announce(self, seconds: float) -> None:
        """One paragraph: what runs where."""
        f = self.facts()
        said = (
            f"model: {f['path']}, {f['parameters'] / 1e6:.1f} M parameters, {f['dtype']} on "
            f"{f['device']}{self._shared()}, {self._threads()}, ops {f['ops']}, "
            f"chat format {f['chat_format']}; loaded in {seconds:.1f} s"
        )
        print(visible(said))

    def _threads(self) -> str:
        return f"{torch.get_num_threads()} threads" + (f" ({waiting()})" if waiting() else "")

    def _shared(self) -> str:
        return f", shared out over {self.world.size} processes" if self.model.is_sharded else ""

    def adapters(self, paths: Sequence[str]) -> dict[str, Lora]:
        """Adapters by the name of their directory, which must differ."""
        found: dict[str, Lora] = {}
        for path in paths:
            name = Path(path).resolve().name
            if name in found or name == "seed":
                raise ValueError(
                    f"adapter {path}: the name {name!r} is taken; rename the directory"
                )
            found[name] = self.adapter(path)
        return found

    def adapter(self, path: str | Path) -> Lora:
        """The adapter of a directory; says so where it was trained in another chat format."""
        refuse_damaged(Path(path))
        lora = load_lora(path)
        self.model.bind(lora)
        trained = TrainedChat.read(path)
        if trained is not None and (why := trained.why_other(self.chat)):
            print(f"WARNING: adapter {path}: {why}")
        return lora

    def note_systems(self, adapters: Sequence[str], rows: Sequence[Any]) -> None:
        """Say where adapters were trained with a system message that `rows` do not have."""
        given = common_system([row.messages for row in rows])
        for path in adapters:
            trained = TrainedChat.read(path)
            if trained is not None and trained.system not in (None, given):
                print(
                    f"note: adapter {path} was trained with the system message {trained.system!r}, "
                    f"these prompts have {'another' if given else 'none'}: --system gives one"
                )


def as_trained(config: ModelConfig, adapters: Sequence[str]) -> ModelConfig:
    """The config under which adapters are asked: in the chat format they were trained with, unless
    one was typed. ValueError where they were trained with several."""
    records = {path: TrainedChat.read(path) for path in adapters}
    formats = {path: record.chat_format for path, record in records.items() if record is not None}
    if config.chat_format is not None or not formats:
        return config
    if len({*formats.values()}) > 1:
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
    """The config under which the run of these meta files, those that are there, goes on.

    What was left to a default that changes by itself (the day's date, the dtype of the device) is
    what the run began with, which is said; what was typed stays.
    """
    for file in metas:
        if not file.exists():
            continue
        meta = read_json(file)
        settings = meta.get("settings")
        begun = meta | (settings if isinstance(settings, dict) else {})
        date, dtype = begun.get("date"), str(begun.get("dtype")).removeprefix("torch.")
        changes = {}
        if config.date is None and isinstance(date, str):
            changes["date"] = date
        if config.dtype == "auto" and dtype in DTYPES:
            changes["dtype"] = dtype
        there = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        now = {"date": datetime.now().date().isoformat()}
        now |= {"dtype": str(default_dtype("cuda" if there else "cpu")).removeprefix("torch.")}
        differ = [f"{name} {value}" for name, value in changes.items() if value != now[name]]
        if differ:
            print(f"going on with what {file} was begun with: {', '.join(differ)}")
        return dataclasses.replace(config, **changes)
    return config


def resolved(*configs: Any) -> dict[str, Any]:
    """The settings of a run by class name, for printing and saving."""
    return {type(c).__name__: dataclasses.asdict(c) for c in configs}
