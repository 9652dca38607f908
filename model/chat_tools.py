"""How a chat template writes tools: found by rendering a made conversation

    ToolProbes.check         ValueError for a conversation of whose tools, calls or results the
                             template leaves something out
    ToolProbes.call_edges    where an answer that calls tools ends in a rendered conversation

A template that knows no tools renders a conversation with them without an error, and without the
tools; what a model would learn from it is an answer from nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from model.control_tokens import QUESTION, Render
from model.messages import Messages, calls_of, tools_of, without_tools
from model.template import TemplateStopped
from model.tokenizer_base import any_of

# the texts of the conversation that probes a template
TOOL = "a_probing_tool"
PARAMETER = "a_parameter"
VALUE = "A-VALUE"
RESULT = "A-RESULT"
CALL_ID = "call12345"  # nine letters and digits, as Mistral's templates want them

_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "Probes.",
            "parameters": {
                "type": "object",
                "properties": {PARAMETER: {"type": "string", "description": "A text."}},
                "required": [PARAMETER],
            },
        },
    }
]
_ASKING = {"role": "user", "content": QUESTION, "tools": _TOOLS}
_CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": CALL_ID,
            "type": "function",
            "function": {"name": TOOL, "arguments": {PARAMETER: VALUE}},
        }
    ],
}
_ANSWERING = {"role": "tool", "name": TOOL, "tool_call_id": CALL_ID, "content": RESULT}

# the parts of a conversation that a template may leave out, as messages name them
TOOLS = "the tools that may be called"
CALLS = "the assistant's tool calls"
RESULTS = "the results of tools"
_PROBES = {  # part -> turns after the question, and the texts that must be written of the part
    TOOLS: ([], (TOOL, PARAMETER)),
    CALLS: ([_CALLING], (VALUE,)),
    RESULTS: ([_CALLING, _ANSWERING], (RESULT,)),
}


class CallEdges(NamedTuple):
    """The text that the template writes behind an answer that calls tools."""

    closing: str  # the token that closes it; "" where none does
    count: int  # how often that token stands behind the call
    spaces: str  # before the first of them, no part of the answer
    after: str  # all that follows the answer, where nothing closes it

    def answer_in(self, text: str) -> str:
        """The answer, of a conversation that it ends: `text` is what stands behind the prompt."""
        if self.closing:
            before = text.rsplit(self.closing, self.count)[0]
            return before.removesuffix(self.spaces)
        return text.removesuffix(self.after)


class ToolProbes:
    """What a template writes of tools, their calls and the results; rendered when first asked.

    render: of masked turns, as `Chat` renders a conversation. name: of the template, for messages.
    A conversation without tools is probed apart, since it may have a template of its own.
    """

    def __init__(self, render: Render, name: str) -> None:
        self._render = render
        self._name = name
        self._known: dict[tuple[str, bool], str | None] = {}  # (part, with tools) -> why it is lost

    def check(self, messages: Messages) -> None:
        """ValueError where a conversation has tools, calls or results and the template leaves them
        out."""
        has_tools = tools_of(messages) is not None
        parts = []
        if has_tools:
            parts.append(TOOLS)
        if any(calls_of(turn) for turn in messages):
            parts.append(CALLS)
        if any(turn["role"] == "tool" for turn in messages):
            parts.append(RESULTS)
        for part in parts:
            why = self._why_lost(part, has_tools)
            if why:
                raise ValueError(why)

    def call_edges(self, special: Iterable[str], closing: str, after: str) -> CallEdges:
        """Where an answer that calls tools ends; `special` are the tokens that may close it.

        closing: the token that closes an answer of text, taken where it closes calls too; else the
        last special token does. after: the text behind an answer of text that nothing closes.
        ValueError where the template writes no calls.
        """
        why = self._why_lost(CALLS, with_tools=True)
        if why:
            raise ValueError(why)
        whole = self._render([_ASKING, _CALLING], False)
        behind = whole.rpartition(VALUE)[2]  # the value
        tokens = any_of(special).findall(behind)
        if not tokens:
            return CallEdges("", 0, "", after if behind.endswith(after) else "")
        if closing not in tokens:
            closing = tokens[-1]
        before = behind.partition(closing)[0]
        spaces = before[len(before.rstrip(" ")) :]
        return CallEdges(closing, tokens.count(closing), spaces, "")

    def _why_lost(self, part: str, with_tools: bool) -> str | None:
        """Why the template cannot be given `part` of a conversation; None where it writes it."""
        key = (part, with_tools)
        if key not in self._known:
            self._known[key] = self._probe(part, with_tools)
        return self._known[key]

    def _probe(self, part: str, with_tools: bool) -> str | None:
        """`_why_lost`, by rendering a conversation whose last turn brings the part."""
        made, texts = _PROBES[part]
        asking = _ASKING if with_tools else without_tools(_ASKING)
        turns = [asking, *made]
        error = f"the {self._name} chat template"
        advice = "use a checkpoint whose chat template writes them, or rows without"
        add_generation_prompt = turns[-1]["role"] != "assistant"
        try:
            rendered = self._render(turns, add_generation_prompt)
        except TemplateStopped:
            raise
        except ValueError as refusal:
            return f"{error} cannot be given {part}: {refusal}; {advice}"
        if any(text not in rendered for text in texts):
            return f"{error} leaves out {part}; {advice}"
        return None


def check_stops(closing: str, id: int, end_ids: Sequence[int], name: str) -> None:
    """ValueError where sampling does not stop at the token that closes tool calls.

    closing, id: its spelling and its id. end_ids: at which sampling stops. name: of the template.
    """
    if id not in end_ids:
        raise ValueError(
            f"the {name} chat template closes tool calls with {closing!r}, at which sampling would "
            f"not stop: add its id {id} to eos_token_id in generation_config.json"
        )
