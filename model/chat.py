"""Conversations as a model was trained to see them: chat templates, and where an answer begins.

A conversation is a sequence of `{"role": "system" | "user" | "assistant", "content": str}`. `Chat`
turns it into a prompt's ids with the checkpoint's own template (Jinja, in an immutable sandbox,
with what transformers gives a template) or with one of the built-in FORMATS:

  chatml   <|im_start|>role, text, <|im_end|> for every turn.
  llama3   <|start_header_id|>role<|end_header_id|>, trimmed text, <|eot_id|>.
  llama2   [INST] user [/INST] assistant </s>, each pair opened by bos, a system message in <<SYS>>
           inside the first user turn; texts trimmed.
  alpaca   "Below is an instruction ...", ### Instruction:, ### Response:. A system message takes
           the place of that first sentence. An earlier answer is closed by eos, and the next
           ### Instruction: follows after a blank line.

A built-in format takes an optional system message, then user and assistant in turns. Where the
checkpoint wants bos before every text, the format opens with it, and what follows a bos is encoded
as the start of a text (for Llama 2: with the space that goes there), as Meta did. A checkpoint's
template writes its own bos and is encoded as transformers encodes it.

Only what a template writes can become a control token. A special token that a message spells is
replaced by a private-use character before rendering, so that the template trims and joins as usual,
and is afterwards encoded as plain text between the pieces around it. (A template that edited texts
otherwise could still compose such a spelling. Added tokens that the checkpoint does not mark
special are text like any other.)

What a template writes between an answer and the token that closes it (the space before </s> in
Llama 2's) stands in the turns of a prompt, and is not asked of the model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.config import read_json
from model.files import check_file
from model.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]

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


class Chat:
    """A chat format with its tokenizer.

    name      "checkpoint", or that of a built-in format
    end_id    the token that closes an assistant turn (<|im_end|>, </s>, <|eot_id|>)
    end_ids   every token that stops sampling: end_id and the eos of generation_config.json (of
              config.json where that names none)
    now       the one time a template is told, so that a date in its prompt stays the same
    """

    def __init__(
        self,
        template: str,
        tokenizer: Tokenizer,
        *,
        name: str = "checkpoint",
        eos_ids: Sequence[int] = (),
        now: datetime | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.now = now or datetime.now()
        self._source = template
        try:
            self._template = _environment(self.now).from_string(template)
        except jinja2.TemplateError as error:
            raise ValueError(f"the {name} chat template is not valid Jinja: {error}") from error
        self._variables = dict(tokenizer.named)
        self._bos = self._opening = ""
        if name in FORMATS:
            lacks = set(re.findall(r"<\|\w+\|>", template)) - set(tokenizer.special)
            if lacks:
                raise ValueError(
                    f"chat format {name} needs the special tokens {sorted(lacks)}, which this "
                    f"tokenizer lacks; choose another of {', '.join(FORMATS)}"
                )
            if tokenizer.add_bos:
                self._bos = tokenizer.named["bos_token"]
            self._variables["bos_token"] = self._bos
        self._opening, self._lead, self.end_id = self._find_edges_of_answers()
        self.end_ids = tuple(dict.fromkeys([self.end_id, *eos_ids]))

    @classmethod
    def from_dir(
        cls,
        path: str | Path,
        tokenizer: Tokenizer,
        chat_format: str | None = None,
        *,
        now: datetime | None = None,
    ) -> Chat:
        """The chat format of the checkpoint directory `path`, or the built-in one asked for.

        ValueError when there is none, when the format is unknown or needs tokens that the tokenizer
        lacks, and when nothing in it closes an assistant turn.
        """
        path = Path(path)
        if chat_format is None:
            name, template = "checkpoint", _checkpoint_template(path)
        elif chat_format in FORMATS:
            name, template = chat_format, TEMPLATES[chat_format]
        else:
            raise ValueError(
                f"chat format {chat_format!r} is unknown; choose one of {', '.join(FORMATS)}"
            )
        eos = read_json(path / "generation_config.json", {}).get("eos_token_id")
        if eos is None:
            eos = read_json(path / "config.json", {}).get("eos_token_id")
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return cls(template, tokenizer, name=name, eos_ids=eos_ids, now=now)

    @property
    def source_hash(self) -> str:
        """Tells templates apart: a resumed run must not change its prompts."""
        return hashlib.sha256(self._source.encode()).hexdigest()[:16]

    @property
    def tells_date(self) -> bool:
        """Whether the template asks for the date, so that prompts differ from day to day."""
        return "strftime_now" in self._source

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """The conversation as text. ValueError when it is malformed or the template refuses it.

        A template that ignores `add_generation_prompt` but writes something before every answer has
        that appended, since the model is not to write it.
        """
        text, spelled = self._render(messages, add_generation_prompt)
        return text.translate(str.maketrans(spelled))

    def prompt_ids(self, messages: Messages, prefix: str = "") -> list[int]:
        """Ids of the conversation and the generation prompt, then of `prefix` (`prefix_ids`)."""
        text, spelled = self._render(messages, add_generation_prompt=True)
        return self._encode(text, spelled) + self.prefix_ids(prefix)

    def prefix_ids(self, prefix: str) -> list[int]:
        """Ids of a forced beginning of the answer.

        Spaces at its end are left to the text that goes on, whose first token carries them. The
        whole answer's ids are `prefix_ids(prefix)` and the ids sampled after them.
        """
        prefix = prefix.rstrip(" ")
        return self.response_ids(prefix) if prefix else []

    def response_ids(self, text: str, prefix: str = "") -> list[int]:
        """Ids of an answer as it goes on after `prompt_ids(messages, prefix)`, no end token.

        What the template writes between the generation prompt and the answer (the space after
        [/INST]) is part of it. Where an answer's first token would merge with the prompt's last
        (an answer that begins with a line break), or the vocabulary cuts the prompt's last line
        breaks otherwise before a word, ids differ from the whole conversation encoded at once.
        """
        spoken = prefix.rstrip(" ")
        lead = prefix[len(spoken) :] if spoken else self._lead
        (text,), spelled = self._mask([text])
        return self._encode_pieces(lead + text, spelled, go_on=True)

    def spells_special(self, messages: Messages) -> bool:
        """Whether a message spells a special token, so that `prompt_ids` encodes it piecewise."""
        pattern = self.tokenizer.special_pattern
        return any(pattern.search(message["content"]) for message in messages)

    def _check(self, messages: Messages, add_generation_prompt: bool) -> None:
        """ValueError for malformed messages, or an order that a built-in format cannot take."""
        if not messages:
            raise ValueError("the conversation is empty; wanted at least one message")
        for n, message in enumerate(messages):
            role, content = message.get("role"), message.get("content")
            if role not in ("system", "user", "assistant") or not isinstance(content, str):
                raise ValueError(
                    f"message {n} has role {role!r} and content of type {type(content).__name__}; "
                    "wanted system, user or assistant and a string"
                )
        if self.name in FORMATS:
            roles = [message["role"] for message in messages]
            turns = roles[1:] if roles[0] == "system" else roles
            wanted = [("user", "assistant")[n % 2] for n in range(len(turns))]
            if not turns or turns != wanted or add_generation_prompt and turns[-1] != "user":
                raise ValueError(
                    f"chat format {self.name} cannot take the roles {roles}; wanted an optional "
                    "system message, then user and assistant in turns (a prompt ends with user)"
                )

    def _render(
        self, messages: Messages, add_generation_prompt: bool
    ) -> tuple[str, dict[str, str]]:
        """The conversation as text, spelled special tokens masked, and what stands for them."""
        self._check(messages, add_generation_prompt)
        texts, spelled = self._mask([message["content"] for message in messages])
        turns = [
            {"role": message["role"], "content": text}
            for message, text in zip(messages, texts, strict=True)
        ]
        try:
            text = self._template.render(
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the {self.name} chat template refuses this conversation: {error}"
            ) from error
        if not text.startswith(self._bos):
            text = self._bos + text
        return text + self._opening if add_generation_prompt else text, spelled

    def _find_edges_of_answers(self) -> tuple[str, str, int]:
        """What to append to a prompt, what comes before an answer, the id that closes it."""
        asked = [{"role": "user", "content": "A-QUESTION"}]
        answered = [*asked, {"role": "assistant", "content": "AN-ANSWER"}]
        prompt, _ = self._render(asked, add_generation_prompt=True)
        unprompted, _ = self._render(asked, add_generation_prompt=False)
        whole, _ = self._render(answered, add_generation_prompt=False)
        before, found, after = whole.rpartition("AN-ANSWER")
        if not found:
            raise ValueError(f"the {self.name} chat template leaves out the assistant's text")
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        # A template that ignores add_generation_prompt: all but spaces belongs to the prompt.
        opening = lead.rstrip(" ") if prompt == unprompted else ""
        lead = lead[len(opening) :]
        closing = self.tokenizer.special_pattern.search(after)
        end_id = self.tokenizer.special[closing.group()] if closing else self.tokenizer.eos_id
        if end_id is None:
            raise ValueError(
                f"the {self.name} chat template closes the assistant's turn by no special token "
                "and the tokenizer has no eos_token; name one in tokenizer_config.json"
            )
        return opening, lead, end_id

    def _mask(self, texts: Sequence[str]) -> tuple[Sequence[str], dict[str, str]]:
        """`texts` with each spelled special token as one private-use character, and what those are.

        Characters that occur in the texts or the template are not used.
        """
        pattern = self.tokenizer.special_pattern
        spelled = sorted({match for text in texts for match in pattern.findall(text)})
        if not spelled:
            return texts, {}
        taken = set(self._source).union(*texts)
        free = [c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in taken][: len(spelled)]
        stand_in = dict(zip(spelled, free, strict=True))
        masked = [pattern.sub(lambda match: stand_in[match.group()], text) for text in texts]
        return masked, {character: spelling for spelling, character in stand_in.items()}

    def _encode(self, text: str, spelled: dict[str, str]) -> list[int]:
        """Ids of a rendered conversation; `spelled` is what `_mask` gave."""
        if not self._bos:
            return self._encode_pieces(text, spelled)
        ids = []
        for part in text.split(self._bos)[1:]:  # the format's own bos: those of messages are masked
            ids += [self.tokenizer.bos_id, *self._encode_pieces(part, spelled)]
        return ids

    def _encode_pieces(self, text: str, spelled: dict[str, str], go_on: bool = False) -> list[int]:
        """Ids of rendered text, stand-ins encoded as the text they spell."""
        if not spelled:
            return self.tokenizer.encode_template(text, continues=go_on)
        ids: list[int] = []
        for part in filter(None, re.split(f"([{''.join(spelled)}])", text)):
            if part in spelled:
                ids += self.tokenizer.encode(spelled[part], continues=go_on)
            else:
                ids += self.tokenizer.encode_template(part, continues=go_on)
            go_on = True
        return ids


def _checkpoint_template(path: Path) -> str:
    """The source of the checkpoint's default chat template."""
    file = path / "chat_template.jinja"  # takes precedence over tokenizer_config.json
    check_file(file)
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = read_json(path / "tokenizer_config.json", {}).get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        if "default" not in named:
            raise ValueError(
                f"{path} has the chat templates {sorted(named)} but no 'default'; "
                f"choose --chat-format: {', '.join(FORMATS)}"
            )
        return named["default"]
    if found is None:
        raise ValueError(
            f"{path} has no chat template (chat_template.jinja, or chat_template in "
            f"tokenizer_config.json); choose --chat-format: {', '.join(FORMATS)}"
        )
    return found


class _Generation(Extension):
    """`{% generation %}` marks an answer for trainers that mask by it; here it is just rendered."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""
    version = tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3])
    if version < (3, 1, 6):  # older sandboxes can be escaped, and templates are strangers' programs
        raise ValueError(
            f"jinja2 {jinja2.__version__} cannot run a checkpoint's template safely -> "
            "pip install -U 'jinja2>=3.1.6'"
        )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own would escape <, >, & and ' for HTML.
        style = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **style)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment
