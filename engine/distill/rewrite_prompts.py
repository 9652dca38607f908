"""How a reference is shown to the model that is to rewrite it (2402.13669; paper.md 1.2)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.chat import Chat


@dataclass(frozen=True)
class Template:
    """How a reference is shown to the model (paper.md 1.2)."""

    system: str  # the sentence that says what to do
    between: str  # what stands between the user's text and the reference
    prefix: str = ""  # the beginning of the assistant's answer; it becomes part of the target
    inline: bool = False  # the sentence stands in the user's message, under Alpaca headers
    plain: str = ""  # the task's system message without a reference; `system` replaces it


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
    """The conversation that asks for a rewrite: `context` ends with the user's message.

    In the `alpaca` chat format the template's sentence replaces the format's own, which gives the
    paper's raw form; elsewhere that form is what the user says.
    """
    *earlier, last = context
    user = last["content"] + template.between + reference
    system = [m["content"] for m in earlier if m["role"] == "system"]
    system = [text for text in system if text != template.plain]
    earlier = [m for m in earlier if m["role"] != "system"]
    if template.inline and chat.name != "alpaca":
        user = f"{template.system}\n\n### Instruction:\n{user}\n\n### Response:\n"
    else:
        system = [*system, template.system]
    head = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return [*head, *earlier, {"role": "user", "content": user}]
