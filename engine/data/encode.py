"""Data: rows become token ids, ids become micro-batches.

    rows = load_rows("train.jsonl")                     # or load_distilled("distilled.jsonl")
    examples, counts = encode(rows, chat, max_length=1024)
    for batch in pack(examples[:8], micro_tokens=4096): ...

How a file becomes rows stands in rows.py; its names are offered here too. Nothing is cut or left
out in silence: a turn that does not fit is named, or cut or left out and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.data.rows import Row, listing
from kernels.philox import mix as hashed

if TYPE_CHECKING:
    from model.chat import Chat
from engine.data.distilled import CONTEXT, KEPT, TARGETS, Distilled

MAX_LENGTH = 1024  # tokens of an example, where nothing else is said


# ---- encoding


@dataclass(frozen=True)
class Example:
    """Token ids of one assistant turn: the prompt's, then ids[n_prompt:], which carry the loss."""

    id: str
    ids: list[int]
    n_prompt: int


@dataclass
class EncodeCounts:
    """What `encode` made and did; every number in it belongs in front of the user."""

    examples: int = 0
    tokens: int = 0
    response_tokens: int = 0  # those that carry loss, end tokens included
    from_response: int = 0  # examples made of sampled ids; the others are encoded references
    truncated: int = 0  # cut from the answer's end to fit max_length, so without end token
    cut: int = 0  # prompt and answer cut in proportion, as --paper-exact has it
    dropped: int = 0  # left out: too long for max_length (--drop-long)
    refused: int = 0  # left out: the chat template refuses the conversation (--skip-bad)
    context: int = 0  # not trained on, as their messages say (weight 0): context of later turns
    unfinished: int = 0  # sampled up to the token limit: trained without an end token
    glued: int = 0  # the same, kept under --paper-exact: trained with an end token
    mixed: int = 0  # kept rewrites whose reference was taken, as --mix asks
    unrendered: int = 0  # the chat template leaves part of the answer out: trained on the whole
    special: int = 0  # their text spells a special token, encoded as plain text


@dataclass(frozen=True)
class _Turn:
    id: str
    messages: Sequence[dict[str, str]]
    text: str
    ids: list[int] | None = None  # sampled; None: encode the text
    ends: bool = True
    glued: bool = False  # it ends where the sampler's limit cut it, and is trained to end there
    mixed: bool = False  # a rewrite that gave way to its reference


def encode(
    rows: Sequence[Row] | Sequence[Distilled],
    chat: Chat,
    *,
    target: str = "target",
    max_length: int,
    model_limit: int | None = None,
    truncate: bool = False,
    drop_long: bool = False,
    in_proportion: bool = False,
    skip_refused: bool = False,
    mix: float = 0.0,
    seed: int = 0,
) -> tuple[list[Example], EncodeCounts]:
    """One example per assistant turn: prompt ids, answer ids, the chat's end token.

    target         the answer. Of distilled lines: "target" (the sampled ids where the rewrite was
                   kept, never a re-encoding; else the reference), "response" (always the sampled
                   ids) or "reference" (then earlier answers in the context are references too: the
                   control never sees a rewrite). Rows only have their reference
    max_length     tokens of a whole example. Longer ones raise ValueError naming them, or with
                   `truncate` lose the end of their answer. A prompt is not cut: one that leaves no
                   room for an answer raises in any case
    model_limit    what the model was made for: where it binds, no message asks for --max-length
    drop_long      turns that would raise for their length are left out, of distilled data also
                   those that would as another target: all targets train on the same turns. Other
                   turns of a conversation stay
    in_proportion  longer turns lose the ends of prompt and answer instead, as in the published code
                   (`cut_in_proportion`); what nothing is left of is left out
    skip_refused   turns that the chat template refuses are left out instead of raising ValueError
    mix            share of the kept rewrites of "target" that give way to their reference, drawn by
                   row id and `seed`; the contexts stay as they are

    A response that hit the sampler's token limit gets no end token: a model must not learn to stop
    there. (Selection keeps none such, but under --paper-exact, which wants them with an end token,
    as published: counted.) An answer without a token raises ValueError. Everything that is cut or
    left out is counted.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}; wanted one of {', '.join(TARGETS)}")
    if not 0 <= mix <= 1 or (mix and (target != "target" or isinstance(rows[0], Row))):
        raise ValueError(
            f"mix={mix} with target={target!r}: a share from 0 to 1 of the rewrites in distilled "
            "data is wanted, with target='target'"
        )
    fit = _Fit(chat, max_length, truncate, in_proportion)
    drops = drop_long or in_proportion
    left_out = _too_long_for_an_arm(rows, fit, seed) if drops else frozenset()
    counts = EncodeCounts()
    counts.context = sum(
        len(row.context_only) if isinstance(row, Row) else row.status == CONTEXT for row in rows
    )
    examples, refused, empty, no_room, too_long = [], [], [], [], []
    for turn in _turns(rows, target, mix, seed):
        try:
            prompt, answer, as_rendered = fit.encoded(turn)
        except ValueError as error:  # the chat template refuses this conversation
            refused.append(f"{turn.id}: {error}")
            continue
        where = f"{turn.id} ({turn.messages[-1]['content'][:40]!r})"  # an id alone is a mere hash
        if not answer:
            empty.append(f"{where}: no token to train on")
            continue
        fitted = fit(turn, prompt, answer)
        if turn.id in left_out or (fitted is None and drops):
            counts.dropped += 1
            continue
        if fitted is None:
            if len(prompt) >= max_length:
                no_room.append(f"{where}: {len(prompt)} prompt tokens leave no room")
            else:
                too_long.append(f"{where}: {len(prompt)} + {len(answer)} tokens")
            continue
        ids, n_prompt = fitted
        if len(ids) < len(prompt) + len(answer):
            counts.cut += in_proportion
            counts.truncated += not in_proportion
        examples.append(Example(turn.id, ids, n_prompt))
        counts.examples += 1
        counts.tokens += len(ids)
        counts.response_tokens += len(ids) - n_prompt
        counts.from_response += turn.ids is not None
        counts.unfinished += not turn.ends
        counts.glued += turn.glued
        counts.mixed += turn.mixed
        counts.unrendered += not as_rendered
        said = {"role": "assistant", "content": turn.text}
        counts.special += chat.spells_special([*turn.messages, said])
    counts.refused = len(refused)
    if refused and not skip_refused:
        what = f"{len(refused)} turns are refused by the chat template"
        raise ValueError(listing(what, refused, "change them, or leave them out with --skip-bad"))
    if empty:
        what = f"{len(empty)} turns have no answer to train on"
        raise ValueError(listing(what, empty, "remove them"))
    if no_room:
        what = f"{len(no_room)} turns cannot be trained on with max_length={max_length}"
        ways = _what_helps("leave them out with --drop-long", max_length, model_limit)
        raise ValueError(listing(what, no_room, ways))
    if too_long:
        what = f"{len(too_long)} turns are longer than max_length={max_length}"
        otherwise = "--truncate answers, or leave them out with --drop-long"
        ways = _what_helps(otherwise, max_length, model_limit)
        raise ValueError(listing(what, too_long, ways))
    return examples, counts


def _what_helps(otherwise: str, max_length: int, model_limit: int | None) -> str:
    """What to do about turns that are too long: a larger limit only where the model takes one."""
    if model_limit is None or max_length < model_limit:
        return f"raise --max-length, or {otherwise}"
    return f"the model itself was made for {model_limit} tokens: {otherwise}"


def _encoded(turn: _Turn, chat: Chat) -> tuple[list[int], list[int], bool]:
    """Ids of the prompt and of the answer, no end token; whether the template writes it so.

    A text is what the template makes of it; sampled ids stand behind the prompt they came from.
    ValueError where the template refuses the conversation, or an id has no embedding.
    """
    if turn.ids is None:
        target = chat.target(turn.messages, turn.text)
        return target.prompt, target.answer, target.as_rendered
    chat.check_ids(turn.ids)
    return chat.prompt_ids(turn.messages), list(turn.ids), True


class _Fit:
    """What of a turn's tokens is trained on; None where it is too long."""

    def __init__(self, chat: Chat, max_length: int, truncate: bool, in_proportion: bool) -> None:
        self.chat, self.max_length = chat, max_length
        self.truncate, self.in_proportion = truncate, in_proportion

    def encoded(self, turn: _Turn) -> tuple[list[int], list[int], bool]:
        """Ids of the prompt, and of the answer with its end token; whether the template writes it
        so (`_encoded`)."""
        prompt, answer, as_rendered = _encoded(turn, self.chat)
        if answer and turn.ends:
            answer.append(self.chat.end_id)
        return prompt, answer, as_rendered

    def __call__(
        self, turn: _Turn, prompt: list[int], answer: list[int]
    ) -> tuple[list[int], int] | None:
        """Ids, and how many of them are the prompt's."""
        if self.in_proportion:
            parts = [*self._turns_of(turn.messages, prompt), (prompt, answer)]
            done = sum(len(source) + len(target) for source, target in parts[:-1])
            parts[-1] = prompt[done:], answer
            return cut_in_proportion(parts, self.max_length)
        room = self.max_length - len(prompt)
        if room < 1 or (len(answer) > room and not self.truncate):
            return None
        return prompt + answer[:room], len(prompt)

    def _turns_of(
        self, messages: Sequence[dict[str, str]], prompt: list[int]
    ) -> list[tuple[list[int], list[int]]]:
        """The earlier turns in a prompt: what is said before each answer, and the answer with its
        end token, as parts of the prompt's ids. (By their lengths: a token that the next turn's
        text merges with can be off by one.)"""
        parts, done = [], 0
        for at, said in enumerate(messages):
            if said["role"] == "assistant":
                start = len(self.chat.prompt_ids(messages[:at]))
                end = start + len(self.chat.response_ids(said["content"])) + 1
                parts.append((prompt[done:start], prompt[start:end]))
                done = end
        return parts


def cut_in_proportion(
    turns: Sequence[tuple[list[int], list[int]]], limit: int
) -> tuple[list[int], int] | None:
    """A conversation within `limit` tokens as the published code cuts it (LLaMA-Factory of 2023).

    turns: the ids before each answer, and those of the answer with its end token. Every turn keeps
    of `limit` tokens the share that its prompt and its answer have in it, the answer at least one
    token; the whole then loses its end. Returns the ids and how many precede the last answer; None
    where nothing of that is left.
    """
    ids: list[int] = []
    before = 0
    for source, target in turns:
        # the order of these operations is theirs: at exactly `limit` tokens rounding can cut one
        of_target = max(int(limit * (len(target) / (len(source) + len(target)))), 1)
        ids += source[: limit - of_target]
        before = len(ids)
        ids += target[:of_target]
    ids = ids[:limit]
    return (ids, before) if before < len(ids) else None


def _too_long_for_an_arm(
    rows: Sequence[Row] | Sequence[Distilled], fit: _Fit, seed: int
) -> frozenset[str]:
    """Turns of distilled data that are too long as a reference or as a rewrite, mixed or not: they
    are left out of every arm, so that all train on the same turns."""
    if not rows or isinstance(rows[0], Row):
        return frozenset()
    found = set()
    for target, mix in (("reference", 0.0), ("target", 0.0), ("target", 1.0)):
        for turn in _turns(rows, target, mix, seed):
            try:
                prompt, answer, _ = fit.encoded(turn)
            except ValueError:  # refused by the template, which is told elsewhere
                continue
            if answer and fit(turn, prompt, answer) is None:
                found.add(turn.id)
    return frozenset(found)


def _turns(
    rows: Sequence[Row] | Sequence[Distilled], target: str, mix: float, seed: int
) -> Iterator[_Turn]:
    references = {row.id: row.reference for row in rows}
    for row in rows:
        if isinstance(row, Row):
            if target == "response":
                raise ValueError(
                    f"row {row.id} has no response, only its reference: target='response' needs "
                    "distilled data (scripts/distill.py makes it)"
                )
            for k, at in enumerate(row.turns):
                if k not in row.context_only:
                    yield _Turn(f"{row.id}/{k}", row.messages[:at], row.messages[at]["content"])
        elif row.status == CONTEXT:
            continue
        elif target == "target" and row.status in KEPT and _drawn(row.id, seed) < mix:
            yield _Turn(row.id, row.messages, row.reference, mixed=True)
        elif target == "response" or (target == "target" and row.status in KEPT):
            cut = row.finish == "length" and row.status != "identical"
            glued = cut and row.status in KEPT
            ends = glued or not cut
            yield _Turn(row.id, row.messages, row.response, row.response_ids, ends, glued)
        elif target == "target":
            yield _Turn(row.id, row.messages, row.reference)
        else:
            yield _Turn(row.id, _as_given(row, references), row.reference)


def _drawn(row_id: str, seed: int) -> float:
    """A number in [0, 1) that belongs to the row."""
    return hashed("mix", seed, row_id) / 2**64


def _as_given(line: Distilled, references: dict[str, str]) -> list[dict[str, str]]:
    """The line's context as the data file had it: earlier answers are references again."""
    row = line.id.rpartition("/")[0]
    messages, turn = [], 0
    for said in line.messages:
        if said["role"] == "assistant":
            if f"{row}/{turn}" not in references:
                raise ValueError(f"{line.id}: the line of its earlier turn {row}/{turn} is absent")
            said = {"role": "assistant", "content": references[f"{row}/{turn}"]}
            turn += 1
        messages.append(said)
    return messages


def prompts_of(row: Row) -> list[tuple[dict[str, str], ...]]:
    """The conversations that a model is asked to go on with: before every answer that is trained
    on, or the whole of a row without one."""
    if row.messages[-1]["role"] != "assistant":
        return [row.messages]
    return [row.messages[:at] for k, at in enumerate(row.turns) if k not in row.context_only]


def template_takes(chat: Chat) -> Callable[[Row], None]:
    """A check for `load_rows`: ValueError for a row that the chat template refuses."""

    def check(row: Row) -> None:
        for messages in prompts_of(row):
            chat.render(messages, add_generation_prompt=True)

    return check


def check_examples(examples: Sequence[Example]) -> None:
    """ValueError naming rows that cannot be trained on."""
    if not examples:
        raise ValueError("there is nothing to train on: no example (all turns were left out)")
    empty = [e.id for e in examples if not 0 < e.n_prompt < len(e.ids)]
    if empty:
        raise ValueError(f"{len(empty)} rows have no prompt or no response token: {empty[:10]}")


def fingerprint(examples: Sequence[Example]) -> str:
    """Hash of what is trained on: ids, tokens, where the loss begins."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.ids, example.n_prompt]).encode())
    return digest.hexdigest()
