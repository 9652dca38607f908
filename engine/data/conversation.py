"""A record becomes the messages of a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from engine.data.fields import as_text, is_given, kind, message, required_field

SPEAKERS = {  # OpenAI's names and ShareGPT's
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
# what other programs call it when a message is not, or alone is, to be trained on
TRAINED = ("weight", "train", "training", "trainable", "loss_mask", "loss")
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
# keys of a message whose text would be missing from what is trained on
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
    """The messages, and names of keys of messages that were not used."""
    if "messages" in shape:
        messages, extra = _messages_of_a_list(record, shape, need_reference)
    else:
        messages, extra = _messages_of_fields(record, shape, need_reference), set()
    if is_given(record, shape, "system"):
        if messages[0]["role"] == "system":
            raise ValueError(f"both a system message and a {shape['system']!r} field; keep one")
        messages.insert(0, message("system", record[shape["system"]], shape["system"]))
    return messages, extra


def _messages_of_fields(
    record: dict, shape: dict[str, str], need_reference: bool
) -> list[dict[str, str]]:
    """The messages of a record that has its prompt and its answer in fields of their own."""
    messages = []
    if is_given(record, shape, "history"):
        name, history = shape["history"], record[shape["history"]]
        for i, pair in enumerate(history if isinstance(history, list) else [None], 1):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"{name!r} is not a list of [user, assistant] pairs")
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
    """The messages of a list of {role, content} or {from, value}, "trained" beside them where a
    message says it; and the names of their keys that are not used."""
    name = shape["messages"]
    entries = required_field(record, name)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{name!r} is {kind(entries)}, wanted a list of messages")
    messages: list[dict] = []
    extra: set[str] = set()
    for i, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"message {i} is {kind(entry)}, wanted an object")
        role = entry.get("role", entry.get("from"))
        if isinstance(role, str) and role in TOOL_ROLES:
            raise ValueError(f"message {i} has the role {role!r}: tool calls are not supported")
        for key, why in UNSUPPORTED.items():
            if entry.get(key):
                raise ValueError(f"message {i} has {key!r}: {why}")
        if not isinstance(role, str) or role not in SPEAKERS:
            raise ValueError(f"message {i}: unknown role {role!r}; known: {', '.join(SPEAKERS)}")
        text = _text_of_parts(entry.get("content", entry.get("value")), i)
        said = message(SPEAKERS[role], text, f"message {i}")
        trained = _is_trained_on(entry, i)
        if trained and said["role"] != "assistant":
            raise ValueError(
                f"message {i} is the {said['role']}'s and asks to be trained on; only the "
                "assistant's are"
            )
        used = ("role", "from", "content", "value", *TRAINED)
        given = {key for key, value in entry.items() if value not in (None, "", [], {})}
        extra |= {f"{name}[].{key}" for key in given - set(used)}
        messages.append(said if trained is None else said | {"trained": trained})
    if not need_reference and messages[-1]["role"] == "assistant":
        messages.pop()
    check_turns(messages, last="assistant" if need_reference else "user")
    return messages, extra


def _text_of_parts(content: object, number: int) -> object:
    """The text of a message; parts that are all text are joined, as chat templates join them."""
    if not isinstance(content, list) or not content:
        return as_text(content)
    for part in content:
        fine = isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text")
        if not fine or not isinstance(part.get("text"), str):
            what = part.get("type") if isinstance(part, dict) else kind(part)
            raise ValueError(
                f"'message {number}' is a list with a part that is no text ({what}); wanted text, "
                'or parts {"type": "text", "text": ...}'
            )
    return "".join(part["text"] for part in content)


def _is_trained_on(entry: dict, number: int) -> bool | None:
    """What a message says of its being trained on; None where it says nothing."""
    said = {key: entry[key] for key in TRAINED if entry.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(
                f"message {number}: {key!r} is {value!r}; 0 or 1 (false or true) is supported"
            )
    if len({bool(value) for value in said.values()}) > 1:
        raise ValueError(f"message {number}: {', '.join(said)} contradict each other")
    return bool(next(iter(said.values()))) if said else None


def context_only_turns(messages: Sequence[dict]) -> frozenset[int]:
    """The numbers of the assistant's turns that are not to be trained on."""
    turns = [said.get("trained") for said in messages if said["role"] == "assistant"]
    silent = frozenset(i for i, trained in enumerate(turns) if trained is False)
    if turns and len(silent) == len(turns):
        raise ValueError("no message of the assistant is to be trained on")
    return silent


def check_turns(messages: Sequence[dict[str, str]], last: str) -> None:
    """ValueError unless user and assistant alternate, a system message at most coming first, and
    `last` speaks last."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    for i, said in enumerate(messages[first:]):
        wanted = ("user", "assistant")[i % 2]
        if said["role"] != wanted:
            number = first + i + 1
            raise ValueError(f"message {number} is the {said['role']}'s, wanted the {wanted}'s")
    if len(messages) == first or messages[-1]["role"] != last:
        raise ValueError(f"the conversation does not end with the {last}")
