"""Messages of a conversation: their roles, texts, calls of tools, and the tools that may be called

A message is a dict:

    role          "system", "user", "assistant", or "tool": the result of a call
    content       text; it may be empty beside tool_calls, and as a tool's result
    tool_calls    of the assistant, the calls that it makes: [{"type": "function", "function":
                  {"name": ..., "arguments": {...}}}], each with an "id" where the data has one
    name, tool_call_id    of a tool's result: the tool's name, the call that it answers; optional
    tools         of one message of the conversation, usually its first: the tools that may be
                  called, [{"type": "function", "function": {"name", "description", "parameters"}}]

A thought is a part of the assistant's content, between THOUGHT_TAGS at its beginning. Its tags are
text: a tokenizer that has them as tokens never treats them as control tokens.

The tools stand in a message because whatever is made of a conversation (a prompt, a context, a line
of a file) begins with its first message: no copy of it can lose them. A chat template is handed
them apart from the messages, as `tools`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Messages = Sequence[Message]

ROLES = ("system", "user", "assistant", "tool")
THOUGHT_TAGS = ("<think>", "</think>")  # around a thought, with which an answer may begin


def tools_of(messages: Messages) -> list[dict] | None:
    """The tools that a conversation may call; None where it has none."""
    for message in messages:
        if message.get("tools"):
            return message["tools"]
    return None


def with_tools(messages: Sequence[dict[str, Any]], tools: list[dict] | None) -> list[dict]:
    """The messages with `tools` in the first of them, and in no other."""
    bare = [without_tools(message) for message in messages]
    if tools and bare:
        bare[0]["tools"] = tools
    return bare


def without_tools(message: Message) -> dict[str, Any]:
    """A copy of the message without its tools."""
    return {key: value for key, value in message.items() if key != "tools"}


def calls_of(message: Message) -> list[dict]:
    """The calls that a message makes; [] for a message of text alone."""
    return message.get("tool_calls") or []


def last_of_user(messages: Messages) -> int:
    """The index of the user's last message; ValueError where there is none."""
    for index in reversed(range(len(messages))):
        if messages[index]["role"] == "user":
            return index
    raise ValueError("the conversation has no message of the user")


def texts_of(message: Message) -> Iterator[str]:
    """Every text of a message but its role, keys of the objects in it included."""
    for key, value in message.items():
        if key != "role":
            yield from _texts_in(value)


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in a part of a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from _texts_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts_in(part)


def with_texts(message: Message, change: Callable[[str], str]) -> dict[str, Any]:
    """A copy of a message with `change` applied to each of its texts (`texts_of`)."""
    changed = {}
    for key, value in message.items():
        changed[key] = value if key == "role" else _changed(value, change)
    return changed


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a part of a message with its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _changed(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(part, change) for part in value]
    return value


def check_messages(messages: Messages) -> None:
    """ValueError for messages without a known role, without text, or with malformed calls."""
    if not messages:
        raise ValueError("the conversation is empty; expected at least one message")
    for number, message in enumerate(messages):
        role = message.get("role")
        content = message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"message {number} has role {role!r} and content of type {type(content).__name__}; "
                "expected system, user, assistant or tool and a string"
            )
        for call in calls_of(message):
            _check_call(call, f"message {number}")
    if sum("tools" in message for message in messages) > 1:
        raise ValueError("two messages hold tools; expected them in the first message alone")


def _check_call(call: Any, where: str) -> None:
    """ValueError for a call that is not {"function": {"name": text, "arguments": object}}."""
    function = call.get("function") if isinstance(call, Mapping) else None
    is_call = isinstance(function, Mapping) and isinstance(function.get("name"), str)
    if not is_call or not isinstance(function.get("arguments"), Mapping):
        raise ValueError(
            f"{where} has a malformed tool call; expected "
            '{"function": {"name": text, "arguments": object}}'
        )
