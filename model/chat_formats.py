"""Chat formats: the built-in templates, and the files in which a checkpoint keeps its own.

  chatml   <|im_start|>role, text, <|im_end|> for every turn.
  llama3   <|start_header_id|>role<|end_header_id|>, trimmed text, <|eot_id|>.
  llama2   [INST] user [/INST] assistant </s>, each pair opened by bos, a system message in <<SYS>>
           inside the first user turn; texts trimmed.
  alpaca   "Below is an instruction ...", ### Instruction:, ### Response:. A system message takes
           the place of that first sentence. An earlier answer is closed by eos, and the next
           ### Instruction: follows after a blank line.

A built-in format takes an optional system message, then user and assistant in turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.config import read_json
from model.file_checks import check_file
from model.messages import Messages, calls_of, tools_of
from model.tokenizer_base import Tokenizer
from model.tokenizer_files import role_ids

TEMPLATES = {
    "chatml": r"""
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama2": r"""
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'user' %}
{%- set text = message.content %}
{%- if loop.first and messages[0].role == 'system' %}
{%- set text = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' + text %}
{%- endif %}
{{- bos_token + '[INST] ' + text | trim + ' [/INST]' }}
{%- else %}
{{- ' ' + message.content | trim + ' ' + eos_token }}
{%- endif %}
{%- endfor %}""",
    "llama3": r"""
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}""",
    "alpaca": r"""
{%- if messages[0].role == 'system' %}
{{- messages[0].content }}
{%- else %}
{{- 'Below is an instruction that describes a task. '
  + 'Write a response that appropriately completes the request.' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'user' %}
{{- '\n\n### Instruction:\n' + message.content + '\n\n### Response:\n' }}
{%- else %}
{{- message.content + eos_token }}
{%- endif %}
{%- endfor %}""",
}
FORMATS = tuple(TEMPLATES)
ADDITIONAL_TEMPLATES = "additional_chat_templates"  # a checkpoint's directory: NAME.jinja


def check_turns(format_name: str, messages: Messages, add_generation_prompt: bool) -> None:
    """ValueError for tools, and for an order of roles that a built-in format cannot take."""
    roles = [message["role"] for message in messages]
    uses_tools = tools_of(messages) is not None or any(calls_of(turn) for turn in messages)
    if uses_tools or "tool" in roles:
        raise ValueError(
            f"chat format {format_name} has no form for tools and their calls; use a checkpoint "
            "whose own chat template writes them"
        )
    turns = roles[1:] if roles[0] == "system" else roles
    alternate = all(role == "user" for role in turns[0::2])
    alternate = alternate and all(role == "assistant" for role in turns[1::2])
    ends_with_user = turns[-1:] == ["user"]
    if not turns or not alternate or (add_generation_prompt and not ends_with_user):
        raise ValueError(
            f"chat format {format_name} cannot take the roles {roles}; expected an optional "
            "system message, then user and assistant in turns (a prompt ends with user)"
        )


def check_tokenizer(format_name: str, tokenizer: Tokenizer) -> None:
    """ValueError where the tokenizer lacks tokens that a built-in format writes."""
    source = TEMPLATES[format_name]
    missing = set(re.findall(r"<\|\w+\|>", source)) - set(tokenizer.added)
    if missing:
        raise ValueError(
            f"chat format {format_name} needs the tokens {sorted(missing)}, which this "
            f"tokenizer lacks; choose another of {', '.join(FORMATS)}"
        )
    if "eos_token" in source and tokenizer.eos_id is None:
        named = tokenizer.named.get("eos_token")
        why = f"{named!r} is not in its vocabulary" if named else "the tokenizer names none"
        raise ValueError(
            f"chat format {format_name} closes answers with the eos token, and {why}: name "
            "eos_token in tokenizer_config.json"
        )


def checkpoint_template(path: Path) -> str:
    """The source of the checkpoint's default chat template; ValueError where it has none."""
    file = path / "chat_template.jinja"  # takes precedence over tokenizer_config.json
    if file.exists():
        return _read_template(file)
    template = read_json(path / "tokenizer_config.json", {}).get("chat_template")
    named = _named_templates(template)
    if named is not None:
        if "default" not in named:
            raise ValueError(
                f"{path} has the chat templates {sorted(named)} but no 'default'; "
                f"choose --chat-format: {', '.join(FORMATS)}"
            )
        template = named["default"]
    if template is None:
        raise ValueError(
            f"{path} has no chat template (chat_template.jinja, or chat_template in "
            f"tokenizer_config.json); choose --chat-format: {', '.join(FORMATS)}"
        )
    if not isinstance(template, str):
        raise ValueError(
            f"{path / 'tokenizer_config.json'}: chat_template is a {type(template).__name__}; "
            "expected the text of a template, or a list of named ones"
        )
    return template


def checkpoint_tool_template(path: Path) -> str | None:
    """The source of the chat template "tool_use", which Hermes' checkpoints have beside the default
    one, for conversations with tools; None where there is none."""
    file = path / ADDITIONAL_TEMPLATES / "tool_use.jinja"
    if file.exists():
        return _read_template(file)
    if (path / "chat_template.jinja").exists():
        return None
    named = _named_templates(read_json(path / "tokenizer_config.json", {}).get("chat_template"))
    template = (named or {}).get("tool_use")
    return template if isinstance(template, str) else None


def change_templates(path: Path, change: Callable[[str], str]) -> None:
    """Put `change(source)` in the place of every chat template of a checkpoint's directory."""
    for file in (path / "chat_template.jinja", *(path / ADDITIONAL_TEMPLATES).glob("*.jinja")):
        if file.exists():
            file.write_text(change(_read_template(file)), encoding="utf-8")
    settings_file = path / "tokenizer_config.json"
    settings = read_json(settings_file, {})
    template = settings.get("chat_template")
    named = _named_templates(template)
    if isinstance(template, str):
        settings["chat_template"] = change(template)
    elif named is not None:
        changed = {name: change(str(source)) for name, source in named.items()}
        settings["chat_template"] = [
            {"name": name, "template": source} for name, source in changed.items()
        ]
    else:
        return
    write_settings(settings_file, settings)


def write_settings(file: Path, settings: dict[str, Any]) -> None:
    """Write one of the small JSON files of a checkpoint's directory."""
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


def _read_template(file: Path) -> str:
    """The text of a template's file; ValueError where it is not UTF-8."""
    check_file(file)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None


def _named_templates(template: object) -> dict[str, object] | None:
    """{name: source} of a list of named chat templates; None for any other value."""
    if not isinstance(template, list) or not all(_is_named_template(each) for each in template):
        return None
    return {str(each["name"]): each["template"] for each in template}


def _is_named_template(entry: object) -> bool:
    """Whether an entry of a list of chat templates has the form {"name": ..., "template": ...}."""
    return isinstance(entry, dict) and "name" in entry and "template" in entry


def checkpoint_eos_ids(path: Path) -> list[int]:
    """The end tokens of generation_config.json, of config.json where that names none."""
    ids = role_ids(path / "generation_config.json", "eos_token")
    return ids or role_ids(path / "config.json", "eos_token")


def embedding_rows(path: Path) -> int | None:
    """config.json's vocab_size, None where it gives none that is a positive integer."""
    rows = read_json(path / "config.json", {}).get("vocab_size")
    return rows if type(rows) is int and rows > 0 else None
