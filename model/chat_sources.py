"""The templates of a chat format: their texts, what a run records of them, and how they are told
whether to think

`enable_thinking` is a variable that the templates of Qwen3, SmolLM3 and others read: false closes
the thoughts of an answer before it begins. It is passed to a template as transformers passes it
(`apply_chat_template(..., enable_thinking=False)`); where it is not set, the template decides.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from model.template import ChatTemplate

ENABLE_THINKING = "enable_thinking"
# the values of --enable-thinking -> what the templates are told; None: nothing, they decide
THINKING = {"true": True, "false": False, "default": None}


@dataclass(frozen=True)
class ChatSources:
    """The texts of the templates, and whether answers think."""

    name: str  # of the format, for messages: "checkpoint", or that of a built-in one
    template: str
    tool_template: str | None = None  # for conversations that have tools; None: the same
    enable_thinking: bool | None = None  # None: not passed, the template decides

    @property
    def hash(self) -> str:
        """A hash of the template for conversations without tools."""
        return _hash(self.template)

    @property
    def tool_hash(self) -> str | None:
        """A hash of the template for conversations with tools; None where it is the same one."""
        return None if self.tool_template is None else _hash(self.tool_template)

    @property
    def settings(self) -> dict[str, Any]:
        """What prompts depend on, beside messages and date: a resumed run must not change it."""
        settings = {"chat": self.name, "template": self.hash, "tool_template": self.tool_hash}
        return settings | self.variables

    @property
    def variables(self) -> dict[str, bool]:
        """What the templates are told beside the conversation."""
        return {} if self.enable_thinking is None else {ENABLE_THINKING: self.enable_thinking}

    @property
    def all_text(self) -> str:
        """The texts of all templates that may be used."""
        return self.template + (self.tool_template or "")

    @property
    def tells_date(self) -> bool:
        """Whether a template asks for the date, so that prompts differ from day to day."""
        return "strftime_now" in self.all_text

    def compiled(self, now: datetime) -> tuple[ChatTemplate, ChatTemplate]:
        """The templates for conversations without tools and with them.

        ValueError where one is not valid, and where `enable_thinking` is set and none reads it.
        """
        template = ChatTemplate(self.template, self.name, now)
        tool_template = template
        if self.tool_template is not None:
            tool_template = ChatTemplate(self.tool_template, self.name, now)
        if self.enable_thinking is not None:
            readers = [each for each in (template, tool_template) if each.reads(ENABLE_THINKING)]
            if not readers:
                raise ValueError(
                    f"enable_thinking {spelled(self.enable_thinking)}: the {self.name} chat "
                    "template does not read enable_thinking, so it would change nothing; leave "
                    "--enable-thinking out (templates that read it: Qwen3's, SmolLM3's)"
                )
        return template, tool_template


def with_default(source: str, enable_thinking: bool | None) -> str:
    """A template that takes this value where a program passes none; None: the template as it is."""
    if enable_thinking is None:
        return source
    value = spelled(enable_thinking)
    set_it = f"{{%- set {ENABLE_THINKING} = {value} %}}"
    # programs drop the line break behind a block (trim_blocks): the template begins as before
    return f"{{%- if {ENABLE_THINKING} is not defined %}}{set_it}{{%- endif %}}\n{source}"


def spelled(enable_thinking: bool | None) -> str:
    """The value as the flag and Jinja spell it."""
    for text, value in THINKING.items():
        if value is enable_thinking:
            return text
    raise AssertionError(f"{enable_thinking!r} is no value of {ENABLE_THINKING}")


def _hash(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]
