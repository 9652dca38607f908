"""The prompts that show the model a reference and ask for a rewrite (2402.13669, section 3)

TEMPLATES are the paper's, by name; a file holds a user's own (template_file.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.distill.template_file import fill, names_in, read_template
from model.chat import Chat


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
    chat: Chat, template: Template, context: Sequence[dict[str, str]], reference: str
) -> list[dict[str, str]]:
    """The messages that ask for a rewrite; `context` ends with the user's message.

    An inline template puts the paper's raw Alpaca prompt into the user's message. In the `alpaca`
    chat format, which has these headers itself, its instruction replaces the format's own instead.
    A template of a file is its own whole prompt in any chat format.
    """
    if template.user:
        return _prompt_of_file(template, context, reference)
    earlier, last = context[:-1], context[-1]
    user = last["content"] + template.between + reference
    system_texts: list[str] = []
    conversation: list[dict[str, str]] = []
    for message in earlier:
        if message["role"] != "system":
            conversation.append(message)
        elif message["content"] != template.plain:
            system_texts.append(message["content"])
    if template.inline and chat.name != "alpaca":
        user = f"{template.system}\n\n### Instruction:\n{user}\n\n### Response:\n"
    else:
        system_texts.append(template.system)
    messages = [*conversation, {"role": "user", "content": user}]
    if system_texts:
        messages.insert(0, {"role": "system", "content": "\n\n".join(system_texts)})
    return messages


def _prompt_of_file(
    template: Template, context: Sequence[dict[str, str]], reference: str
) -> list[dict[str, str]]:
    """`prompt` for a template of a file: its parts with their placeholders filled in."""
    system_texts = [turn["content"] for turn in context if turn["role"] == "system"]
    values = {
        "instruction": context[-1]["content"],
        "reference": reference,
        "system": "\n\n".join(system_texts),
    }
    system = fill(template.system, values).strip()
    if "system" not in names_in(template.system + template.user):
        system = "\n\n".join([*system_texts, system]).strip()
    messages = [turn for turn in context[:-1] if turn["role"] != "system"]
    messages.append({"role": "user", "content": fill(template.user, values)})
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return messages
