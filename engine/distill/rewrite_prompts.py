"""The prompts that show the model a reference and ask for a rewrite (2402.13669, section 3)

TEMPLATES are the paper's, by name; a file holds a user's own (template_file.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.distill.template_file import fill, names_in, read_template
from model.chat import Chat
from model.messages import last_of_user, tools_of, with_tools


@dataclass(frozen=True)
class Template:
    """The wording of a prompt that asks for a rewrite."""

    system: str  # the instruction
    between: str  # text between the user's message and the reference
    prefix: str = ""  # forced beginning of the answer; it becomes part of the target
    inline: bool = False  # the instruction goes into the user's message, with Alpaca headers
    plain: str = ""  # the task's plain system message, in whose place `system` is used
    # of a file alone:
    user: str = ""  # the whole user's message, with placeholders; `system` may have them too
    marks: tuple[str, ...] = ()  # headings of its own, which no answer may repeat
    digest: str = ""  # sha256 of the file


_USING = (
    "Below are an instruction that describes a task along with a reference answer. Using the "
    "reference answer as a guide, write your own response."
)
_REFER = _USING.replace(
    "Using the reference answer as a guide,", "Refer to the reference answer and"
)
_GSM8K = (
    "You are an expert in math. Below are a math question and its reference answer. Refer to the "
    "reference answer and write a response that appropriately answers the question."
)
GSM8K_SYSTEM = (
    "You are an expert in math. Below is a math question. Write a response that appropriately "
    "answers the question."
)
TEMPLATES = {
    "using": Template(_USING, "\n\n### Reference Answer:\n", inline=True),
    "refer": Template(_REFER, "\n\n### Reference Answer:\n", inline=True),
    "gsm8k": Template(_GSM8K, "\n\n", "Great! Let's think step by step. ", plain=GSM8K_SYSTEM),
}


def get_template(name: str) -> Template:
    """The template of a name or a file; ValueError where there is neither, or it has a fault."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not Path(name).is_file():
        raise ValueError(
            f"template {name!r}: expected one of {', '.join(TEMPLATES)}, or a text file with "
            "{instruction} and {reference}"
        )
    parts = read_template(Path(name))
    return Template(
        system=parts.system,
        between="",
        prefix=parts.prefix,
        user=parts.user,
        marks=parts.marks,
        digest=parts.digest,
    )


def prompt(
    chat: Chat, template: Template, context: Sequence[dict[str, Any]], reference: str
) -> list[dict[str, Any]]:
    """The messages that ask for a rewrite; `context` ends with the user's message or a tool's.

    An inline template puts the paper's raw Alpaca prompt into the user's message. In the `alpaca`
    chat format, which has these headers itself, its instruction replaces the format's own instead.
    A template of a file is its own whole prompt in any chat format.

    The user's last message is the one that is replaced. Calls and results after it stay behind it,
    and the tools stay with the conversation: the answer is asked for as in the plain prompt.
    """
    last = last_of_user(context)
    system_texts = [turn["content"] for turn in context if turn["role"] == "system"]
    earlier = [turn for turn in context[:last] if turn["role"] != "system"]
    question = context[last]["content"]
    if template.user:
        system, user = _texts_of_file(template, system_texts, question, reference)
    else:
        system, user = _texts_of_template(chat, template, system_texts, question, reference)
    messages = [*earlier, {"role": "user", "content": user}, *context[last + 1 :]]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    tools = tools_of(context)
    return with_tools(messages, tools) if tools else messages


def _texts_of_template(
    chat: Chat, template: Template, system_texts: list[str], question: str, reference: str
) -> tuple[str | None, str]:
    """The system message (None: there is none) and the user's message of a template by name."""
    user = question + template.between + reference
    system_texts = [text for text in system_texts if text != template.plain]
    if template.inline and chat.name != "alpaca":
        user = f"{template.system}\n\n### Instruction:\n{user}\n\n### Response:\n"
    else:
        system_texts = [*system_texts, template.system]
    system = "\n\n".join(system_texts) if system_texts else None
    return system, user


def _texts_of_file(
    template: Template, system_texts: list[str], question: str, reference: str
) -> tuple[str | None, str]:
    """The same for a template of a file: its parts with their placeholders filled in."""
    values = {
        "instruction": question,
        "reference": reference,
        "system": "\n\n".join(system_texts),
    }
    system = fill(template.system, values).strip()
    if "system" not in names_in(template.system + template.user):
        system = "\n\n".join([*system_texts, system]).strip()
    return system or None, fill(template.user, values)
