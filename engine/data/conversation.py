"""A record becomes the messages of a conversation: `conversation_of(record, shape)`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from engine.data.fields import as_text, is_given, kind, message, required_field
from engine.data.thinking import OPENS, with_thought
from engine.data.tool_calls import calls_of_entry, calls_of_text, tools_of_field
from model.messages import calls_of

SPEAKERS = {  # OpenAI's and ShareGPT's names of roles -> ours
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALLING = ("function_call", "tool_call")  # ShareGPT's speakers whose text is calls as JSON
# keys by which other programs say that a message is (1) or is not (0) to be trained on
TRAINED = ("weight", "train", "training", "trainable", "loss_mask", "loss")
CALLS = ("tool_calls", "function_call")  # keys of a message that hold calls
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a thought beside the text
OF_RESULTS = ("name", "tool_call_id")  # keys of a tool's result that a chat template may read


class Conversation(NamedTuple):
    """The messages of a record.

    A message is one of model/messages.py, with "trained": bool where the record says whether the
    message is to be trained on.
    """

    messages: list[dict]
    unused_keys: set[str]  # keys of messages that are given and not read: "messages[].name"


def conversation_of(record: dict, shape: dict[str, str], need_reference: bool) -> Conversation:
    """The conversation of a record of this shape, the assistant's answer last.

    need_reference: False for a conversation that ends with the user's message instead. ValueError
    for a record that is no conversation, or has an unsupported field that would change its texts.
    """
    if "messages" in shape:
        messages, unused_keys = _conversation_of_list(record, shape, need_reference)
    else:
        messages = _messages_of_fields(record, shape, need_reference)
        unused_keys = set()
    if is_given(record, shape, "system"):
        name = shape["system"]
        if messages[0]["role"] == "system":
            raise ValueError(f"both a system message and a {name!r} field; keep one")
        messages.insert(0, message("system", record[name], name))
    tools = []
    if shape.get("tools"):
        tools = tools_of_field(record.get(shape["tools"]), shape["tools"])
    if tools:
        messages[0]["tools"] = tools
    return Conversation(messages, unused_keys)


def _messages_of_fields(
    record: dict, shape: dict[str, str], need_reference: bool
) -> list[dict[str, str]]:
    """The messages of a record that has its prompt and its answer in fields of their own."""
    messages = []
    if is_given(record, shape, "history"):
        name = shape["history"]
        messages = _messages_of_history(record[name], name)
    name = shape["prompt"]
    prompt = as_text(required_field(record, name))
    user_message = message("user", prompt, name)
    if is_given(record, shape, "input"):
        name = shape["input"]
        extra = message("user", as_text(record[name]), name)
        user_message["content"] += "\n" + extra["content"]
    messages.append(user_message)
    if need_reference:
        name = shape["response"]
        answer = as_text(required_field(record, name))
        messages.append(message("assistant", answer, name))
    return messages


def _messages_of_history(history: object, name: str) -> list[dict[str, str]]:
    """The earlier turns, from a list of [user, assistant] pairs in the field `name`."""
    fault = f"{name!r} is not a list of [user, assistant] pairs"
    if not isinstance(history, list):
        raise ValueError(fault)
    messages = []
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(fault)
        question, answer = pair
        messages.append(message("user", as_text(question), f"{name} {number}, user"))
        messages.append(message("assistant", as_text(answer), f"{name} {number}, assistant"))
    return messages


def _conversation_of_list(
    record: dict, shape: dict[str, str], need_reference: bool
) -> Conversation:
    """The conversation of a list of {role, content} or {from, value}."""
    name = shape["messages"]
    entries = required_field(record, name)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{name!r} is {kind(entries)}, expected a list of messages")
    messages: list[dict] = []
    unused_keys: set[str] = set()
    for number, entry in enumerate(entries, 1):
        messages.append(_message_of_entry(entry, number))
        for key in _unused_keys(entry):
            unused_keys.add(f"{name}[].{key}")
    if not need_reference and messages[-1]["role"] == "assistant":
        messages.pop()
    check_turns(messages, last=("assistant",) if need_reference else ("user", "tool"))
    return Conversation(messages, unused_keys)


def _message_of_entry(entry: object, number: int) -> dict:
    """The message of one entry of a list; `number` counts from 1 and names it in errors."""
    if not isinstance(entry, dict):
        raise ValueError(f"message {number} is {kind(entry)}, expected an object")
    speaker = entry.get("role", entry.get("from"))
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        known = ", ".join(SPEAKERS)
        raise ValueError(f"message {number}: unknown role {speaker!r}; known: {known}")
    role = SPEAKERS[speaker]
    if role == "assistant":
        made = _message_of_assistant(entry, number)
    elif role == "tool":
        made = _result_of_tool(entry, number)
    else:
        _refuse_calls_and_thoughts(entry, role, number)
        content = _text_of_parts(entry.get("content", entry.get("value")), number)
        made = message(role, content, f"message {number}")
    trained = _is_trained_on(entry, number)
    if trained and role != "assistant":
        raise ValueError(
            f"message {number} is the {role}'s and asks to be trained on; only the assistant's are"
        )
    if trained is not None:
        made["trained"] = trained
    return made


def _refuse_calls_and_thoughts(entry: dict, role: str, number: int) -> None:
    """ValueError where a message that is not the assistant's has them."""
    for key in (*CALLS, *THOUGHTS):
        if entry.get(key):
            raise ValueError(f"message {number} is the {role}'s and has {key!r}")


def _message_of_assistant(entry: dict, number: int) -> dict:
    """The assistant's message: its text, behind a thought that stands beside it, and its calls."""
    where = f"message {number}"
    content = entry.get("content", entry.get("value"))
    if entry.get("from") in CALLING or entry.get("role") in CALLING:
        if any(entry.get(key) for key in CALLS):
            raise ValueError(f"{where} has calls in its text and calls beside it; keep one")
        calls = calls_of_text(content, where)
        content = None
    else:
        calls = calls_of_entry(entry, where)
    text = _text_of_parts(content, number)
    thought = _thought_of(entry, number)
    if (calls or thought) and text in (None, []):
        text = ""
    if thought and isinstance(text, str):
        text = _joined(thought, text, number)
    if not calls:
        return message("assistant", text, where)
    made = message("assistant", text, where, may_be_empty=True)
    return {**made, "tool_calls": calls}


def _thought_of(entry: dict, number: int) -> str:
    """The thought beside a message's text; "" without."""
    given = {key: entry[key] for key in THOUGHTS if entry.get(key)}
    thoughts = set()
    for key, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"message {number}: {key!r} is {kind(value)}, expected text")
        thoughts.add(value.strip())
    if len(thoughts) > 1:
        raise ValueError(f"message {number}: {', '.join(given)} contradict each other")
    return thoughts.pop() if thoughts else ""


def _joined(thought: str, text: str, number: int) -> str:
    """A thought and the text that follows it; a text that begins with the same thought as it is."""
    if not text.lstrip().startswith(OPENS):
        return with_thought(thought, text)
    if thought not in text:
        raise ValueError(f"message {number} has one thought in its text and another beside it")
    return text


def _result_of_tool(entry: dict, number: int) -> dict:
    """The message of a tool: its result as text, an object as JSON; it may be empty."""
    _refuse_calls_and_thoughts(entry, "tool", number)
    content = entry.get("content", entry.get("value"))
    is_json = isinstance(content, dict)
    if isinstance(content, list):
        is_json = not all(isinstance(part, dict) and "type" in part for part in content)
    text = json.dumps(content, ensure_ascii=False) if is_json else _text_of_parts(content, number)
    made = message("tool", text, f"message {number}", may_be_empty=True)
    for key in OF_RESULTS:
        if isinstance(entry.get(key), str) and entry[key]:
            made[key] = entry[key]
    return made


def _unused_keys(entry: dict) -> set[str]:
    """The keys of an entry that are given and from which nothing is read."""
    given = {key for key, value in entry.items() if value not in (None, "", [], {})}
    read = {"role", "from", "content", "value", *TRAINED}
    read.update(key for key in (*CALLS, *THOUGHTS) if entry.get(key))
    speaker = entry.get("role", entry.get("from"))
    if SPEAKERS.get(speaker) == "tool":
        read.update(OF_RESULTS)
    return given - read


def _text_of_parts(content: object, number: int) -> object:
    """The text of a message; a list of text parts is joined, as chat templates join them."""
    if not isinstance(content, list) or not content:
        return as_text(content)
    texts = []
    for part in content:
        part_type = part.get("type") if isinstance(part, dict) else kind(part)
        is_text = isinstance(part, dict) and part_type in ("text", "input_text", "output_text")
        if not is_text or not isinstance(part.get("text"), str):
            raise ValueError(
                f"'message {number}' is a list with a part that is no text ({part_type}); expected "
                'text, or parts {"type": "text", "text": ...}'
            )
        texts.append(part["text"])
    return "".join(texts)


def _is_trained_on(entry: dict, number: int) -> bool | None:
    """Whether a message says that it is to be trained on; None where it says nothing."""
    flags = {key: entry[key] for key in TRAINED if entry.get(key) is not None}
    for key, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(
                f"message {number}: {key!r} is {value!r}; expected 0 or 1 (false or true)"
            )
    if not flags:
        return None
    values = [bool(value) for value in flags.values()]
    if any(value != values[0] for value in values):
        raise ValueError(f"message {number}: {', '.join(flags)} contradict each other")
    return values[0]


def context_only_turns(messages: Sequence[dict]) -> frozenset[int]:
    """The assistant's turns, counted from 0, that are not to be trained on.

    ValueError where that is every turn.
    """
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    context_only = set()
    for number, answer in enumerate(answers):
        if answer.get("trained") is False:
            context_only.add(number)
    if answers and len(context_only) == len(answers):
        raise ValueError("no message of the assistant is to be trained on")
    return frozenset(context_only)


def check_turns(messages: Sequence[dict], last: Sequence[str]) -> None:
    """ValueError unless the roles follow each other as a conversation's do and it ends with `last`.

    One system message may come first, then the user and the assistant in turns. Between an
    assistant's message and the assistant's next one stand tools' results, one or more, which
    must follow where the first calls tools (its calls may be spelled in its text too).
    """
    first = 1 if messages and messages[0]["role"] == "system" else 0  # after the system message
    expected: tuple[str, ...] = ("user",)
    for number, turn in enumerate(messages[first:], first + 1):
        if turn["role"] not in expected:
            raise ValueError(
                f"message {number} is the {turn['role']}'s, expected the {expected[0]}'s"
            )
        if turn["role"] == "user":
            expected = ("assistant",)
        elif turn["role"] == "tool":
            expected = ("assistant", "tool")
        elif calls_of(turn):
            expected = ("tool",)
        else:
            expected = ("user", "tool")
    if len(messages) == first or messages[-1]["role"] not in last:
        raise ValueError(f"the conversation does not end with the {' or the '.join(last)}")
