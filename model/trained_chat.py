"""The chat format, end token, system message and `enable_thinking` of an adapter's training.

    ADAPTER/chat.json    written by training beside adapter_model.safetensors; other readers of
                         PEFT's layout ignore it. Older adapters have none

A model must be prompted as it was trained. `as_trained` and `Session.adapter` (engine/session.py)
read the file; `install` puts it into a merged model, where transformers, vLLM and this engine find
it: the chat template, and the end token among those that stop generation.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.chat import Chat
from model.chat_formats import (
    ADDITIONAL_TEMPLATES,
    FORMATS,
    change_templates,
    checkpoint_eos_ids,
    write_settings,
)
from model.chat_sources import spelled, with_default
from model.config import read_json
from model.durable import file_beside

FILE = "chat.json"
OWN = "own"  # the value of --chat-format for the checkpoint's own template
# keys that the file has only where they say something; older files have none of them
ADDED_LATER = ("tool_template_hash", "enable_thinking")


@dataclass(frozen=True)
class TrainedChat:
    """The chat format of a training."""

    chat_format: str  # OWN, or the name of a built-in format
    template: str  # Jinja, for programs that give it the tokenizer's bos_token and eos_token
    template_hash: str  # of the template as it was used here
    end_id: int  # the token that answers were trained to end with
    end_token: str
    system: str | None  # the system message of every row, if all had the same
    # of the template for conversations with tools; None: it is the same, or the file is older
    tool_template_hash: str | None = None
    enable_thinking: bool | None = None  # told to the template; None: nothing was

    @classmethod
    def of(cls, chat: Chat, system: str | None) -> TrainedChat:
        """The record of a training with `chat`."""
        return cls(
            chat_format=chat.name if chat.name in FORMATS else OWN,
            template=chat.portable_source,
            template_hash=chat.sources.hash,
            tool_template_hash=chat.sources.tool_hash,
            enable_thinking=chat.sources.enable_thinking,
            end_id=chat.end_id,
            end_token=chat.tokenizer.piece(chat.end_id),
            system=system,
        )

    @classmethod
    def read(cls, adapter: str | Path) -> TrainedChat | None:
        """The record in an adapter's directory, None where it has none; ValueError for a broken
        one."""
        file = Path(adapter) / FILE
        if not file.exists():
            return None
        record = read_json(file)
        types: dict[str, Any] = {
            "chat_format": str,
            "template": str,
            "template_hash": str,
            "end_id": int,
            "end_token": str,
            "system": (str, type(None)),
            "tool_template_hash": (str, type(None)),
            "enable_thinking": (bool, type(None)),
        }
        for name, expected in types.items():
            if not isinstance(record.get(name), expected):
                raise ValueError(
                    f"{file}: {name} is {record.get(name)!r}, which training does not write; "
                    "restore the file, or delete it and name --chat-format yourself"
                )
        known_formats = (OWN, *FORMATS)
        if record["chat_format"] not in known_formats:
            raise ValueError(
                f"{file}: chat format {record['chat_format']!r}; expected one of "
                f"{', '.join(known_formats)}"
            )
        return cls(**{name: record.get(name) for name in types})

    @property
    def thinking(self) -> str:
        """`enable_thinking` as --enable-thinking spells it."""
        return spelled(self.enable_thinking)

    def write(self, directory: Path) -> None:
        """Put the record into a directory: written beside, then renamed."""
        record = dataclasses.asdict(self)
        for name in ADDED_LATER:
            if record[name] is None:
                del record[name]
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        with file_beside(directory / FILE) as beside:
            beside.write_text(text, encoding="utf-8")

    def why_other(self, chat: Chat) -> str | None:
        """Why `chat` is not the format that was trained with, None where it is."""
        used = chat.name if chat.name in FORMATS else OWN
        if used != self.chat_format:
            return (
                f"it was trained with --chat-format {self.chat_format}, this run uses {used}: its "
                "answers will not be what training made them"
            )
        thinking = spelled(chat.sources.enable_thinking)
        if thinking != self.thinking:
            return (
                f"it was trained with --enable-thinking {self.thinking}, this run uses {thinking}: "
                "its answers will not be what training made them"
            )
        is_other = chat.sources.hash != self.template_hash
        if self.tool_template_hash is not None:
            is_other = is_other or chat.sources.tool_hash != self.tool_template_hash
        if is_other:
            return (
                "it was trained with another chat template than the model's directory has now: its "
                "answers will not be what training made them"
            )
        end_token = chat.tokenizer.piece(chat.end_id)
        if end_token != self.end_token:
            return (
                f"its answers were trained to end with {self.end_token!r}, here they end with "
                f"{end_token!r}"
            )
        return None

    def install(self, directory: Path) -> None:
        """Give the model in `directory` the chat template and the end token of its training.

        Its own templates think as they were told to, where a program does not say so.
        """
        known_ids = checkpoint_eos_ids(directory)
        end_ids = list(dict.fromkeys([self.end_id, *known_ids]))  # each once, the trained one first
        if end_ids != known_ids:
            _set_end_ids(directory, end_ids)
        if self.chat_format == OWN:
            if self.enable_thinking is not None:
                change_templates(directory, lambda text: with_default(text, self.enable_thinking))
            return
        shutil.rmtree(directory / ADDITIONAL_TEMPLATES, ignore_errors=True)
        (directory / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        settings_file = directory / "tokenizer_config.json"  # older programs look here
        settings = read_json(settings_file, {})
        if settings:
            write_settings(settings_file, settings | {"chat_template": self.template})

    def text(self) -> str:
        """A line for the user of the model."""
        text = f"chat format {self.chat_format}, answers end with {self.end_token!r}"
        if self.enable_thinking is not None:
            text += f", enable_thinking {self.thinking} where a request does not set it"
        if self.system:
            text += f", trained with the system message {self.system!r} (give it in every request)"
        return text


def common_system(conversations: Iterable[Sequence[Mapping[str, str]]]) -> str | None:
    """The system message that all conversations begin with, None where they differ or have none."""
    common = CommonSystem()
    for messages in conversations:
        common.add(messages)
    return common.text


class CommonSystem:
    """`common_system` of conversations that come one after the other."""

    def __init__(self) -> None:
        self._systems: set[str | None] = set()  # the first two different ones

    def add(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Add a conversation."""
        if len(self._systems) < 2:
            first = messages[0]
            self._systems.add(first["content"] if first["role"] == "system" else None)

    @property
    def text(self) -> str | None:
        """The system message of all conversations so far, None where they differ or have none."""
        if len(self._systems) != 1:
            return None
        (system,) = self._systems
        return system


def _set_end_ids(directory: Path, end_ids: list[int]) -> None:
    """Name the end tokens in generation_config.json and config.json, as the list or the one id."""
    config_file = directory / "config.json"
    generation_file = directory / "generation_config.json"
    config = read_json(config_file)
    # what transformers would make of config.json where there is no generation_config.json
    inherited = {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
    generation = read_json(generation_file, inherited)
    stops = {"eos_token_id": end_ids if len(end_ids) > 1 else end_ids[0]}
    write_settings(generation_file, generation | stops)
    write_settings(config_file, config | stops)
