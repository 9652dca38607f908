"""Conversations as a model was trained to see them: chat templates, and where an answer begins.

A conversation is a sequence of messages (model/messages.py): roles, texts, calls of tools. `Chat`
turns it into a prompt's ids with the checkpoint's own template (Jinja, in the sandbox of
model/template.py) or with a built-in format (model/chat_formats.py).

bos. Where the checkpoint needs bos before every text, a built-in format opens with it, and the text
after a bos is encoded as the start of a text (for Llama 2: with the space that goes there), as Meta
did. A checkpoint's template writes its own bos and is encoded as transformers encodes it.

Control tokens. Only text that a template writes can become a control token: a special token, or an
added token that the template writes around turns, whether the checkpoint marks it special or not. A
control token that a message spells is replaced by a private-use character (its stand-in) before
rendering, so that the template trims and joins as usual, and is afterwards encoded as plain text
between the pieces around it. (A template that edited texts otherwise could still compose such a
spelling. Other added tokens, as <tool_call>, are text like any other; so are <think> and </think>
in any case.)

Targets. An answer that is to be learnt is encoded as the template renders it (`target`), so that it
is the same text as an earlier answer in a context: trimmed where the template trims. The generation
prompt may continue after the text that the template writes before a finished answer
(DeepSeek-R1-Distill's opens a think block); that continuation is not part of a target, and `notice`
tells the user. Spaces that a template writes between an answer and the token that closes it (one
before </s> in Llama 2's) stand in the turns of a prompt and are not part of a target.

Tools. A template is handed the tools of a conversation, and messages with their calls. A template
that leaves out one of the three (tools, calls, results) is found by rendering made ones, and is
refused where the conversation has them. An answer that calls tools is learnt as the template writes
it, with the token that closes such an answer (model/chat_tools.py).

No id may lie beyond the model's embeddings: a template or a text that needs such a token is refused
before the weights are used.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from model.chat_formats import (
    FORMATS,
    TEMPLATES,
    check_tokenizer,
    check_turns,
    checkpoint_eos_ids,
    checkpoint_template,
    checkpoint_tool_template,
    embedding_rows,
)
from model.chat_notice import notice_of_prompt
from model.chat_sources import ChatSources, with_default
from model.chat_tools import CallEdges, ToolProbes, check_stops
from model.control_tokens import ANSWER, QUESTION, Masked, mask, turn_tokens
from model.messages import (
    Message,
    Messages,
    calls_of,
    check_messages,
    texts_of,
    tools_of,
    without_tools,
)
from model.tokenizer_base import Tokenizer, any_of


@dataclass(frozen=True)
class Target:
    """An answer to be learnt, as ids."""

    prompt: list[int]  # everything that the template writes before a finished answer
    answer: list[int]  # the answer and the text that the template puts around it, no end token
    # False: the template leaves part of the answer out; here it is whole, but for text beside calls
    as_rendered: bool


class Chat:
    """A chat format with its tokenizer.

    template  Jinja; tool_template is another for conversations that have tools, None: the same
    enable_thinking  told to the templates; None: they decide (model/chat_sources.py)
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
        tool_template: str | None = None,
        enable_thinking: bool | None = None,
        name: str = "checkpoint",
        eos_ids: Sequence[int] = (),
        now: datetime | None = None,
        rows: int | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.now = now or datetime.now()
        self.rows = rows
        self.sources = ChatSources(name, template, tool_template, enable_thinking)
        self._template, self._tool_template = self.sources.compiled(self.now)
        self._variables = tokenizer.named | self.sources.variables
        self._bos = ""
        self._opening = ""
        if name in FORMATS:
            check_tokenizer(name, tokenizer)
            if tokenizer.add_bos:
                self._bos = tokenizer.named["bos_token"]
            self._variables["bos_token"] = self._bos
        turns = turn_tokens(self._text, tokenizer.added)
        not_yet_special = turns - set(tokenizer.special)
        if not_yet_special:
            self.tokenizer = tokenizer.with_control(not_yet_special)
        added_token = any_of(self.tokenizer.added).pattern
        self._part = re.compile(rf"{added_token}|\w+|\W")
        self._find_edges_of_answers()
        self.end_ids = tuple(dict.fromkeys([self.end_id, *eos_ids]))  # each once, end_id first
        self.check_ids(self.end_ids, "which ends an answer")

    @classmethod
    def from_dir(
        cls,
        path: str | Path,
        tokenizer: Tokenizer,
        chat_format: str | None = None,
        *,
        now: datetime | None = None,
        enable_thinking: bool | None = None,
    ) -> Chat:
        """The chat format of the checkpoint directory `path`, or the built-in `chat_format`.

        ValueError when there is none, when the format is unknown or needs tokens that the tokenizer
        lacks, when nothing in it closes an assistant turn, when a token that it writes or that ends
        an answer lies beyond the embeddings (config.json's vocab_size), and when `enable_thinking`
        is set and the template does not read it.
        """
        path = Path(path)
        tool_template = None
        if chat_format is None:
            name, template = "checkpoint", checkpoint_template(path)
            tool_template = checkpoint_tool_template(path)
        elif chat_format in FORMATS:
            name, template = chat_format, TEMPLATES[chat_format]
        else:
            raise ValueError(
                f"chat format {chat_format!r} is unknown; choose one of {', '.join(FORMATS)}"
            )
        return cls(
            template,
            tokenizer,
            tool_template=tool_template,
            enable_thinking=enable_thinking,
            name=name,
            eos_ids=checkpoint_eos_ids(path),
            now=now,
            rows=embedding_rows(path),
        )

    @property
    def portable_source(self) -> str:
        """The template for programs that give it the tokenizer's own bos_token and eos_token.

        Where they do not say whether to think, it does as here. A built-in format gets the tokens
        that it is rendered with here, and the bos that it opens with.
        Where bos is followed by plain text, the space that is put before a text is written out:
        other programs encode the rendering as one text.
        """
        source = self.sources.template
        if self.name not in FORMATS:
            return with_default(source, self.sources.enable_thinking)
        bos_token = self._bos
        eos_token = self.tokenizer.named.get("eos_token", "")
        opening = ""
        if self._bos:
            question = [{"role": "user", "content": QUESTION}]
            if not self._template_text(question, True).startswith(self._bos):
                opening = "{{- bos_token }}"
            rendered = self.render(question, add_generation_prompt=True)
            if self._encode(rendered, {}) != self.tokenizer.encode_template(rendered):
                bos_token += " "
        set_bos = f"{{%- set bos_token = {json.dumps(bos_token)} %}}"
        set_eos = f"{{%- set eos_token = {json.dumps(eos_token)} %}}"
        return set_bos + set_eos + opening + source

    def check_ids(self, ids: Sequence[int], note: str = "") -> None:
        """ValueError naming the first of `ids` that lies beyond the model's embeddings.

        `note` is a clause of the message that describes the token.
        """
        if self.rows is None or not ids or max(ids) < self.rows:
            return
        too_large = [id for id in ids if id >= self.rows]
        id = too_large[0]
        token = f"the token {self.tokenizer.piece(id)!r}"
        if note:
            token += f", {note},"
        raise ValueError(
            f"{token} has the id {id}, but the model has "
            f"embeddings for {self.rows} ids (0 to {self.rows - 1}): tokenizer files and weights "
            "do not fit together; take all from one checkpoint, or leave that token out"
        )

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """The conversation as text. ValueError when it is malformed or the template refuses it.

        A template that ignores `add_generation_prompt` but writes something before every answer has
        that appended, since the model is not to write it.
        """
        turns, stand_ins = self._masked(messages, add_generation_prompt)
        text = self._text(turns, add_generation_prompt)
        return text.translate(str.maketrans(stand_ins))

    def prompt_ids(self, messages: Messages, prefix: str = "") -> list[int]:
        """Ids of the conversation and the generation prompt, then of `prefix` (`prefix_ids`)."""
        turns, stand_ins = self._masked(messages, add_generation_prompt=True)
        prompt = self._text(turns, add_generation_prompt=True)
        return self._encode(prompt, stand_ins) + self.prefix_ids(prefix)

    def target(self, messages: Messages, answer: str | Message) -> Target:
        """The answer to `messages` as the template renders it: the text a model learns.

        answer: its text, or the assistant's message, which may call tools.

        The template may trim it or set other space around its parts. Where it leaves some of the
        answer's text out (the reasoning of an answer that is no longer the last), the whole
        answer stands in its place; beside calls it is left out. ValueError for calls that the
        template does not write.
        """
        if isinstance(answer, str):
            answer = {"role": "assistant", "content": answer}
        conversation = [*messages, answer]
        turns, stand_ins = self._masked(conversation, add_generation_prompt=False)
        if calls_of(answer):
            return self._target_of_calls(turns, stand_ins)
        return self._target_of_text(turns, stand_ins)

    def _target_of_text(self, turns: list[dict[str, Any]], stand_ins: dict[str, str]) -> Target:
        """`target` for an answer of text alone, the last of the masked turns."""
        answer = turns[-1]["content"]
        prompt = self._text(turns[:-1], add_generation_prompt=True)
        whole = self._text(turns, add_generation_prompt=False)
        before = self._common(prompt, whole)
        opened = prompt[len(before) :]  # the beginning of an answer that only the prompt writes
        rendered = None
        if len(opened) > len(self._header):  # nothing in common after the question
            before = prompt
            opened = ""
        else:
            rendered = self._rendered_answer(before, whole, answer)
        as_rendered = rendered is not None
        if rendered is None:
            rendered = answer if opened else self._lead + answer
        if not rendered.strip():
            rendered = ""
        answer_ids = self._encode_pieces(rendered, stand_ins, continues=True)
        prompt_ids = self._encode(before, stand_ins)
        return Target(prompt_ids, answer_ids, as_rendered)

    def _target_of_calls(self, turns: list[dict[str, Any]], stand_ins: dict[str, str]) -> Target:
        """`target` for an answer that calls tools, the last of the masked turns."""
        before, rendered = self._prompt_and_calls(turns)
        answer_ids = self._encode_pieces(rendered, stand_ins, continues=True)
        content = "".join(turns[-1]["content"].split())
        as_rendered = content in "".join(rendered.split())
        return Target(self._encode(before, stand_ins), answer_ids, as_rendered)

    def _prompt_and_calls(self, turns: list[dict[str, Any]]) -> tuple[str, str]:
        """The text before an answer that calls tools, the last of the masked turns, and its text.

        Where the template writes the context otherwise once it is answered, the text is that of the
        answer to a question alone.
        """
        prompt = self._text(turns[:-1], add_generation_prompt=True)
        whole = self._text(turns, add_generation_prompt=False)
        before = self._common(prompt, whole)
        if len(prompt) - len(before) <= len(self._header):
            return before, self._call_edges.answer_in(whole[len(before) :])
        question = {"role": "user", "content": QUESTION}  # else nothing in common after it
        if turns[:-1] == [question]:
            raise ValueError(
                f"the {self.name} chat template writes tool calls in another conversation than it "
                "prompts for: they cannot be trained on"
            )
        _, rendered = self._prompt_and_calls([question, turns[-1]])
        return prompt, rendered

    def end_id_of(self, answer: Message) -> int:
        """The token that closes an answer: `end_id`, or that of an answer that calls tools."""
        if not calls_of(answer) or not self._call_edges.closing:
            return self.end_id
        return self.tokenizer.special[self._call_edges.closing]

    def text_of_calls(self, messages: Messages, answer: Message) -> str:
        """What a model writes to give `answer`, which calls tools: the template's form as text."""
        return self.tokenizer.decode(self.target(messages, answer).answer).strip()

    @cached_property
    def _tool_probes(self) -> ToolProbes:
        return ToolProbes(self._text, self.name)

    @cached_property
    def _call_edges(self) -> CallEdges:
        """How the template writes an answer that calls tools; ValueError where it writes none."""
        special = self.tokenizer.special
        edges = self._tool_probes.call_edges(special, self._closing, self._after)
        if edges.closing:
            check_stops(edges.closing, special[edges.closing], self.end_ids, self.name)
        return edges

    def _rendered_answer(self, before: str, whole: str, answer: str) -> str | None:
        """The part of `whole` after `before` that the model is to write.

        None where the answer, spaces apart, is not wholly in it.
        """
        rest = whole[len(before) :]
        if self._closing:
            start = len(self._before) if rest.startswith(self._before) else 0
            end = rest.find(self._closing, start)
            if end < 0:
                return None
            rendered = rest[:end]
        else:
            rendered = rest.removesuffix(self._after)
        rendered = rendered.removesuffix(self._spaces)
        # The prompt may contain the beginning of the answer: a think block that it opens.
        end_of_prompt = before[len(before) - len(self._header) :]
        shown = end_of_prompt + rendered.removesuffix(self._tail)
        answer_without_spaces = "".join(answer.split())
        shown_without_spaces = "".join(shown.split())
        if answer_without_spaces and shown_without_spaces.endswith(answer_without_spaces):
            return rendered
        return None

    def prefix_ids(self, prefix: str) -> list[int]:
        """Ids of a forced beginning of the answer.

        Spaces at its end are left to the text that follows, whose first token carries them. The
        whole answer's ids are `prefix_ids(prefix)` and the ids sampled after them.
        """
        prefix = prefix.rstrip(" ")
        return self.response_ids(prefix) if prefix else []

    def response_ids(self, text: str, prefix: str = "") -> list[int]:
        """Ids of an answer that follows `prompt_ids(messages, prefix)`, no end token.

        The text that the template writes between the generation prompt and the answer (the space
        after [/INST]) is part of it. Where an answer's first token would merge with the prompt's
        last (an answer that begins with a line break), or the vocabulary cuts the prompt's last
        line breaks otherwise before a word, ids differ from the whole conversation encoded at once.
        """
        encoded = prefix.rstrip(" ")  # by prefix_ids
        lead = prefix[len(encoded) :] if encoded else self._lead
        masked = self._mask([{"role": "assistant", "content": text}])
        answer = lead + masked.turns[0]["content"]
        return self._encode_pieces(answer, masked.stand_ins, continues=True)

    def spells_special(self, messages: Messages) -> bool:
        """Whether a message spells a special token, so that `prompt_ids` encodes it piecewise."""
        pattern = self.tokenizer.special_pattern
        return any(pattern.search(text) for message in messages for text in texts_of(message))

    def _masked(self, messages: Messages, add_generation_prompt: bool) -> Masked:
        """The messages, checked, their spelled special tokens masked."""
        check_messages(messages)
        if self.name in FORMATS:
            check_turns(self.name, messages, add_generation_prompt)
        else:
            self._tool_probes.check(messages)
        return self._mask(messages)

    def _template_text(self, turns: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        """Masked messages rendered by the template, nothing added."""
        length = sum(len(text) for turn in turns for text in texts_of(turn))
        tools = tools_of(turns)
        template = self._template if tools is None else self._tool_template
        return template.render(
            length,
            messages=[without_tools(turn) for turn in turns],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )

    def _text(self, turns: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        """Masked messages as text, with the format's bos and the opening of an answer."""
        text = self._template_text(turns, add_generation_prompt)
        if not text.startswith(self._bos):
            text = self._bos + text
        if add_generation_prompt:
            text += self._opening
        return text

    def _find_edges_of_answers(self) -> None:
        """Find out how the template writes an answer, by rendering a made conversation.

        _opening  to append to a prompt: the header of a template that never prompts
        _header   the end of a prompt, after the question
        _lead     between prompt and answer, where the prompt is a part of the conversation
        _before   between the text that a prompt and a finished answer have in common and the answer
        _closing  the spelling of end_id, or "" where nothing closes a turn
        _tail     between answer and closing; _spaces: the same where it is only spaces, which are
                  not part of a target
        _after    after an answer that nothing closes
        """
        question = [{"role": "user", "content": QUESTION}]
        answered = [*question, {"role": "assistant", "content": ANSWER}]
        prompt = self._text(question, add_generation_prompt=True)
        unprompted = self._text(question, add_generation_prompt=False)
        whole = self._text(answered, add_generation_prompt=False)
        before, answer, self._after = whole.rpartition(ANSWER)
        if not answer:
            raise ValueError(f"the {self.name} chat template leaves out the assistant's text")
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        ignores_prompt = prompt == unprompted
        # Of a template that ignores add_generation_prompt, all but spaces belongs to the prompt.
        self._opening = lead.rstrip(" ") if ignores_prompt else ""
        prompt += self._opening
        self._lead = lead[len(self._opening) :]
        self._header = prompt.rpartition(QUESTION)[2]
        common = self._common(prompt, before)
        self._before = before[len(common) :]
        self.notice = notice_of_prompt(self.name, self._header, prompt, common, whole)
        self._find_closing()
        self._encode(whole, {})  # ValueError for a token beyond the embeddings
        self._encode(prompt, {})

    def _find_closing(self) -> None:
        """Find the token that closes an answer, and the text before it (see above)."""
        closing = self.tokenizer.special_pattern.search(self._after)
        if closing is None:
            self._closing = ""
            self._tail = ""
            self.end_id = self.tokenizer.eos_id
        else:
            self._closing = closing.group()
            self._tail = self._after[: closing.start()]
            self.end_id = self.tokenizer.special[self._closing]
        self._spaces = "" if self._tail.strip(" ") else self._tail
        if self.end_id is None:
            raise ValueError(
                f"the {self.name} chat template closes the assistant's turn by no special token "
                "and the tokenizer has no eos_token; name one in tokenizer_config.json"
            )

    def _common(self, prompt: str, text: str) -> str:
        """The prompt where the text begins with it, else their common beginning in whole tokens
        and words."""
        if text.startswith(prompt):
            return prompt
        parts_of_both = [self._part.findall(prompt), self._part.findall(text)]
        common = os.path.commonprefix(parts_of_both)  # it compares lists item by item too
        return "".join(common)

    def _mask(self, messages: Messages) -> Masked:
        """The messages with stand-ins for the control tokens that they spell."""
        return mask(messages, self.tokenizer.special_pattern, self.sources.all_text)

    def _encode(self, text: str, stand_ins: dict[str, str]) -> list[int]:
        """Ids of a rendered conversation; `stand_ins` come from `_masked`."""
        if not self._bos:
            return self._encode_pieces(text, stand_ins)
        ids: list[int] = []
        # Every bos in the text is the format's own: those of messages are masked. The first one
        # opens the text, so nothing stands before it.
        for part in text.split(self._bos)[1:]:
            ids.append(self.tokenizer.bos_id)
            ids += self._encode_pieces(part, stand_ins)
        return ids

    def _encode_pieces(
        self, text: str, stand_ins: dict[str, str], continues: bool = False
    ) -> list[int]:
        """Ids of rendered text, stand-ins encoded as the text they spell.

        `continues`: the text follows other text.
        """
        parts = [text]
        if stand_ins:
            any_stand_in = "".join(stand_ins)
            parts = re.split(f"([{any_stand_in}])", text)  # the group keeps the stand-ins
        ids: list[int] = []
        for part in parts:
            if not part:
                continue
            if part in stand_ins:
                ids += self.tokenizer.encode(stand_ins[part], continues=continues)
            else:
                ids += self.tokenizer.encode_template(part, continues=continues)
            continues = True
        self.check_ids(ids)
        return ids
