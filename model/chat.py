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

Only what a template writes can become a control token: a special token, or an added token that the
template writes around turns, whether the checkpoint marks it special or not. One that a message
spells is replaced by a private-use character before rendering, so that the template trims and joins
as usual, and is afterwards encoded as plain text between the pieces around it. (A template that
edited texts otherwise could still compose such a spelling. Other added tokens, as <think>, are text
like any other.)

An answer that is to be learnt is encoded as the template renders it (`target`), so that it is the
same text as an earlier answer in a context: trimmed where the template trims. A generation prompt
that goes on after what the template writes before a finished answer (DeepSeek-R1-Distill's opens a
think block) is not part of it; `notice` then says so. Spaces that a template writes between an
answer and the token that closes it (one before </s> in Llama 2's) stand in the turns of a prompt,
and are not asked of the model.

No id may lie beyond the model's embeddings: what needs such a token is refused before the weights
are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from model.config import read_json
from model.files import check_file
from model.template import ChatTemplate, TemplateStopped
from model.tokenizer import Tokenizer, any_of, role_ids

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


QUESTION, ANSWER = "A-QUESTION", "AN-ANSWER"  # of the conversation that shows how turns look


@dataclass(frozen=True)
class Target:
    """An answer to be learnt, as ids."""

    prompt: list[int]  # all that the template writes before a finished answer
    answer: list[int]  # the answer and what the template puts around it, no end token
    as_rendered: bool  # False: the template leaves part of the answer out; here it is whole


class Chat:
    """A chat format with its tokenizer.

    name      "checkpoint", or that of a built-in format
    tokenizer to which all tokens that the template writes around turns are special
    end_id    the token that closes an assistant turn (<|im_end|>, </s>, <|eot_id|>)
    end_ids   every token that stops sampling: end_id and the eos of generation_config.json (of
              config.json where that names none)
    now       the one time a template is told, so that a date in its prompt stays the same
    rows      of the model's embeddings: no id may reach it (None: not known)
    notice    a line for the user where the generation prompt is not how the template begins a
              finished answer, else None
    """

    def __init__(
        self,
        template: str,
        tokenizer: Tokenizer,
        *,
        name: str = "checkpoint",
        eos_ids: Sequence[int] = (),
        now: datetime | None = None,
        rows: int | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.now = now or datetime.now()
        self.rows = rows
        self._source = template
        self._template = ChatTemplate(template, name, self.now)
        self._variables = dict(tokenizer.named)
        self._bos = self._opening = ""
        if name in FORMATS:
            self._check_format()
            if tokenizer.add_bos:
                self._bos = tokenizer.named["bos_token"]
            self._variables["bos_token"] = self._bos
        if turn_tokens := self._turn_tokens() - {*tokenizer.special}:
            self.tokenizer = tokenizer.with_control(turn_tokens)
        self._part = re.compile(rf"{any_of(self.tokenizer.added).pattern}|\w+|\W")
        self._find_edges_of_answers()
        self.end_ids = tuple(dict.fromkeys([self.end_id, *eos_ids]))
        self.check_ids(self.end_ids, "which ends an answer")

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
        lacks, when nothing in it closes an assistant turn, and when a token that it writes or that
        ends an answer lies beyond the embeddings (config.json's vocab_size).
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
        return cls(
            template,
            tokenizer,
            name=name,
            eos_ids=checkpoint_eos_ids(path),
            now=now,
            rows=_embedding_rows(path),
        )

    @property
    def source_hash(self) -> str:
        """Tells templates apart: a resumed run must not change its prompts."""
        return hashlib.sha256(self._source.encode()).hexdigest()[:16]

    @property
    def tells_date(self) -> bool:
        """Whether the template asks for the date, so that prompts differ from day to day."""
        return "strftime_now" in self._source

    @property
    def portable_source(self) -> str:
        """The template for programs that give it the tokenizer's own bos_token and eos_token.

        A built-in format gets those that it is rendered with here, and the bos that it opens with.
        Where bos is followed by plain text, the space that is put before a text is written out:
        other programs encode the rendering as one text.
        """
        if self.name not in FORMATS:
            return self._source
        values = {"bos_token": self._bos, "eos_token": self.tokenizer.named.get("eos_token", "")}
        opening = ""
        if self._bos:
            asked = [{"role": "user", "content": QUESTION}]
            opens_itself = self._template_text(asked, True).startswith(self._bos)
            opening = "" if opens_itself else "{{- bos_token }}"
            start = self._encode(self.render(asked, add_generation_prompt=True), {})
            if start != self.tokenizer.encode_template(
                self.render(asked, add_generation_prompt=True)
            ):
                values["bos_token"] += " "
        sets = "".join(f"{{%- set {k} = {json.dumps(v)} %}}" for k, v in values.items())
        return sets + opening + self._source

    def check_ids(self, ids: Sequence[int], what: str = "") -> None:
        """ValueError naming the first of `ids` that lies beyond the model's embeddings."""
        if self.rows is None or not ids or max(ids) < self.rows:
            return
        id = next(id for id in ids if id >= self.rows)
        piece = repr(self.tokenizer.piece(id))
        raise ValueError(
            f"the token {piece}{f', {what},' if what else ''} has the id {id}, but the model has "
            f"embeddings for {self.rows} ids (0 to {self.rows - 1}): tokenizer files and weights "
            "do not fit together; take all from one checkpoint, or leave that token out"
        )

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """The conversation as text. ValueError when it is malformed or the template refuses it.

        A template that ignores `add_generation_prompt` but writes something before every answer has
        that appended, since the model is not to write it.
        """
        turns, spelled = self._masked(messages, add_generation_prompt)
        return self._text(turns, add_generation_prompt).translate(str.maketrans(spelled))

    def prompt_ids(self, messages: Messages, prefix: str = "") -> list[int]:
        """Ids of the conversation and the generation prompt, then of `prefix` (`prefix_ids`)."""
        turns, spelled = self._masked(messages, add_generation_prompt=True)
        return self._encode(self._text(turns, True), spelled) + self.prefix_ids(prefix)

    def target(self, messages: Messages, text: str) -> Target:
        """The answer `text` to `messages` as the template renders it: what a model is to learn.

        The template may trim it or set other space around its parts. Where it leaves some of the
        answer's text out (the reasoning of an answer that is no longer the last), the whole
        answer stands in its place.
        """
        conversation = [*messages, {"role": "assistant", "content": text}]
        turns, spelled = self._masked(conversation, add_generation_prompt=False)
        prompt, whole = self._text(turns[:-1], True), self._text(turns, False)
        answer = turns[-1]["content"]
        before = self._common(prompt, whole)
        begun = prompt[len(before) :]  # of the answer, by the prompt alone
        said = None
        if len(begun) > len(self._header):  # not behind the question: no common conversation
            before, begun = prompt, ""
        else:
            said = self._said(before, whole, answer)
        as_rendered = said is not None
        if said is None:
            said = answer if begun else self._lead + answer
        if not said.strip():
            said = ""
        ids = self._encode_pieces(said, spelled, go_on=True)
        return Target(self._encode(before, spelled), ids, as_rendered)

    def _said(self, before: str, whole: str, answer: str) -> str | None:
        """What of `whole`, behind `before`, is asked of the model; None where the answer is not
        wholly in it, but for space."""
        rendered = whole[len(before) :]
        start = len(self._before) if rendered.startswith(self._before) else 0
        closed = rendered.find(self._closing, start) if self._closing else len(rendered)
        if closed < 0:
            return None
        said = rendered[:closed] if self._closing else rendered.removesuffix(self._after)
        said = said.removesuffix(self._spaces)
        # The prompt may have begun with the answer: a think block that it opens.
        shown = before[len(before) - len(self._header) :] + said.removesuffix(self._tail)
        own = "".join(answer.split())
        return said if own and "".join(shown.split()).endswith(own) else None

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

    def _check_format(self) -> None:
        """ValueError where the tokenizer lacks what a built-in format writes."""
        lacks = set(re.findall(r"<\|\w+\|>", self._source)) - set(self.tokenizer.added)
        if lacks:
            raise ValueError(
                f"chat format {self.name} needs the tokens {sorted(lacks)}, which this "
                f"tokenizer lacks; choose another of {', '.join(FORMATS)}"
            )
        if "eos_token" in self._source and self.tokenizer.eos_id is None:
            named = self.tokenizer.named.get("eos_token")
            why = f"{named!r} is not in its vocabulary" if named else "the tokenizer names none"
            raise ValueError(
                f"chat format {self.name} closes answers with the eos token, and {why}: name "
                "eos_token in tokenizer_config.json"
            )

    def _masked(
        self, messages: Messages, add_generation_prompt: bool
    ) -> tuple[list[dict[str, str]], dict[str, str]]:
        """The checked messages, spelled special tokens masked, and what stands for them."""
        self._check(messages, add_generation_prompt)
        texts, spelled = self._mask([message["content"] for message in messages])
        turns = [
            {"role": message["role"], "content": text}
            for message, text in zip(messages, texts, strict=True)
        ]
        return turns, spelled

    def _template_text(self, turns: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        """What the template alone makes of masked messages."""
        return self._template.render(
            sum(len(turn["content"]) for turn in turns),
            messages=[dict(turn) for turn in turns],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )

    def _text(self, turns: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        """Masked messages as text, with the format's bos and the opening of an answer."""
        text = self._template_text(turns, add_generation_prompt)
        if not text.startswith(self._bos):
            text = self._bos + text
        return text + self._opening if add_generation_prompt else text

    def _turn_tokens(self) -> set[str]:
        """Added tokens that the template writes around finished turns, special or not.

        Those that are blank or a plain word are not taken for control tokens.
        """
        added = any_of(s for s in self.tokenizer.added if not s.strip().isalnum() and s.strip())
        system = {"role": "system", "content": QUESTION}
        asked = {"role": "user", "content": QUESTION}
        answered = [asked, {"role": "assistant", "content": ANSWER}]
        for turns in ([system, *answered, asked], [*answered, asked], answered):
            try:
                return set(added.findall(self._text(turns, False)))
            except TemplateStopped:
                raise
            except ValueError:  # it takes no system message, or one question only
                continue
        return set()

    def _find_edges_of_answers(self) -> None:
        """Find out how the template writes an answer, from one that it is shown.

        _opening  to append to a prompt: the header of a template that never prompts
        _header   what a prompt ends with, behind the question
        _lead     between prompt and answer, where the prompt is a part of the conversation
        _before   between what both have in common and a finished answer
        _closing  the spelling of end_id, or "" where nothing closes a turn
        _tail     between answer and closing; _spaces: the same where it is only spaces, which are
                  not asked of the model
        _after    behind an answer that nothing closes
        """
        asked = [{"role": "user", "content": QUESTION}]
        answered = [*asked, {"role": "assistant", "content": ANSWER}]
        prompt, unprompted = self._text(asked, True), self._text(asked, False)
        whole = self._text(answered, False)
        before, found, self._after = whole.rpartition(ANSWER)
        if not found:
            raise ValueError(f"the {self.name} chat template leaves out the assistant's text")
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        # A template that ignores add_generation_prompt: all but spaces belongs to the prompt.
        self._opening = lead.rstrip(" ") if prompt == unprompted else ""
        prompt += self._opening
        self._lead = lead[len(self._opening) :]

        self._header = prompt.rpartition(QUESTION)[2]
        common = self._common(prompt, before)
        self._before = before[len(common) :]
        self.notice = None
        if len(common) < len(prompt):
            if len(prompt) - len(common) <= len(self._header):
                ends = self._header, whole.rpartition(QUESTION)[2]
                what = "the references are trained on as it writes them, the model's own answers "
                what += "as they were sampled"
            else:
                ends = prompt, whole
                what = "answers are trained on behind the prompt, which it would not write so"
            self.notice = (
                f"the {self.name} chat template ends a prompt with {ends[0]!r} and writes a "
                f"finished answer as {ends[1]!r}: {what}"
            )

        special = self.tokenizer.special
        closing = self.tokenizer.special_pattern.search(self._after)
        self._closing = closing.group() if closing else ""
        self.end_id = special[self._closing] if closing else self.tokenizer.eos_id
        if self.end_id is None:
            raise ValueError(
                f"the {self.name} chat template closes the assistant's turn by no special token "
                "and the tokenizer has no eos_token; name one in tokenizer_config.json"
            )
        self._tail = self._after[: closing.start()] if closing else ""
        self._spaces = "" if self._tail.strip(" ") else self._tail
        self._encode(whole, {})  # ValueError for a token beyond the embeddings
        self._encode(prompt, {})

    def _common(self, prompt: str, text: str) -> str:
        """The prompt where the text begins with it, else what both begin with alike, in whole
        tokens and words."""
        if text.startswith(prompt):
            return prompt
        parts = [self._part.findall(t) for t in (prompt, text)]
        return "".join(os.path.commonprefix(parts))

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
        ids: list[int] = []
        for part in text.split(self._bos)[1:]:  # the format's own bos: those of messages are masked
            ids += [self.tokenizer.bos_id, *self._encode_pieces(part, spelled)]
        return ids

    def _encode_pieces(self, text: str, spelled: dict[str, str], go_on: bool = False) -> list[int]:
        """Ids of rendered text, stand-ins encoded as the text they spell."""
        ids: list[int] = []
        parts = re.split(f"([{''.join(spelled)}])", text) if spelled else [text]
        for part in filter(None, parts):
            if part in spelled:
                ids += self.tokenizer.encode(spelled[part], continues=go_on)
            else:
                ids += self.tokenizer.encode_template(part, continues=go_on)
            go_on = True
        self.check_ids(ids)
        return ids


def checkpoint_eos_ids(path: Path) -> list[int]:
    """The end tokens of generation_config.json, of config.json where that names none."""
    found = role_ids(path / "generation_config.json", "eos_token")
    return found or role_ids(path / "config.json", "eos_token")


def _embedding_rows(path: Path) -> int | None:
    """config.json's vocab_size, None where it says nothing that could be one."""
    rows = read_json(path / "config.json", {}).get("vocab_size")
    return rows if type(rows) is int and rows > 0 else None


def _checkpoint_template(path: Path) -> str:
    """The source of the checkpoint's default chat template."""
    file = path / "chat_template.jinja"  # takes precedence over tokenizer_config.json
    if file.exists():
        check_file(file)
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}") from None
    found = read_json(path / "tokenizer_config.json", {}).get("chat_template")
    if isinstance(found, list) and all(
        isinstance(entry, dict) and {"name", "template"} <= {*entry} for entry in found
    ):
        named = {str(entry["name"]): entry["template"] for entry in found}
        if "default" not in named:
            raise ValueError(
                f"{path} has the chat templates {sorted(named)} but no 'default'; "
                f"choose --chat-format: {', '.join(FORMATS)}"
            )
        found = named["default"]
    if found is None:
        raise ValueError(
            f"{path} has no chat template (chat_template.jinja, or chat_template in "
            f"tokenizer_config.json); choose --chat-format: {', '.join(FORMATS)}"
        )
    if not isinstance(found, str):
        raise ValueError(
            f"{path / 'tokenizer_config.json'}: chat_template is a {type(found).__name__}; the "
            "text of a template, or a list of named ones, is wanted"
        )
    return found
