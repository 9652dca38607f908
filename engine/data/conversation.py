"""A record becomes the messages of a conversation: conversation_of(record, shape)."""

from __future__ import annotations

from collections.abc import Sequence

from engine.data.fields import as_text, is_given, kind, message, required_field

SPEAKERS = {  # OpenAI's and ShareGPT's names of roles -> ours
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
# keys by which other programs say that a message is (1) or is not (0) to be trained on
TRAINED = ("weight", "train", "training", "trainable", "loss_mask", "loss")
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
# keys of a message whose text we would leave out of training
UNSUPPORTED = {
    "tool_calls": "tool calls are not supported",
    "function_call": "tool calls are not supported",
    "reasoning_content": "thoughts beside the text are not supported",
    "reasoning": "thoughts beside the text are not supported",
    "thinking": "thoughts beside the text are not supported",
}


def conversation_of(
    record: dict, shape: dict[str, str], need_reference: bool
) -> tuple[list[dict], set[str]]:
    """(the messages, names of keys of messages that were not used).

    A message is {"role", "content"}, and "trained": bool where the record says it. ValueError for
    a record that is no conversation, or needs what is not supported.
    """
    if "messages" in shape:
        messages, unused = _messages_of_a_list(record, shape, need_reference)
    else:
        messages = _messages_of_fields(record, shape, need_reference)
        unused = set()
    if is_given(record, shape, "system"):
        if messages[0]["role"] == "system":
            raise ValueError(f"both a system message and a {shape['system']!r} field; keep one")
        messages.insert(0, message("system", record[shape["system"]], shape["system"]))
    return messages, unused


def _messages_of_fields(
    record: dict, shape: dict[str, str], need_reference: bool
) -> list[dict[str, str]]:
    """The messages of a record that has its prompt and its answer in fields of their own."""
    messages = []
    if is_given(record, shape, "history"):
        name, history = shape["history"], record[shape["history"]]
        fault = f"{name!r} is not a list of [user, assistant] pairs"
        if not isinstance(history, list):
            raise ValueError(fault)
        for i, pair in enumerate(history, 1):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(fault)
            messages.append(message("user", as_text(pair[0]), f"{name} {i}, user"))
            messages.append(message("assistant", as_text(pair[1]), f"{name} {i}, assistant"))
    prompt = as_text(required_field(record, shape["prompt"]))
    messages.append(message("user", prompt, shape["prompt"]))
    if is_given(record, shape, "input"):
        extra = message("user", as_text(record[shape["input"]]), shape["input"])
        messages[-1]["content"] += "\n" + extra["content"]
    if need_reference:
        answer = as_text(required_field(record, shape["response"]))
        messages.append(message("assistant", answer, shape["response"]))
    return messages


def _messages_of_a_list(
    record: dict, shape: dict[str, str], need_reference: bool
) -> tuple[list[dict], set[str]]:
    """The messages of a list of {role, content} or {from, value}, and names of unused keys."""
    name = shape["messages"]
    entries = required_field(record, name)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{name!r} is {kind(entries)}, expected a list of messages")
    messages: list[dict] = []
    unused: set[str] = set()
    for number, entry in enumerate(entries, 1):
        messages.append(_message_of_entry(entry, number))
        unused |= {f"{name}[].{key}" for key in _unused_keys(entry)}
    if not need_reference and messages[-1]["role"] == "assistant":
        messages.pop()
    check_turns(messages, last="assistant" if need_reference else "user")
    return messages, unused


def _message_of_entry(entry: object, number: int) -> dict:
    """The message of one entry of a list; `number` counts from 1 and names it in errors."""
    if not isinstance(entry, dict):
        raise ValueError(f"message {number} is {kind(entry)}, expected an object")
    speaker = entry.get("role", entry.get("from"))
    if isinstance(speaker, str) and speaker in TOOL_ROLES:
        raise ValueError(f"message {number} has the role {speaker!r}: tool calls are not supported")
    for key, why in UNSUPPORTED.items():
        if entry.get(key):
            raise ValueError(f"message {number} has {key!r}: {why}")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        known = ", ".join(SPEAKERS)
        raise ValueError(f"message {number}: unknown role {speaker!r}; known: {known}")
    role = SPEAKERS[speaker]
    text = _text_of_parts(entry.get("content", entry.get("value")), number)
    made = message(role, text, f"message {number}")
    trained = _is_trained_on(entry, number)
    if trained and role != "assistant":
        raise ValueError(
            f"message {number} is the {role}'s and asks to be trained on; only the assistant's are"
        )
    if trained is not None:
        made["trained"] = trained
    return made


def _unused_keys(entry: dict) -> set[str]:
    """The keys of an entry that are given and from which nothing is read."""
    used = {"role", "from", "content", "value", *TRAINED}
    return {key for key, value in entry.items() if value not in (None, "", [], {})} - used


def _text_of_parts(content: object, number: int) -> object:
    """The text of a message; a list of text parts is joined, as chat templates join them."""
    if not isinstance(content, list) or not content:
        return as_text(content)
    for part in content:
        part_type = part.get("type") if isinstance(part, dict) else kind(part)
        is_text = isinstance(part, dict) and part_type in ("text", "input_text", "output_text")
        if not is_text or not isinstance(part.get("text"), str):
            raise ValueError(
                f"'message {number}' is a list with a part that is no text ({part_type}); expected "
                'text, or parts {"type": "text", "text": ...}'
            )
    return "".join(part["text"] for part in content)


def _is_trained_on(entry: dict, number: int) -> bool | None:
    """Whether a message says that it is to be trained on; None where it says nothing."""
    flags = {key: entry[key] for key in TRAINED if entry.get(key) is not None}
    for key, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(
                f"message {number}: {key!r} is {value!r}; expected 0 or 1 (false or true)"
            )
    answers = {bool(value) for value in flags.values()}
    if len(answers) > 1:
        raise ValueError(f"message {number}: {', '.join(flags)} contradict each other")
    return answers.pop() if answers else None


def context_only_turns(messages: Sequence[dict]) -> frozenset[int]:
    """The assistant's turns, counted from 0, that are not to be trained on.

    ValueError where that is every turn.
    """
    turns = [turn.get("trained") for turn in messages if turn["role"] == "assistant"]
    context_only = frozenset(i for i, trained in enumerate(turns) if trained is False)
    if turns and len(context_only) == len(turns):
        raise ValueError("no message of the assistant is to be trained on")
    return context_only


def check_turns(messages: Sequence[dict[str, str]], last: str) -> None:
    """ValueError unless user and assistant alternate and the last message is of the role `last`.

    One system message may come first.
    """
    first = 1 if messages and messages[0]["role"] == "system" else 0
    for i, turn in enumerate(messages[first:]):
        role = ("user", "assistant")[i % 2]
        if turn["role"] != role:
            number = first + i + 1
            raise ValueError(f"message {number} is the {turn['role']}'s, expected the {role}'s")
    if len(messages) == first or messages[-1]["role"] != last:
        raise ValueError(f"the conversation does not end with the {last}")
