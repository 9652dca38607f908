"""What every script needs first: the model with its tokenizer and chat format, checked."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from engine.cores import waiting, within_limits
from engine.distributed import World, start
from engine.log import model_fingerprint
from engine.process import keep_freed_memory, return_freed_memory
from engine.rows import Rows, load_rows, parse_columns
from kernels.registry import choose
from model.chat import Chat
from model.config import LlamaConfig
from model.llama import Llama, default_dtype
from model.lora import Lora
from model.tokenizer import load_tokenizer
from model.weights import expected_shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it runs."""

    model: str  # directory of a Llama checkpoint (Hugging Face layout, safetensors)
    device: str = "auto"  # auto | cpu | cuda: auto takes a GPU where there is one
    dtype: str = "auto"  # auto | float32 | bfloat16 | float64; auto: bf16 on a GPU, else float32
    ops: str = "auto"  # auto | torch | native | triton | reference; auto: what passes its check
    threads: int = 0  # CPU threads; 0: torch's choice, no more than a container's limit allows
    chat_format: str | None = None  # chatml | llama2 | llama3 | alpaca; own: the model's (default)
    shard: bool = False  # under torchrun: share the weights out; for training and scoring
    date: str | None = None  # YYYY-MM-DD told to chat templates that ask for it (default today)


@dataclass(frozen=True)
class DataConfig:
    """Which rows of which file."""

    data: str  # JSON, JSONL or CSV file of rows, or distilled data
    columns: str | None = None  # field names, as prompt=goal,response=target
    skip_bad: bool = False  # leave unusable rows out and count them, instead of stopping
    limit: int | None = None  # use only the first so many usable rows
    system: str | None = None  # a system message for every row that has none

    def load(self, need_reference: bool = True) -> Rows:
        """The rows, with what was left out said."""
        rows = load_rows(
            self.data,
            columns=parse_columns(self.columns) if self.columns else None,
            skip_bad=self.skip_bad,
            limit=self.limit,
            need_reference=need_reference,
            system=self.system,
        )
        skipped = f", {len(rows.bad)} unusable rows left out" if rows.bad else ""
        unused = f", fields not used: {', '.join(rows.unused)}" if rows.unused else ""
        print(f"data: {len(rows)} rows from {self.data}{skipped}{unused}")
        return rows


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
        wanted = None if config.chat_format == "own" else config.chat_format
        chat = Chat.from_dir(path, tokenizer, wanted, now=now)
        model = Llama.from_pretrained(path, device=device, dtype=dtype, ops=ops, shard=config.shard)
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
        return session

    def facts(self) -> dict[str, Any]:
        """What runs where, for people."""
        m = self.model
        return {
            "path": self.config.model,
            "parameters": sum(map(math.prod, expected_shapes(m.config).values())),
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
        print(
            f"model: {f['path']}, {f['parameters'] / 1e6:.1f} M parameters, {f['dtype']} on "
            f"{f['device']}{self._shared()}, {self._threads()}, ops {f['ops']}, "
            f"chat format {f['chat_format']}; loaded in {seconds:.1f} s"
        )

    def _threads(self) -> str:
        return f"{torch.get_num_threads()} threads" + (f" ({waiting()})" if waiting() else "")

    def _shared(self) -> str:
        return f", shared out over {self.world.size} processes" if self.model.sharded else ""

    def adapters(self, paths: Sequence[str]) -> dict[str, Lora]:
        """Adapters by the name of their directory, which must differ."""
        found: dict[str, Lora] = {}
        for path in paths:
            name = Path(path).resolve().name
            if name in found or name == "seed":
                raise ValueError(
                    f"adapter {path}: the name {name!r} is taken; rename the directory"
                )
            found[name] = Lora.load(path)
            found[name].ensure_bound(self.model)
        return found


def resolved(*configs: Any) -> dict[str, Any]:
    """The settings of a run by class name, for printing and saving."""
    return {type(c).__name__: dataclasses.asdict(c) for c in configs}
