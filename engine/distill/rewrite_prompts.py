"""The prompts that show the model a reference and ask for a rewrite (2402.13669, section 3)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.chat import Chat


@dataclass(frozen=True)
class Template:
    """The wording of a prompt that asks for a rewrite."""

    system: str  # the instruction
    between: str  # text between the user's message and the reference
    prefix: str = ""  # forced beginning of the answer; it becomes part of the target
    inline: bool = False  # the instruction goes into the user's message, with Alpaca headers
    plain: str = ""  # the task's plain system message, in whose place `system` is used


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


def prompt(
    chat: Chat, template: Template, context: Sequence[dict[str, str]], reference: str
) -> list[dict[str, str]]:
    """The messages that ask for a rewrite; `context` ends with the user's message.

    An inline template puts the paper's raw Alpaca prompt into the user's message. In the `alpaca`
    chat format, which has these headers itself, its instruction replaces the format's own instead.
    """
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
