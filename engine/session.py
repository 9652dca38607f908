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
from typing import Any, NamedTuple

import torch

from engine.runtime.cores import waiting, within_limits
from engine.runtime.distributed import World, start
from engine.runtime.limits import check_numbers
from engine.runtime.process_memory import keep_freed_memory, memory_for, return_freed_memory
from engine.runtime.published_adapter import refuse_damaged
from engine.runtime.run_record import model_fingerprint
from kernels.select_ops import choose
from model.chat import Chat
from model.chat_sources import THINKING, spelled
from model.config import LlamaConfig, read_json
from model.layout import checkpoint_shapes
from model.llama import Llama, default_dtype, has_bf16_units
from model.lora import Lora, check_strength
from model.peft_format import load_lora
from model.terminal import visible
from model.tokenizer import load_tokenizer
from model.trained_chat import FILE, OWN, TrainedChat, common_system

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

# the advice in the message where memory does not hold the weights
LOAD_LESS = "--dtype bfloat16 takes half of float32; else a smaller model, or a larger machine"


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it runs."""

    model: str  # a Llama model: its directory (Hugging Face layout, safetensors), a .gguf file, or
    #   ORG/NAME in the local Hugging Face cache (nothing is downloaded)
    device: str = "auto"  # auto, cpu or cuda: where to compute; auto takes a GPU if there is one
    dtype: str = "auto"  # float32, bfloat16 or float64: number format of weights and activations
    #   [default: auto (bfloat16 on a GPU that computes in it; else float32)]
    ops: str = "auto"  # implementation of the model's operations: torch, native (C, on a CPU),
    #   triton (GPU kernels) or reference (their definitions, slow)
    #   [default: auto (the fastest one that passes its self-check here)]
    threads: int = 0  # CPU threads to compute with
    #   [default: auto (torch's choice, at most the cores that a container may use)]
    chat_format: str | None = None  # prompt format: chatml, llama2, llama3, alpaca, or own (the
    #   model's chat template) [default: what the adapter was trained with; else own]
    enable_thinking: str | None = None  # true or false: told to the model's chat template, where it
    #   reads enable_thinking (Qwen3, SmolLM3: false closes the thoughts before an answer); default:
    #   the template decides [default: what the adapter was trained with; else default]
    shard: bool = False  # under torchrun, split the weights over the processes (FSDP2), for a model
    #   too large for one device; training and scoring only
    date: str | None = None  # day (YYYY-MM-DD) for chat templates that write the date into prompts
    #   [default: today]

    def check(self) -> None:
        """ValueError for settings that cannot run."""
        # more threads than CPUs are only slow; a hundred thousand of them end the process
        most_threads = max(256, os.cpu_count() or 1)
        check_numbers(self, threads=(0, most_threads))
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}: expected auto or one of {', '.join(DTYPES)}")
        if self.enable_thinking is not None and self.enable_thinking not in THINKING:
            raise ValueError(
                f"enable_thinking {self.enable_thinking!r}: expected one of {', '.join(THINKING)}"
            )


class ScaledAdapter(NamedTuple):
    """An adapter's directory, and the strength at which it is used."""

    path: str
    scale: float = 1.0  # 0: the model without it; 1: as it was trained (model/lora.py)

    @property
    def name(self) -> str:
        """The name of its arm: the directory's, with `@SCALE` where that is not 1."""
        return scaled_name(Path(self.path).resolve().name, self.scale)


def scaled_name(name: str, scale: float) -> str:
    """The name of an adapter at a strength: `sft@0.5`, and `sft` at 1."""
    return name if scale == 1 else f"{name}@{scale:g}"


def parse_scales(text: str | None) -> tuple[float, ...]:
    """The strengths of a flag: numbers joined by commas, each once; None is 1.

    ValueError for a text that is no such list, and for numbers out of range.
    """
    if text is None:
        return (1.0,)
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = ()
    names = {scaled_name("", scale) for scale in scales}
    if not scales or len(names) < len(scales):
        raise ValueError(
            f"scale {text!r}: expected numbers joined by commas, each once (six digits count), as "
            "in 0.25,0.5,1"
        )
    for scale in scales:
        check_strength(scale)
    return scales


@dataclass(frozen=True)
class Session:
    """A loaded model with its chat format, and the processes that share the job."""

    config: ModelConfig
    model: Llama
    chat: Chat
    fingerprint: str  # hash that tells checkpoints apart (run_record.model_fingerprint)
    settings: dict[str, Any]  # every setting of the model that can change a result; an output file
    #   is continued only under equal ones
    world: World = World()  # the processes of the job

    @classmethod
    def open(cls, config: ModelConfig, *, packed: bool = False) -> Session:
        """Load the model and print where it runs.

        packed: for jobs that only sample. A CPU then holds the matrices packed from the start.

        ValueError, before the weights are loaded, for a file that is missing and for a setting
        that is unknown or cannot run here.
        """
        config.check()
        device = device_of(config)
        world = start(device)
        if config.shard and world.size == 1:
            raise ValueError(
                "--shard splits the weights over several processes, this is one; start it with "
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
                path, device=device, dtype=dtype, ops=ops, shard=config.shard, packed=packed
            )

        settings = {
            "model": model_fingerprint(path),
            "dtype": str(model.dtype),
            **chat.sources.settings,
        }
        if chat.sources.tells_date:
            settings["date"] = now.date().isoformat()
        session = cls(config, model, chat, settings["model"], settings, world)
        session.announce(time.perf_counter() - started)
        if chat.notice:
            print(f"note: {chat.notice}")
        return session

    def facts(self) -> dict[str, Any]:
        """The model, its size and where it runs, as summary.json holds them."""
        model = self.model
        shapes = checkpoint_shapes(model.config).values()
        return {
            "path": self.config.model,
            "parameters": sum(math.prod(shape) for shape in shapes),
            "dtype": str(model.dtype),
            "device": str(model.device),
            "ops": model.ops.name,
            "ops_table": model.ops.table(),
            "chat_format": self.chat.name,
            **self.chat.sources.variables,
            "fingerprint": self.fingerprint,
        }

    def require_one_process(self, job: str) -> None:
        """ValueError under torchrun, for a job that several processes cannot share."""
        if self.world.size > 1:
            raise ValueError(
                f"{job} runs in one process, torchrun started {self.world.size}; only "
                "scripts/distill.py and scripts/train.py run under torchrun, start this one "
                "without it"
            )

    def announce(self, seconds: float) -> None:
        """Print the model, where it runs, and the seconds that loading took."""
        facts = self.facts()
        place = f"{facts['dtype']} on {facts['device']}"
        if self.model.is_sharded:
            place += f", split over {self.world.size} processes"
        if not self.model.is_sharded and self.model.weights.stays_packed:
            place += f", {self.model.weights.nbytes / 1e9:.2f} GB packed"
        threads = f"{torch.get_num_threads()} threads"
        if waiting():
            threads += f" ({waiting()})"
        text = (
            f"model: {facts['path']}, {facts['parameters'] / 1e6:.1f} M parameters, {place}, "
            f"{threads}, ops {facts['ops']}, chat format {facts['chat_format']}; loaded in "
            f"{seconds:.1f} s"
        )
        if self.chat.sources.enable_thinking is not None:
            text += f"; enable_thinking {spelled(self.chat.sources.enable_thinking)}"
        print(visible(text))

    def adapters(self, paths: Sequence[str], scales: Sequence[float] = (1.0,)) -> dict[str, Lora]:
        """The adapters of these directories, each at every one of the scales, by their names.

        The scales of one adapter share its buffers. ValueError where two names are equal.
        """
        adapters: dict[str, Lora] = {}
        for path in paths:
            lora = self.adapter(path)
            for scale in scales:
                name = ScaledAdapter(path, scale).name
                if name in adapters or name == "seed":
                    raise ValueError(
                        f"adapter {path}: the name {name!r} is taken; rename the directory"
                    )
                adapters[name] = lora.scaled(scale)
        return adapters

    def adapter(self, path: str | Path) -> Lora:
        """The adapter of a directory; warns where it was trained in another chat format.

        ValueError where its files are damaged, or do not fit the model.
        """
        refuse_damaged(Path(path))
        lora = load_lora(path)
        self.model.bind(lora)
        trained = TrainedChat.read(path)
        if trained is not None:
            why = trained.why_other(self.chat)
            if why is not None:
                print(f"WARNING: adapter {path}: {why}")
        return lora

    def note_other_system(self, adapters: Sequence[str], rows: Sequence[Any]) -> None:
        """Print a note where an adapter was trained with a system message that `rows` lack."""
        given = common_system([row.messages for row in rows])
        has = "another" if given else "none"
        for path in adapters:
            trained = TrainedChat.read(path)
            if trained is None or trained.system is None or trained.system == given:
                continue
            print(
                f"note: adapter {path} was trained with the system message {trained.system!r}, "
                f"these prompts have {has}: --system gives one"
            )


def device_of(config: ModelConfig) -> str:
    """The device to compute on, "cpu" or "cuda"; ValueError where it is unknown or missing."""
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {config.device!r}: expected auto, cpu or cuda")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no GPU here; use --device cpu")
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(config: ModelConfig, device: str) -> torch.dtype:
    """The dtype to compute in; prints a line where the GPU has no units for bfloat16."""
    may_be_bf16 = device == "cuda" and config.dtype in ("auto", "bfloat16")
    if may_be_bf16 and not has_bf16_units(device):
        effect = "float32 is used" if config.dtype == "auto" else "bfloat16 is emulated, slowly"
        print(f"dtype: {torch.cuda.get_device_name()} has no units for bfloat16: {effect}")
    if config.dtype == "auto":
        return default_dtype(device)
    return DTYPES[config.dtype]


def set_threads(count: int) -> None:
    """Use that many CPU threads; 0: torch's choice within the limits of the container."""
    chosen_by_torch = torch.get_num_threads()
    threads = count if count > 0 else within_limits(chosen_by_torch)
    if threads != chosen_by_torch:
        torch.set_num_threads(threads)


def date_of(config: ModelConfig) -> datetime:
    """The date that chat templates are told; ValueError where --date is no date."""
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
    thinks = THINKING[config.enable_thinking or "default"]
    return Chat.from_dir(path, load_tokenizer(path), name, now=now, enable_thinking=thinks)


def as_trained(config: ModelConfig, adapters: Sequence[str]) -> ModelConfig:
    """The config with the chat format that the adapters were trained with, and whether the model
    was told to think; a typed value stays.

    ValueError where they were trained with several.
    """
    formats: dict[str, str] = {}  # by adapter directory
    thinking: dict[str, str] = {}
    for path in adapters:
        trained = TrainedChat.read(path)
        if trained is not None:
            formats[path] = trained.chat_format
            thinking[path] = trained.thinking
    if not formats:
        return config
    if config.chat_format is None:
        name = _the_same(formats, "chat formats", "one format for all with --chat-format")
        if name != OWN:
            print(f"chat format {name}: as the adapter was trained (its {FILE})")
        config = dataclasses.replace(config, chat_format=name)
    if config.enable_thinking is None and config.chat_format == OWN:
        value = _the_same(thinking, "enable_thinking", "one value for all with --enable-thinking")
        if value != "default":
            print(f"enable_thinking {value}: as the adapter was trained (its {FILE})")
            config = dataclasses.replace(config, enable_thinking=value)
    return config


def _the_same(values: dict[str, str], what: str, advice: str) -> str:
    """The value with which all adapters were trained; ValueError where they differ.

    values: by adapter directory, not empty. what: of the training, for the message.
    """
    found = set(values.values())
    if len(found) > 1:
        listed = ", ".join(f"{path}: {value}" for path, value in values.items())
        raise ValueError(
            f"the adapters were trained with different {what} ({listed}); run them separately, or "
            f"name {advice}"
        )
    return found.pop()


def as_begun(config: ModelConfig, *metas: Path) -> ModelConfig:
    """The config with the date and dtype that the run of these meta files was started with.

    Both defaults depend on where and when a command runs (the day, the device). A run that
    continues takes them from the first meta file that exists, and prints those that differ from
    the defaults of this start. A typed value stays.
    """
    existing = [file for file in metas if file.exists()]
    if not existing:
        return config
    file = existing[0]
    begun = read_json(file)
    settings = begun.get("settings")  # in the meta file of a training; else they are the file
    if isinstance(settings, dict):
        begun = begun | settings
    date = begun.get("date")
    dtype = str(begun.get("dtype")).removeprefix("torch.")
    changes = {}
    if config.date is None and isinstance(date, str):
        changes["date"] = date
    if config.dtype == "auto" and dtype in DTYPES:
        changes["dtype"] = dtype

    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    default = default_dtype("cuda" if on_gpu else "cpu")
    defaults = {
        "date": datetime.now().date().isoformat(),
        "dtype": str(default).removeprefix("torch."),
    }
    differ = [f"{name} {value}" for name, value in changes.items() if value != defaults[name]]
    if differ:
        print(f"continuing with the values that {file} was begun with: {', '.join(differ)}")
    return dataclasses.replace(config, **changes)
